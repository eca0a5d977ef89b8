"""How long a tile should take on SM120 and SM121, which nobody has measured. Pure; standard library alone.

Modelled, not measured: docs/performance.md says what is in it and what is not. It chooses tiles on SM120 and SM121
where there is no tuned table. A wrong choice costs time, never a bit of the result.

For each of the two grouped GEMMs it counts output tiles, padding included, gives the busiest SM its whole number of
them, and asks four questions of it: how long do its tensor cores take, how long its issue slots, how long do its bytes
take through its port to the L2 cache, and how long until bytes in flight have covered the memory's latency. A fifth is
asked of the memory: how long do all weights take. The slowest answer rules; since nothing overlaps perfectly, the
others count a little (a norm with exponent 4).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..tiles import (
    MXFP4_BF16,
    MXFP4_FP16,
    MXFP4_MXFP4,
    MXFP4_MXFP8,
    NVFP4_BF16,
    NVFP4_FP16,
    NVFP4_NVFP4,
    TILE_K,
    Tile,
    TileProof,
    expert_bytes,
    formats_of,
    nearest_tile,
    prove,
    select_tile,
    value_bytes,
)
from .facts import DeviceFacts, Layer
from .rows import expected_active, expected_m_tiles

_LATENCY_US = 1.0  # from a load's issue to its bytes, memory under load
_TILE_US = 0.6  # what a tile costs beside its main loop: epilogue and the first stage's way through
_LAUNCH_US = 2.0  # from one kernel to the next
_MEMORY_EFFICIENCY = 0.9  # of the published bandwidth
_L2_BYTES_PER_CLOCK = 64.0  # of one SM
_SCHEDULERS = 4
_ISSUE_EFFICIENCY = 0.8
_OVERLAP = 4.0


@dataclass(frozen=True, kw_only=True)
class ArchModel:
    """What the model knows of an arch.

    `mma_flops_per_clock`: of one SM. SM12x: the block-scaled FP8 rate, twice the one of plain FP8 MMAs that accumulate
    in float32. Measured by others from registers alone: 737 TFLOP/s against 370 on an RTX 5090
    (main-horse.github.io/posts/5090-mm-perf), 202 against 102 on an RTX 5060 Ti (flashinfer-ai/flashinfer, issue 3628).
    Both are E4M3 with E4M3; docs/performance.md says what is known of E4M3 with E2M1.
    `loop_instructions`: of one warp and K tile, a line through the build report's figures: a constant, and so many for
    8 rows of weights, for 8 rows of activations, and for a fragment of 16 x 8.
    """

    arch: str
    mma_flops_per_clock: float
    loop_instructions: tuple[float, float, float, float]


ARCH = "120f"
ARCH_MODELS = {
    12: ArchModel(arch=ARCH, mma_flops_per_clock=2048.0, loop_instructions=(23.0, 9.3, 0.4, 9.1)),
}
# Of the other pairs. Dense bf16 MMAs that accumulate in float32, of the maker's tables: 1024 flops (503.8 TFLOP/s of an
# RTX PRO 6000), of which GeForce has half (209.5 TFLOP/s of an RTX 5090); the tables have the same of fp16 MMAs.
_HALVES_FLOPS, _GEFORCE_HALVES_FLOPS = 1024.0, 512.0
# Dense kind::mxf4 and kind::mxf4nvf4 that accumulate in float32, of the maker's tables, which give GeForce the whole
# rate: 1676 TFLOP/s of an RTX 5090 (half of the 3352 with sparsity).
_FP4_FLOPS = 4096.0
# wheelbuild/docs/loop_fit.py prints these lines, and how far off they are.
_LOOP_INSTRUCTIONS = {
    MXFP4_BF16: (76.0, 49.3, 4.0, 14.2),
    NVFP4_BF16: (74.9, 60.9, 4.0, 12.8),
    MXFP4_FP16: (76.3, 67.6, 2.5, 14.1),
    NVFP4_FP16: (75.5, 73.3, 3.8, 13.1),
    MXFP4_MXFP4: (17.5, 1.4, 0.8, 4.2),
    NVFP4_NVFP4: (17.4, 1.5, 1.3, 4.3),
}


def _model_of(device: DeviceFacts, proof: TileProof) -> ArchModel:
    model = arch_model(device.capability)
    if proof.pair not in _LOOP_INSTRUCTIONS:
        return model
    rate = _FP4_FLOPS
    if proof.reads_halves:
        rate = _GEFORCE_HALVES_FLOPS if "GeForce" in device.name else _HALVES_FLOPS
    return replace(model, mma_flops_per_clock=rate, loop_instructions=_LOOP_INSTRUCTIONS[proof.pair])


@dataclass(frozen=True, kw_only=True)
class GemmTime:
    """Microseconds of one grouped GEMM, by cause."""

    memory_us: float
    mma_us: float
    issue_us: float
    l2_us: float
    latency_us: float
    fixed_us: float

    @property
    def us(self) -> float:
        """The slowest cause with a little of the others, and what comes on top of all."""
        parts = (self.memory_us, self.mma_us, self.issue_us, self.l2_us, self.latency_us)
        return float(sum(part**_OVERLAP for part in parts) ** (1 / _OVERLAP) + self.fixed_us)

    @property
    def bound_by(self) -> str:
        """The slowest cause's name."""
        parts = {name: value for name, value in vars(self).items() if name != "fixed_us"}
        return max(parts, key=lambda name: parts[name]).removesuffix("_us")


def loop_terms(proof: TileProof) -> tuple[float, float, float, float]:
    """What the numbers of `ArchModel.loop_instructions` count of a warp's tile."""
    weights, acts = (proof.warp_m, proof.warp_n) if proof.weights_are_a else (proof.warp_n, proof.warp_m)
    return 1.0, weights / 8, acts / 8, (proof.warp_m / 16) * (proof.warp_n / 8)


def on_line(line: tuple[float, float, float, float], proof: TileProof) -> float:
    """Instructions that one warp issues for one K tile, by such numbers."""
    return sum(each * count for each, count in zip(line, loop_terms(proof), strict=True))


def gemm_time(
    proof: TileProof,
    device: DeviceFacts,
    layer: Layer,
    tokens: int,
    n: int,
    k: int,
    instructions: float | None = None,
    written: float | None = None,
) -> GemmTime:
    """One grouped GEMM of `tokens` tokens' rows with [n, k] weights for each expert.

    Args:
        instructions: of a warp in a K tile, where the build report says it; else the model's line.
        written: bytes for each row; by default n values of 16 bits.

    Raises:
        ValueError: an arch that the model does not know.
    """
    model = _model_of(device, proof)
    tile = proof.tile
    m_tiles = expected_m_tiles(tokens, layer, tile.m)
    tiles = max(round(m_tiles * -(-n // tile.n)), 1)
    k_tiles = -(-k // TILE_K)
    mine = -(-tiles // device.sms)  # of the busiest SM
    resident = min(mine, proof.blocks_per_sm)
    clocks = device.ghz * 1e3  # per microsecond

    expert = expert_bytes(proof.pair, n, k)
    active = expected_active(tokens, layer)
    # The m-tiles of an expert follow each other, so its weights are read once if L2 keeps them that long.
    reads = active if expert * 2 <= device.l2_bytes else max(m_tiles, active)
    row_bytes = value_bytes(formats_of(proof.pair)[1]) * k + (2.0 * n if written is None else written)
    memory = _memory_us(device, reads * expert + tokens * layer.top_k * row_bytes)

    mma = mine * k_tiles * 2 * tile.m * tile.n * TILE_K / model.mma_flops_per_clock / clocks
    per_warp = on_line(model.loop_instructions, proof) if instructions is None else instructions
    issued = mine * k_tiles * proof.warps_m * proof.warps_n * per_warp
    issue = issued / (_SCHEDULERS * _ISSUE_EFFICIENCY) / clocks
    moved = mine * k_tiles * proof.stage_bytes
    l2 = moved / _L2_BYTES_PER_CLOCK / clocks
    latency = moved / (resident * proof.stages * proof.stage_bytes) * _LATENCY_US
    rounds = -(-mine // proof.blocks_per_sm)
    return GemmTime(
        memory_us=memory,
        mma_us=mma,
        issue_us=issue,
        l2_us=l2,
        latency_us=latency,
        fixed_us=_LAUNCH_US + rounds * _TILE_US,
    )


def _memory_us(device: DeviceFacts, moved: float) -> float:
    return moved / (device.gb_per_s * _MEMORY_EFFICIENCY * 1e3)


@functools.cache
def _proof(tile: Tile, arch: str, pair: str) -> TileProof:
    return prove(tile, arch, pair)


def layer_us(
    tile: Tile,
    device: DeviceFacts,
    layer: Layer,
    tokens: int,
    instructions: Mapping[str, float] | None = None,
    pair: str = MXFP4_MXFP8,
) -> float:
    """Microseconds of both GEMMs with one tile; what is around them is the same for all tiles and left out.

    Where GEMM1 does not apply the activation, that is not: its float32 sums go through the memory and another kernel.

    Args:
        instructions: tile name -> instructions of a warp in a K tile, from the build report.
        pair: of formats that the kernels compute.

    Raises:
        ValueError: an arch that the model does not know.
    """
    proof = _proof(tile, arch_model(device.capability).arch, pair)
    known = instructions.get(tile.name) if instructions else None
    width, made = 2 * layer.intermediate, value_bytes(formats_of(pair)[1]) * layer.intermediate
    sums = 0.0 if proof.activates else 4.0 * width
    gemm1 = gemm_time(proof, device, layer, tokens, width, layer.hidden, known, sums or made)
    gemm2 = gemm_time(proof, device, layer, tokens, layer.hidden, layer.intermediate, known)
    activation = _LAUNCH_US + _memory_us(device, tokens * layer.top_k * (sums + made)) if sums else 0.0
    return gemm1.us + activation + gemm2.us


def arch_model(capability: tuple[int, int]) -> ArchModel:
    """The model of this compute capability's family.

    Raises:
        ValueError: there is none.
    """
    if capability[0] not in ARCH_MODELS:
        raise ValueError(f"capability: expected one of {sorted(ARCH_MODELS)}.x, got {capability[0]}.{capability[1]}")
    return ARCH_MODELS[capability[0]]


def choose(
    tokens: int,
    layer: Layer,
    device: DeviceFacts,
    tiles: Iterable[Tile],
    instructions: Mapping[str, float] | None = None,
    pair: str = MXFP4_MXFP8,
) -> Tile:
    """The tile that the model thinks fastest; among equals within a hundredth, the nearest to the simple rule's.

    Raises:
        ValueError: no tiles, or an arch that the model does not know.
    """
    choices = list(tiles)
    rule = select_tile(tokens, layer.top_k, layer.experts, choices)
    if tokens == 0:
        return rule
    times = {tile: layer_us(tile, device, layer, tokens, instructions, pair) for tile in choices}
    fastest = min(times.values())
    return nearest_tile(rule, [tile for tile in choices if times[tile] <= 1.01 * fastest])
