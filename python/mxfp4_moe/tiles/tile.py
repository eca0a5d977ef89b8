"""A tile of the wheel, by name and shape."""

from __future__ import annotations

from dataclasses import dataclass


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

    @classmethod
    def from_mn(cls, tile_mn: tuple[int, int]) -> Tile:
        """The tile of this shape; fewer than 64 rows means swapped operands."""
        m, n = tile_mn
        return cls(m=m, n=n, swap_ab=m < 64)


# Every tile that was considered for the wheel; the proof below says which of them can be.
CANDIDATES = (
    *(Tile(m=m, n=n, swap_ab=False) for m in (64, 128, 256) for n in (8, 16, 32, 64, 128, 256)),
    *(Tile(m=m, n=n, swap_ab=True) for m in (8, 16, 32) for n in (64, 128, 256)),
)
