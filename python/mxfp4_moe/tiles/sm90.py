"""What SM90's two kernels make of a tile: csrc/tile/sm90/tile_shape.cuh, statement by statement."""

from __future__ import annotations

from .proof import WEIGHT_BLOCK_BYTES, WEIGHT_BLOCK_ROWS, TileProof, shape_refusals, stage_refusals
from .stages import BARRIER_BYTES_PER_STAGE, MAX_BLOCKS_PER_SM, Occupancy, ceil_div, smem_per_sm
from .tile import Tile

_PRODUCER_REGISTERS = 24


def has_wgmma(m: int, n: int) -> bool:
    """Whether a tile's kernel is grouped_gemm_wgmma; else it is grouped_gemm_mma_sync."""
    return m >= 32 and n >= 64


def _wgmma_moves_registers(m: int, n: int) -> bool:
    return m * n >= 128 * 256


def prove_sm90(tile: Tile, arch: str) -> TileProof:
    """`prove` on SM90: MmaSyncShape or WgmmaShape."""
    refusals = shape_refusals(tile)
    m, n = max(tile.m, 1), max(tile.n, 1)  # the sizes of a senseless tile are senseless too, but never by zero
    wgmma = has_wgmma(m, n)

    # MmaSyncTile or WgmmaTile: what each makes of Bf16Tile
    swap = tile.swap_ab or wgmma
    if wgmma:
        warp_m, warp_n = 16, m
        mma_warps, moves_registers = n // 16, _wgmma_moves_registers(m, n)
    else:
        warp_m, warp_n = (n if swap else m) // 4, m if swap else n
        mma_warps, moves_registers = 4, False

    # Bf16Tile
    physical_m, physical_n = (n, m) if swap else (m, n)
    warps_n = (m if swap else n) // warp_n
    warps_m = mma_warps // warps_n
    fragments_m, fragments_n = warp_m // 16, warp_n // 8
    warp_weight_rows = warp_m if swap else warp_n
    accumulators = fragments_m * fragments_n * 4
    mma_registers = 112 if mma_warps > 8 else 240
    threads = (mma_warps + (4 if moves_registers else 1)) * 32
    act_bytes = 2 * m * 128  # bf16, as two halves of a K tile
    weight_bytes = ceil_div(n, WEIGHT_BLOCK_ROWS) * WEIGHT_BLOCK_BYTES
    stage_bytes = act_bytes + weight_bytes
    activates = n >= 64
    amax_bytes = n // warp_weight_rows * m * 4 if activates else 0
    fits = Occupancy(
        smem_per_sm=smem_per_sm(arch),
        threads=threads,
        stage_bytes=stage_bytes + BARRIER_BYTES_PER_STAGE,
        once_bytes=amax_bytes,
    )

    # kRegistersWanted and kBlocksPerSm of each
    if wgmma:
        registers_wanted = accumulators + 48
        blocks_per_sm = 1 if moves_registers else fits.blocks_that_fit(MAX_BLOCKS_PER_SM, registers_wanted)
    else:
        act_registers = 4 * fragments_n if swap else 8 * fragments_m
        row_registers = 64 if warp_weight_rows >= 64 else warp_weight_rows // 2
        registers_wanted = accumulators + 2 * act_registers + row_registers + 48
        blocks_per_sm = fits.blocks_that_fit(6, registers_wanted)

    # Bf16Layout
    stages = fits.stages_for(blocks_per_sm)

    here = fits.registers_for(blocks_per_sm)
    if moves_registers:
        moved, there = mma_warps * mma_registers + 4 * _PRODUCER_REGISTERS, threads // 32 * here
        if moved > there:
            refusals.append(f"registers: warps take {moved} of a block's {there}")
        here = mma_registers
    if registers_wanted > here:
        refusals.append(
            f"registers: {accumulators} accumulators per thread ({warp_m} x {warp_n} per warp) want {registers_wanted} "
            f"with the rest, a block of {threads} threads has {here} for each"
        )
    refusals += stage_refusals(
        stages=stages, arch=arch, activations=act_bytes, weights=weight_bytes, barriers=BARRIER_BYTES_PER_STAGE
    )
    return TileProof(
        tile=tile,
        arch=arch,
        function="grouped_gemm_wgmma" if wgmma else "grouped_gemm_mma_sync",
        opcode="HGMMA" if wgmma else "HMMA",
        reads_bf16=True,
        activates=activates,
        weights_are_a=swap,
        physical_m=physical_m,
        physical_n=physical_n,
        warps_m=warps_m,
        warps_n=warps_n,
        warp_m=warp_m,
        warp_n=warp_n,
        threads=threads,
        accumulator_registers=accumulators,
        act_bytes=act_bytes,
        weight_bytes=weight_bytes,
        act_scale_bytes=0,  # the scales are in the activations
        barrier_bytes=BARRIER_BYTES_PER_STAGE,
        amax_bytes=amax_bytes,
        stage_bytes=stage_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * fits.stage_bytes + amax_bytes,
        refusals=tuple(refusals),
    )
