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
from ..weights import MoEWeights

_TENSORS = ("w13", "w2", "w13_bias", "w2_bias")
_MATRICES = ("w13", "w2")


class MoEExperts(nn.Module):
    """Experts that stand where transformers' `GptOssExperts` stood; the weights are buffers.

    ``to(device)`` moves them, and puts the weights' words in that device's order. A state dict holds them in the order
    of CPU, wherever it was made, so that it loads on any device. A change of dtype (``half()``, ``to(torch.bfloat16)``)
    leaves them as they are: codes are bytes, and the layer adds its biases in float32. No gradient flows.

    Args:
        weights: the layer's weights.
    """

    def __init__(self, weights: MoEWeights) -> None:
        super().__init__()
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
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _MATRICES:
            key = prefix + name
            destination[key] = self._reordered(name, destination[key], self._word_order, WordOrder.CONTAINERS)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        order, given = self._word_order, dict(state_dict)
        for name in _MATRICES:
            tensor = given.get(prefix + name)
            if isinstance(tensor, Tensor) and tensor.shape == getattr(self, name).shape:  # torch reports others
                if local_metadata.get("assign_to_params_buffers", False):
                    order = word_order_of(tensor.device)
                given[prefix + name] = self._reordered(name, tensor, WordOrder.CONTAINERS, order)
        super()._load_from_state_dict(given, prefix, local_metadata, *rest)
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
    """Puts `MoEExperts` in place of every `GptOssExperts` of a model, in place.

    Without checkpoint, each layer's weights are quantized from the model's own. A model that was loaded from an MXFP4
    checkpoint with ``Mxfp4Config(dequantize=True)`` holds values that MXFP4 represents, and those do not change.
    With checkpoint, a gpt-oss checkpoint in safetensors, the MXFP4 weights are read from it, byte for byte.

    Layers are replaced one after another, so the extra memory is one layer's. Call it before torch.compile.

    Args:
        model: a `GptOssForCausalLM`, a `GptOssModel`, or any module that holds their experts.
        checkpoint: file or directory, as for `MoEWeights.from_safetensors`.

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: the model has no GptOssExperts; weights that are not finite; sizes that are not multiples of 32.
        TypeError: the model holds MXFP4 weights packed for transformers' own kernels, whose scales it does not keep.
    """
    found = [(name, module) for name, module in model.named_modules() if _kind(module) == "GptOssExperts"]
    if not found:
        if any(_kind(module) == "Mxfp4GptOssExperts" for module in model.modules()):
            raise TypeError(
                "model: expected experts as transformers dequantizes them, got Mxfp4GptOssExperts; "
                "load it with quantization_config=Mxfp4Config(dequantize=True)"
            )
        raise ValueError(f"model: expected a model with GptOssExperts, got {type(model).__name__} without any")
    for layer, (name, experts) in enumerate(found):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, MoEExperts(_weights(experts, layer, checkpoint)))
    return len(found)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _weights(experts: Any, layer: int, checkpoint: str | Path | None) -> MoEWeights:
    numbers: dict[str, Any] = {"alpha": float(experts.alpha), "beta": 1.0, "limit": float(experts.limit)}
    if checkpoint is not None:
        return MoEWeights.from_safetensors(checkpoint, layer=layer, device=experts.gate_up_proj.device, **numbers)
    return MoEWeights.from_float(  # transformers has [E, K, N], gate and up columns interleaved
        experts.gate_up_proj.mT,
        experts.down_proj.mT,
        w13_bias=experts.gate_up_proj_bias,
        w2_bias=experts.down_proj_bias,
        **numbers,
    )
