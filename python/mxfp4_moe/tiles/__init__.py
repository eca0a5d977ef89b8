"""Tiles: the manifest's model, the proof that a tile fits the hardware, and the choice of a tile for a call.

Everything here is a pure function of its arguments and the standard library alone, because the wheel's build loads
these files before the package exists. Importing a tile's extension module is done elsewhere.
"""

from .manifest import MANIFEST_NAME, Manifest, ManifestError, Profile, load_manifest, manifest_path, parse_manifest
from .proof import (
    MAX_ACCUMULATORS,
    MAX_ACTIVATING_ACCUMULATORS,
    MAX_BLOCKS_PER_SM,
    MAX_STAGES,
    TILE_K,
    TileProof,
    kernels_of,
    max_smem_per_block,
    prove,
)
from .selection import expected_rows_per_expert, nearest_tile, select_tile, select_tile_mn_for_sm120
from .tile import CANDIDATES, Kernel, Tile

__all__ = [
    "CANDIDATES",
    "MANIFEST_NAME",
    "MAX_ACCUMULATORS",
    "MAX_ACTIVATING_ACCUMULATORS",
    "MAX_BLOCKS_PER_SM",
    "MAX_STAGES",
    "TILE_K",
    "Kernel",
    "Manifest",
    "ManifestError",
    "Profile",
    "Tile",
    "TileProof",
    "expected_rows_per_expert",
    "kernels_of",
    "load_manifest",
    "manifest_path",
    "max_smem_per_block",
    "nearest_tile",
    "parse_manifest",
    "prove",
    "select_tile",
    "select_tile_mn_for_sm120",
]
