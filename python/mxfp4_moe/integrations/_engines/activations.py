"""Which activations a layer computes with: what the engine would have, unless the user asks for others.

Installing a package must not change a model's numbers unseen. MXFP8 activations keep three bits of mantissa
(docs/accuracy.md), so an engine that computes W4A16 gets W4A8 only where it was asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .settings import ACTIVATIONS_VARIABLE, Settings
from .table import Engine

ALWAYS_THERE = ("mxfp8",)
IN_WORDS = {
    "mxfp8": "MXFP8 activations (W4A8)",
    "bf16": "bfloat16 activations (W4A16)",
    "fp16": "float16 activations (W4A16)",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The activations of a layer.

    Attributes:
        format: what `fused_moe` takes as activation_format: "mxfp8", "bf16" or "fp16"; "" where the engine's own
            kernels must run.
        reason: which, and whose wish it was; or why not.
        next_step: what else the user could do, or "".
    """

    format: str
    reason: str
    next_step: str = ""


def formats_on(device: Any) -> Sequence[str]:
    """The activation formats that this package has kernels for on a torch device."""
    package = sys.modules[__name__.partition(".")[0]]
    ask = getattr(package, "activation_formats", None)
    return ALWAYS_THERE if ask is None else tuple(ask(device))


def choose_activations(
    engine: Engine,
    settings: Settings,
    formats: Sequence[str],
    *,
    dtype: str = "bf16",
    engine_default: str = "",
    wish: str = "",
) -> Choice:
    """The activations for a layer.

    Args:
        formats: those that we have on the layer's device, `formats_on`.
        dtype: "bf16" or "fp16", the model's: an engine's W4A16 takes its hidden states as they are. By name "bf16" is
            taken with both, where float16 hidden states are rounded to it, and "fp16" with float16 ones alone.
        engine_default: what the engine would compute with here, where that is not its row's `activations`.
        wish: whose wish it was, in words, where it was not the settings' or the engine's.
    """
    asked = settings.activations != "engine"
    wanted = settings.activations if asked else engine_default or engine.activations
    wish = wish or (f"as {ACTIVATIONS_VARIABLE} says" if asked else f"as {engine.title} computes")
    name = wanted if asked or wanted == "mxfp8" else dtype
    if name == "fp16" and dtype != "fp16":
        reason = f"{IN_WORDS[name]}, {wish}, take a float16 model, and this one is computed in bfloat16"
        return Choice(format="", reason=reason, next_step=f"{ACTIVATIONS_VARIABLE}=bf16 takes it as it is")
    if name in formats:
        return Choice(format=name, reason=f"{IN_WORDS[name]}, {wish}")
    others = [other for other in formats if other != name]
    step = ""
    if "mxfp8" in others:
        step = f"{ACTIVATIONS_VARIABLE}=mxfp8 takes our kernels with MXFP8 activations (docs/accuracy.md)"
    if name == "fp16" and "bf16" in others:
        step = f"{ACTIVATIONS_VARIABLE}=bf16 rounds to bfloat16 ones; {step}"
    return Choice(format="", reason=f"no kernels with {IN_WORDS[name]} on this device, {wish}", next_step=step)
