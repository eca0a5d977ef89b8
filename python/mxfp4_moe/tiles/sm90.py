"""What SM90's kernels beside the plain one make of a tile: csrc/tile/sm90/*_shape.cuh, statement by statement.

Which tiles have them stands here too, as there; tiles.kernels_of and tiles.prove ask it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .proof import TILE_K, WEIGHT_BLOCK_BYTES, WEIGHT_BLOCK_ROWS, TileProof, prove_plain, stage_refusals
from .stages import BARRIER_BYTES_PER_STAGE, MAX_BLOCKS_PER_SM, Occupancy, ceil_div, smem_per_sm
from .tile import Kernel, Tile

# ---- bf16_shape.cuh --------------------------------------------------------------------------------------------------


def _prove_folded(
    tile: Tile,
    arch: str,
    *,
    function: str,
    warp_m: int,
    threads: int,
    blocks_of: Callable[[Occupancy, int], int],
) -> TileProof:
    """Bf16Tile and Bf16Layout. `blocks_of` says from what fits, and the accumulators, how many blocks an SM has."""
    m, n = tile.mn
    accumulators = (warp_m // 16) * (m // 8) * 4
    act_bytes = 2 * m * 128  # bf16, as two halves of a K tile
    weight_bytes = ceil_div(n, WEIGHT_BLOCK_ROWS) * WEIGHT_BLOCK_BYTES
    stage_bytes = act_bytes + weight_bytes
    amax_bytes = n // warp_m * m * 4
    fits = Occupancy(
        smem_per_sm=smem_per_sm(arch),
        threads=threads,
        stage_bytes=stage_bytes + BARRIER_BYTES_PER_STAGE,
        once_bytes=amax_bytes,
    )
    blocks_per_sm = blocks_of(fits, accumulators)
    stages = fits.stages_for(blocks_per_sm)
    parts = {"activations": act_bytes, "weights": weight_bytes, "barriers": BARRIER_BYTES_PER_STAGE}
    return TileProof(
        tile=tile,
        arch=arch,
        kernel=Kernel.FOLDED,
        function=function,
        physical_m=n,  # weights are the MMA's rows, whatever the tile's mode
        physical_n=m,
        warps_m=n // warp_m,
        warps_n=1,
        warp_m=warp_m,
        warp_n=m,
        threads=threads,
        accumulator_registers=accumulators,
        act_bytes=act_bytes,
        weight_bytes=weight_bytes,
        act_scale_bytes=0,  # the scales are in the activations
        barrier_bytes=BARRIER_BYTES_PER_STAGE,
        sum_bytes=0,
        amax_bytes=amax_bytes,
        column_bytes=0,
        stage_bytes=stage_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * fits.stage_bytes + amax_bytes,
        refusals=tuple(stage_refusals(stages=stages, least=2, arch=arch, **parts)),
    )


# ---- mma_sync_shape.cuh ----------------------------------------------------------------------------------------------


def has_mma_sync(m: int, n: int) -> bool:
    return m <= 16 and n >= 64


def prove_mma_sync(tile: Tile, arch: str) -> TileProof:
    """MmaSyncShape: four warps, and one that produces."""
    warp_m = tile.n // 4
    fragments, row_sets = tile.m // 8, warp_m // 16

    def blocks_of(fits: Occupancy, accumulators: int) -> int:
        return fits.blocks_that_fit(6, accumulators + 8 * fragments + 4 * row_sets + 2 * row_sets + 48)

    return _prove_folded(
        tile, arch, function="grouped_gemm_mma_sync", warp_m=warp_m, threads=5 * 32, blocks_of=blocks_of
    )


# ---- wgmma_shape.cuh -------------------------------------------------------------------------------------------------

_MMA_REGISTERS = 240
_PRODUCER_REGISTERS = 24
_OTHER_REGISTERS = 52


def has_wgmma(m: int, n: int) -> bool:
    return m >= 32 and (n == 128 or (n == 64 and m <= 128) or (n == 256 and m <= 64))


def prove_wgmma(tile: Tile, arch: str) -> TileProof:
    """WgmmaShape: 64 or 128 weight rows to a warpgroup, and a warp or a warpgroup that produces."""
    m, n = tile.mn
    warp_m = 16 * (2 if m <= 64 and n >= 128 else 1)
    warps = n // warp_m
    moves_registers = m >= 128 and warps == 8
    threads = warps * 32 + (128 if moves_registers else 32)
    refusals: list[str] = []

    def blocks_of(fits: Occupancy, accumulators: int) -> int:
        if not moves_registers:
            return fits.blocks_that_fit(MAX_BLOCKS_PER_SM, accumulators + _OTHER_REGISTERS + 16)
        moved, there = warps * _MMA_REGISTERS + 4 * _PRODUCER_REGISTERS, threads // 32 * fits.registers_for(1)
        if moved > there:
            refusals.append(f"registers: warps take {moved} of a block's {there}")
        return 1

    proof = _prove_folded(
        tile, arch, function="grouped_gemm_wgmma", warp_m=warp_m, threads=threads, blocks_of=blocks_of
    )
    return replace(proof, refusals=(*proof.refusals, *refusals))


# ---- parallel_k_shape.cuh --------------------------------------------------------------------------------------------

_PARTS = 4
PARALLEL_K_WARP_ROWS = 32


def has_parallel_k(m: int, n: int) -> bool:
    return (m, n) == (8, 64)


def prove_parallel_k(tile: Tile, arch: str) -> TileProof:
    """ParallelKShape: the tile's own warps add and write, others multiply. `warp_m` is of those that write."""
    plain = prove_plain(tile, arch)
    row_warps = tile.n // PARALLEL_K_WARP_ROWS
    add_warps = plain.warps_m * plain.warps_n
    threads = (add_warps + _PARTS * row_warps + 1) * 32
    sum_bytes = TILE_K // 32 * (tile.n // 16 * 32 * 16)
    barrier_bytes = 24  # full, empty and summed
    column_bytes = tile.n * 4
    blocks_per_sm = 2
    fits = Occupancy(
        smem_per_sm=smem_per_sm(arch),
        threads=threads,
        stage_bytes=plain.stage_bytes + sum_bytes + barrier_bytes,
        once_bytes=plain.amax_bytes + column_bytes,
        most_stages=16,
    )
    stages = fits.stages_for(blocks_per_sm) // _PARTS * _PARTS
    refusals = stage_refusals(
        stages=stages,
        least=_PARTS,
        arch=arch,
        activations=plain.act_bytes,
        weights=plain.weight_bytes,
        activation_scales=plain.act_scale_bytes,
        sums=sum_bytes,
        barriers=barrier_bytes,
    )
    return replace(
        plain,
        kernel=Kernel.PARALLEL_K,
        function="grouped_gemm_parallel_k",
        threads=threads,
        barrier_bytes=barrier_bytes,
        sum_bytes=sum_bytes,
        column_bytes=column_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * fits.stage_bytes + fits.once_bytes,
        refusals=(*plain.refusals, *refusals),
    )
