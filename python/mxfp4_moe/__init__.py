"""Fused mixture-of-experts layers with MXFP4 weights and MXFP8 activations, compiled ahead of time.

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
    from ._call.fused_moe import fused_moe
    from ._call.modules import get_cutlass_fused_moe_module, prewarm_moe_tiles
    from .routing import fused_moe_from_logits, topk_softmax
    from .tiles import select_tile_mn_for_sm120
    from .weights import Activation, GateUpOrder, MoEWeights

__version__ = wheel.version()

importing.watch()

if _conflict := wheel.conflict():
    warnings.warn(_conflict, RuntimeWarning, stacklevel=2)

if _emulation := wheel.emulation_words(wheel.built_archs(), wheel.emulated_on()):
    print(f"mxfp4_moe {__version__}: {_emulation}", file=sys.stderr)  # not a warning, which could be ignored

__all__ = [
    "Activation",
    "GateUpOrder",
    "MoEWeights",
    "__version__",
    "fused_moe",
    "fused_moe_from_logits",
    "get_cutlass_fused_moe_module",
    "prewarm_moe_tiles",
    "select_tile_mn_for_sm120",
    "topk_softmax",
]

_MODULE_OF = {
    "Activation": "weights",
    "GateUpOrder": "weights",
    "MoEWeights": "weights",
    "fused_moe": "_call.fused_moe",
    "fused_moe_from_logits": "routing",
    "get_cutlass_fused_moe_module": "_call.modules",
    "prewarm_moe_tiles": "_call.modules",
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
