"""gpt-oss of Hugging Face transformers (version 5) with this library's experts: one call, `replace_experts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._call.fused_moe import fused_moe
from .._checkpoints.prepare import move
from ..formats import WordOrder, word_order_of
from ..weights import GateUpOrder, MoEWeights
from . import _transformers_models as models

_TENSORS = ("w13", "w2", "w13_bias", "w2_bias")
_MATRICES = ("w13", "w2")
_STORED = {  # argument of from_mxfp4 -> name in a state dict, which is that of gpt-oss's checkpoints
    "w13": "gate_up_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2": "down_proj_blocks",
    "w2_scale": "down_proj_scales",
    "w2_bias": "down_proj_bias",
}


class MoEExperts(nn.Module):
    """Experts that stand where transformers' `GptOssExperts` stood; the weights are buffers.

    ``to(device)`` moves them, and puts the weights' words in that device's order. A change of dtype (``half()``,
    ``to(torch.bfloat16)``) leaves them as they are: codes are bytes, and the layer adds its biases in float32. A state
    dict has gpt-oss's names and MXFP4 bytes, wherever it was made, so that what is saved is a checkpoint of the model:
    gate_up_proj_blocks, gate_up_proj_scales, gate_up_proj_bias, down_proj_blocks, down_proj_scales, down_proj_bias;
    biases are bfloat16 where that holds them exactly. A backward pass through the module is an error that says so.

    Args:
        weights: the layer's weights.
        unsaved: why no state dict can be made of them; empty where one can.
    """

    def __init__(self, weights: MoEWeights, *, unsaved: str = "") -> None:
        super().__init__()
        self._unsaved = unsaved
        for name in _TENSORS:
            self.register_buffer(name, getattr(weights, name))
        self._weights = weights
        self._word_order = weights.word_order  # of the buffers

    @property
    def weights(self) -> MoEWeights:
        """The buffers as `MoEWeights`."""
        if any(getattr(self._weights, name) is not getattr(self, name) for name in _TENSORS):
            device = self._device()
            tensors = {name: getattr(self, name) for name in _TENSORS}
            for name in ("alpha", "beta", "limit"):  # with one number for each expert they move too
                value = getattr(self._weights, name)
                tensors[name] = value.to(device) if isinstance(value, Tensor) else value
            self._weights = replace(self._weights, **tensors, word_order=self._word_order)
        return self._weights

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [..., H], router_indices [T, k], routing_weights [T, k] -> [..., H] in hidden_states' dtype.

        float32 hidden states are rounded to bfloat16 on the way in.
        """
        if routing_weights.shape != router_indices.shape:
            raise ValueError(
                f"routing_weights: expected {list(router_indices.shape)}, a weight for each chosen expert, got "
                f"{list(routing_weights.shape)}; transformers before version 5 gives one for each expert there is"
            )
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if rows.dtype not in (torch.bfloat16, torch.float16):
            rows = rows.to(torch.bfloat16)
        out = fused_moe(rows, routing_weights.to(torch.float32).contiguous(), router_indices.contiguous(), self.weights)
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def extra_repr(self) -> str:
        """The sizes, for print(model)."""
        return repr(self.weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEExperts:
        # What nn.Module calls for to(), cuda(), half() and so on: devices are followed, dtypes are not.
        biases = {name: self._buffers[name] for name in ("w13_bias", "w2_bias")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, bias in biases.items():
            if bias is not None:
                self._buffers[name] = bias.to(self._device())
        order = word_order_of(self._device())
        for name in _MATRICES:
            self._buffers[name] = self._reordered(name, self._buffers[name], self._word_order, order)
        self._word_order = order
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._unsaved:
            raise RuntimeError(self._unsaved)
        # Prepared rows know nothing of the order in which a checkpoint had them, and these names have this one.
        tensors = replace(self.weights, gate_up_order=GateUpOrder.INTERLEAVED).to_mxfp4()._asdict()
        for argument, name in _STORED.items():
            tensor = tensors[argument]
            if tensor is not None:
                destination[prefix + name] = _as_stored(argument, tensor)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = dict(state_dict)
        stored = {argument: given.pop(prefix + name, None) for argument, name in _STORED.items()}
        own = {name: getattr(self, name) for name in _TENSORS}
        lacking = [n for a, n in _STORED.items() if stored[a] is None and own.get(a.removesuffix("_scale")) is not None]
        if lacking:
            missing_keys.extend(prefix + name for name in lacking)
            return
        try:
            loaded = MoEWeights.from_mxfp4(**stored, activation=self._weights.activation)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        order = self._word_order
        if local_metadata.get("assign_to_params_buffers", False):
            order = loaded.word_order
        for name in _TENSORS:
            tensor = getattr(loaded, name)
            fits = (tensor is None) == (own[name] is None) and (tensor is None or tensor.shape == own[name].shape)
            if not fits or loaded.intermediate_size != self._weights.intermediate_size:
                error_msgs.append(f"size mismatch for {prefix}{name}: expected {self._weights}, got {loaded}")
                return
            if tensor is not None:
                matrix = name in _MATRICES
                given[prefix + name] = self._reordered(name, tensor, loaded.word_order, order) if matrix else tensor
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._word_order = order

    def _reordered(self, name: str, weight: Any, old: WordOrder, new: WordOrder) -> Any:
        """One of the matrices in another word order; itself where it has that already."""
        if old is new:
            return weight
        hidden, inter = self._weights.hidden_size, self._weights.intermediate_size
        n, k = (self._weights.w13_rows, hidden) if name == "w13" else (hidden, inter)
        return move(weight, weight.device, n, k, old, new)

    def _device(self) -> torch.device:
        w13 = self._buffers["w13"]
        assert w13 is not None
        return w13.device


def replace_experts(model: nn.Module, *, checkpoint: str | Path | None = None) -> int:
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
    refused.

    Args:
        model: a `GptOssForCausalLM`, a `GptOssModel`, or any module that holds decoder layers of one.
        checkpoint: file or directory, as for `MoEWeights.from_safetensors`.

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: the model has no GptOssExperts; experts on meta without a checkpoint; a checkpoint of another model
            or without one of the layers; weights that are not finite; sizes that are not multiples of 32.
        TypeError: experts packed for transformers' own kernels, sharded ones, or those of a version of transformers
            that calls them otherwise.
    """
    found = models.find_experts(model, MoEExperts)
    if checkpoint is None:
        models.check_here(found)
    else:
        models.check_checkpoint(found, checkpoint)
    unsaved = {experts.name for experts in models.layers_without_format(found)}
    made = []
    for experts in found:
        try:
            weights = _weights(experts, checkpoint)
        except ValueError as error:
            raise ValueError(f"{experts.name or models.EXPERTS}: {error}") from error
        made.append(MoEExperts(weights, unsaved=_UNSAVED.format(experts.name) if experts.name in unsaved else ""))
    if found and not found[0].name:
        raise ValueError(f"model: expected a module that holds {models.EXPERTS}, got {models.EXPERTS} itself")
    for experts, module in zip(found, made, strict=True):
        parent, _, attribute = experts.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.train(experts.module.training))
    models.note_format(found)
    return len(found)


_UNSAVED = (
    "{}: cannot be saved, because it was replaced in a part of a model that does not have the model's configuration, "
    "which must say that these weights are MXFP4; call replace_experts on the model or on whole decoder layers"
)


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


def _as_stored(argument: str, tensor: Tensor) -> Tensor:
    """As gpt-oss's checkpoints have it: blocks of 16 bytes, biases in bfloat16 unless that would change them."""
    if argument.endswith("_bias"):
        narrow = tensor.to(torch.bfloat16)
        return narrow if tensor.is_meta or torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return tensor if argument.endswith("_scale") else tensor.view(*tensor.shape[:2], -1, 16)
