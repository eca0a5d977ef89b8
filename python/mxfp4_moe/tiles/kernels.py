"""The kernel that an arch has for a tile, and its proof. The build compares it with what was compiled."""

from __future__ import annotations

from ..archs import check_arch
from .proof import TileProof, prove_sm12x
from .sm90 import prove_sm90
from .tile import Tile


def prove(tile: Tile, arch: str) -> TileProof:
    """Stages, shared memory by part, registers and threads of `tile` on `arch`, legal or not.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    return prove_sm90(tile, arch) if check_arch(arch)[0] == 9 else prove_sm12x(tile, arch)


def facts(tile: Tile, arch: str) -> dict[str, int]:
    """What the compiled tile must report for this arch: `facts()` of its proof.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    return prove(tile, arch).facts()
