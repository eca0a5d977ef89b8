"""Whether a tile can be, before anything is compiled: what a proof is, and that of SM12x's block-scaled kernels.

`prove_sm12x` mirrors csrc/tile/tile_shape.cuh, statement by statement; the build compares the two after every compile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .pairs import FP4_PAIRS, scale_words
from .stages import BARRIER_BYTES_PER_STAGE, MAX_BLOCKS_PER_SM, Occupancy, ceil_div, max_smem_per_block, smem_per_sm
from .tile import Tile

TILE_K = 128  # four K = 32 blocks, whose E8M0 scales are one 32-bit word per row
WEIGHT_BLOCK_ROWS = 64
_REGISTERS_WANTED = {  # by accumulators, per thread; whether both operands are FP4, of which none is expanded
    False: ((8, 96), (16, 112), (32, 168), (math.inf, 176)),
    True: ((8, 96), (16, 112), (math.inf, 168)),
}
MXFP8_OPCODE, FP4_OPCODE = "QMMA.SF", "OMMA.SF"
MAX_ACCUMULATORS = 128  # fp32 registers per thread; beyond it ptxas spills
MAX_ACTIVATING_ACCUMULATORS = 64  # of a tile whose epilogue applies GEMM1's activation; beyond it ptxas spills


@dataclass(frozen=True, kw_only=True)
class TileProof:
    """What an arch's kernel makes of a tile, in bytes, registers and threads, and every reason why it cannot be.

    `smem_bytes` is the dynamic shared memory of one block; the part sizes are per pipeline stage, but for
    `amax_bytes` and `kept_bytes`, which a block has once. `stage_bytes` are what a stage loads: not its barriers.
    """

    tile: Tile
    arch: str
    pair: str  # of formats that the kernel reads, weights first
    function: str  # its name in csrc/tile
    opcode: str  # of its MMA in machine code
    reads_halves: bool  # bf16 or fp16 activations, and writes them so; else codes with scales
    activates: bool  # its epilogue can apply GEMM1's activation
    weights_are_a: bool  # of the MMA's operands; else activations
    physical_m: int
    physical_n: int
    warps_m: int
    warps_n: int
    warp_m: int
    warp_n: int
    threads: int
    accumulator_registers: int
    act_bytes: int
    weight_bytes: int
    act_scale_bytes: int
    barrier_bytes: int
    amax_bytes: int  # the largest magnitudes that GEMM1's activation needs
    kept_bytes: int  # the output tile that each warp is at, on SM90
    stage_bytes: int
    blocks_per_sm: int
    stages: int
    smem_bytes: int
    refusals: tuple[str, ...]

    @property
    def legal(self) -> bool:
        return not self.refusals

    @property
    def mma_per_step(self) -> int:
        """MMAs of a warp in a step of K = 64 or 32: OMMA.SF has 64, QMMA.SF 32, the others 16.

        HGMMA has all of a warp's columns.
        """
        columns = 1 if self.opcode == "HGMMA" else self.warp_n // 8
        return self.warp_m // 16 * columns * (1 if self.opcode in (MXFP8_OPCODE, FP4_OPCODE) else 2)

    @property
    def steps_per_k_tile(self) -> int:
        return 2 if self.opcode == FP4_OPCODE else 4

    def facts(self) -> dict[str, int]:
        """What the compiled tile must report for this arch: facts() of csrc/tile/tile_op.cpp."""
        return {
            "tile_m": self.tile.m,
            "tile_n": self.tile.n,
            "swap_ab": int(self.tile.swap_ab),
            "threads": self.threads,
            "stages": self.stages,
            "stage_bytes": self.stage_bytes,
            "smem_bytes": self.smem_bytes,
            "blocks_per_sm": self.blocks_per_sm,
            "accumulator_registers": self.accumulator_registers,
        }


def shape_refusals(tile: Tile) -> list[str]:
    """Why no arch has a tile of this shape."""
    m, n = tile.m, tile.n
    refusals = []
    if tile.swap_ab:
        if m not in (8, 16, 32):
            refusals.append(f"a swapped tile has m in 8, 16, 32, not {m}")
        if n < 64:
            refusals.append(f"a swapped tile has n of at least 64, not {n}")
    else:
        if m < 64 or m % 64 != 0:
            refusals.append(f"a native tile has m divisible by 64, not {m}")
    if not 8 <= n <= 256:
        refusals.append(f"n must be from 8 to 256 (a TMA box has at most 256 rows), not {n}")
    if m > 256:
        refusals.append(f"m must be at most 256 (a TMA box has at most 256 rows), not {m}")
    if n >= 8 and n % 8 != 0:
        refusals.append(f"n must be divisible by 8, the MMA's granule, not {n}")
    if n > 0 and WEIGHT_BLOCK_ROWS % n != 0 and n % WEIGHT_BLOCK_ROWS != 0:
        refusals.append(f"n must divide {WEIGHT_BLOCK_ROWS}, the rows of a weight block, or be a multiple: {n}")
    return refusals


def stage_refusals(*, stages: int, arch: str, **parts: int) -> list[str]:
    """Why a pipeline of less than two stages cannot be; `parts` are the bytes of each of a stage's."""
    if stages >= 2:
        return []
    stage = sum(parts.values())
    each = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in parts.items())
    return [
        f"shared memory: two pipeline stages need 2 x {stage:,} = {2 * stage:,} bytes "
        f"(per stage: {each}), a block has {max_smem_per_block(arch):,}"
    ]


def weight_block_bytes(pair: str) -> int:
    """Of 64 weight rows and a K tile: packed E2M1, and a row's scale words."""
    return WEIGHT_BLOCK_ROWS * (TILE_K // 2 + 4 * scale_words(pair))


def prove_sm12x(tile: Tile, arch: str, pair: str) -> TileProof:
    """`prove` on SM12x for activations with scales, MXFP8 or FP4: TileShape."""
    m, n, fp4 = tile.m, tile.n, pair in FP4_PAIRS
    refusals = shape_refusals(tile)
    m, n = max(m, 1), max(n, 1)  # the sizes of a senseless tile are senseless too, but never a division by zero

    swap = tile.swap_ab or (fp4 and n >= 64)  # FP4 weights are A as soon as four warps have 16 rows of them each
    physical_m, physical_n = (n, m) if swap else (m, n)
    if tile.swap_ab:
        long_warps = (m <= 16 and n >= 256) or (m == 8 and n == 128)
        mma_warps = max(n // (16 if n <= 64 else 64 if long_warps else 32), 1)
    else:
        mma_warps = 8 if m * n >= 16384 else 4
    warp_n = physical_n if tile.swap_ab else (64 if m * n >= 8192 else 32) if swap else min(n, 32)
    warps_n = physical_n // warp_n
    warps_m = max(mma_warps // warps_n, 1)
    warp_m = physical_m // warps_m
    accumulators = (warp_m // 16) * (warp_n // 8) * 4
    # One warp produces; beside eight warps with large accumulators a whole warpgroup, because registers move between
    # roles by warpgroups.
    moves_registers = mma_warps == 8 and accumulators >= 64
    threads = (mma_warps + (4 if moves_registers else 1)) * 32

    act_bytes = m * (TILE_K // 2 if fp4 else TILE_K)
    weight_bytes = ceil_div(n, WEIGHT_BLOCK_ROWS) * weight_block_bytes(pair)
    act_scale_set_bytes = (m + 4) * 4  # TMA moves four rows; the first may be any of the four
    act_scale_bytes = ceil_div(scale_words(pair) * act_scale_set_bytes, 128) * 128
    stage_bytes = act_bytes + weight_bytes + act_scale_bytes
    # GEMM1's activation: the largest magnitude per row and warp.
    activates = n >= 64 and accumulators <= MAX_ACTIVATING_ACCUMULATORS
    amax_bytes = (n // (warp_m if swap else warp_n)) * m * 4 if activates else 0

    fits = Occupancy(
        smem_per_sm=smem_per_sm(arch),
        threads=threads,
        stage_bytes=stage_bytes + BARRIER_BYTES_PER_STAGE,
        once_bytes=amax_bytes,
    )
    registers_wanted = next(wanted for most, wanted in _REGISTERS_WANTED[fp4] if accumulators <= most)
    blocks_per_sm = fits.blocks_that_fit(MAX_BLOCKS_PER_SM, registers_wanted)
    stages = fits.stages_for(blocks_per_sm)

    if not refusals and (
        warp_m % 16 != 0
        or warps_m * warp_m != physical_m
        or warps_n * warp_n != physical_n
        or warps_m * warps_n != mma_warps
    ):
        refusals.append(
            f"{mma_warps} MMA warps as a {warps_m} x {warps_n} grid of {warp_m} x {warp_n} warp tiles do not cover "
            f"{physical_m} x {physical_n} in whole 16 x 8 fragments"
        )
    refusals += stage_refusals(
        stages=stages,
        arch=arch,
        activations=act_bytes,
        weights=weight_bytes,
        activation_scales=act_scale_bytes,
        barriers=BARRIER_BYTES_PER_STAGE,
    )
    if accumulators > MAX_ACCUMULATORS:
        refusals.append(
            f"registers: {accumulators} accumulators per thread ({warp_m} x {warp_n} per warp), at most "
            f"{MAX_ACCUMULATORS} leave room for the rest"
        )
    return TileProof(
        tile=tile,
        arch=arch,
        pair=pair,
        function="grouped_gemm",
        opcode=FP4_OPCODE if fp4 else MXFP8_OPCODE,
        reads_halves=False,
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
        act_scale_bytes=act_scale_bytes,
        barrier_bytes=BARRIER_BYTES_PER_STAGE,
        amax_bytes=amax_bytes,
        kept_bytes=0,
        stage_bytes=stage_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * fits.stage_bytes + amax_bytes,
        refusals=tuple(refusals),
    )
