"""Tiles: the manifest's model, the proof that a tile fits the hardware, and the choice of a tile for a call.

Everything here is a pure function of its arguments and the standard library alone, because the wheel's build loads
these files before the package exists. Importing a tile's extension module is done elsewhere.
"""

from .kernels import facts, prove
from .manifest import MANIFEST_NAME, Manifest, ManifestError, Profile, load_manifest, manifest_path, parse_manifest
from .pairs import (
    FP4_PAIRS,
    HALF_PAIRS,
    MXFP4_BF16,
    MXFP4_FP16,
    MXFP4_MXFP4,
    MXFP4_MXFP8,
    NVFP4_BF16,
    NVFP4_FP16,
    NVFP4_NVFP4,
    PAIRS,
    expert_bytes,
    formats_of,
    kernel_pair,
    kernel_pairs,
    pair_of,
    scale_words,
    value_bytes,
)
from .proof import (
    MAX_ACCUMULATORS,
    MAX_ACTIVATING_ACCUMULATORS,
    TILE_K,
    WEIGHT_BLOCK_ROWS,
    TileProof,
    weight_block_bytes,
)
from .selection import expected_rows_per_expert, nearest_tile, select_tile, select_tile_mn_for_sm120
from .stages import MAX_BLOCKS_PER_SM, MAX_STAGES, max_smem_per_block
from .tile import CANDIDATES, Tile

__all__ = [
    "CANDIDATES",
    "FP4_PAIRS",
    "HALF_PAIRS",
    "MANIFEST_NAME",
    "MAX_ACCUMULATORS",
    "MAX_ACTIVATING_ACCUMULATORS",
    "MAX_BLOCKS_PER_SM",
    "MAX_STAGES",
    "MXFP4_BF16",
    "MXFP4_FP16",
    "MXFP4_MXFP4",
    "MXFP4_MXFP8",
    "NVFP4_BF16",
    "NVFP4_FP16",
    "NVFP4_NVFP4",
    "PAIRS",
    "TILE_K",
    "WEIGHT_BLOCK_ROWS",
    "Manifest",
    "ManifestError",
    "Profile",
    "Tile",
    "TileProof",
    "expected_rows_per_expert",
    "expert_bytes",
    "facts",
    "formats_of",
    "kernel_pair",
    "kernel_pairs",
    "load_manifest",
    "manifest_path",
    "max_smem_per_block",
    "nearest_tile",
    "pair_of",
    "parse_manifest",
    "prove",
    "scale_words",
    "select_tile",
    "select_tile_mn_for_sm120",
    "value_bytes",
    "weight_block_bytes",
]
