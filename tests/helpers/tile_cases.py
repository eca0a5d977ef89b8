"""The candidate tiles, for the tests of manifest, proof and selection."""

from __future__ import annotations

import math
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

# Shared memory of a multiprocessor (CUDA programming guide, "Technical specifications per compute capability").
SMEM_PER_SM = {"90a": 233_472, "120f": 102_400}


def registers_per_thread(blocks: int, threads: int) -> int:
    """What ptxas may use: a quarter of the multiprocessor has 16,384 registers, and a thread's come by eights."""
    warps = math.ceil(blocks * threads / 128)
    return 16_384 // 32 // warps // 8 * 8
