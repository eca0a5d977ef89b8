"""gpt-oss of Hugging Face transformers (version 5) with this library's experts.

`enable` for models that are about to be loaded, `replace_experts` for those in memory.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..weights import MoEWeights
from . import _transformers_models as models
from ._engines import Choice, Settings, register, say
from ._engines.activations import IN_WORDS, formats_on
from ._engines.table import TRANSFORMERS
from ._transformers_experts import MoEExperts

__all__ = ["MoEExperts", "disable", "enable", "replace_experts"]

_FORMATS = ("bf16", "fp16", "mxfp8")
_METHOD = "mxfp4"  # transformers' name for the format
_own: list[Any] = []  # transformers' own quantizer, while ours is in its place


def enable(*, activation_format: str | None = None) -> bool:
    """From now on `from_pretrained` loads an MXFP4 gpt-oss into the kernels' layout, and its experts run on them.

    The checkpoint's bytes are prepared matrix by matrix for the device that executes the layer; no dequantized copy is
    made. ``device_map``, offloading to CPU and disk, an expert-parallel plan and ``save_pretrained`` (MXFP4 under the
    checkpoint's names) work as in transformers. Each load says in one line which activations it computes with. Where
    our kernels do not serve, it says why in one line, and transformers' own path does: another GPU, ``use_kernels``, a
    checkpoint that is not MXFP4, or activations that we have no kernels for.

    Nothing is raised: of a version of transformers that was not tested, or that lacks what is needed here, one line
    tells, and transformers stays as it is. MXFP4_MOE_ENGINES and the other variables of docs/engines.md count here too.

    Args:
        activation_format: "bf16" or "fp16" (W4A16; transformers itself computes in the model's dtype), or "mxfp8"
            (W4A8; docs/accuracy.md). By default what MXFP4_MOE_ACTIVATIONS says, and without it transformers' own.
            "fp16" is for models in float16; others stay on transformers' path.

    Returns:
        Whether it is enabled.

    Raises:
        ValueError: another activation_format.
    """
    if activation_format not in (None, *_FORMATS):
        raise ValueError(f"activation_format: expected 'bf16', 'fp16', 'mxfp8' or None, got {activation_format!r}")
    standing = register(
        TRANSFORMERS, lambda settings: _look() or "from_pretrained of an MXFP4 gpt-oss loads our layout"
    )
    if not standing.is_in:
        return False
    mapping, quantizer = _look_up()
    settings = Settings.read()
    if activation_format is not None:
        settings = replace(settings, activations=activation_format)
    quantizer.settings = settings
    quantizer.wish = "" if activation_format is None else "as enable() was asked"
    if not _own:
        _own.append(mapping[_METHOD])
    mapping[_METHOD] = quantizer
    return True


def disable() -> None:
    """Puts transformers' own quantizer back; models that are loaded stay as they are."""
    if _own:
        mapping, _ = _look_up()
        mapping[_METHOD] = _own.pop()


def _look_up() -> tuple[dict[str, Any], Any]:
    """transformers' table of quantizers, and our class for it."""
    mapping: dict[str, Any] = import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    return mapping, import_module("._transformers_quantizer", __package__).Quantizer


def _look() -> str:
    mapping, quantizer = _look_up()
    if not issubclass(quantizer, mapping[_METHOD]):
        raise TypeError(f"transformers' quantizer for {_METHOD} is {mapping[_METHOD].__name__} here, somebody else's")
    return ""


def replace_experts(
    model: nn.Module, *, checkpoint: str | Path | None = None, activation_format: str | None = None
) -> int:
    """Puts `MoEExperts` in place of every `GptOssExperts` of a model, in place; of all, or after an error of none.

    Without checkpoint, each layer's weights are quantized from the model's own. A model that was loaded from an MXFP4
    checkpoint with ``Mxfp4Config(dequantize=True)`` holds values that MXFP4 represents, and those do not change.
    With checkpoint, a gpt-oss checkpoint in safetensors, the MXFP4 weights are read from it, byte for byte; then
    experts may be on meta (offloaded, or never loaded). A layer gets the weights of its own number, which its attention
    knows, also where only a part of a model is given; every size is compared with the checkpoint's before anything is
    read.

    The new weights of all layers are made before the first old ones go, so the extra memory is theirs: about a quarter
    of what experts in bfloat16 have. Call it before torch.compile. Experts that were replaced before stay as they are.

    What the model saves (`save_pretrained`, `state_dict`) is then a gpt-oss checkpoint with these MXFP4 bytes, and its
    configuration says so (quantization_config). Of layers whose configuration is not within reach, a state dict is
    refused. One line says which activations the layers compute with.

    Args:
        model: a `GptOssForCausalLM`, a `GptOssModel`, or any module that holds decoder layers of one.
        checkpoint: file or directory, as for `MoEWeights.from_safetensors`.
        activation_format: "bf16" or "fp16" (W4A16; transformers itself computes in the model's dtype), or "mxfp8"
            (W4A8; docs/accuracy.md). By default the first of these that every layer's device has kernels for: of a
            model in float16 "fp16", then "bf16", to which its hidden states are rounded, then "mxfp8".

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: the model has no GptOssExperts; experts on meta without a checkpoint; a checkpoint of another model
            or without one of the layers; weights that are not finite; sizes that are not multiples of 32; an
            activation_format that is unknown, or that a layer's device has no kernels for.
        TypeError: experts packed for transformers' own kernels, sharded ones, or those of a version of transformers
            that calls them otherwise.
    """
    found = models.find_experts(model, MoEExperts)
    if checkpoint is None:
        models.check_here(found)
    else:
        models.check_checkpoint(found, checkpoint)
    activations = _activations(found, activation_format)
    unsaved = {experts.name for experts in models.layers_without_format(found)}
    made = []
    for experts in found:
        try:
            weights = _weights(experts, checkpoint)
            weights = weights.to(weights.device, activations.format)
        except ValueError as error:
            raise ValueError(f"{experts.name or models.EXPERTS}: {error}") from error
        why = _UNSAVED.format(experts.name) if experts.name in unsaved else ""
        made.append(MoEExperts(weights, activation_format=activations.format, unsaved=why))
    if found and not found[0].name:
        raise ValueError(f"model: expected a module that holds {models.EXPERTS}, got {models.EXPERTS} itself")
    for experts, module in zip(found, made, strict=True):
        parent, _, attribute = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.train(experts.module.training))
    models.note_format(found)
    if found:
        line = f"mxfp4-moe runs the experts of {len(found)} layers of {type(model).__name__}: {activations.reason}"
        say(TRANSFORMERS, line, once=False)
    return len(found)


_UNSAVED = (
    "{}: cannot be saved, because it was replaced in a part of a model that does not have the model's configuration, "
    "which must say that these weights are MXFP4; call replace_experts on the model or on whole decoder layers"
)


def _activations(found: list[models.FoundExperts], asked: str | None) -> Choice:
    """Which ones: those that were asked for, or bfloat16 ones, or those that every device has."""
    if asked not in (None, *_FORMATS):
        raise ValueError(f"activation_format: expected 'bf16', 'fp16', 'mxfp8' or None, got {asked!r}")
    devices = {experts.device for experts in found}
    # Not of the matrices, which some versions of transformers dequantize to bfloat16 whatever the model's dtype is.
    half = all(experts.module.gate_up_proj_bias.dtype is torch.float16 for experts in found)
    there = [name for name in _FORMATS if all(name in formats_on(device) for device in devices)]
    order = ("fp16", "bf16", "mxfp8") if half else ("bf16", "mxfp8")
    chosen = asked or next((name for name in order if name in there), "mxfp8")
    if chosen not in there:
        raise ValueError(
            f"activation_format: expected {' or '.join(map(repr, there))}, what this wheel has for "
            f"{', '.join(sorted(map(str, devices)))}, got {chosen!r}"
        )
    if chosen == "fp16" and not half:
        raise ValueError("activation_format: expected 'bf16' or 'mxfp8' for a model not in float16, got 'fp16'")
    wish = "as replace_experts was asked" if asked else "as transformers computes"
    if not asked and chosen != order[0]:
        wish = f"for want of {'float16' if half else 'bfloat16'} ones on this device"
    return Choice(format=chosen, reason=f"{IN_WORDS[chosen]}, {wish}")


def _weights(experts: models.FoundExperts, checkpoint: str | Path | None) -> MoEWeights:
    module = experts.module
    numbers: dict[str, Any] = {"alpha": float(module.alpha), "beta": 1.0, "limit": float(module.limit)}
    if checkpoint is not None:
        assert experts.number is not None
        return MoEWeights.from_safetensors(checkpoint, layer=experts.number, device=experts.device, **numbers)
    return MoEWeights.from_float(  # transformers has [E, K, N], gate and up columns interleaved
        module.gate_up_proj.mT,
        module.down_proj.mT,
        w13_bias=module.gate_up_proj_bias,
        w2_bias=module.down_proj_bias,
        **numbers,
    )
