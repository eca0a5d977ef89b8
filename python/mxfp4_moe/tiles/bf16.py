"""What the kernels of bf16 and fp16 MMAs make of a tile: SM90's two, and SM12x's for activations not quantized.

Weights are MXFP4 or NVFP4, whose blocks are larger; bf16 and fp16 differ in nothing here.

Mirrors csrc/tile/bf16/tile_shape.cuh, csrc/tile/sm90/tile_shape.cuh and csrc/tile/sm12x/bf16_tile_shape.cuh, statement
by statement; the build compares them after every compile.
"""

from __future__ import annotations

from .pairs import HALF_PAIRS, MXFP4_BF16, NVFP4_BF16
from .proof import WEIGHT_BLOCK_ROWS, TileProof, shape_refusals, stage_refusals, weight_block_bytes
from .stages import (
    BARRIER_BYTES_PER_STAGE,
    MAX_BLOCKS_PER_SM,
    PASSED_TILE_BYTES,
    Occupancy,
    ceil_div,
    smem_per_sm,
)
from .tile import Tile

_PRODUCER_REGISTERS = 24


def has_wgmma(m: int, n: int) -> bool:
    """Whether a tile's kernel on SM90 is grouped_gemm_wgmma; else it is grouped_gemm_mma_sync."""
    return m >= 32 and n >= 64


def wgmma_sets(proof: TileProof) -> int:
    """How many times 64 weight rows a warpgroup of grouped_gemm_wgmma has: kSets of its shape."""
    return proof.warp_m // 16


def prove_sm90(tile: Tile, arch: str, pair: str) -> TileProof:
    """`prove` on SM90: Sm90MmaSyncShape or WgmmaShape."""
    m, n = max(tile.m, 1), max(tile.n, 1)
    if has_wgmma(m, n):
        if n >= 128 and m * n <= 64 * 128:
            two = _prove_wgmma(tile, arch, pair, sets=2)
            if two.blocks_per_sm * two.warps_m * two.warps_n >= 12:
                return two
        return _prove_wgmma(tile, arch, pair, sets=1)
    return _prove(
        tile,
        arch,
        pair,
        function="grouped_gemm_mma_sync",
        swap=tile.swap_ab,
        mma_warps=4,
        moves_registers=False,
        most_blocks=6,
        folds=pair in (MXFP4_BF16, NVFP4_BF16),
        passes_tiles=True,
    )


def _prove_wgmma(tile: Tile, arch: str, pair: str, *, sets: int) -> TileProof:
    m, n = max(tile.m, 1), max(tile.n, 1)
    moves_registers = m * n >= 128 * 256
    return _prove(
        tile,
        arch,
        pair,
        function="grouped_gemm_wgmma",
        swap=True,
        mma_warps=n // (16 * sets),
        moves_registers=moves_registers,
        most_blocks=1 if moves_registers else MAX_BLOCKS_PER_SM,
        folds=pair in (MXFP4_BF16, NVFP4_BF16),
        passes_tiles=True,
    )


def prove_sm12x_bf16(tile: Tile, arch: str, pair: str) -> TileProof:
    """`prove` on SM12x for bf16 and fp16 activations: Sm12xBf16."""
    m, n = max(tile.m, 1), max(tile.n, 1)
    swap, moves_registers = n >= 64, m * n >= 128 * 256
    return _prove(
        tile,
        arch,
        pair,
        function="grouped_gemm_mma_sync",
        swap=swap,
        mma_warps=8 if swap and m * n >= 16384 else 4,
        moves_registers=moves_registers,
        most_blocks=1 if moves_registers else MAX_BLOCKS_PER_SM,
        loads_ahead=not swap or m <= 32,
        folds=False,
        passes_tiles=False,
    )


def _prove(
    tile: Tile,
    arch: str,
    pair: str,
    *,
    function: str,
    swap: bool,
    mma_warps: int,
    moves_registers: bool,
    most_blocks: int,
    folds: bool,
    passes_tiles: bool,
    loads_ahead: bool = True,
) -> TileProof:
    assert pair in HALF_PAIRS
    refusals = shape_refusals(tile)
    m, n = max(tile.m, 1), max(tile.n, 1)  # the sizes of a senseless tile are senseless too, but never by zero
    wgmma = function == "grouped_gemm_wgmma"
    warp_m, warp_n = (n if swap else m) // mma_warps, m if swap else n

    # Bf16Tile
    physical_m, physical_n = (n, m) if swap else (m, n)
    warps_n = (m if swap else n) // warp_n
    warps_m = mma_warps // warps_n
    fragments_m, fragments_n = warp_m // 16, warp_n // 8
    warp_weight_rows = warp_m if swap else warp_n
    accumulators = fragments_m * fragments_n * 4
    mma_registers = 112 if mma_warps > 8 else 240
    threads = (mma_warps + (4 if moves_registers else 1)) * 32
    act_bytes = 2 * m * 128  # 16 bits each, as two halves of a K tile
    weight_bytes = ceil_div(n, WEIGHT_BLOCK_ROWS) * weight_block_bytes(pair)
    stage_bytes = act_bytes + weight_bytes
    activates = n >= 64
    amax_bytes = 0  # only quantizing needs them; of NVFP4 the two warps' that share a block, in one place
    if activates and folds:
        parts = n // warp_weight_rows if pair == MXFP4_BF16 else n // 32 if warp_weight_rows < 32 else 0
        amax_bytes = parts * m * 4
    ring_bytes = BARRIER_BYTES_PER_STAGE + (PASSED_TILE_BYTES if passes_tiles else 0)
    kept_bytes = mma_warps * PASSED_TILE_BYTES if passes_tiles else 0
    fits = Occupancy(
        smem_per_sm=smem_per_sm(arch),
        threads=threads,
        stage_bytes=stage_bytes + ring_bytes,
        once_bytes=amax_bytes + kept_bytes,
    )

    # kRegistersWanted of WgmmaTile or MmaSyncTile
    if wgmma:
        registers_wanted = accumulators + 40 + warp_m // 2  # 8 for each 16 rows of a warp
    else:
        act_registers = 4 * fragments_n if swap else 8 * fragments_m
        operand_registers = 2 * act_registers if loads_ahead else 16 + 8 * fragments_m
        row_registers = 64 if warp_weight_rows >= 64 else warp_weight_rows // 2
        registers_wanted = accumulators + operand_registers + row_registers + 48
    blocks_per_sm = fits.blocks_that_fit(most_blocks, registers_wanted)

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
        stages=stages, arch=arch, activations=act_bytes, weights=weight_bytes, barriers=ring_bytes
    )
    return TileProof(
        tile=tile,
        arch=arch,
        pair=pair,
        function=function,
        opcode="HGMMA" if wgmma else "HMMA",
        reads_halves=True,
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
        barrier_bytes=ring_bytes,
        amax_bytes=amax_bytes,
        kept_bytes=kept_bytes,
        stage_bytes=stage_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * fits.stage_bytes + amax_bytes + kept_bytes,
        refusals=tuple(refusals),
    )
