"""What a tile's kernel does in more than one way: every number of rows that it may have, weight scales large and small,
K with every tail, and calls that follow each other closely. Bit for bit.

Of SM90's two kernels and their native and swapped modes, and of SM12x's: a few tiles each. Values that are no numbers
stay where they belong.
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
from gpu_problems import GemmProblem, bits, random_call, random_weights

import mxfp4_moe
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

FEW_ROWS = [Tile.from_mn(mn) for mn in ((8, 64), (16, 256))]
NATIVE_NARROW = [Tile.from_mn(mn) for mn in ((64, 8), (256, 32))]
MANY_ROWS = [Tile.from_mn(mn) for mn in ((32, 64), (64, 128), (128, 128), (256, 128))]
TILES = FEW_ROWS + NATIVE_NARROW + MANY_ROWS
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


@functools.lru_cache(maxsize=2)
def problem(k: int, n: int, rows: Sequence[int], wide_scales: bool = False) -> GemmProblem:
    return gpu_problems.random_problem(k, n, gpu_problems.gpu(), rows_per_expert=rows, wide_scales=wide_scales)


@each_tile
def test_each_number_of_rows(tile: Tile) -> None:
    """SM90's kernels multiply as few columns as an m-tile has rows: one expert for every number of them."""
    every = range(tile.m + 2) if tile.m <= 64 else [*range(0, tile.m, 5), *range(7, tile.m + 2, 8), tile.m, tile.m + 1]
    experts = 32
    for first in range(0, len(every), experts):
        rows = tuple(every)[first : first + experts]
        mismatch = problem(288, 144, rows).check(tile)
        assert not mismatch, f"{tile.name}, rows {rows}: {mismatch}"


@each_tile
@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 192, 224, 256, 608], ids=lambda k: f"k{k}")
def test_each_tail_of_k(k: int, tile: Tile) -> None:
    for n in (16, 80, 272):
        mismatch = problem(k, n, (0, 1, 9, 65, 130)).check(tile)
        assert not mismatch, f"{tile.name}, K={k}, N={n}: {mismatch}"


@each_tile
@pytest.mark.parametrize("which", ["all", "a row", "a block", "the last block"])
def test_large_weight_scales(which: str, tile: Tile) -> None:
    """Beyond 2^0 SM90 takes a way of its own, of a K tile in which a warp has one: alone, or among others."""
    given = problem(416, 144, (1, 9, 65, 130))
    scales = (given.scales.int() - 20).clamp(min=90).to(torch.uint8)
    places = {
        "all": (slice(None), slice(None)),
        "a row": (77, slice(None)),
        "a block": (77, 5),
        "the last block": (3, 12),
    }
    where = (slice(None), *places[which])
    scales[where] = (scales[where].int() + 50).clamp(min=128).to(torch.uint8)
    large = GemmProblem.with_oracle(given.rows, given.row_scales, given.packed, scales, given.offsets)
    assert int(scales.max()) >= 128 > int(scales[0, 0, 0] if which != "all" else 0)
    for dtype in (torch.float32, torch.bfloat16):
        mismatch = large.check(tile, dtype)
        assert not mismatch, f"{tile.name}, {dtype}: {mismatch}"


@each_tile
@pytest.mark.parametrize("rows", [(1, 1, 1), (3, 8, 1)], ids=["lone", "several"])
def test_nan_and_infinity_pass_through_and_stay_in_their_rows(rows: tuple[int, ...], tile: Tile) -> None:
    given = problem(672, 144, rows)
    assert given.row_scales is not None
    codes, row_scales, scales = given.rows.clone(), given.row_scales.clone(), given.scales.clone()
    codes[0, 133] = 0x7F
    row_scales[1] = 248  # with the largest weight scales: sums beyond fp32
    scales[:, 7] = 253
    wild = replace(given, rows=codes, row_scales=row_scales, scales=scales)  # what it must give is not asked
    out = wild.run(tile)
    assert out[0].isnan().all()
    assert not out[1, 7].isfinite()
    assert out[2].isfinite().sum() >= 140
    assert same(out[2:3, :7], given.run(tile)[2:3, :7])


@pytest.mark.parametrize("seed", range(30))
def test_random_problems_of_few_rows(seed: int) -> None:
    draw = random.Random(seed)
    k, n, experts = 32 * draw.randint(1, 130), 16 * draw.randint(1, 200), draw.randint(1, 40)
    rows = tuple(draw.choice((0, 1, 1, draw.randint(0, 8), draw.randint(0, 40))) for _ in range(experts))
    for tile in TILES:
        mismatch = problem(k, n, rows).check(tile)
        assert not mismatch, f"{tile.name}, seed {seed}, K={k}, N={n}, rows {rows}: {mismatch}"


@each_tile
@pytest.mark.parametrize("k", [32, 160, 2880])
def test_same_bits_in_calls_that_follow_each_other_closely(k: int, tile: Tile) -> None:
    given = problem(k, 2880, (0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 17, 1))
    outs = [given.run(tile) for _ in range(60)]
    wrong = [i for i, out in enumerate(outs) if given.mismatch(out)]
    assert not wrong, f"calls {wrong}"


# ---- through the layer -----------------------------------------------------------------------------------------------


@functools.cache
def layer(activation: str, bias: bool) -> MoEWeights:
    limit = {"swiglu": {}, "swiglu_oai": {"alpha": 1.702, "beta": 1.0, "limit": 7.0}}[activation]
    return random_weights(8, 672, 416, gpu_problems.gpu(), bias=bias, activation=activation, **limit)


@each_tile
@pytest.mark.parametrize("rounds", [False, True], ids=["fp32", "rounds"])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu_oai", True)])
def test_layer_with_few_rows(activation: str, bias: bool, rounds: bool, tile: Tile) -> None:
    weights = layer(activation, bias)
    for tokens in (1, 2, 3, 8, 33):
        call = random_call(tokens, 4, weights, seed=tokens)
        poison_memory(weights.device, 0xFF)
        out = mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=tile.mn, intermediate_rounding=rounds)
        assert same(out, exact_layer(call, weights, intermediate_rounding=rounds)), f"{tokens} tokens"


@each_tile
def test_calls_of_the_layer_that_follow_each_other_closely(tile: Tile) -> None:
    weights = layer("swiglu_oai", True)
    calls = [random_call(tokens, 4, weights, seed=seed) for seed in range(8) for tokens in (1, 2)]
    expected = [mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=(8, 128)) for call in calls]
    torch.cuda.synchronize()
    outs = [mxfp4_moe.fused_moe(*call.args(), weights, tile_mn=tile.mn) for _ in range(20) for call in calls]
    wrong = [i for i, out in enumerate(outs) if not torch.equal(bits(out), bits(expected[i % len(calls)]))]
    assert not wrong, f"calls {wrong}"
