"""Fused mixture-of-experts layers with MXFP4 weights and MXFP8 activations, compiled ahead of time.

The public names come from their modules when they are first asked for. So the command line, which is there for the
case that torch does not work, starts without importing torch.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._wheel import conflict, version

if TYPE_CHECKING:
    from .fused_moe import fused_moe, get_cutlass_fused_moe_module, prewarm_moe_tiles
    from .routing import topk_softmax
    from .tiles import select_tile_mn_for_sm120
    from .weights import Activation, GateUpOrder, MoEWeights

__version__ = version()

if _conflict := conflict():
    warnings.warn(_conflict, RuntimeWarning, stacklevel=2)

__all__ = [
    "Activation",
    "GateUpOrder",
    "MoEWeights",
    "__version__",
    "fused_moe",
    "get_cutlass_fused_moe_module",
    "prewarm_moe_tiles",
    "select_tile_mn_for_sm120",
    "topk_softmax",
]

_MODULE_OF = {
    "Activation": "weights",
    "GateUpOrder": "weights",
    "MoEWeights": "weights",
    "fused_moe": "fused_moe",
    "get_cutlass_fused_moe_module": "fused_moe",
    "prewarm_moe_tiles": "fused_moe",
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


class _Package(ModuleType):
    """`mxfp4_moe.fused_moe` is the function, also after Python has imported the submodule of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "fused_moe" and isinstance(value, ModuleType):
            value = value.fused_moe
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
