"""Every tile's grouped GEMM on the GPU, bit for bit against the oracle, with outputs poisoned before each run."""

from __future__ import annotations

import functools
import random

import gpu_problems
import pytest
import torch
from gpu_problems import GemmProblem

from mxfp4_moe import problems
from mxfp4_moe._install import loading
from mxfp4_moe.tiles import Tile, load_manifest

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
        mismatch = problem(k, n).check(tile, dtype)
        assert not mismatch, f"{tile.name}, K={k}, N={n}, {dtype}: {mismatch}"


@each_tile
@pytest.mark.parametrize("k", [160, 2880])
def test_scales_over_the_whole_exponent_range(k: int, tile: Tile) -> None:
    wide = problem(k, 144, wide_scales=True)
    mismatch = wide.check(tile)
    assert not mismatch, f"{tile.name}, K={k}: {mismatch}"


@each_tile
def test_every_weight_lands_in_its_place(tile: Tile) -> None:
    one_hot = gpu_problems.layout_problem(gpu_problems.gpu())
    for dtype in DTYPES:
        mismatch = one_hot.check(tile, dtype)
        assert not mismatch, f"{tile.name}, {dtype}: {mismatch}"


@pytest.mark.parametrize(("k", "n"), [(96, 80), (2880, 5760)])
def test_all_tiles_give_the_same_bits(k: int, n: int) -> None:
    first = gpu_problems.bits(problem(k, n).run(TILES[0]))
    for tile in TILES:
        out = problem(k, n).run(tile)
        assert torch.equal(first, gpu_problems.bits(out)), f"{tile.name} differs from {TILES[0].name}"


@pytest.mark.parametrize("seed", range(50))
def test_random_problems(seed: int) -> None:
    """Experts up to 128, rows per expert up to 2000 (few have many), K and N up to 6144: every tile is the oracle.

    Of rows there are a quarter where the MMA is emulated.
    """
    draw = random.Random(seed)
    k, n, experts = 32 * draw.randint(1, 192), 16 * draw.randint(1, 384), draw.randint(1, 128)
    experts = max(1, min(experts, 2**31 // (k * n)))  # a gigabyte of weights
    rows = [draw.choice((0, draw.randint(0, 12), draw.randint(0, 150), draw.randint(0, 2000))) for _ in range(experts)]
    while sum(rows) > gpu_problems.fewer(6000):
        rows[rows.index(max(rows))] //= 2
    given = gpu_problems.random_problem(k, n, gpu_problems.gpu(), rows_per_expert=rows)
    for tile in TILES:
        mismatch = given.check(tile)
        assert not mismatch, f"{tile.name}, seed {seed}, K={k}, N={n}, rows {rows}: {mismatch}"


@pytest.mark.parametrize(
    "mn", [(8, 128), (16, 128), (32, 128), (128, 128)], ids=["swapped", "swapped16", "swapped32", "native"]
)
@pytest.mark.parametrize("byte", [0, 1, 2, 127, 128, 252, 253])
def test_scales_at_the_ends_of_their_range(byte: int, mn: tuple[int, int]) -> None:
    """The weights' lowest and highest scales; activation scales that cancel them keep every sum exact."""
    (tile,) = (tile for tile in TILES if tile.mn == mn)
    device, rows, n, k = gpu_problems.gpu(), 70, 144, 288
    g = torch.Generator(device).manual_seed(byte)
    shape = (rows + problems.ROWS_OF_NO_EXPERT, k)
    codes = torch.randint(0x30, 0x48, shape, generator=g, device=device).to(torch.uint8)  # 0.5 to 3.75
    codes |= torch.randint(0, 2, shape, generator=g, device=device).to(torch.uint8) << 7
    given = GemmProblem.with_oracle(
        codes,
        torch.full((shape[0], k // 32), min(254 - byte, 248), dtype=torch.uint8, device=device),
        torch.randint(0, 256, (1, n, k // 2), generator=g, device=device, dtype=torch.uint8),
        torch.full((1, n, k // 32), byte, dtype=torch.uint8, device=device),
        gpu_problems.offsets_of([rows], device),
    )
    assert given.expected[:rows].isfinite().all()
    assert bool(given.expected[:rows].count_nonzero() > rows * n // 2)
    mismatch = given.check(tile)
    assert not mismatch, mismatch


def test_blocks_wider_than_the_accumulator() -> None:
    """Blocks that hold both E4M3's largest and smallest values, of which tensor cores keep the upper bits alone."""
    device = gpu_problems.gpu()
    rows, n = 64, 32
    codes = torch.full((rows + problems.ROWS_OF_NO_EXPERT, 32), 0x7E, dtype=torch.uint8, device=device)  # 448
    row = torch.arange(rows, device=device)
    codes[row, row % 32] = 0x01  # 2^-9
    codes[row[32:], (row[32:] * 7 + 3) % 32] = 0x82  # -2^-8
    given = GemmProblem.with_oracle(
        codes,
        torch.full((len(codes), 1), 127, dtype=torch.uint8, device=device),
        torch.full((1, n, 16), 0x77, dtype=torch.uint8, device=device),  # 6
        torch.full((1, n, 1), 127, dtype=torch.uint8, device=device),
        gpu_problems.offsets_of([rows], device),
    )
    for tile in TILES:
        mismatch = given.check(tile)
        assert not mismatch, f"{tile.name}: {mismatch}"


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
    assert loading.load_tile.__wrapped__(tile) is loading.load_tile(tile)
