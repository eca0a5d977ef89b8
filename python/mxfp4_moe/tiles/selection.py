"""Rules that choose among tiles by numbers alone: by expected rows per expert, and the nearest to a wanted one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .tile import Tile

# Hardly any expert stays empty when slots are many, so E * m slots give a hair over m rows: that still counts as m.
_COVER_SLACK = 1.001


def select_tile_mn_for_sm120(num_tokens: int) -> tuple[int, int]:
    """The simple rule, by token count alone: (64, 128) below 64 tokens, (256, 64) from 256 on, else (128, 128)."""
    if num_tokens < 64:
        return (64, 128)
    if num_tokens >= 256:
        return (256, 64)
    return (128, 128)


def expected_rows_per_expert(num_tokens: int, top_k: int, num_experts: int) -> float:
    """Mean rows of an expert that gets any, when num_tokens * top_k slots fall on experts uniformly; 0 for no slots.

    An expert stays empty with probability (1 - 1/E)^(T*k), so E * (1 - (1 - 1/E)^(T*k)) experts are active.
    """
    if num_tokens < 0 or top_k < 1 or num_experts < 1:
        raise ValueError(
            "expected num_tokens >= 0, top_k >= 1 and num_experts >= 1, got "
            f"num_tokens={num_tokens}, top_k={top_k}, num_experts={num_experts}"
        )
    slots = num_tokens * top_k
    if slots == 0:
        return 0.0
    if num_experts == 1:
        return float(slots)
    active = -num_experts * math.expm1(slots * math.log1p(-1.0 / num_experts))
    return slots / active


def select_tile(num_tokens: int, top_k: int, num_experts: int, tiles: Iterable[Tile]) -> Tile:
    """The default choice among `tiles`: the smallest m that covers the expected rows of an active expert.

    Fewer rows than m are wasted MMA work, more mean a second pass over the expert's weights. When none covers, the
    largest m. Among equal m, the n nearest to 128: one whole scale block, and enough columns to reuse activations.
    """
    choices = list(tiles)
    if not choices:
        raise ValueError("tiles: expected at least one tile, got none")
    rows = expected_rows_per_expert(num_tokens, top_k, num_experts)
    covering = [tile.m for tile in choices if tile.m * _COVER_SLACK >= rows]
    m = min(covering) if covering else max(tile.m for tile in choices)
    return nearest_tile(Tile.from_mn((m, 128)), [tile for tile in choices if tile.m == m])


def nearest_tile(wanted: Tile, tiles: Iterable[Tile]) -> Tile:
    """`wanted` if it is among `tiles`, else the nearest: of the same mode, then by ratio in m, in n; larger on a tie.

    This is the fallback when a tile is missing from the wheel or blocked on the device.
    """
    choices = list(tiles)
    if not choices:
        raise ValueError("tiles: expected at least one tile, got none")

    def distance(tile: Tile) -> tuple[bool, float, float, int, int]:
        m, n = abs(math.log2(tile.m / wanted.m)), abs(math.log2(tile.n / wanted.n))
        return (tile.swap_ab != wanted.swap_ab, m, n, -tile.m, -tile.n)

    return min(choices, key=distance)
