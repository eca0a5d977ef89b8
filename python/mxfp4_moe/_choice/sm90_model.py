"""How long a tile takes on SM90: a small physical model, its constants fitted to measurements. Standard library alone.

docs/performance.md says how well it chooses. A wrong choice costs time, never a bit of the result.

Persistent blocks walk the m-tiles of experts with rows times the tiles along n: full rounds, in which each SM has as
many blocks as fit, and a last one with what is left. A block alone has latencies that its own warps cannot hide; all
blocks of an SM share what it can issue, most of it the expansion of weights from FP4 to bf16; the two add. Meanwhile
the memory has the weights of the active experts to deliver, which overlaps, though not perfectly: a norm and not a
maximum. Bytes from L2 and the latency of loads were tried and explained nothing more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..tiles import (
    MXFP4_BF16,
    MXFP4_FP16,
    MXFP4_MXFP8,
    NVFP4_BF16,
    NVFP4_FP16,
    TILE_K,
    Tile,
    expert_bytes,
    kernel_pair,
    prove,
    select_tile,
)
from ..tiles.bf16 import has_wgmma, wgmma_sets
from .facts import DeviceFacts, Layer
from .rows import expected_active, row_probabilities

ARCH = "90a"


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Clocks of an SM for a K tile where nothing else is said; `sync` is the mma.sync kernel, `wgmma` the other."""

    memory_efficiency: float  # of the published bandwidth
    overlap: float  # exponent of the norm between the memory and the SMs
    sync_expand: float  # 64 weight rows
    wgmma_expand: float  # 64 weight rows
    wgmma_expand_sets: float  # 64 weight rows of a warpgroup that has 128
    wgmma_expand_few_warps: float  # the same in tiles of 64 rows, whose blocks leave an SM twelve warps and not sixteen
    wgmma_row: float  # and for each activation row
    wgmma_alone: float  # a block alone, for each 64 weight rows of a warpgroup; its activation rows come on top
    tile: float  # of a tile alone, beside that
    epilogue: float  # of a tile, for each 64 weight rows by an activation row
    around_us: float  # microseconds of a layer beside its two GEMMs
    row_us: float  # microseconds that 2^20 activation values add to that


# Fitted with wheelbuild/docs/cost_fit.py on 2026-11-27 to an H100 80GB HBM3 and an H200, 132 SMs each: the eight
# shapes of its table in docs/performance.md, from 1 to 4096 tokens, and the tiles of `sensible`. `overlap` was not
# fitted: left to itself it goes to 10.7, and choices are a little worse. The two of warpgroups with 128 rows are from a
# scan with the others held, to what was measured of those: a fit of all to that chooses worse (1.5 % against 0.9).
CONSTANTS = Constants(
    memory_efficiency=0.892,
    overlap=4.5,
    sync_expand=236.7,
    wgmma_expand=234.1,
    wgmma_expand_sets=205.0,
    wgmma_expand_few_warps=235.0,
    wgmma_row=2.177,
    wgmma_alone=83.12,
    tile=3474.0,
    epilogue=16.55,
    around_us=22.68,
    row_us=1.971,
)

# What was measured were layers of MXFP4 weights in bf16. The other kernels' main loops have more instructions for a K
# tile: so many times those, in machine code, of mma.sync's kernels and of wgmma's. Expanding is all that differs.
# wheelbuild/docs/loop_fit.py prints these numbers.
EXPANDING = {
    MXFP4_BF16: (1.0, 1.0),
    NVFP4_BF16: (1.16, 1.07),
    MXFP4_FP16: (1.21, 1.14),
    NVFP4_FP16: (1.31, 1.20),
}


def width(rows: int, m: int) -> int:
    """The columns that an m-tile of so many rows computes: as csrc/tile/sm90/wgmma_kernel.cuh has them."""
    if m <= 16:
        return m
    step, least = (32, 64) if m > 128 else (16, 32 if m > 64 else 16)
    return max(-(-rows // step) * step, least)


@functools.lru_cache(maxsize=256)
def widths(tokens: int, top_k: int, experts: int, m: int) -> tuple[tuple[int, float], ...]:
    """(width, expected m-tiles of one expert that have it): an expert's rows are split as evenly as 8 rows allow."""
    found: dict[int, float] = {}
    for expected, probability in row_probabilities(tokens, top_k, experts):
        rows = round(expected)
        if rows < 1:
            continue
        count = -(-rows // m)
        each = math.ceil(rows / count / 8) * 8  # csrc/shared/schedule.cuh
        full, last = width(each, m), width(rows - (count - 1) * each, m)
        found[full] = found.get(full, 0.0) + probability * (count - 1)
        found[last] = found.get(last, 0.0) + probability
    return tuple(found.items())


def _norm(a: float, b: float, exponent: float) -> float:
    return float((a**exponent + b**exponent) ** (1 / exponent))


@functools.cache
def _blocks(tile: Tile, pair: str) -> int:
    return prove(tile, ARCH, pair).blocks_per_sm


@functools.cache
def _sets(tile: Tile, pair: str) -> int:
    return wgmma_sets(prove(tile, ARCH, pair))


def _gemm_us(
    tile: Tile, device: DeviceFacts, layer: Layer, tokens: int, n: int, k: int, c: Constants, pair: str
) -> float:
    blocks = _blocks(tile, pair)
    sync_times, wgmma_times = EXPANDING[kernel_pair(ARCH, pair)]
    units, k_tiles, clocks = tile.n / 64, -(-k // TILE_K), device.ghz * 1e3
    shares = widths(tokens, layer.top_k, layer.experts, tile.m)
    m_tiles = sum(count for _, count in shares)
    total = layer.experts * m_tiles * -(-n // tile.n)
    rounds, left = divmod(total, device.sms * blocks)
    tail = math.ceil(left / device.sms - 1e-3)
    full = last = 0.0
    for columns, count in shares:
        if tile.m <= 16:
            shared, alone = sync_times * c.sync_expand, c.tile
        else:
            sets = _sets(tile, pair)
            of_sets = c.wgmma_expand_sets if tile.m <= 32 else c.wgmma_expand_few_warps
            expand = of_sets if sets == 2 else c.wgmma_expand
            shared = wgmma_times * expand + c.wgmma_row * columns
            alone = k_tiles * sets * (c.wgmma_alone + c.wgmma_row * columns) + c.tile
        shared = units * (k_tiles * shared + c.epilogue * columns)
        full += rounds * (alone + blocks * shared) * count / m_tiles / clocks
        if tail:
            last += (alone + tail * shared) * count / m_tiles / clocks
    weights = expected_active(tokens, layer) * expert_bytes(pair, n, k)
    memory = weights / (device.gb_per_s * c.memory_efficiency * 1e3)
    # The last round has the memory for few blocks, and cannot make up for what the others waited for it.
    return _norm(memory * (1 - left / total), full, c.overlap) + _norm(memory * left / total, last, c.overlap)


def layer_us(
    tile: Tile,
    device: DeviceFacts,
    layer: Layer,
    tokens: int,
    constants: Constants = CONSTANTS,
    pair: str = MXFP4_MXFP8,
) -> float:
    """Microseconds of a layer of `tokens` tokens, at least one, from its router's logits to its output.

    Args:
        pair: of formats, that of the layer: its weights' bytes count, and the instructions of the kernel that has it.
    """
    gemm1 = _gemm_us(tile, device, layer, tokens, 2 * layer.intermediate, layer.hidden, constants, pair)
    gemm2 = _gemm_us(tile, device, layer, tokens, layer.hidden, layer.intermediate, constants, pair)
    values = tokens * (layer.top_k + 1) * (layer.hidden + layer.intermediate) / 2**20
    return gemm1 + gemm2 + constants.around_us + constants.row_us * values


@functools.cache
def sensible(tile: Tile) -> bool:
    """Whether a tile may be the fastest by more than the noise of measuring.

    GEMM1 has to apply its activation. Of mma.sync's four warps each expands a quarter of the weight rows; 64 are too
    many for one. wgmma expands 64 weight rows a warpgroup: with fewer than two for each activation row the MMAs wait
    for too few warps (64 x 64, 128 x 128, all of m = 256), with more than four the same activations are loaded over and
    over.
    """
    proof = prove(tile, ARCH)
    if not proof.activates:
        return False
    if has_wgmma(tile.m, tile.n):
        return 2 * tile.m <= tile.n <= 4 * tile.m
    return proof.warp_m <= 32


def pick(times: Mapping[Tile, float]) -> Tile:
    """The fastest tile; among equals within a hundredth the one with the fewest weight rows, whose last round is short
    whatever the experts' rows turn out to be.
    """
    fastest = min(times.values())
    return min((tile for tile in times if times[tile] <= 1.01 * fastest), key=lambda tile: (tile.n, times[tile]))


def choose(tokens: int, layer: Layer, device: DeviceFacts, tiles: Iterable[Tile], pair: str = MXFP4_MXFP8) -> Tile:
    """The tile that the model thinks fastest, of the sensible ones if there are any.

    Raises:
        ValueError: no tiles.
    """
    choices = list(tiles)
    choices = [tile for tile in choices if sensible(tile)] or choices
    if tokens == 0 or not choices:
        return select_tile(tokens, layer.top_k, layer.experts, choices)
    return pick({tile: layer_us(tile, device, layer, tokens, pair=pair) for tile in choices})
