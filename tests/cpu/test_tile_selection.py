"""Tiles chosen by expected rows, and the nearest to one that is missing."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
from tile_cases import LEGAL

from mxfp4_moe import tiles
from mxfp4_moe.tiles import Tile


def test_the_simple_rule() -> None:
    choices = [tiles.select_tile_mn_for_sm120(tokens) for tokens in range(1025)]
    assert choices[:64] == [(64, 128)] * 64
    assert choices[64:256] == [(128, 128)] * 192
    assert choices[256:] == [(256, 64)] * (1025 - 256)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), list(product((1, 2, 7, 64, 4096), (1, 4), (1, 2, 32, 128))))
def test_expected_rows_against_exact_arithmetic(tokens: int, top_k: int, experts: int) -> None:
    slots = tokens * top_k
    active = experts * (1 - (1 - Fraction(1, experts)) ** slots)
    assert tiles.expected_rows_per_expert(tokens, top_k, experts) == pytest.approx(float(slots / active), rel=1e-12)


def test_expected_rows_of_nothing_and_of_nonsense() -> None:
    assert tiles.expected_rows_per_expert(0, 4, 128) == 0.0
    for arguments in ((-1, 4, 128), (1, 0, 128), (1, 4, 0)):
        with pytest.raises(ValueError, match="expected num_tokens >= 0, top_k >= 1 and num_experts >= 1, got"):
            tiles.expected_rows_per_expert(*arguments)


def test_selection_for_gpt_oss_covers_the_expected_rows() -> None:
    manifest = tiles.load_manifest()
    picked = {
        tokens: tiles.select_tile(tokens, 4, 128, manifest.tiles).mn for tokens in (0, 1, 64, 256, 512, 1024, 4096)
    }
    # Expected rows: 0, 1.01, 2.3, 8.003, 16.000002, 32, 128.
    assert picked == {
        0: (8, 128),
        1: (8, 128),
        64: (8, 128),
        256: (8, 128),
        512: (16, 128),
        1024: (32, 128),
        4096: (128, 128),
    }


@pytest.mark.parametrize(("top_k", "experts"), [(1, 1), (4, 32), (4, 128), (8, 256)])
def test_selection_is_the_smallest_cover_and_grows_with_the_batch(top_k: int, experts: int) -> None:
    for choices in (tiles.load_manifest().tiles, LEGAL):
        largest = max(tile.m for tile in choices)
        last = 0
        for tokens in [*range(0, 300), *range(300, 40_000, 997)]:
            tile = tiles.select_tile(tokens, top_k, experts, choices)
            rows = tiles.expected_rows_per_expert(tokens, top_k, experts)
            assert tile in choices
            assert tile.m * 1.001 >= rows or tile.m == largest
            assert all(other.m >= tile.m or other.m * 1.001 < rows for other in choices)
            widths = [other.n for other in choices if other.m == tile.m]
            assert tile.n == 128 or 128 not in widths
            assert tile.m >= last
            last = tile.m


def test_selection_does_not_depend_on_the_order_of_tiles() -> None:
    for tokens in (1, 100, 3000):
        chosen = {tiles.select_tile(tokens, 4, 128, order) for order in (LEGAL, LEGAL[::-1], sorted(LEGAL))}
        assert len(chosen) == 1


def test_a_lone_expert_gets_exactly_its_rows() -> None:
    for m in (8, 16, 32, 64, 128, 256):
        assert tiles.select_tile(m, 1, 1, LEGAL).m == m
        assert tiles.select_tile(m + 1, 1, 1, LEGAL).m == min(2 * m, 256)


def test_the_nearest_tile_is_the_wanted_one_if_it_is_there() -> None:
    for tile in LEGAL:
        assert tiles.nearest_tile(tile, LEGAL) == tile


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((8, 128), (16, 128)),
        ((64, 128), (128, 128)),  # one step of m either way: the larger
        ((256, 64), (128, 128)),
        ((16, 64), (16, 128)),
    ],
)
def test_the_nearest_tile_when_the_wanted_one_is_missing(wanted: tuple[int, int], expected: tuple[int, int]) -> None:
    choices = [Tile.from_mn(mn) for mn in ((16, 128), (32, 128), (128, 128))]
    assert tiles.nearest_tile(Tile.from_mn(wanted), choices).mn == expected


def test_selection_among_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="tiles: expected at least one tile, got none"):
        tiles.select_tile(1, 4, 128, [])
    with pytest.raises(ValueError, match="tiles: expected at least one tile, got none"):
        tiles.nearest_tile(LEGAL[0], [])


def test_waste_is_bounded_by_the_next_power_of_two() -> None:
    """With all legal tiles, the tile holds less than twice the rows expected, as far as tiles go that far."""
    for tokens in range(3, 5000, 11):
        rows = tiles.expected_rows_per_expert(tokens, 4, 128)
        m = tiles.select_tile(tokens, 4, 128, LEGAL).m
        if 8 < rows <= 256:
            assert m == 2 ** math.ceil(math.log2(rows / 1.001))
