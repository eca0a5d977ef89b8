"""activation_format="fp16" on a GPU, of MXFP4 and NVFP4 weights: bit for bit, under every tile.

Where a wheel has no kernels of it, each test says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace

import gpu_problems
import pytest
import torch
from gpu_cases import HALVES, ops, require_pair
from gpu_layers import _activation, same
from moe_cases import FP16, ids_of, layer_of, rows_of, same_halves, special_rows
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, pair_problems, reference
from mxfp4_moe._call.activation_format import tiles_of
from mxfp4_moe.activations import Activation
from mxfp4_moe.arithmetic import SM90_FP16
from mxfp4_moe.formats import WeightFormat
from mxfp4_moe.pair_problems import PairProblem
from mxfp4_moe.problems import bits, random_call, random_weights, relative_error
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

PAIRS = ("mxfp4_fp16", "nvfp4_fp16")
DTYPES = (torch.float32, *HALVES)
TOLERANCE = 1e-3  # torch's exp has other last bits, which round to the next float16 now and then
HIDDEN, INTER, EXPERTS = 160, 96, 16


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> str:
    require_pair(request.param)
    return str(request.param)


def kind_of(pair: str) -> WeightFormat:
    return WeightFormat(pair.split("_")[0])


def tiles_here(pair: str) -> tuple[Tile, ...]:
    tiles = tuple(tiles_of("fp16", gpu_problems.gpu().index, kind_of(pair)))
    assert tiles
    return tiles


# ---- GEMMs -----------------------------------------------------------------------------------------------------------


def check_all(problem: PairProblem, pair: str) -> None:
    """SM12x's rule and SM90's are one."""
    for tile in tiles_here(pair):
        for dtype in DTYPES:
            assert not problem.check(tile, dtype), f"{tile.name}, {dtype}"


@pytest.mark.parametrize(("k", "n"), [(32, 16), (96, 80), (640, 272), (2880, 144)])
def test_every_tile_has_the_published_rules_bits(k: int, n: int, pair: str) -> None:
    """Weights that are exact, rounded and zero in float16 among each other, and zeros under larger scales."""
    check_all(pair_problems.random_problem(pair, k, n, gpu_problems.gpu(), SM90_FP16), pair)


@pytest.mark.parametrize(("what", "k", "n"), [("one-hot", 160, 144), ("sparse", 2880, 512), ("integers", 2880, 272)])
def test_every_tile_on_sums_that_are_exact(what: str, k: int, n: int, pair: str) -> None:
    check_all(pair_problems.exact_problem(pair, what, k, n, gpu_problems.gpu()), pair)


KINDS = ("finite", "denormal", "huge", "any")


@functools.lru_cache(maxsize=1)
def of_any_bits(pair: str, kind: str) -> PairProblem:
    """float16 rows of every bit pattern, or by the ends of the range."""
    device = gpu_problems.gpu()
    problem = pair_problems.random_problem(pair, 416, 272, device, SM90_FP16)
    g = torch.Generator(device).manual_seed(len(kind))
    words = torch.randint(0, 1 << 16, problem.rows.shape, generator=g, device=device, dtype=torch.int32)
    sign, magnitude = words & 0x8000, words & 0x7FFF
    finite = magnitude % 0x7C00
    seldom = torch.arange(problem.rows.shape[1], device=device) % 31 == 0  # so that most sums are numbers
    magnitude = torch.where(seldom & (kind == "any"), magnitude, finite)
    if kind == "denormal":
        magnitude %= 0x600
    elif kind == "huge":
        magnitude = 0x7BFF - magnitude % 0x600
    rows = (sign | magnitude).to(torch.int16).view(torch.float16)
    changed = replace(problem, rows=rows)
    return replace(changed, expected=changed.sums(SM90_FP16))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_bits(kind: str, pair: str) -> None:
    problem = of_any_bits(pair, kind)
    valid = slice(problem.valid)
    assert problem.expected[valid].isnan().any() == (kind == "any")
    for tile in tiles_here(pair):
        for dtype in DTYPES:
            out = problem.run(tile, dtype)
            assert not problem.stray(out), f"{tile.name}, {dtype}"
            assert same(out[valid], problem.expected[valid].to(dtype)), f"{tile.name}, {dtype}"


def test_the_whole_range_of_scales() -> None:
    """B at both ends of E8M0, whose factors are the smallest and the largest that there are."""
    device = gpu_problems.gpu()
    require_pair("mxfp4_fp16")
    base = pair_problems.random_problem("mxfp4_fp16", 160, 80, device, SM90_FP16)
    small = (base.rows.float() * 2.0**-14).half()  # so that sums times 2^126 are numbers
    below = (142 - base.scales.int()).clamp(min=0)  # of weights that are not zero 142 is the largest
    for largest in (2, 10, 127, 254):
        scales = (largest - below).clamp(min=0).to(torch.uint8)
        held = [formats.largest_scale(packed, of) for packed, of in zip(base.packed, scales, strict=True)]
        factors = formats.fp16_factor(torch.stack(held)).unsqueeze(1).expand(-1, 2).contiguous()
        problem = replace(base, rows=small if largest == 254 else base.rows, scales=scales, of_weights=factors)
        problem = replace(problem, expected=problem.sums(SM90_FP16))
        assert problem.expected.any()
        assert problem.expected.isfinite().any()
        check_all(problem, "mxfp4_fp16")


# ---- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [32, 96, 160, 2880])
def test_quantize_permute_to_fp16_is_exact(width: int, dtype: torch.dtype) -> None:
    device = gpu_problems.gpu()
    for tokens, top_k in ((9, 5), (9, 1), (700, 3)):
        x = special_rows(width, dtype).repeat(-(-tokens // 9), 1)[:tokens].contiguous()
        ids = ids_of(tokens, top_k, 6, torch.int32, device)
        offsets, row_slot, slot_row = reference.route(ids, 6)
        valid = int(offsets[-1])
        rows, scales = ops().quantize_permute(x.to(device), slot_row, top_k, FP16)
        expected, _ = rows_of(x, FP16)
        assert scales.numel() == 0
        assert same_halves(rows[:valid].cpu(), expected[row_slot[:valid].cpu() // top_k])


@pytest.mark.parametrize("rounding", [None, *HALVES], ids=str)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_activation_to_fp16_is_its_values(activation: str, rounding: torch.dtype | None) -> None:
    """Where no exp stands, the values rounded; beyond float16's range infinite."""
    device, rows, inter = gpu_problems.gpu(), 70, 160
    weights = layer_of(5, inter, activation, "one for all", bias=True, device=device)
    g = torch.Generator(device).manual_seed(2)
    gemm1 = torch.randn(rows, weights.w13_rows, generator=g, device=device) * 4
    gemm1[3] *= 2.0**-20
    gemm1[6] *= 2.0**16
    gemm1[4, 8], gemm1[5, 0] = torch.nan, torch.inf
    row_expert = torch.arange(rows, device=device, dtype=torch.int32) % 5
    out, scales = _activation(gemm1, row_expert, weights, rounding, FP16)
    assert out.dtype is torch.float16
    assert scales.numel() == 0
    numbers = (weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, weights.w13_bias, activation, *numbers, rounding=rounding)
    if activation in ("relu", "relu2", "identity"):
        assert same_halves(out, values.half())
        assert out.isinf().any()
    else:
        expected = values.half().float()
        finite = expected.isfinite()
        torch.testing.assert_close(out.float()[finite], expected[finite], rtol=2.0**-9, atol=2.0**-23)
        assert torch.equal(out.isnan(), expected.isnan())


# ---- layers ----------------------------------------------------------------------------------------------------------


def layers(pair: str) -> Iterator[MoEWeights]:
    device = gpu_problems.gpu()
    if kind_of(pair) is WeightFormat.NVFP4:
        yield pair_problems.random_nvfp4_weights(EXPERTS, HIDDEN, INTER, device, inputs=False)
    else:
        yield random_weights(EXPERTS, HIDDEN, INTER, device)
        yield random_weights(EXPERTS, HIDDEN, INTER, device, bias=True, activation="relu2", limit=None)


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_layers(pair: str, tokens: int) -> None:
    """Close to the reference, the same bits from every tile, of a token alone, and of a graph."""
    for given in layers(pair):
        call = random_call(tokens, 4, given, dtype=torch.float16)
        expected = reference.fused_moe(*call.args(), given, activation_format="fp16", arithmetic=SM90_FP16)
        weights = given.to(gpu_problems.gpu(), activation_format="fp16")
        outs: list[Tensor] = []
        for tile in tiles_here(pair):
            outs.append(mxfp4_moe.fused_moe(*call.args(), weights, activation_format="fp16", tile_mn=tile.mn))
            assert relative_error(outs[-1], expected) <= TOLERANCE, tile.name
            assert torch.equal(bits(outs[-1]), bits(outs[0])), tile.name
        one = call.token(tokens // 2)
        alone = mxfp4_moe.fused_moe(*one.args(), weights, activation_format="fp16")
        assert torch.equal(bits(alone[0]), bits(outs[0][tokens // 2]))
        graph, static = torch.cuda.CUDAGraph(), torch.empty_like(outs[0])
        with torch.cuda.graph(graph):
            mxfp4_moe.fused_moe(*call.args(), weights, activation_format="fp16", output=static)
        static.fill_(float("nan"))
        graph.replay()
        assert torch.equal(bits(static), bits(outs[0])), "captured"


def test_a_warning_counts_what_is_rounded() -> None:
    device = gpu_problems.gpu()
    require_pair("mxfp4_fp16")
    stored = random_weights(4, 64, 64, device).to_mxfp4()._asdict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEWeights.from_mxfp4(**stored).to(device, activation_format="fp16")
    stored["w2_scale"] = stored["w2_scale"].clone()
    stored["w2_scale"][1, 0, 0] = int(stored["w2_scale"].amax()) - 27
    with pytest.warns(RuntimeWarning, match="of .* weights of .* are rounded"):
        MoEWeights.from_mxfp4(**stored).to(device, activation_format="fp16")
