"""SM12x's kernels of bf16 activations and NVFP4 weights as the PTX that nvcc makes of them for sm_120f, on the CPU.

As test_ptx_bf16.py for MXFP4 weights: bit by bit against the reference under SM12x's rule, in poisoned outputs, with
launches by the launcher. Each 16 k of a weight row have a scale of their own, all 127 numbers of E4M3 among them, and
finished sums are multiplied by a float that gates and ups of each expert have for themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

import ptx_moe_checks
import pytest
import torch
from ptx import abi, bf16_problems, gemm, launch
from ptx.bf16_problems import any_problem, usual_problem
from ptx.faults import Fault
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.mutants import once
from ptx.tile_cases import COLUMNS, DTYPES, EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT
from mxfp4_moe.tiles import MXFP4_BF16, MXFP4_MXFP8, NVFP4_BF16, Tile, load_manifest, prove

MANIFEST = load_manifest()
TILES = [tile for tile in MANIFEST.tiles if prove(tile, "120f", NVFP4_BF16).legal]
# Each way that a kernel is made: weights as B and as A; few rows and whole operands ahead, many and a few at a time.
USUAL = [MANIFEST.tile(name) for name in ("m64n8", "m8n64_swap", "m64n128")]


SMALL = MANIFEST.tile("m8n64_swap")


def some(tiles: list[Tile], usual: list[Tile]) -> list[object]:
    """Every tile; those that are not usual where all of them are asked for."""
    return [pytest.param(tile, id=tile.name, marks=() if tile in usual else pytest.mark.ptx_full) for tile in tiles]


@functools.lru_cache(maxsize=2)
def problem_of(tile: Tile, steps: int) -> Fp4Problem:
    """More K tiles than stages, the last of `steps` blocks of 32; a tail along N where the tile can have one."""
    k = prove(tile, "120f", NVFP4_BF16).stages * 128 + steps * 32
    return any_problem(k, COLUMNS[tile.n], (3, 0, tile.m // 2, tile.m + 1))


def check(problem: Fp4Problem, tile: Tile, dtype: torch.dtype, *, ready: bool, seed: int) -> None:
    out = Gemm(problem, tile, Machine(seed=seed)).run(dtype, m_tiles_are_ready=ready)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{tile.name}, seed {seed}: {mismatch}"


@pytest.mark.parametrize("tile", some(TILES, USUAL))
def test_tile_equals_the_reference_bitwise(tile: Tile) -> None:
    place = TILES.index(tile)
    dtype, steps = DTYPES[place % 3], 1 + place % 4
    problem = problem_of(tile, steps)
    assert len(problem.scales.unique()) == bf16_problems.SCALES
    check(problem, tile, dtype, ready=place % 2 == 1, seed=seed_of(tile.name, dtype, steps))


@pytest.mark.ptx_full
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_more_tails(tile: Tile, dtype: torch.dtype) -> None:
    for steps in (1, 2, 3, 4):
        check(problem_of(tile, steps), tile, dtype, ready=steps % 2 == 0, seed=seed_of(tile.name, dtype, steps, "more"))


@functools.cache
def every_weight() -> Fp4Problem:
    """Each code under each scale, and rows with a single one in K: a sum is a weight, which float32 holds, exactly."""
    n, k = 64, 160
    codes = (torch.arange(k) + torch.arange(n)[:, None]) % 16  # a block of 16 k has each of them once
    scales = (10 * torch.arange(n)[:, None] + torch.arange(k // 16)) % bf16_problems.SCALES
    met = codes * bf16_problems.SCALES + scales.repeat_interleave(16, 1)
    assert len(met.unique()) == 16 * bf16_problems.SCALES
    nibbles = codes.to(torch.uint8)
    packed, scales = nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales.to(torch.uint8)
    hot = torch.randperm(k, generator=torch.Generator().manual_seed(7))
    rows = torch.nn.functional.one_hot(torch.cat((hot, hot[:ROWS_OF_NO_EXPERT])), k).bfloat16()
    problem = bf16_problems.problem_of(rows, packed[None], scales[None], (k,), 7)
    assert problem.of_weights is not None
    weights = formats.nvfp4_products(packed, scales)[:, hot].T
    assert torch.equal(problem.expected[:k], weights * problem.of_weights[0, torch.arange(n) % 16 // 8] + 0.0)
    return problem


@pytest.mark.parametrize("name", ["m8n64_swap", pytest.param("m64n8", marks=pytest.mark.ptx_full)])
def test_every_code_under_every_scale_is_exact(name: str) -> None:
    check(every_weight(), MANIFEST.tile(name), torch.float32, ready=False, seed=3)


def test_sums_at_the_ends_of_float32() -> None:
    """Kernels sum 2^-7 of each product: the last bits of small sums are cut there, and no sum of the others is lost."""
    tile = MANIFEST.tile("m8n64_swap")
    usual = usual_problem(160, 64, (3, 0, 9))
    for power in (-133, -126, 115, 118):
        rows = (usual.rows.double() * 2.0**power).bfloat16()
        problem = bf16_problems.problem_of(rows, usual.packed, usual.scales, (3, 0, 9), 5)
        ones = dataclasses.replace(problem, of_weights=torch.ones(3, 2)).under_sm12x()
        assert ones.expected.any()
        check(ones, tile, torch.float32, ready=False, seed=5)


# ---- SM90's kernels --------------------------------------------------------------------------------------------------

SM90_USUAL = "m32n64_swap nvfp4"
SM90_TILES = [
    (tile, pair)
    for pair, asked in ((NVFP4_BF16, NVFP4_BF16), (MXFP4_BF16, MXFP4_MXFP8))
    for tile in MANIFEST.tiles
    if asked in MANIFEST.pairs_of("full", tile)
]


@pytest.mark.parametrize(
    ("tile", "pair"),
    [
        pytest.param(tile, pair, id=name, marks=() if name == SM90_USUAL else pytest.mark.ptx_full)
        for tile, pair in SM90_TILES
        for name in [f"{tile.name} {pair.removesuffix('_bf16')}"]
    ],
)
def test_sm90s_tiles(tile: Tile, pair: str) -> None:
    """Compiled for sm_90a, and launched as there: the warp's MMA and wgmma, which have SM12x's rule for bf16."""
    place = SM90_TILES.index((tile, pair))
    k, rows = prove(tile, "90a", pair).stages * 128 + (1 + place % 4) * 32, (3, 0, tile.m // 2, tile.m + 1)
    made = (
        any_problem(k, COLUMNS[tile.n], rows)
        if pair == NVFP4_BF16
        else gemm.any_problem(k, COLUMNS[tile.n], rows, pair)
    )
    dtype, seed = DTYPES[place % 3], seed_of(tile.name, pair, "90a")
    out = Gemm(made, tile, Machine(seed=seed), "90a").run(dtype, m_tiles_are_ready=place % 2 == 1)
    mismatch = made.mismatch(out)
    assert not mismatch, f"{tile.name}, seed {seed}: {mismatch}"


def test_sm90s_activation() -> None:
    tile, kind = MANIFEST.tile("m32n64_swap"), KINDS[4]
    rows, _ = Gemm(usual(192), tile, Machine(seed=8), "90a").run_activated(epilogue(kind, 192))
    expected = torch.full_like(rows, 0xAA)
    expected[: usual(192).valid] = from_stored_sums(kind, 192).view(torch.uint8)
    assert torch.equal(rows, expected)


WGMMA_MISTAKES = {
    "no wait for the last MMAs": (r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    "groups not committed": (r"wgmma\.commit_group\.sync\.aligned;", ""),
    "rows g and g + 8 of A exchanged": (r"(wgmma\.mma_async[^;]*?\}, *\{)(%r\d+), *(%r\d+)", r"\1\3, \2"),
}


@pytest.mark.parametrize("name", WGMMA_MISTAKES)
def test_a_mistake_of_wgmma_is_noticed(name: str) -> None:
    """In the code of all widths."""
    tile, problem = MANIFEST.tile("m32n64_swap"), any_problem(160, 80, (3, 0, 17))

    def change(ptx: str) -> str:
        changed, count = re.subn(*WGMMA_MISTAKES[name], ptx)
        assert count > 1
        return changed

    gemm_of_tile = Gemm(problem, tile, Machine(seed=2), "90a")
    if "wait" in WGMMA_MISTAKES[name][0] or "commit" in WGMMA_MISTAKES[name][0]:
        with pytest.raises(Fault, match=r"before wgmma\.wait_group"):
            gemm_of_tile.run(torch.float32, change=change)
    else:
        assert problem.mismatch(gemm_of_tile.run(torch.float32, change=change))


# ---- GEMM1's activation ----------------------------------------------------------------------------------------------


@functools.cache
def usual(n: int) -> Fp4Problem:
    return usual_problem(160, n, EXPERTS_ROWS)


@functools.cache
def from_stored_sums(kind: str, n: int) -> Tensor:
    return ptx_moe_checks.halves_of_stored_sums(usual(n), epilogue(kind, n), len(EXPERTS_ROWS))


@pytest.mark.parametrize("tile", some([tile for tile in TILES if prove(tile, "120f", NVFP4_BF16).activates], [SMALL]))
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile) -> None:
    n = 320 if tile.n == 256 else 192
    for kind in KINDS if tile is SMALL else KINDS[2:5:2]:
        seed = seed_of(tile.name, kind, "nvfp4 bf16")
        run = Gemm(usual(n), tile, Machine(seed=seed))
        rows, scales = run.run_activated(epilogue(kind, n), m_tiles_are_ready=bool(seed % 2))
        expected = torch.full_like(rows, 0xAA)
        expected[: usual(n).valid] = from_stored_sums(kind, n).view(torch.uint8)
        assert torch.equal(rows, expected), f"{tile.name}, {kind}, seed {seed}"
        assert (scales == 0xAA).all(), "bf16 rows have no scales"


# ---- mistakes, each of which must be noticed -------------------------------------------------------------------------

LOW = r"(mov\.b32 \{low, high\}, %r\d+; mov\.b32 %r\d+, )\{low, low\};"
HIGH = LOW.replace(r"\{low, low\}", r"\{high, high\}")
FACTORS = r"(ld\.global\.nc\.v2\.f32 )\{(%f\d+),(%f\d+)\}"
MISTAKES = {
    "the second 16 k's scale for the first": once(LOW, r"\1{high, high};"),
    "the first 16 k's scale for the second": once(HIGH, r"\1{low, low};"),
    "the scales of the K block after it": once(r", 16704;", ", 17218;"),
    "the scales of the K block before it": once(r", 17218;", ", 16704;"),
    "the scales of the other half of a K tile": once(r"(ld\.shared\.u32\s+%r\d+, \[%r\d+)\+6400\]", r"\1+6144]"),
    "scales of the row 8 below": once(r"(ld\.shared\.u32\s+%r\d+, \[%r\d+)\+6152\]", r"\1+6144]"),
    "words from where MXFP4's begin": once(r"(ld\.shared\.v2\.u32\s+\{[^}]*\}, \[%r\d+)\+6656\]", r"\1+6400]"),
    "scales 2^3 times too small": once(r", 2130738944;", f", {2130738944 - 3 * 0x00800080};"),
    "subnormal scales lost": once(r"mul\.rn\.bf16x2 (%r\d+), (%r\d+), %r\d+;", r"add.u32 \1, \2, 2130738944;"),
    "the sums' unit is 1": once(r"mul\.f32(\s+%f\d+, %f\d+), 0f43000000;", r"mul.f32\1, 0f3F800000;"),
    "no factor": once(r"mul\.rn\.f32(\s+%f\d+, )(%f\d+), %f\d+;", r"mov.f32\1\2;", number=1),
    "factors of gates and ups exchanged": once(FACTORS, r"\1{\3,\2}"),
    "another expert's factors": once(FACTORS + r", \[(%rd\d+)\]", r"\1{\2,\3}, [\4+8]"),
    "no wait for a stage": once(r"\{ \.reg \.pred done; again: mbarrier\.try_wait[^}]*\}", "", number=4),
}


def noticed(change: Callable[[str], str]) -> str:
    """What notices an edit of the kernel's PTX, under one of a few orders of warps and copies."""
    problem = any_problem(prove(SMALL, "120f", NVFP4_BF16).stages * 128 + 32, 80, (3, 2, 9))
    for seed, lateness in ((0, 1.0), (1, 30.0), (2, 300.0)):
        try:
            out = Gemm(problem, SMALL, Machine(seed=seed, lateness=lateness)).run(torch.float32, change=change)
        except Fault as fault:
            return str(fault)
        if mismatch := problem.mismatch(out):
            return mismatch
    return ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    assert noticed(MISTAKES[name])


def test_what_changes_nothing_is_not_noticed() -> None:
    assert noticed(once(r"(mul\.rn\.bf16x2 %r\d+, )(%r\d+), (%r\d+);", r"\1\3, \2;", number=2)) == ""


def test_an_activation_without_factors_is_noticed() -> None:
    kind = KINDS[1]
    rows, _ = Gemm(usual(192), SMALL, Machine()).run_activated(epilogue(kind, 192), change=MISTAKES["no factor"])
    right, _ = Gemm(usual(192), SMALL, Machine()).run_activated(epilogue(kind, 192))
    assert not torch.equal(rows, right)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def args_of(**changes: int) -> abi.GemmArgs:
    given = {"act": 1 << 20, "weight": 2 << 20, "out": 3 << 20, "m_tiles": 4 << 20, "num_m_tiles": 5 << 20}
    sizes = {"max_m_tiles": 3, "out_type": 0, "rows": 9, "n": 64, "k": 160, "experts": 2}
    sizes |= dict(zip(("weight_format", "act_format"), abi.formats_of(NVFP4_BF16), strict=True))
    args = abi.GemmArgs(**{**given, **sizes, **{name: value for name, value in changes.items() if name != "factors"}})
    args.factors.of_weights = changes.get("factors", 6 << 20) or None
    return args


@pytest.mark.parametrize("tile", [MANIFEST.tile("m8n64_swap"), MANIFEST.tile("m64n128")], ids=lambda tile: tile.name)
def test_the_launch_is_the_proofs(tile: Tile) -> None:
    launch.ptx_of_tile(tile, pair=NVFP4_BF16)
    [one] = launch.shared_recorder().gemm_of(tile, NVFP4_BF16, args_of())
    proof = prove(tile, "120f", NVFP4_BF16)
    assert (one.block[0], one.smem_bytes) == (proof.threads, proof.smem_bytes)
    assert "grouped_gemm_mma_sync" in one.kernel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_format": 0}, "act_format, weight_format: expected 1 and 1, .*, got 0 and 1"),
        ({"weight_format": 0}, "act_format, weight_format: expected 1 and 1, .*, got 1 and 0"),
        ({"factors": 0}, "factors.of_weights: expected an address that is a multiple of 8"),
        ({"factors": (6 << 20) + 4}, "factors.of_weights: expected an address that is a multiple of 8"),
        ({"k": 48}, "k: expected a positive multiple of 32, got 48"),
    ],
)
@pytest.mark.parametrize("arch", ["120f", "90a"])
def test_the_launcher_refuses(changes: dict[str, int], message: str, arch: str) -> None:
    launch.ptx_of_tile(SMALL, arch, NVFP4_BF16)
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().gemm_of(SMALL, NVFP4_BF16, args_of(**changes), arch=arch)


@pytest.mark.parametrize("arch", ["120f", "90a"])
def test_the_launcher_refuses_to_quantize(arch: str) -> None:
    """No pair has NVFP4 weights and MXFP8 activations; on SM90 kernels of MXFP4 weights fold them."""
    launch.ptx_of_tile(SMALL, arch, NVFP4_BF16)
    args = args_of()
    args.activate.rows, args.activate.format = 7 << 20, 0
    with pytest.raises(
        launch.RefusedError, match=r"format: expected 1, which tile \(8, 64\) writes on this GPU, got 0"
    ):
        launch.shared_recorder().gemm_of(SMALL, NVFP4_BF16, args, arch=arch)
