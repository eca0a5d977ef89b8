"""SM12x's kernels of bf16 activations as the PTX that nvcc makes of them for sm_120f, executed on the CPU.

As test_ptx_tiles.py for those of MXFP8: bit by bit against the reference under SM12x's rule, in poisoned outputs, with
launches by the launcher. The installed wheel need not have these kernels: tests/helpers/ptx/host_code.py compiles each.
An m-tile has few rows, half of the tile's, and more than a tile: a kernel has ways of its own for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import ptx_moe_checks
import pytest
import torch
from ptx import abi, gemm, launch
from ptx.faults import Fault
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.mutants import once
from ptx.tile_cases import COLUMNS, DTYPES, EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe.problems import GemmProblem
from mxfp4_moe.tiles import MXFP4_BF16, Tile, load_manifest, prove

MANIFEST = load_manifest()
TILES = [tile for tile in MANIFEST.tiles if MXFP4_BF16 in MANIFEST.pairs_of("full", tile)]
# Each way that a kernel is made: weights as B and as A; few rows and whole operands ahead, many and a few at a time;
# warps that share a block of weights, have one, and have two.
USUAL = [MANIFEST.tile(name) for name in ("m64n8", "m128n32", "m8n64_swap", "m32n256_swap", "m64n64", "m64n128")]
LARGE_SCALE = 254  # takes two factors


def some(tiles: list[Tile]) -> list[object]:
    """Every tile; those that are not usual where all of them are asked for."""
    return [pytest.param(tile, id=tile.name, marks=() if tile in USUAL else pytest.mark.ptx_full) for tile in tiles]


@functools.lru_cache(maxsize=2)
def problem_of(tile: Tile, steps: int) -> GemmProblem:
    """More K tiles than stages, the last of `steps` blocks of 32; a tail along N where the tile can have one."""
    k = prove(tile, "120f", MXFP4_BF16).stages * 128 + steps * 32
    return gemm.any_problem(k, COLUMNS[tile.n], (3, 0, tile.m // 2, tile.m + 1), MXFP4_BF16)


def check(problem: GemmProblem, tile: Tile, dtype: torch.dtype, *, ready: bool, seed: int) -> None:
    out = Gemm(problem, tile, Machine(seed=seed)).run(dtype, m_tiles_are_ready=ready)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{tile.name}, seed {seed}: {mismatch}"


@pytest.mark.parametrize("tile", some(TILES))
def test_tile_equals_the_reference_bitwise(tile: Tile) -> None:
    place = TILES.index(tile)
    dtype, steps = DTYPES[place % 3], 1 + place % 4
    check(problem_of(tile, steps), tile, dtype, ready=place % 2 == 1, seed=seed_of(tile.name, dtype, steps))


@pytest.mark.ptx_full
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_more_tails(tile: Tile, dtype: torch.dtype) -> None:
    for steps in (1, 2, 3, 4):
        check(problem_of(tile, steps), tile, dtype, ready=steps % 2 == 0, seed=seed_of(tile.name, dtype, steps, "more"))


@pytest.mark.parametrize("name", ["m8n64_swap", "m64n8", "m64n64"])
def test_large_scales_take_two_factors(name: str) -> None:
    """E8M0 bytes from 128 on, which no bf16 factor holds in one, beside small ones, and the largest that is taken."""
    tile = MANIFEST.tile(name)
    problem = gemm.usual_problem(160, 80, (3, 0, 9), pair=MXFP4_BF16)
    g = torch.Generator().manual_seed(5)
    scales = torch.randint(100, LARGE_SCALE, problem.scales.shape, generator=g).to(torch.uint8)
    rows = (problem.rows.float() * 2.0**-60).bfloat16()
    large = gemm.under_sm12x(
        GemmProblem(
            rows=rows,
            row_scales=None,
            packed=problem.packed,
            scales=scales,
            offsets=problem.offsets,
            expected=problem.expected,
        )
    )
    assert large.expected.isfinite().all()
    check(large, tile, torch.float32, ready=False, seed=1)


# ---- GEMM1's activation ----------------------------------------------------------------------------------------------


@functools.cache
def usual(n: int) -> GemmProblem:
    return gemm.usual_problem(160, n, EXPERTS_ROWS, pair=MXFP4_BF16)


@functools.cache
def from_stored_sums(kind: str, n: int) -> Tensor:
    return ptx_moe_checks.halves_of_stored_sums(usual(n), epilogue(kind, n), len(EXPERTS_ROWS))


@pytest.mark.parametrize("tile", some([tile for tile in TILES if prove(tile, "120f", MXFP4_BF16).activates]))
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile) -> None:
    n = 320 if tile.n == 256 else 192
    for kind in KINDS if tile in USUAL[:4] else KINDS[2:5:2]:
        seed = seed_of(tile.name, kind, "bf16")
        run = Gemm(usual(n), tile, Machine(seed=seed))
        rows, scales = run.run_activated(epilogue(kind, n), m_tiles_are_ready=bool(seed % 2))
        expected = torch.full_like(rows, 0xAA)
        expected[: usual(n).valid] = from_stored_sums(kind, n).view(torch.uint8)
        assert torch.equal(rows, expected), f"{tile.name}, {kind}, seed {seed}"
        assert (scales == 0xAA).all(), "bf16 rows have no scales"


# ---- mistakes, each of which must be noticed -------------------------------------------------------------------------

MMA = r"mma\.sync[^;]*?"
SMALL = MANIFEST.tile("m8n64_swap")
MISTAKES = {
    "codes without their highest bit": once(r", -2118090304;", ", -2122284672;"),
    "the fourth pair without its lowest bit": once(r", 4194368;", ", 4194304;"),
    "rotation by 5 instead of 6": once(
        r"(mov\.b32\s+(%r\d+), )6;(?=(?:(?!mov\.b32).)*?shf\.r\.wrap\.b32 %r\d+, %r\d+, %r\d+, \2;)", r"\g<1>5;"
    ),
    "a weight times itself": once(r"(mul\.rn\.bf16x2 %r\d+, )(%r\d+), %r\d+;", r"\1\2, \2;"),
    "rows g and g + 8 of A exchanged": once(
        rf"({MMA}\}}, \{{)(%r\d+), ?(%r\d+), ?(%r\d+), ?(%r\d+)\}}", r"\g<1>\3, \2, \5, \4}"
    ),
    "registers of B exchanged": once(
        rf"({MMA}\{{%r\d+, ?%r\d+, ?%r\d+, ?%r\d+\}}, \{{)(%r\d+), ?(%r\d+)\}}", r"\g<1>\3, \2}"
    ),
    "the sums' unit is 1": once(r"(add|mul)\.(?:rn\.)?f32\s+(%f\d+), (%f\d+), (?:\3|0f40000000);", r"mov.f32 \2, \3;"),
    "no wait for a stage": once(r"\{ \.reg \.pred done; again: mbarrier\.try_wait[^}]*\}", "", number=4),
    "a stage with fewer bytes": once(
        r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )(%r\d+);",
        r"add.u32 \2, \2, -128;\n\1\2;",
        number=2,
    ),
}


def noticed(change: Callable[[str], str]) -> str:
    """What notices an edit of the kernel's PTX, under one of a few orders of warps and copies."""
    problem = gemm.any_problem(prove(SMALL, "120f", MXFP4_BF16).stages * 128 + 32, 80, (3, 0, 9), MXFP4_BF16)
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
    assert noticed(once(r"(mul\.rn\.bf16x2 %r\d+, )(%r\d+), (%r\d+);", r"\1\3, \2;")) == ""


@pytest.mark.parametrize(
    "change",
    [
        once(r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%f\d+), (%f\d+);", r"\1\3, \2;"),
        once(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16 (%r\d+), (%r\d+);", r"mov.b32 \1, \2;"),
    ],
    ids=["halves exchanged", "outputs not transposed"],
)
def test_a_mistake_of_the_activation_is_noticed(change: Callable[[str], str]) -> None:
    kind = KINDS[1]
    rows, _ = Gemm(usual(192), SMALL, Machine()).run_activated(epilogue(kind, 192), change=change)
    right, _ = Gemm(usual(192), SMALL, Machine()).run_activated(epilogue(kind, 192))
    assert not torch.equal(rows, right)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def args_of(**changes: int) -> abi.GemmArgs:
    given = {"act": 1 << 20, "weight": 2 << 20, "out": 3 << 20, "m_tiles": 4 << 20, "num_m_tiles": 5 << 20}
    sizes = {"max_m_tiles": 3, "out_type": 0, "rows": 9, "n": 64, "k": 160, "experts": 2, "act_format": 1}
    return abi.GemmArgs(**{**given, **sizes, **changes})


@pytest.mark.parametrize("tile", [MANIFEST.tile("m8n64_swap"), MANIFEST.tile("m64n64")], ids=lambda tile: tile.name)
def test_the_launch_is_the_proofs(tile: Tile) -> None:
    launch.ptx_of_tile(tile, pair=MXFP4_BF16)
    [one] = launch.shared_recorder().gemm_of(tile, MXFP4_BF16, args_of())
    proof = prove(tile, "120f", MXFP4_BF16)
    assert (one.block[0], one.smem_bytes) == (proof.threads, proof.smem_bytes)
    assert "grouped_gemm_mma_sync" in one.kernel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_format": 0}, r"expected 1 and 0, what this kernel of tile \(8, 64\) reads, got 0 and 0"),
        ({"act": (1 << 20) + 8}, "act: expected an address that is a multiple of 16"),
        ({"k": 48}, "k: expected a positive multiple of 32, got 48"),
    ],
)
def test_the_launcher_refuses(changes: dict[str, int], message: str) -> None:
    tile = MANIFEST.tile("m8n64_swap")
    launch.ptx_of_tile(tile, pair=MXFP4_BF16)
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().gemm_of(tile, MXFP4_BF16, args_of(**changes))


def test_the_launcher_refuses_to_quantize() -> None:
    """MXFP8 activations have a kernel of their own on SM12x."""
    tile = MANIFEST.tile("m8n64_swap")
    launch.ptx_of_tile(tile, pair=MXFP4_BF16)
    args = args_of()
    args.activate.rows, args.activate.format = 6 << 20, 0
    with pytest.raises(
        launch.RefusedError, match=r"format: expected 1, which tile \(8, 64\) writes on this GPU, got 0"
    ):
        launch.shared_recorder().gemm_of(tile, MXFP4_BF16, args)
