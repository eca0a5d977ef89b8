"""How shared memory and registers are divided: csrc/tile/stages.cuh, statement by statement, once for all shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..archs import check_arch

SMEM_PER_SM = {9: 228 * 1024, 12: 100 * 1024}  # by the major number of the arch
SMEM_RESERVED_PER_BLOCK = 1024  # taken by the system from every block
_REGISTERS_PER_SUBPARTITION = 512  # of 32 lanes each; a multiprocessor's warps share four of these
MAX_STAGES = 8
MAX_BLOCKS_PER_SM = 4
BARRIER_BYTES_PER_STAGE = 16  # one full and one empty mbarrier
PASSED_TILE_BYTES = 16  # an output tile, as the warp that loads passes it on


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def smem_per_sm(arch: str) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return SMEM_PER_SM[check_arch(arch)[0]]


def max_smem_per_block(arch: str) -> int:
    """Bytes of shared memory that a block may opt in to."""
    return smem_per_sm(arch) - SMEM_RESERVED_PER_BLOCK


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """What blocks per multiprocessor leave each block.

    `stage_bytes` includes the stage's barriers; `once_bytes` are what a block has beside its stages.
    """

    smem_per_sm: int
    threads: int
    stage_bytes: int
    once_bytes: int

    def stages_for(self, blocks: int) -> int:
        budget = self.smem_per_sm // blocks - SMEM_RESERVED_PER_BLOCK - self.once_bytes
        return min(MAX_STAGES, budget // self.stage_bytes)

    def registers_for(self, blocks: int) -> int:
        return _REGISTERS_PER_SUBPARTITION // ceil_div(blocks * self.threads // 32, 4) // 8 * 8

    def blocks_that_fit(self, most: int, registers_wanted: int) -> int:
        """Several blocks hide each other's latencies, as long as each has three stages and the registers it wants."""
        fitting = (
            blocks
            for blocks in range(most, 1, -1)
            if self.stages_for(blocks) >= 3 and self.registers_for(blocks) >= registers_wanted
        )
        return next(fitting, 1)
