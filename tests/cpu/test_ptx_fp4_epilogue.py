"""GEMM1's epilogue of tiles that read and write FP4 rows, as PTX executed on the CPU: see test_ptx_tiles.py.

Codes and scales are those of csrc/moe's activation kernel on the reference's sums, which has the same exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import ptx_fp4_checks
import pytest
import torch
from ptx import gemm, mutants
from ptx.faults import Fault
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Epilogue, Gemm
from ptx.machine import Machine
from ptx.tile_cases import EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe.tiles import MXFP4_MXFP4, NVFP4_NVFP4, Tile, load_manifest, prove

GLOBAL_SCALES = torch.tensor([700.0, 1.0, 2.5])
TILES = load_manifest().tiles
CASES = [(tile, pair) for pair in (MXFP4_MXFP4, NVFP4_NVFP4) for tile in TILES if prove(tile, "120f", pair).activates]
# Four warps share a block, or two; one has two; several warps along the rows.
USUAL = {MXFP4_MXFP4: ((8, 64), (128, 64)), NVFP4_NVFP4: ((8, 64), (8, 128), (64, 64))}


@functools.cache
def problem_of(n: int, pair: str) -> Fp4Problem:
    """Usual sums, and of the last expert a row of zeros, one of very small sums, one of NaN, and NaN in one column."""
    usual = gemm.usual_problem(160, n, EXPERTS_ROWS, pair=pair)
    assert isinstance(usual, Fp4Problem)
    assert usual.row_scales is not None
    nan, small = (0x7F, 1) if pair == NVFP4_NVFP4 else (0xFF, 40)
    rows, row_scales, scales = usual.rows.clone(), usual.row_scales.clone(), usual.scales.clone()
    rows[4] = 0
    row_scales[5], row_scales[6, 1] = small, nan
    scales[2, 37, 2] = nan
    problem = dataclasses.replace(usual, rows=rows, row_scales=row_scales, scales=scales).under_sm12x()
    sums = problem.expected[3:12]
    assert sums[:, 37].isnan().all()
    assert sums[3].isnan().all()
    assert sums.isnan().sum() == n + 8
    assert 0 < sums[2].nan_to_num().abs().max() < 1e-3
    return problem


def epilogue_of(kind: str, n: int, pair: str) -> Epilogue:
    return dataclasses.replace(epilogue(kind, n), global_scales=GLOBAL_SCALES if pair == NVFP4_NVFP4 else None)


@functools.cache
def from_stored_sums(kind: str, n: int, pair: str) -> tuple[Tensor, Tensor]:
    """Rows and scales, packed as GEMM2 reads them, of the valid rows; within a code of what torch's exp makes."""
    problem, applied = problem_of(n, pair), epilogue_of(kind, n, pair)
    return ptx_fp4_checks.activated(problem, applied, EXPERTS_ROWS)


def param(tile: Tile, pair: str) -> object:
    usual = (tile.m, tile.n) in USUAL[pair]
    return pytest.param(tile, pair, id=f"{tile.name}-{pair}", marks=() if usual else pytest.mark.ptx_full)


def check(tile: Tile, pair: str, kind: str, change: Callable[[str], str] | None = None) -> None:
    """Bit by bit, and nothing is written behind the valid rows. `change` makes another kernel of the PTX."""
    n = (
        320 if tile.n == 256 or pair == NVFP4_NVFP4 else 192
    )  # bytes of zeros, in NVFP4 a word too, behind the last scales
    seed = seed_of(tile.name, pair, kind)
    problem = problem_of(n, pair)
    run = Gemm(problem, tile, Machine(seed=seed))
    codes, scales = run.run_activated(epilogue_of(kind, n, pair), m_tiles_are_ready=bool(seed % 2), change=change)
    valid = int(problem.offsets[-1])
    expected_codes, expected_scales = from_stored_sums(kind, n, pair)
    assert torch.equal(codes[:valid], expected_codes)
    assert (codes[valid:] == 0xAA).all()
    assert torch.equal(scales[:, :valid], expected_scales[:, :valid])
    assert (scales[:, valid:] == 0xAA).all()


@pytest.mark.parametrize(("tile", "pair"), [param(*case) for case in CASES])
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile, pair: str) -> None:
    check(tile, pair, "swiglu")
    check(tile, pair, KINDS[1 + seed_of(tile.name, pair) % (len(KINDS) - 1)])


@pytest.mark.ptx_full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tile", "pair"), [param(*case) for case in CASES])
def test_every_activation(tile: Tile, pair: str, kind: str) -> None:
    check(tile, pair, kind)


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {  # name -> tile, pair, old text in the epilogue's source, new text
    "four groups in another order": ("m8n128_swap", MXFP4_MXFP4, "x[r * 4 + c % 2 * 2 + c / 2]", "x[r * 4 + c]"),
    "codes of two outputs exchanged": (
        "m8n64_swap",
        NVFP4_NVFP4,
        "spread(codes & 0xffffu) | spread(codes >> 16) << 4",
        "spread(codes >> 16) | spread(codes & 0xffffu) << 4",
    ),
    "a warp's part of a block alone": ("m8n64_swap", MXFP4_MXFP4, "(first_part + i) * Shape::M", "part * Shape::M"),
    "blocks of a warp mixed": ("m8n128_swap", NVFP4_NVFP4, "[r][q / kGroupsPerBlock]", "[r][0]"),
    "no meeting behind the parts": ("m8n64_swap", MXFP4_MXFP4, "    }\n    sync();\n", "    }\n"),
    "no meeting before the next tile's parts": (
        "m8n64_swap",
        MXFP4_MXFP4,
        "    sync();  // all have read the table of the output tile before\n",
        "",
    ),
    "padding of one word": ("m8n64_swap", NVFP4_NVFP4, "pad % Blocks::kOfTile", "pad % 4"),
    "poison saturates": ("m8n64_swap", MXFP4_MXFP4, "return by < 0.f ? 0.f :", "return"),
    "another expert's global scale": ("m8n64_swap", NVFP4_NVFP4, "global_scales + m_tile.expert", "global_scales"),
    "a row too many": ("m8n64_swap", NVFP4_NVFP4, "cell < kCells && row < valid", "cell < kCells && row <= valid"),
}


def mistakes() -> list[object]:
    quick = ("four groups in another order", "padding of one word")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.ptx_full) for name in MISTAKES]


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_noticed(name: str) -> None:
    tile, pair, old, new = MISTAKES[name]
    changed = mutants.compiled(load_manifest().tile(tile), ("tile/fp4_epilogue.cuh", old, new), pair)
    with pytest.raises((Fault, AssertionError)) as caught:
        check(load_manifest().tile(tile), pair, "swiglu", change=lambda _: changed)
    print(f"\n{name}: {caught.value.kind.value if isinstance(caught.value, Fault) else 'wrong result'}")
