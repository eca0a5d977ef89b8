"""A tile of the wheel, by name and shape, and the kernels that it may have."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


@dataclass(frozen=True, kw_only=True, order=True)
class Tile:
    """One logical GEMM tile: `m` activation rows by `n` weight rows; `swap_ab` feeds weights to the MMA's A operand."""

    m: int
    n: int
    swap_ab: bool

    @property
    def name(self) -> str:
        return f"m{self.m}n{self.n}{'_swap' if self.swap_ab else ''}"

    @property
    def module(self) -> str:
        """Name of the extension module inside `mxfp4_moe._ext`."""
        return f"tile_{self.name}"

    @property
    def mn(self) -> tuple[int, int]:
        return (self.m, self.n)

    @property
    def folded_major(self) -> int:
        """Compute capability (major) of the GPUs on which a layer gives it folded activations, or 0.

        There the extension has a second kernel (kExists of csrc/tile/folded_shape.cuh and wgmma_shape.cuh).
        """
        has_few_rows = self.m <= 64 and self.n >= 64
        return 9 if has_few_rows or self.mn in ((128, 64), (128, 128), (256, 128)) else 0

    @classmethod
    def from_mn(cls, tile_mn: tuple[int, int]) -> Tile:
        """The tile of this shape; fewer than 64 rows means swapped operands."""
        m, n = tile_mn
        return cls(m=m, n=n, swap_ab=m < 64)


class Kernel(IntEnum):
    """Which kernel of a tile runs: Mxfp4MoeKernel of csrc/tile_abi.h. All give the same bits."""

    BY_SIZE = 0  # csrc/tile/launcher.cuh decides, for every call of the layer
    PLAIN = 1
    SPLIT_K = 2
    FOLDED = 3  # reads folded activations (csrc/tile/folded.cuh)


# Every tile that was considered for the wheel; the proof below says which of them can be.
CANDIDATES = (
    *(Tile(m=m, n=n, swap_ab=False) for m in (64, 128, 256) for n in (8, 16, 32, 64, 128, 256)),
    *(Tile(m=m, n=n, swap_ab=True) for m in (8, 16, 32) for n in (64, 128, 256)),
)
