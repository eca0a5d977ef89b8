"""Every tile's GEMM as the PTX that nvcc makes of it for sm_120f, executed on the CPU (tests/helpers/ptx).

Results are compared bit by bit with the reference under SM12x's arithmetic, in outputs poisoned before; the executor
itself fails on races, on memory that is not there, on hangs. Launches are the launcher's own. Each problem has an
expert without rows, m-tiles of one row, of one row less and more than whole, a tail along N where the tile can have
one, a K tail, more K tiles than stages, more output tiles than blocks, and activations that are not there until
griddepcontrol.wait; so are the m-tiles, where the launch says that they are not ready.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import ptx_moe_checks
import pytest
import torch
from ptx import gemm
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.tile_cases import COLUMNS, DTYPES, EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.problems import GemmProblem
from mxfp4_moe.tiles import Tile, load_manifest, prove

TILES = load_manifest().tiles
ACTIVATING = [tile for tile in TILES if prove(tile, "120f").amax_bytes]
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
each_activating = pytest.mark.parametrize("tile", ACTIVATING, ids=lambda tile: tile.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@functools.lru_cache(maxsize=4)
def tails(tile: Tile, steps: int) -> GemmProblem:
    """Whole K tiles for every stage, and one of `steps` blocks of 32 behind them."""
    k = prove(tile, "120f").stages * 128 + steps * 32
    return gemm.any_problem(k, COLUMNS[tile.n], (1, 0, tile.m - 1, tile.m, tile.m + 1))


def check(tile: Tile, dtype: torch.dtype, steps: int, *, ready: bool, sms: int = 1) -> None:
    problem, seed = tails(tile, steps), seed_of(tile.name, dtype, steps, ready)
    out = Gemm(problem, tile, Machine(seed=seed)).run(dtype, m_tiles_are_ready=ready, sms=sms)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{tile.name}, seed {seed}: {mismatch}"


@each_dtype
@each_tile
def test_tile_equals_the_reference_bitwise(tile: Tile, dtype: torch.dtype) -> None:
    assert prove(tile, "120f").blocks_per_sm < 5 * -(-COLUMNS[tile.n] // tile.n), "output tiles than blocks of one SM"
    number = DTYPES.index(dtype)
    check(tile, dtype, 1 + number, ready=(number + TILES.index(tile)) % 2 == 1)


@pytest.mark.ptx_full
@each_dtype
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@each_tile
def test_more_tails_and_orders(tile: Tile, steps: int, ready: bool, dtype: torch.dtype) -> None:
    check(tile, dtype, steps, ready=ready, sms=2)


# ---- GEMM1's activation ----------------------------------------------------------------------------------------------


@functools.cache
def usual(n: int) -> GemmProblem:
    return gemm.usual_problem(160, n, EXPERTS_ROWS)


def ordinal(codes: Tensor) -> Tensor:
    """E4M3 codes as integers in the order of their values."""
    value = (codes & 0x7F).int()
    return torch.where(codes >= 0x80, -value, value)


@functools.cache
def from_stored_sums(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """What csrc/moe's activation kernel makes of the reference's sums: codes and scales of the rows, in plain order.

    It has the same exp as the tiles. With torch's, a code moves to its neighbour where the value lies near a tie.
    """
    problem, applied = usual(n), epilogue(kind, n)
    valid = int(problem.offsets[-1])
    row_expert = torch.repeat_interleave(torch.arange(len(EXPERTS_ROWS)), problem.offsets.diff()).to(torch.int32)
    rounding = None if applied.rounding is torch.float32 else applied.rounding
    numbers = {"alpha": applied.alpha, "beta": applied.beta, "limit": applied.limit}
    weights = SimpleNamespace(
        num_experts=len(EXPERTS_ROWS), w13_bias=applied.bias, activation=applied.activation, **numbers
    )
    codes, scales = ptx_moe_checks.activated(
        problem.expected[:valid].contiguous(), row_expert, weights, rounding, valid
    )
    if isinstance(applied.limit, float) and math.isinf(applied.limit):  # the kernels' word for none
        numbers["limit"] = None
    values = reference.activate(
        problem.expected[:valid], row_expert, applied.bias, applied.activation, **numbers, rounding=rounding
    )
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    assert torch.equal(scales, expected_scales)
    assert (ordinal(codes) - ordinal(expected_codes)).abs().max() <= 1
    assert (codes != expected_codes).float().mean() < 2e-3
    return codes, scales


@each_activating
@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile, kind: str) -> None:
    n = 320 if tile.n == 256 else 192
    seed = seed_of(tile.name, kind)
    run = Gemm(usual(n), tile, Machine(seed=seed))
    codes, scales = run.run_activated(epilogue(kind, n), m_tiles_are_ready=bool(seed % 2))
    valid = int(usual(n).offsets[-1])
    expected_codes, expected_scales = from_stored_sums(kind, n)
    expected = torch.full_like(codes, 0xAA)
    expected[:valid] = formats.interleave_k(expected_codes)
    assert torch.equal(codes, expected)
    words = torch.full_like(scales, 0xAA)
    words[:, :valid] = formats.pack_row_scales(expected_scales)[:, :valid]
    assert torch.equal(scales, words)
