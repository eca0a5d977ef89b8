"""The experts that stand in a transformers model: `MoEExperts` over weights, `LoadedExperts` where it loads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._call.fused_moe import fused_moe
from .._checkpoints.prepare import move
from ..formats import WordOrder, weight_bytes, word_order_of
from ..weights import GateUpOrder, MoEWeights

TENSORS = ("w13", "w2", "w13_bias", "w2_bias")
MATRICES = ("w13", "w2")
STORED = {  # argument of from_mxfp4 -> name in a state dict, which is that of gpt-oss's checkpoints
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
        activation_format: "mxfp8" (W4A8), "bf16" (W4A16, to which float16 hidden states are rounded), or "fp16" (W4A16
            of float16 hidden states).
        unsaved: why no state dict can be made of them; empty where one can.
    """

    def __init__(self, weights: MoEWeights, *, activation_format: str = "mxfp8", unsaved: str = "") -> None:
        super().__init__()
        self.activation_format = activation_format
        self._unsaved = unsaved
        for name in TENSORS:
            self._register(name, getattr(weights, name))
        self._weights = weights
        self._word_order = weights.word_order  # of the tensors

    @property
    def weights(self) -> MoEWeights:
        """The module's tensors as `MoEWeights`."""
        stale = self._weights.word_order is not self._word_order
        if stale or any(getattr(self._weights, name) is not getattr(self, name) for name in TENSORS):
            device = self._device()
            tensors = {name: getattr(self, name) for name in TENSORS}
            for name in ("alpha", "beta", "limit"):  # with one number for each expert they move too
                value = getattr(self._weights, name)
                tensors[name] = value.to(device) if isinstance(value, Tensor) else value
            made = replace(self._weights, **tensors, word_order=self._word_order)
            if self._is_lent():  # where no word order is that of every GPU, some layers are reordered in each call
                return made if device.type == "cpu" else made.to(device, self.activation_format)
            self._weights = made
        return self._weights

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [..., H], router_indices [T, k], routing_weights [T, k] -> [..., H] in hidden_states' dtype.

        float32 hidden states are rounded on the way in, to bfloat16, or to float16 with activations in it.

        Raises:
            TypeError: bfloat16 hidden states with float16 activations.
        """
        if routing_weights.shape != router_indices.shape:
            raise ValueError(
                f"routing_weights: expected {list(router_indices.shape)}, a weight for each chosen expert, got "
                f"{list(routing_weights.shape)}; transformers before version 5 gives one for each expert there is"
            )
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if rows.dtype not in (torch.bfloat16, torch.float16):
            rows = rows.to(torch.float16 if self.activation_format == "fp16" else torch.bfloat16)
        out = fused_moe(
            rows,
            routing_weights.to(torch.float32).contiguous(),
            router_indices.contiguous(),
            self.weights,
            **format_argument(self.activation_format),
        )
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def extra_repr(self) -> str:
        """The sizes and the activations, for print(model)."""
        return f"{self.weights}, activation_format={self.activation_format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoEExperts:
        # What nn.Module calls for to(), cuda(), half() and so on: devices are followed, dtypes are not.
        biases = {name: getattr(self, name) for name in ("w13_bias", "w2_bias")}
        biases = {name: bias.detach() for name, bias in biases.items() if bias is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, bias in biases.items():
            self._register(name, bias.to(self._device()))
        order = word_order_of(self._device(), self.activation_format)
        for name in MATRICES:
            self._register(name, self._reordered(name, getattr(self, name), self._word_order, order))
        self._word_order = order
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._unsaved:
            raise RuntimeError(self._unsaved)
        for name, tensor in _stored_of(self.weights).items():
            destination[prefix + name] = tensor

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
        stored = {argument: given.pop(prefix + name, None) for argument, name in STORED.items()}
        own = {name: getattr(self, name) for name in TENSORS}
        lacking = [n for a, n in STORED.items() if stored[a] is None and own.get(a.removesuffix("_scale")) is not None]
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
        for name in TENSORS:
            tensor = getattr(loaded, name)
            fits = (tensor is None) == (own[name] is None) and (tensor is None or tensor.shape == own[name].shape)
            if not fits or loaded.intermediate_size != self._weights.intermediate_size:
                error_msgs.append(f"size mismatch for {prefix}{name}: expected {self._weights}, got {loaded}")
                return
            if tensor is not None:
                matrix = name in MATRICES
                given[prefix + name] = self._reordered(name, tensor, loaded.word_order, order) if matrix else tensor
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._word_order = order
        self._weights = replace(self._weights)  # one that knows nothing of what was there

    def _reordered(self, name: str, weight: Any, old: WordOrder, new: WordOrder) -> Any:
        """One of the matrices in another word order; itself where it has that already."""
        if old is new:
            return weight
        hidden, inter = self._weights.hidden_size, self._weights.intermediate_size
        n, k = (self._weights.w13_rows, hidden) if name == "w13" else (hidden, inter)
        return move(weight, weight.device, n, k, old, new)

    def _register(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor)

    def _is_lent(self) -> bool:
        """Whether the tensors are here for one call alone, so that nothing may keep them."""
        hook: Any = getattr(self, "_hf_hook", None)
        return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))

    def _device(self) -> torch.device:
        w13: Any = self.w13
        device: torch.device = w13.device
        return device


class LoadedExperts(MoEExperts):
    """Experts that transformers loads: on meta at first, then parameter by parameter in the kernels' layout.

    The tensors are parameters without gradient, because that is what transformers and accelerate place, offload and
    shard. Until `is_loaded` a state dict has their own names (w13, w2, w13_bias, w2_bias), which the loading
    fills; afterwards it has the checkpoint's, as that of `MoEExperts`.

    Args:
        experts, hidden, inter: E, H and I.
        alpha, limit: of swiglu_oai.
        activation_format: as for `MoEExperts`.
    """

    def __init__(
        self, experts: int, hidden: int, inter: int, *, alpha: float, limit: float, activation_format: str
    ) -> None:
        meta = torch.device("meta")
        super().__init__(
            MoEWeights(
                w13=torch.empty((experts, weight_bytes(2 * inter, hidden)), dtype=torch.uint8, device=meta),
                w2=torch.empty((experts, weight_bytes(hidden, inter)), dtype=torch.uint8, device=meta),
                w13_bias=torch.empty((experts, 2 * inter), dtype=torch.float32, device=meta),
                w2_bias=torch.empty((experts, hidden), dtype=torch.float32, device=meta),
                hidden_size=hidden,
                intermediate_size=inter,
                alpha=alpha,
                limit=limit,
            ),
            activation_format=activation_format,
        )
        self.hidden_size, self.intermediate_size = hidden, inter
        self.num_experts = experts  # an expert-parallel plan makes it those that are here
        self.is_loaded = False
        self.is_saved_apart = False  # a state dict leaves it out: `stored` follows

    def prepared_for(self, order: WordOrder) -> None:
        """Says in which word order the matrices are that the loading brings."""
        self._word_order = order

    def real(self, name: str) -> Tensor:
        """A tensor of the whole layer with its values, also where it is offloaded or sharded."""
        tensor: Any = getattr(self, name)
        if tensor.is_meta:
            hook: Any = getattr(self, "_hf_hook", None)
            for one in (hook, *getattr(hook, "hooks", ())):
                if getattr(one, "weights_map", None) is not None:
                    tensor = one.weights_map[name]
                    break
        if hasattr(tensor, "full_tensor"):  # a DTensor; every rank comes here
            tensor = tensor.full_tensor()
        value: Tensor = tensor.detach()
        return value

    def stored(self) -> dict[str, Tensor]:
        """The whole layer as gpt-oss's checkpoints have it, on the CPU: their names, their MXFP4 bytes."""
        tensors: dict[str, Any] = {name: self.real(name) for name in TENSORS}
        self._refuse_part(tensors["w13"], "transformers of this version does not save expert-parallel models")
        stored = _stored_of(replace(self._weights, word_order=self._word_order, **tensors))
        return {name: tensor.cpu() for name, tensor in stored.items()}

    def _refuse_part(self, w13: Any, next_step: str) -> None:
        count = self._weights.num_global_experts
        if hasattr(w13, "full_tensor") or len(w13) != count:
            raise RuntimeError(
                f"w13: expected a whole layer of {count} experts, got one rank's part, of which no state dict can be "
                f"made; {next_step}"
            )

    def extra_repr(self) -> str:
        """The sizes and the activations, for print(model), whatever is loaded."""
        sizes = ("num_experts", "hidden_size", "intermediate_size", "activation_format")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)

    def _register(self, name: str, tensor: Tensor | None) -> None:
        assert tensor is not None
        self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_loaded:
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        elif not self.is_saved_apart:
            self._refuse_part(self.w13, "call save_pretrained on every rank, which saves whole layers")
            super()._save_to_state_dict(destination, prefix, keep_vars)


def format_argument(activation_format: str) -> dict[str, Any]:
    """What `fused_moe` is told: nothing for its default."""
    return {} if activation_format == "mxfp8" else {"activation_format": activation_format}


def _stored_of(weights: MoEWeights) -> dict[str, Tensor]:
    # Prepared rows know nothing of the order in which a checkpoint had them, and these names have this one.
    tensors = replace(weights, gate_up_order=GateUpOrder.INTERLEAVED).to_mxfp4()._asdict()
    return {
        name: _as_stored(argument, tensors[argument])
        for argument, name in STORED.items()
        if tensors[argument] is not None
    }


def _as_stored(argument: str, tensor: Tensor) -> Tensor:
    """As gpt-oss's checkpoints have it: blocks of 16 bytes, biases in bfloat16 unless that would change them."""
    if argument.endswith("_bias"):
        narrow = tensor.to(torch.bfloat16)
        return narrow if tensor.is_meta or torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return tensor if argument.endswith("_scale") else tensor.view(*tensor.shape[:2], -1, 16)
