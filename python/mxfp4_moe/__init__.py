"""Fused mixture-of-experts layers with MXFP4 weights and MXFP8 activations, compiled ahead of time."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .fused_moe import fused_moe, get_cutlass_fused_moe_module, prewarm_moe_tiles
from .tiles import select_tile_mn_for_sm120
from .weights import Activation, GateUpOrder, MoEWeights

try:
    __version__ = version("mxfp4-moe")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "Activation",
    "GateUpOrder",
    "MoEWeights",
    "__version__",
    "fused_moe",
    "get_cutlass_fused_moe_module",
    "prewarm_moe_tiles",
    "select_tile_mn_for_sm120",
]
