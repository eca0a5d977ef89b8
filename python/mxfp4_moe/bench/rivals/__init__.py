"""Other implementations of the same layer: found on this machine, given the same weights, checked, then timed.

Each file has `NAME`, `DESCRIPTION`, `find(folders, capability)` and `prepare(found, tensors)`:

    find      where the package is, and whether it runs on such a GPU; `packages.Absent` with one sentence if not
    prepare   the layer's weights as the rival wants them, and from them a function of `CallInputs` that gives a call:
              from logits to output [T, H], without arguments, fit for a CUDA graph

Preparing may take long (some compile); it is not timed. What a rival computes is compared with our output before it is
timed, because a wrong call is often a fast one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import b12x, flashinfer, flashinfer_sm12x, humming, marlin, triton_kernels
from .packages import Absent, Found

if TYPE_CHECKING:
    from torch import Tensor

    from ...weights import MoEWeights
    from ..inputs import CallInputs, LayerTensors

__all__ = ["RIVALS", "TOLERANCE", "Absent", "Found", "Rival", "choose"]

# Largest relative error (norm of the difference over norm of ours) at which a rival still computes the same layer.
# Activations in bfloat16, in FP8 with a scale for each token, or in MXFP8 differ by a few per cent; a wrong layout,
# activation or routing gives an error near 1.4.
TOLERANCE = 0.15

MakeCall = Callable[["CallInputs"], Callable[[], "Tensor"]]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One entry of the table. `layer`, where it computes another layer than gpt-oss's: our weights of that one."""

    name: str
    description: str
    find: Callable[[Sequence[Path], tuple[int, int]], Found]
    prepare: Callable[[Found, LayerTensors], MakeCall]
    layer: Callable[[LayerTensors], MoEWeights] | None = None


RIVALS = (
    Rival(
        name=humming.W4A8_NAME,
        description=humming.W4A8_DESCRIPTION,
        find=humming.find,
        prepare=humming.prepare_w4a8,
    ),
    Rival(
        name=humming.W4A16_NAME,
        description=humming.W4A16_DESCRIPTION,
        find=humming.find,
        prepare=humming.prepare_w4a16,
    ),
    Rival(
        name=triton_kernels.NAME,
        description=triton_kernels.DESCRIPTION,
        find=triton_kernels.find,
        prepare=triton_kernels.prepare,
    ),
    Rival(name=marlin.NAME, description=marlin.DESCRIPTION, find=marlin.find, prepare=marlin.prepare),
    Rival(name=flashinfer.NAME, description=flashinfer.DESCRIPTION, find=flashinfer.find, prepare=flashinfer.prepare),
    Rival(
        name=flashinfer_sm12x.NAME,
        description=flashinfer_sm12x.DESCRIPTION,
        find=flashinfer_sm12x.find,
        prepare=flashinfer_sm12x.prepare,
        layer=flashinfer_sm12x.layer,
    ),
    Rival(name=b12x.NAME, description=b12x.DESCRIPTION, find=b12x.find, prepare=b12x.prepare, layer=b12x.layer),
)


def choose(text: str) -> tuple[Rival, ...]:
    """The rivals that the option names: "all", "none", or names with commas between.

    Raises:
        ValueError: a name that no rival has.
    """
    if text == "all":
        return RIVALS
    if text == "none":
        return ()
    by_name = {rival.name: rival for rival in RIVALS}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in by_name:
            raise ValueError(f"rivals: expected all, none, or some of {', '.join(by_name)}, got {name!r}")
    return tuple(by_name[name] for name in dict.fromkeys(names))
