"""Every tile's grouped GEMM on the GPU, bit for bit against the oracle, with outputs poisoned before each run."""

from __future__ import annotations

import functools

import gpu_problems
import pytest
import torch
from gpu_problems import GemmProblem

from mxfp4_moe import _load
from mxfp4_moe.tiles import Tile, load_manifest

pytestmark = pytest.mark.gpu

TILES = load_manifest().tiles
KS = (32, 64, 96, 128, 2880, 4096)
NS = (16, 80, 128, 2880, 5760)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


@functools.lru_cache(maxsize=1)  # the oracle costs more than all tiles together; problems come one after the other
def problem(k: int, n: int, wide_scales: bool = False) -> GemmProblem:
    return gpu_problems.random_problem(k, n, gpu_problems.gpu(), wide_scales=wide_scales)


@each_tile
@pytest.mark.parametrize("n", NS, ids=lambda n: f"n{n}")
@pytest.mark.parametrize("k", KS, ids=lambda k: f"k{k}")
def test_tile_equals_oracle_bitwise(k: int, n: int, tile: Tile) -> None:
    for dtype in DTYPES:
        mismatch = problem(k, n).mismatch(problem(k, n).run(tile, dtype))
        assert not mismatch, f"{tile.name}, K={k}, N={n}, {dtype}: {mismatch}"


@each_tile
@pytest.mark.parametrize("k", [160, 2880])
def test_scales_over_the_whole_exponent_range(k: int, tile: Tile) -> None:
    wide = problem(k, 144, wide_scales=True)
    mismatch = wide.mismatch(wide.run(tile))
    assert not mismatch, f"{tile.name}, K={k}: {mismatch}"


@each_tile
def test_every_weight_lands_in_its_place(tile: Tile) -> None:
    one_hot = gpu_problems.layout_problem(gpu_problems.gpu())
    for dtype in DTYPES:
        mismatch = one_hot.mismatch(one_hot.run(tile, dtype))
        assert not mismatch, f"{tile.name}, {dtype}: {mismatch}"


@pytest.mark.parametrize(("k", "n"), [(96, 80), (2880, 5760)])
def test_all_tiles_give_the_same_bits(k: int, n: int) -> None:
    first, *others = (gpu_problems.bits(problem(k, n).run(tile)) for tile in TILES)
    for tile, other in zip(TILES[1:], others, strict=True):
        assert torch.equal(first, other), f"{tile.name} differs from {TILES[0].name}"


@each_tile
def test_same_bits_on_every_run(tile: Tile) -> None:
    first = gpu_problems.bits(problem(2880, 2880).run(tile))
    for _ in range(10):
        assert torch.equal(first, gpu_problems.bits(problem(2880, 2880).run(tile)))


@each_tile
def test_without_rows_nothing_is_written(tile: Tile) -> None:
    empty = gpu_problems.random_problem(96, 80, gpu_problems.gpu(), rows_per_expert=(0, 0, 0))
    assert empty.run(tile).isnan().all()


@each_tile
def test_exported_entry_registers_again_without_harm(tile: Tile) -> None:
    gpu_problems.gpu()
    assert _load.load_tile.__wrapped__(tile) is _load.load_tile(tile)
