"""SM12x's kernels of bf16 activations and NVFP4 weights as the PTX that nvcc makes of them for sm_120f, on the CPU.

As test_ptx_bf16.py for MXFP4 weights: bit by bit against the reference under SM12x's rule, in poisoned outputs, with
launches by the launcher. Each 16 k of a weight row have a scale of their own, all 127 numbers of E4M3 among them, and
finished sums are multiplied by a float that gates and ups of each expert have for themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace

import ptx_moe_checks
import pytest
import torch
from ptx import abi, bf16_problems, launch
from ptx.bf16_problems import any_problem, usual_problem
from ptx.faults import Fault
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.mutants import once
from ptx.tile_cases import COLUMNS, DTYPES, EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.tiles import NVFP4_BF16, Tile, load_manifest, prove

BF16_ROWS = 2  # csrc/moe/kernels.h, RowFormat
MANIFEST = load_manifest()
TILES = [tile for tile in MANIFEST.tiles if prove(tile, "120f", NVFP4_BF16).legal]
# Each way that a kernel is made: weights as B and as A; few rows and whole operands ahead, many and a few at a time;
# warps that share a block of weights, have one, and have two.
USUAL = [MANIFEST.tile(name) for name in ("m64n8", "m128n32", "m8n64_swap", "m32n256_swap", "m64n64", "m64n128")]


def some(tiles: list[Tile]) -> list[object]:
    """Every tile; those that are not usual where all of them are asked for."""
    return [pytest.param(tile, id=tile.name, marks=() if tile in USUAL else pytest.mark.ptx_full) for tile in tiles]


@functools.lru_cache(maxsize=2)
def problem_of(tile: Tile, steps: int) -> Fp4Problem:
    """More K tiles than stages, the last of `steps` blocks of 32; a tail along N where the tile can have one."""
    k = prove(tile, "120f", NVFP4_BF16).stages * 128 + steps * 32
    return any_problem(k, COLUMNS[tile.n], (3, 0, tile.m // 2, tile.m + 1))


def check(problem: Fp4Problem, tile: Tile, dtype: torch.dtype, *, ready: bool, seed: int) -> None:
    out = Gemm(problem, tile, Machine(seed=seed)).run(dtype, m_tiles_are_ready=ready)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{tile.name}, seed {seed}: {mismatch}"


@pytest.mark.parametrize("tile", some(TILES))
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


@pytest.mark.parametrize("name", ["m8n64_swap", "m64n8"])
def test_every_code_under_every_scale_is_exact(name: str) -> None:
    """Rows with a single one in K: a sum is one weight, code times scale, which float32 holds, times its factor."""
    code, scale = torch.meshgrid(torch.arange(16), torch.arange(bf16_problems.SCALES), indexing="ij")
    n, k = 128, 256  # 16 blocks of 16 for each of 127 scales, in which each code has another place
    nibbles = torch.zeros(n, k, dtype=torch.uint8)
    nibbles[: bf16_problems.SCALES] = ((torch.arange(k) + torch.arange(k) // 16) % 16).to(torch.uint8)
    scales = torch.arange(n).clamp_(max=bf16_problems.SCALES - 1).to(torch.uint8)[:, None].repeat(1, k // 16)
    scales = (scales.int() + 8 * torch.arange(k // 16)).remainder(bf16_problems.SCALES).to(torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    hot = torch.randperm(k, generator=torch.Generator().manual_seed(7))
    rows = torch.nn.functional.one_hot(hot, k).bfloat16()
    problem = bf16_problems.problem_of(rows, packed[None], scales[None], (k,), 7)
    assert problem.of_weights is not None
    values = formats.nvfp4_products(packed, scales)[:, hot].T
    factor = problem.of_weights[0, torch.arange(n) % 16 // 8]
    assert torch.equal(problem.expected, values * factor + 0.0)
    met = {
        (c, s)
        for c, s in zip(nibbles.flatten().tolist(), scales.repeat_interleave(16, 1).flatten().tolist(), strict=True)
    }
    assert met >= set(zip(code.flatten().tolist(), scale.flatten().tolist(), strict=True))
    check(problem, MANIFEST.tile(name), torch.float32, ready=False, seed=3)
