"""The kernel that an arch has for a tile and a pair of formats, and its proof, which the build holds it to."""

from __future__ import annotations

from ..archs import check_arch
from .bf16 import prove_sm12x_bf16, prove_sm90
from .pairs import HALF_PAIRS, MXFP4_MXFP8, PAIRS, kernel_pair
from .proof import TileProof, prove_sm12x
from .tile import Tile


def prove(tile: Tile, arch: str, pair: str = MXFP4_MXFP8) -> TileProof:
    """Stages, shared memory by part, registers and threads of the kernel that computes `pair` on `arch`, legal or not.

    Raises:
        ArchError: the kernel has no code for the arch.
        ValueError: there is no such pair.
    """
    if pair not in PAIRS:
        raise ValueError(f"pair: expected one of {', '.join(PAIRS)}, got {pair!r}")
    reads = kernel_pair(arch, pair)
    if check_arch(arch)[0] == 9:
        return prove_sm90(tile, arch, reads)
    return prove_sm12x_bf16(tile, arch, reads) if reads in HALF_PAIRS else prove_sm12x(tile, arch, reads)


def facts(tile: Tile, arch: str, pair: str = MXFP4_MXFP8) -> dict[str, int]:
    """What the compiled kernel must report: `facts()` of its proof.

    Raises:
        ArchError, ValueError: as `prove`.
    """
    return prove(tile, arch, pair).facts()
