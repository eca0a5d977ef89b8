"""Fused mixture-of-experts layers with MXFP4 weights, compiled ahead of time.

The public names come from their modules when they are first asked for. So the command line, which is there for the
case that torch does not work, starts without importing torch.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._install import importing, wheel

if TYPE_CHECKING:
    from ._call.activation_format import activation_formats
    from ._call.fused_moe import fused_moe
    from ._call.modules import SM120_SUPPORTED_TILE_MN, prewarm_moe_tiles
    from .flashinfer_api.modules import get_cutlass_fused_moe_module
    from .routers import Router
    from .routing import fused_moe_from_logits, load_router, select_experts, topk_softmax
    from .shared_experts import join_shared_experts
    from .tiles import select_tile_mn_for_sm120
    from .weights import Activation, GateUpOrder, MoEWeights

__version__ = wheel.version()

importing.watch()

if _conflict := wheel.conflict():
    warnings.warn(_conflict, RuntimeWarning, stacklevel=2)

if _emulation := wheel.emulation_words(wheel.built_archs(), wheel.emulated_on()):
    print(f"mxfp4_moe {__version__}: {_emulation}", file=sys.stderr)  # not a warning, which could be ignored

__all__ = [
    "SM120_SUPPORTED_TILE_MN",
    "Activation",
    "GateUpOrder",
    "MoEWeights",
    "Router",
    "__version__",
    "activation_formats",
    "fused_moe",
    "fused_moe_from_logits",
    "get_cutlass_fused_moe_module",
    "join_shared_experts",
    "load_router",
    "prewarm_moe_tiles",
    "select_experts",
    "select_tile_mn_for_sm120",
    "topk_softmax",
]

_MODULE_OF = {
    "SM120_SUPPORTED_TILE_MN": "_call.modules",
    "Activation": "weights",
    "GateUpOrder": "weights",
    "MoEWeights": "weights",
    "Router": "routers",
    "activation_formats": "_call.activation_format",
    "fused_moe": "_call.fused_moe",
    "fused_moe_from_logits": "routing",
    "get_cutlass_fused_moe_module": "flashinfer_api.modules",
    "join_shared_experts": "shared_experts",
    "load_router": "routing",
    "prewarm_moe_tiles": "_call.modules",
    "select_experts": "routing",
    "select_tile_mn_for_sm120": "tiles",
    "topk_softmax": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next time it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
