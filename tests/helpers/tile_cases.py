"""The candidate tiles, for the tests of manifest, proof and selection."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from mxfp4_moe.tiles import Tile

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("90a", "120f")
NATIVE = [Tile(m=m, n=n, swap_ab=False) for m, n in product((64, 128, 256), (8, 16, 32, 64, 128, 256))]
SWAPPED = [Tile(m=m, n=n, swap_ab=True) for m, n in product((8, 16, 32), (64, 128, 256))]
CANDIDATES = NATIVE + SWAPPED
IMPOSSIBLE = Tile(m=256, n=256, swap_ab=False)
LEGAL = [tile for tile in CANDIDATES if tile != IMPOSSIBLE]
