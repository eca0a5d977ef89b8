"""The kernels of fp16 activations, of MXFP4 and of NVFP4 weights, as the PTX that nvcc makes of them, on the CPU.

As test_ptx_bf16.py: bit by bit against the reference, in poisoned outputs, with launches by the launcher; those of
SM12x and, compiled for sm_90a, those of SM90, whose rule for fp16 is the same. MXFP4 weights are relative to their
expert's largest scale, far beyond what fp16 holds exactly, with zeros under larger scales among them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import ptx_moe_checks
import pytest
import torch
from moe_cases import FP16
from ptx import abi, fp16_problems, launch
from ptx.faults import Fault
from ptx.fp4_problems import Fp4Problem
from ptx.fp16_problems import any_problem, problem_of, usual_problem
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.mutants import once
from ptx.tile_cases import COLUMNS, DTYPES, EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import arithmetic, formats
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT
from mxfp4_moe.tiles import MXFP4_FP16, NVFP4_FP16, Tile, load_manifest, prove

MANIFEST = load_manifest()
PAIRS = (MXFP4_FP16, NVFP4_FP16)
ARCHS = ("120f", "90a")
KERNELS = [
    (tile, pair, arch)
    for arch in ARCHS
    for pair in PAIRS
    for tile in MANIFEST.tiles
    if pair in MANIFEST.pairs_of("full", tile)
]
# Each way that a kernel is made: weights as B and as A; few rows and whole operands ahead, many and a few at a time;
# the warp's MMA and wgmma.
USUAL = [
    *("m64n8 mxfp4 120f", "m8n64_swap mxfp4 120f", "m64n128 mxfp4 120f", "m8n64_swap nvfp4 120f", "m64n64 nvfp4 120f"),
    *("m32n64_swap mxfp4 90a", "m8n64_swap mxfp4 90a", "m32n64_swap nvfp4 90a"),
]
SMALL = MANIFEST.tile("m8n64_swap")


def named(tile: Tile, pair: str, arch: str) -> str:
    return f"{tile.name} {pair.removesuffix('_fp16')} {arch}"


def check(problem: Fp4Problem, tile: Tile, dtype: torch.dtype, *, arch: str = "120f", ready: bool, seed: int) -> None:
    out = Gemm(problem, tile, Machine(seed=seed), arch).run(dtype, m_tiles_are_ready=ready)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{tile.name}, {problem.pair}, {arch}, seed {seed}: {mismatch}"


def test_both_archs_have_one_rule() -> None:
    """So that one expectation serves both."""
    ours, theirs = (arithmetic.of_arch(arch, MXFP4_FP16) for arch in ARCHS)
    assert (ours.words(), ours.operands) == (theirs.words(), theirs.operands)
    assert ours.operands == "fp16"


@pytest.mark.parametrize(
    ("tile", "pair", "arch"),
    [
        pytest.param(*kernel, id=name, marks=() if name in USUAL else pytest.mark.ptx_full)
        for kernel in KERNELS
        for name in [named(*kernel)]
    ],
)
def test_tile_equals_the_reference_bitwise(tile: Tile, pair: str, arch: str) -> None:
    """More K tiles than stages, the last of one to four blocks of 32; a tail along N where the tile can have one."""
    place = KERNELS.index((tile, pair, arch))
    dtype, steps = DTYPES[place % 3], 1 + place % 4
    k = prove(tile, arch, pair).stages * 128 + steps * 32
    problem = any_problem(k, COLUMNS[tile.n], (3, 0, tile.m // 2, tile.m + 1), pair, seed=place % 3)
    seed = seed_of(tile.name, pair, arch, steps)
    check(problem, tile, dtype, arch=arch, ready=place % 2 == 1, seed=seed)


# ---- every weight ----------------------------------------------------------------------------------------------------


def half_of(bits: int) -> np.float16:
    return np.array(bits, np.uint16).view(np.float16)[()]


def held(code: int, scale: int, largest: int) -> np.float16:
    """What the MMA is to read, by the halves' bits: the code's, times the scale's."""
    x = max(0, 30 + scale - largest)
    with np.errstate(under="ignore"):
        return half_of((code & 7) << 9 | code >> 3 << 15) * half_of(x << 10)


def one_hot(k: int) -> tuple[Tensor, Tensor]:
    """The k of each row's only one, and the rows."""
    hot = torch.randperm(k, generator=torch.Generator().manual_seed(7))
    return hot, torch.nn.functional.one_hot(torch.cat((hot, hot[:ROWS_OF_NO_EXPERT])), k).half()


def packed_of(codes: Tensor) -> Tensor:
    nibbles = codes.to(torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


@functools.cache
def every_mxfp4_weight(largest: int) -> Fp4Problem:
    """Each code under each scale from the largest down to what is zero in fp16; what is expected is worked out here."""
    n, k = 64, 160
    scales = (largest - (5 * torch.arange(n)[:, None] + torch.arange(k // 32)) % 36).clamp(min=0)
    codes = (torch.arange(k) + torch.arange(n)[:, None]) % 16
    hot, rows = one_hot(k)
    problem = problem_of(rows, packed_of(codes)[None], scales[None].to(torch.uint8), (k,), MXFP4_FP16)
    each = scales.repeat_interleave(32, 1)
    weights = [
        [held(int(c), int(s), largest) for c, s in zip(*of, strict=True)] for of in zip(codes, each, strict=True)
    ]
    exact = torch.from_numpy(np.array(weights)).double() * 2.0 ** (largest - 128)
    expected = torch.zeros_like(problem.expected)
    expected[:k] = exact[:, hot].T + 0.0  # sums begin with +0
    assert torch.equal(problem.expected[:k], expected[:k])
    values = torch.tensor(formats.E2M1_VALUES, dtype=torch.float64)[codes] * (each - 127).double().exp2()
    near = largest - each <= formats.FP16_EXACT_BINADES
    assert torch.equal(exact[near], values[near])
    assert not torch.equal(exact[~near], values[~near])
    return dataclasses.replace(problem, expected=expected)


@pytest.mark.parametrize(
    ("largest", "name"),
    [
        (127, "m8n64_swap"),
        *[pytest.param(*of, marks=pytest.mark.ptx_full) for of in ((200, "m8n64_swap"), (127, "m64n8"))],
    ],
)
def test_every_code_under_every_scale(largest: int, name: str) -> None:
    check(every_mxfp4_weight(largest), MANIFEST.tile(name), torch.float32, ready=False, seed=3)


def test_every_code_under_every_nvfp4_scale_is_exact() -> None:
    n, k, count = 64, 160, fp16_problems.NVFP4_SCALES
    codes = (torch.arange(k) + torch.arange(n)[:, None]) % 16  # a block of 16 k has each of them once
    scales = (10 * torch.arange(n)[:, None] + torch.arange(k // 16)) % count
    assert len((codes * count + scales.repeat_interleave(16, 1)).unique()) == 16 * count
    hot, rows = one_hot(k)
    packed, scales = packed_of(codes), scales.to(torch.uint8)
    problem = problem_of(rows, packed[None], scales[None], (k,), NVFP4_FP16, 7)
    assert problem.of_weights is not None
    factors = problem.of_weights[0, torch.arange(n) % 16 // 8]
    expected = formats.nvfp4_products(packed, scales)[:, hot].T / 128 * factors + 0.0
    assert torch.equal(problem.expected[:k], expected)
    check(problem, SMALL, torch.float32, ready=False, seed=3)


def test_infinite_rows_are_ieees() -> None:
    """Infinity times a weight is infinity, times zero or beside the other sign not a number; other rows do not know."""
    usual = usual_problem(160, 64, (3, 0, 9), MXFP4_FP16)
    rows, packed = usual.rows.clone(), usual.packed.clone()
    rows[0, 5], rows[1, 7], rows[1, 90], rows[4, 150] = torch.inf, -torch.inf, torch.inf, torch.nan
    packed[:, ::3, 2] = 0
    problem = problem_of(rows, packed, usual.scales, (3, 0, 9), MXFP4_FP16)
    finite = problem.expected[:12].isfinite()
    assert not finite[[0, 1, 4]].any()
    assert finite[[2, 3, *range(5, 12)]].all()
    assert problem.expected[0].isinf().any()
    assert problem.expected[0].isnan().any()
    check(problem, SMALL, torch.float32, ready=False, seed=9)


# ---- GEMM1's activation ----------------------------------------------------------------------------------------------


@functools.cache
def usual(n: int, pair: str) -> Fp4Problem:
    return usual_problem(160, n, EXPERTS_ROWS, pair)


@functools.cache
def from_stored_sums(kind: str, n: int, pair: str) -> Tensor:
    return ptx_moe_checks.halves_of_stored_sums(usual(n, pair), epilogue(kind, n), len(EXPERTS_ROWS), FP16)


@pytest.mark.parametrize(
    ("tile", "pair", "arch"),
    [
        pytest.param(*kernel, id=name, marks=() if name in (USUAL[1], USUAL[5]) else pytest.mark.ptx_full)
        for kernel in KERNELS
        if prove(*(kernel[i] for i in (0, 2, 1))).activates
        for name in [named(*kernel)]
    ],
)
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile, pair: str, arch: str) -> None:
    n = 320 if tile.n == 256 else 192
    for kind in KINDS if (tile, arch) == (SMALL, "120f") else KINDS[2:5:2]:
        seed = seed_of(tile.name, kind, pair, arch)
        run = Gemm(usual(n, pair), tile, Machine(seed=seed), arch)
        rows, scales = run.run_activated(epilogue(kind, n), m_tiles_are_ready=bool(seed % 2))
        expected = torch.full_like(rows, 0xAA)
        expected[: usual(n, pair).valid] = from_stored_sums(kind, n, pair).view(torch.uint8)
        assert torch.equal(rows, expected), f"{tile.name}, {kind}, seed {seed}"
        assert (scales == 0xAA).all(), "fp16 rows have no scales"


def test_an_activation_beyond_fp16_is_infinite() -> None:
    few = usual(192, MXFP4_FP16)
    large = problem_of(few.rows, few.packed, few.scales + 12, EXPERTS_ROWS, MXFP4_FP16)
    kind = "swiglu"
    made = ptx_moe_checks.halves_of_stored_sums(large, epilogue(kind, 192), len(EXPERTS_ROWS), FP16)
    assert made.isinf().any()
    assert not made.isinf().all()
    rows, _ = Gemm(large, SMALL, Machine(seed=4)).run_activated(epilogue(kind, 192))
    assert torch.equal(rows[: large.valid], made.view(torch.uint8))


# ---- mistakes, each of which must be noticed -------------------------------------------------------------------------

MMA = r"mma\.sync[^;]*?"
MXFP4_MISTAKES = {
    "codes without their highest bit": once(r", -1912566272;", ", -2046784000;"),
    "the fourth pair without its lowest bit": once(r", 33554944;", ", 33554432;"),
    "codes shifted, not rotated": once(r"(shf\.l\.wrap\.b32 %r\d+, )%r\d+, ", r"\g<1>0, "),
    "signs of the codes' word": once(r"(lop3\.b32 %r\d+, %r\d+, )(%r\d+), (%r\d+), 0xCA;", r"\1\3, \3, 0xCA;"),
    "a weight times itself": once(r"(mul\.rn\.f16x2 %r\d+, )(%r\d+), %r\d+;", r"\1\2, \2;"),
    "the scale of the K block after it": once(
        r"(mov\.b32 \{low, high\}, %r\d+; mov\.b32 %r\d+, )\{low, low\};", r"\1{high, high};"
    ),
    "scales of the third and fourth block for the first two": once(r", 16704;", ", 17218;"),
    "no lower end of scales": once(r"min\.s16x2\.relu", "min.s16x2"),
    "no upper end of scales": once(r"min\.s16x2\.relu (%?\w+), (%?\w+), %?\w+;", r"max.s16x2 \1, \2, 0;"),
    "scales count from one below": once(r"(sub\.s32\s+%r\d+, )29,", r"\g<1>28,"),
    "scales 2^1 too large": once(r"(shl\.b32\s+%r\d+, %r\d+, )10;", r"\g<1>11;"),
    "another expert's factor": once(r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]", r"\1+8]"),
    "an MMA of bf16": once(r"(mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.)f16\.f16", r"\1bf16.bf16"),
    "rows g and g + 8 of A exchanged": once(
        rf"({MMA}\}}, \{{)(%r\d+), ?(%r\d+), ?(%r\d+), ?(%r\d+)\}}", r"\g<1>\3, \2, \5, \4}"
    ),
    "no factor": once(r"mul\.rn\.f32(\s+%f\d+, )(%f\d+), %f\d+;", r"mov.f32\1\2;", number=1),
    "no wait for a stage": once(r"\{ \.reg \.pred done; again: mbarrier\.try_wait[^}]*\}", "", number=4),
}
NVFP4_MISTAKES = {
    "the second 16 k's scale for the first": once(
        r"(mov\.b32 \{low, high\}, %r\d+; mov\.b32 %r\d+, )\{low, low\};", r"\1{high, high};"
    ),
    "scales 2^3 times too small": once(r", 2013296640;", f", {2013296640 - 3 * 0x04000400};"),
    "subnormal scales lost": once(r"mul\.rn\.f16x2 (%r\d+), (%r\d+), %r\d+;", r"add.u32 \1, \2, 1006648320;"),
    "factors of gates and ups exchanged": once(r"(ld\.global\.nc\.v2\.f32 )\{(%f\d+),\s*(%f\d+)\}", r"\1{\3,\2}"),
    "an MMA of bf16": MXFP4_MISTAKES["an MMA of bf16"],
}


def noticed(change: Callable[[str], str], pair: str) -> str:
    """What notices an edit of the kernel's PTX, under one of a few orders of warps and copies."""
    problem = any_problem(prove(SMALL, "120f", pair).stages * 128 + 128, 80, (3, 2, 9), pair)
    for seed, lateness in ((0, 1.0), (1, 30.0), (2, 300.0)):
        try:
            out = Gemm(problem, SMALL, Machine(seed=seed, lateness=lateness)).run(torch.float32, change=change)
        except Fault as fault:
            return str(fault)
        if mismatch := problem.mismatch(out):
            return mismatch
    return ""


@pytest.mark.parametrize("name", MXFP4_MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    assert noticed(MXFP4_MISTAKES[name], MXFP4_FP16)


@pytest.mark.parametrize("name", NVFP4_MISTAKES)
def test_a_mistake_with_nvfp4_weights_is_noticed(name: str) -> None:
    assert noticed(NVFP4_MISTAKES[name], NVFP4_FP16)


@pytest.mark.parametrize("pair", PAIRS)
def test_what_changes_nothing_is_not_noticed(pair: str) -> None:
    assert noticed(once(r"(mul\.rn\.f16x2 %r\d+, )(%r\d+), (%r\d+);", r"\1\3, \2;", number=2), pair) == ""


@pytest.mark.parametrize(
    "change",
    [
        once(r"(cvt\.rn\.f16x2\.f32 %r\d+, )(%f\d+), (%f\d+);", r"\1\3, \2;"),
        once(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16 (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"),
        once(r"cvt\.rn\.f16x2\.f32", "cvt.rn.bf16x2.f32"),
    ],
    ids=["halves exchanged", "outputs not transposed", "rows of bf16"],
)
def test_a_mistake_of_the_activation_is_noticed(change: Callable[[str], str]) -> None:
    few, kind = usual(192, MXFP4_FP16), epilogue(KINDS[1], 192)
    rows, _ = Gemm(few, SMALL, Machine()).run_activated(kind, change=change)
    right, _ = Gemm(few, SMALL, Machine()).run_activated(kind)
    assert not torch.equal(rows, right)


def test_wgmma_of_bf16_is_noticed() -> None:
    """In the code of all widths."""
    tile, problem = MANIFEST.tile("m32n64_swap"), any_problem(160, 80, (3, 0, 17), MXFP4_FP16)
    of_tile = Gemm(problem, tile, Machine(seed=2), "90a")
    out = of_tile.run(torch.float32, change=lambda ptx: ptx.replace("k16.f32.f16.f16", "k16.f32.bf16.bf16"))
    assert problem.mismatch(out)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def args_of(pair: str, **changes: int) -> abi.GemmArgs:
    given = {"act": 1 << 20, "weight": 2 << 20, "out": 3 << 20, "m_tiles": 4 << 20, "num_m_tiles": 5 << 20}
    sizes = {"max_m_tiles": 3, "out_type": 0, "rows": 9, "n": 64, "k": 160, "experts": 2}
    sizes |= dict(zip(("weight_format", "act_format"), abi.formats_of(pair), strict=True))
    args = abi.GemmArgs(**{**given, **sizes, **{name: value for name, value in changes.items() if name != "factors"}})
    args.factors.of_weights = changes.get("factors", 6 << 20) or None
    return args


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("tile", [SMALL, MANIFEST.tile("m64n128")], ids=lambda tile: tile.name)
def test_the_launch_is_the_proofs(tile: Tile, pair: str) -> None:
    launch.ptx_of_tile(tile, pair=pair)
    [one] = launch.shared_recorder().gemm_of(tile, pair, args_of(pair))
    proof = prove(tile, "120f", pair)
    assert (one.block[0], one.smem_bytes) == (proof.threads, proof.smem_bytes)
    assert "grouped_gemm_mma_sync" in one.kernel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_format": 1}, "act_format, weight_format: expected 4 and 0, .*, got 1 and 0"),
        ({"weight_format": 1}, "act_format, weight_format: expected 4 and 0, .*, got 4 and 1"),
        ({"factors": 0}, "factors.of_weights: expected an address that is a multiple of 8"),
        ({"act": (1 << 20) + 8}, "act: expected an address that is a multiple of 16"),
        ({"k": 48}, "k: expected a positive multiple of 32, got 48"),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_launcher_refuses(changes: dict[str, int], message: str, arch: str) -> None:
    launch.ptx_of_tile(SMALL, arch, MXFP4_FP16)
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().gemm_of(SMALL, MXFP4_FP16, args_of(MXFP4_FP16, **changes), arch=arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_launcher_refuses_to_quantize(arch: str) -> None:
    """fp16 does not hold what MXFP8 stands for: no kernel of fp16 rows makes it."""
    launch.ptx_of_tile(SMALL, arch, MXFP4_FP16)
    args = args_of(MXFP4_FP16)
    for wanted in (0, 1):
        args.activate.rows, args.activate.format = 7 << 20, wanted
        with pytest.raises(
            launch.RefusedError, match=rf"format: expected 4, which tile \(8, 64\) writes on this GPU, got {wanted}"
        ):
            launch.shared_recorder().gemm_of(SMALL, MXFP4_FP16, args, arch=arch)
