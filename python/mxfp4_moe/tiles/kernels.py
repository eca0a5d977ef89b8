"""Which kernels a tile has on an arch, and the proof of each: csrc/tile/shapes.cuh; the build compares the two."""

from __future__ import annotations

from typing import Any

from ..archs import check_arch
from .proof import TileProof, prove_plain
from .sm90 import has_mma_sync, has_parallel_k, has_wgmma, prove_mma_sync, prove_parallel_k, prove_wgmma
from .tile import Kernel, Tile


def kernels_of(tile: Tile, arch: str) -> tuple[Kernel, ...]:
    """The kernels that a tile has on an arch, in the order of their numbers.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    if check_arch(arch)[0] != 9:
        return (Kernel.PLAIN,)
    parallel_k = (Kernel.PARALLEL_K,) if has_parallel_k(*tile.mn) else ()
    folded = (Kernel.FOLDED,) if has_mma_sync(*tile.mn) or has_wgmma(*tile.mn) else ()
    return (Kernel.PLAIN, *parallel_k, *folded)


def prove(tile: Tile, arch: str, kernel: Kernel = Kernel.PLAIN) -> TileProof:
    """Stages, shared memory by part, registers and threads of one kernel of `tile` on `arch`, legal or not.

    Raises:
        ArchError: the kernel has no code for the arch.
        ValueError: the tile does not have this kernel there.
    """
    has = kernels_of(tile, arch)
    if kernel not in has:
        names = ", ".join(each.name for each in has)
        raise ValueError(f"kernel: expected one that {tile.name} has on sm_{arch} ({names}), got {kernel.name}")
    if kernel == Kernel.PARALLEL_K:
        return prove_parallel_k(tile, arch)
    if kernel == Kernel.FOLDED:
        return prove_mma_sync(tile, arch) if has_mma_sync(*tile.mn) else prove_wgmma(tile, arch)
    return prove_plain(tile, arch)


def facts(tile: Tile, arch: str) -> dict[str, Any]:
    """What the compiled tile must report for this arch: its shape, and by label the facts of each kernel.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    return {
        "tile_m": tile.m,
        "tile_n": tile.n,
        "swap_ab": int(tile.swap_ab),
        "kernels": {kernel.label: prove(tile, arch, kernel).facts() for kernel in kernels_of(tile, arch)},
    }
