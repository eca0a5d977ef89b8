"""Shared experts, which every token visits, as experts of the routed layer that every token is given.

A layer of their own costs five launches more and the time until its first bytes arrive, at every token count; in the
routed layer they cost their weights and one row more per token. docs/decisions.md has what that is in figures.

    joined = join_shared_experts(routed, shared)  # once
    out = fused_moe(hidden_states, *joined.choices(topk_weights, topk_ids), joined.weights)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import require_tensor
from .activations import Activation
from .weights import MoEWeights, TensorScales

_IDS = (torch.int32, torch.int64)
_LARGEST = torch.finfo(torch.float32).max
_SOFT = (Activation.SITU, Activation.CLAMPED_RELU2)  # soft(x, limit) is x without a limit alone, at no number


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedExperts:
    """What `join_shared_experts` returns.

    Attributes:
        weights: the E routed experts, then the S shared ones, whose ids are E to E + S - 1.
        num_shared: S.
        shared_ids, shared_ids_int32: int64 and int32 [S] on the weights' device.
        shared_weights: float32 [S], the factor of each shared expert's output.
    """

    weights: MoEWeights
    num_shared: int
    shared_ids: Tensor
    shared_ids_int32: Tensor  # made once, so that no call has to
    shared_weights: Tensor

    def choices(
        self, topk_weights: Tensor, topk_ids: Tensor, shared_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The router's choices with the shared experts behind them: what `fused_moe` takes.

        Args:
            topk_weights: float32 [T, k].
            topk_ids: int32 or int64 [T, k], ids of routed experts.
            shared_weights: float32 [T, S] where a gate weighs the shared experts of each token; None: as they were
                joined.

        Returns:
            float32 [T, k + S], and ids [T, k + S] in the dtype of topk_ids.

        Raises:
            TypeError, ValueError: an argument of another dtype, shape or device.
        """
        device = self.weights.device
        require_tensor("topk_ids", topk_ids, _IDS, ("T", "k"), device)
        require_tensor("topk_weights", topk_weights, torch.float32, topk_ids.shape, device)
        tokens = len(topk_ids)
        if shared_weights is None:
            shared_weights = self.shared_weights.expand(tokens, self.num_shared)
        else:
            require_tensor("shared_weights", shared_weights, torch.float32, (tokens, self.num_shared), device)
        ids = self.shared_ids_int32 if topk_ids.dtype is torch.int32 else self.shared_ids
        ids = ids.expand(tokens, self.num_shared)
        return torch.cat([topk_weights, shared_weights], dim=1), torch.cat([topk_ids, ids], dim=1)


def join_shared_experts(routed: MoEWeights, shared: MoEWeights, weight: float = 1.0) -> JoinedExperts:
    """Routed and shared experts as one layer.

    The output is the sum of both layers', but for the order of additions and the rounding of one sum instead of two. A
    shared expert that is n times as wide as a routed one becomes n experts (S counts them): their outputs add up to its
    own. Copies: for a moment both layers and the joined one are in memory.

    Under expert parallelism split the joined weights (`MoEWeights.expert_parallel`): the shared experts then belong to
    the last rank, which gets a row of every token. Where that is too much for one rank, keep them apart.

    Args:
        routed: all E experts of the layer.
        shared: experts that take the same hidden states and have the same activation; its numbers may differ.
        weight: of their outputs, which are not routed: 1, or 1 / factor where the sum is multiplied by a routed scaling
            factor afterwards.

    Raises:
        TypeError: not MoEWeights, or a weight that is no number.
        ValueError: slices of layers; another hidden size, activation or device; a width that is no multiple of the
            routed experts'; a limit of one of the two alone, of an activation that has no number for none; a weight
            that is not finite. The message says what to do.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: expected a number, got {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"weight: expected a finite number, got {weight}")
    for name, weights in (("routed", routed), ("shared", shared)):
        if not isinstance(weights, MoEWeights):
            raise TypeError(f"{name}: expected MoEWeights, got {type(weights).__name__}")
        if weights.num_experts != weights.num_global_experts:
            raise ValueError(
                f"{name}: expected all experts of a layer, got {weights.num_experts} of {weights.num_global_experts}; "
                "join first, then call expert_parallel"
            )
    for what in ("weight_format", "hidden_size", "activation", "device", "word_order"):
        expected, actual = getattr(routed, what), getattr(shared, what)
        if expected != actual:
            if what == "weight_format":
                expected, actual = expected.value, actual.value
            raise ValueError(
                f"shared: expected {what} {expected}, as routed has, got {actual}; call it as its own layer"
            )
    if (routed.limit is None) != (shared.limit is None) and routed.activation in _SOFT:
        expected, actual = ("None", "one") if routed.limit is None else ("a limit", "None")
        raise ValueError(
            f"shared: expected limit to be {expected} with {routed.activation.value}, as routed's, got {actual}; call "
            "it as its own layer"
        )
    width = routed.intermediate_size
    parts, rest = divmod(shared.intermediate_size, width)
    if rest:
        raise ValueError(
            f"shared: expected intermediate_size to be a multiple of {width}, which routed has, got "
            f"{shared.intermediate_size}; call it as its own layer"
        )
    layers = [routed, *(shared.tensor_parallel(part, parts) for part in range(parts))]
    experts = sum(layer.num_experts for layer in layers)
    joined = MoEWeights(
        w13=torch.cat([layer.w13 for layer in layers]),
        w2=torch.cat([layer.w2 for layer in layers]),
        hidden_size=routed.hidden_size,
        intermediate_size=width,
        word_order=routed.word_order,
        w13_bias=_joined_bias([(layer.w13_bias, layer) for layer in layers], routed.w13_rows),
        w2_bias=_joined_bias([(layer.w2_bias, layer) for layer in layers], routed.hidden_size),
        activation=routed.activation,
        alpha=_joined_number([(layer.alpha, layer) for layer in layers]),
        beta=_joined_number([(layer.beta, layer) for layer in layers]),
        limit=_joined_limit(layers),
        gate_up_order=routed.gate_up_order,
        weight_format=routed.weight_format,
        tensor_scales=_joined_scales(layers),
    )
    ids = torch.arange(routed.num_experts, experts, device=routed.device)
    return JoinedExperts(
        weights=joined,
        num_shared=experts - routed.num_experts,
        shared_ids=ids,
        shared_ids_int32=ids.to(torch.int32),
        shared_weights=torch.full((experts - routed.num_experts,), weight, dtype=torch.float32, device=routed.device),
    )


def _joined_scales(layers: list[MoEWeights]) -> TensorScales | None:
    """The float32 scales of NVFP4 layers."""
    given = [layer.tensor_scales for layer in layers if layer.tensor_scales is not None]
    if not given:
        return None
    first = given[0]
    if any((one.divide, one.w2_input is None) != (first.divide, first.w2_input is None) for one in given):
        raise ValueError(
            "shared: expected float32 scales of the same kind as routed has, those that multiply or those that divide, "
            "and scales of inputs where routed has them; call it as its own layer"
        )
    return first.map_with(given[1:], torch.cat)


def _joined_bias(biases: list[tuple[Tensor | None, MoEWeights]], columns: int) -> Tensor | None:
    """Zeros stand for a layer without."""
    if all(bias is None for bias, _ in biases):
        return None
    return torch.cat(
        [
            torch.zeros(layer.num_experts, columns, dtype=torch.float32, device=layer.device) if bias is None else bias
            for bias, layer in biases
        ]
    )


def _joined_limit(layers: list[MoEWeights]) -> float | Tensor | None:
    """Where one layer has no limit, that of its experts is float32's largest number, at which nothing is clamped."""
    if all(layer.limit is None for layer in layers):
        return None
    return _joined_number([(_LARGEST if layer.limit is None else layer.limit, layer) for layer in layers])


def _joined_number(numbers: list[tuple[float | Tensor, MoEWeights]]) -> float | Tensor:
    """One number where all layers have it, else one for each expert."""
    first = numbers[0][0]
    if not any(isinstance(number, Tensor) for number, _ in numbers) and all(number == first for number, _ in numbers):
        return first
    return torch.cat(
        [
            number
            if isinstance(number, Tensor)
            else torch.full((layer.num_experts,), number, dtype=torch.float32, device=layer.device)
            for number, layer in numbers
        ]
    )
