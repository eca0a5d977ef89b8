"""SM90's second kernel of tile (8, 64), which multiplies several K tiles at once, bit for bit.

SM12x's kernels have none, emulated or not, and asking for it is refused.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import gpu_problems
import pytest
import torch
from gpu_layers import exact_layer, poison_memory, same
from gpu_problems import Call, GemmProblem, bits, random_call, random_weights
from torch import Tensor
from torch.autograd import DeviceType

import mxfp4_moe
from mxfp4_moe._install import wheel
from mxfp4_moe.tiles import Kernel, Tile, kernels_of
from mxfp4_moe.weights import MoEWeights

TILE = Tile.from_mn((8, 64))
KS = (32, 96, 128, 160, 672, 2880, 5152)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# m-tiles of every number of rows; of lone rows, for which two warps add alone, several in sequence.
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 17, 1)


@functools.cache
def has_parallel_k() -> bool:
    arch = wheel.arch_for(torch.cuda.get_device_capability(gpu_problems.gpu()))
    assert arch is not None
    return Kernel.PARALLEL_K in kernels_of(TILE, arch)


@functools.lru_cache(maxsize=1)
def problem(k: int, n: int, rows: Sequence[int] = ROWS, wide_scales: bool = False) -> GemmProblem:
    return gpu_problems.random_problem(k, n, gpu_problems.gpu(), rows_per_expert=rows, wide_scales=wide_scales)


def parallel_k(given: GemmProblem, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the parallel-K kernel; where there is none, that this is refused, and then the plain one's."""
    if has_parallel_k():
        return given.run(TILE, dtype, Kernel.PARALLEL_K)
    with pytest.raises(RuntimeError, match=r"kernel: tile \(8, 64\) has no split-K kernel for this GPU"):
        given.run(TILE, dtype, Kernel.PARALLEL_K)
    return given.run(TILE, dtype, Kernel.PLAIN)


@pytest.mark.parametrize("n", [16, 80, 2880], ids=lambda n: f"n{n}")  # 2880: more output tiles than blocks
@pytest.mark.parametrize("k", KS, ids=lambda k: f"k{k}")
def test_parallel_k_equals_plain_and_oracle_bitwise(k: int, n: int) -> None:
    given = problem(k, n)
    for dtype in DTYPES:
        out = parallel_k(given, dtype)
        mismatch = given.mismatch(out)
        assert not mismatch, f"K={k}, N={n}, {dtype}: {mismatch}"
        assert torch.equal(bits(out), bits(given.run(TILE, dtype, Kernel.PLAIN)))


@pytest.mark.parametrize("rows", range(9))
def test_each_number_of_rows(rows: int) -> None:
    given = problem(672, 144, (rows, 0, rows))
    mismatch = given.mismatch(parallel_k(given))
    assert not mismatch, f"{rows} rows: {mismatch}"


@pytest.mark.parametrize("k", [160, 2880])
def test_scales_over_the_whole_exponent_range(k: int) -> None:
    given = problem(k, 144, wide_scales=True)
    mismatch = given.mismatch(parallel_k(given))
    assert not mismatch, f"K={k}: {mismatch}"


def test_every_weight_lands_in_its_place() -> None:
    one_hot = gpu_problems.layout_problem(gpu_problems.gpu())
    for dtype in DTYPES:
        mismatch = one_hot.mismatch(parallel_k(one_hot, dtype))
        assert not mismatch, f"{dtype}: {mismatch}"


@pytest.mark.parametrize("rows", [(1, 1, 1), (3, 8, 1)], ids=["lone", "several"])
def test_nan_and_infinity_pass_through_and_stay_in_their_rows(rows: tuple[int, ...]) -> None:
    given = problem(672, 144, rows)
    codes, row_scales, scales = given.codes.clone(), given.row_scales.clone(), given.scales.clone()
    codes[0, 133] = 0x7F
    row_scales[1] = 248  # with the largest weight scales: sums beyond fp32
    scales[:, 7] = 253
    wild = replace(given, codes=codes, row_scales=row_scales, scales=scales)  # what it must give is not asked
    plain = wild.run(TILE, kernel=Kernel.PLAIN)
    assert plain[0].isnan().all()
    assert not plain[1, 7].isfinite()
    assert plain[2].isfinite().sum() >= 140
    assert same(parallel_k(wild), plain)


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(seed: int) -> None:
    draw = random.Random(seed)
    k, n, experts = 32 * draw.randint(1, 130), 16 * draw.randint(1, 200), draw.randint(1, 40)
    rows = tuple(draw.choice((0, 1, 1, draw.randint(0, 8), draw.randint(0, 40))) for _ in range(experts))
    given = problem(k, n, rows)
    mismatch = given.mismatch(parallel_k(given))
    assert not mismatch, f"seed {seed}, K={k}, N={n}, rows {rows}: {mismatch}"


@pytest.mark.parametrize("k", [32, 160, 2880])
def test_same_bits_in_calls_that_follow_each_other_closely(k: int) -> None:
    given = problem(k, 2880)
    expected = given.run(TILE, kernel=Kernel.PLAIN)
    outs = [parallel_k(given) for _ in range(60)]
    wrong = [i for i, out in enumerate(outs) if not torch.equal(bits(out), bits(expected))]
    assert not wrong, f"calls {wrong}"


def test_without_rows_nothing_is_written() -> None:
    assert parallel_k(problem(96, 80, (0, 0, 0))).isnan().all()


def test_what_is_not_there_is_refused() -> None:
    given = problem(96, 80)
    with pytest.raises(RuntimeError, match=r"kernel: tile \(8, 128\) has no split-K kernel for this GPU"):
        given.run(Tile.from_mn((8, 128)), kernel=Kernel.PARALLEL_K)
    with pytest.raises(
        RuntimeError, match=r"kernel: expected 0 \(by size\), 1 \(plain\), 2 \(split K\) or 3 \(folded\), got 4"
    ):
        given.run(TILE, kernel=4)  # type: ignore[arg-type]


# ---- through the layer, which leaves the choice to the launcher ------------------------------------------------------


@functools.cache
def layer(activation: str, bias: bool) -> MoEWeights:
    limit = {"swiglu": {}, "swiglu_oai": {"alpha": 1.702, "beta": 1.0, "limit": 7.0}}[activation]
    return random_weights(8, 672, 416, gpu_problems.gpu(), bias=bias, activation=activation, **limit)


def kernels_run(call: Call, weights: MoEWeights) -> list[str]:
    """Which kernels the layer's GEMMs were: 'folded', 'parallel K' or 'plain'."""
    mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=TILE.mn)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=TILE.mn)
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    names = [event.name for event in sorted(on_gpu, key=lambda event: event.time_range.start)]
    kinds = {"grouped_gemm_mma_sync": "folded", "grouped_gemm_parallel_k": "parallel K", "grouped_gemm": "plain"}
    return [next(kind for part, kind in kinds.items() if part in name) for name in names if "grouped_gemm" in name]


@pytest.mark.parametrize("rounds", [False, True], ids=["fp32", "rounds"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_layer_with_fused_activation(tokens: int, activation: str, bias: bool, rounds: bool) -> None:
    weights = layer(activation, bias)
    for seed in range(4):
        call = random_call(tokens, 4, weights, seed=seed)
        poison_memory(weights.device, 0xFF)
        out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=TILE.mn, intermediate_rounding=rounds)
        assert same(out, exact_layer(call, weights, intermediate_rounding=rounds))
        other = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=(8, 128), intermediate_rounding=rounds)
        assert torch.equal(bits(out), bits(other))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_layer_of_gpt_oss_whichever_kernel_the_rule_takes(tokens: int) -> None:
    weights = gpt_oss()
    for seed in range(3):
        call = random_call(tokens, 4, weights, seed=seed)
        out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=TILE.mn)
        other = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=(8, 128))
        assert torch.equal(bits(out), bits(other))


def test_calls_of_the_layer_that_follow_each_other_closely() -> None:
    weights = gpt_oss()
    calls = [random_call(tokens, 4, weights, seed=seed) for seed in range(8) for tokens in (1, 2)]
    expected = [mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=(8, 128)) for call in calls]
    torch.cuda.synchronize()
    outs = [mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=TILE.mn) for _ in range(20) for call in calls]
    wrong = [i for i, out in enumerate(outs) if not torch.equal(bits(out), bits(expected[i % len(calls)]))]
    assert not wrong, f"calls {wrong}"


def test_the_rule_takes_the_parallel_k_kernel_where_tiles_are_few() -> None:
    one, many = (random_call(tokens, 4, gpt_oss()) for tokens in (1, 64))
    assert kernels_run(one, gpt_oss()) == (["folded", "parallel K"] if has_parallel_k() else ["plain", "plain"])
    assert kernels_run(many, gpt_oss()) == ["folded" if has_parallel_k() else "plain", "plain"]


@functools.cache
def gpt_oss() -> MoEWeights:
    return random_weights(128, 2880, 2880, gpu_problems.gpu())
