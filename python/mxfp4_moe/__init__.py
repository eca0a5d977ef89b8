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

from ._wheel import built_archs, conflict, emulated_on, emulation_words, version

if TYPE_CHECKING:
    from .fused_moe import fused_moe, get_cutlass_fused_moe_module, prewarm_moe_tiles
    from .routing import fused_moe_from_logits, topk_softmax
    from .tiles import select_tile_mn_for_sm120
    from .weights import Activation, GateUpOrder, MoEWeights

__version__ = version()

if _conflict := conflict():
    warnings.warn(_conflict, RuntimeWarning, stacklevel=2)

if _emulation := emulation_words(built_archs(), emulated_on()):
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
    "fused_moe": "fused_moe",
    "fused_moe_from_logits": "routing",
    "get_cutlass_fused_moe_module": "fused_moe",
    "prewarm_moe_tiles": "fused_moe",
    "select_tile_mn_for_sm120": "tiles",
    "topk_softmax": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except (ImportError, OSError, AttributeError) as error:
        _explain(error)
        raise
    value = getattr(module, name)
    globals()[name] = value  # the next time it is found without coming here
    return value


def _explain(error: Exception) -> None:
    """Raises an ImportError with the next step, where torch is missing, broken or too old; returns otherwise."""
    from . import _troubles, _wheel

    torch = sys.modules.get("torch")
    built_with = (_wheel.read_report() or {}).get("built_with") or {}
    here = _troubles.Versions(
        wheel_cuda=str(built_with.get("cuda", "")),
        torch_cuda=getattr(getattr(torch, "version", None), "cuda", None) or "",
        importing_torch=torch is None,
    )
    if trouble := _troubles.recognize(_troubles.words(error), here):
        means, remedy = trouble.words(here)
        raise ImportError(
            f"{__name__} cannot be used ({_troubles.words(error)}): {means}; {remedy}; {_troubles.DOCTOR}"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`mxfp4_moe.fused_moe` is the function, also after Python has imported the submodule of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "fused_moe" and isinstance(value, ModuleType):
            value = value.fused_moe
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
