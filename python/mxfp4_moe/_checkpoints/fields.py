"""The fields of a layer's weights, as checkpoints store them and as `MoEWeights` holds them: what they must be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import describe, require_contiguous, require_tensor
from ..activations import Activation
from ..formats import WeightFormat, WordOrder
from .nvfp4_layers import refuse_gpu
from .options import GateUpOrder, check_int, check_number, split_number
from .tensor_scales import TensorScales


class Mxfp4Tensors(NamedTuple):
    """Weights of one layer as checkpoints store them; `MoEWeights.from_mxfp4` takes these names. W = 2I or I."""

    w13: Tensor  # uint8 [E, W, H/2], low nibble = even k
    w13_scale: Tensor  # uint8 [E, W, H/32], E8M0
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/32]
    w13_bias: Tensor | None  # float32 [E, W]
    w2_bias: Tensor | None  # float32 [E, H]


class Nvfp4Tensors(NamedTuple):
    """The same of NVFP4 weights; `MoEWeights.from_nvfp4` takes these names. P is 2, gate and up, or 1."""

    w13: Tensor  # uint8 [E, W, H/2], low nibble = even k
    w13_scale: Tensor  # uint8 [E, W, H/16], E4M3, linear
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/16]
    w13_scale_2: Tensor | None  # float32 [E, P]; these four multiply
    w2_scale_2: Tensor | None  # float32 [E]
    w13_input_scale: Tensor | None
    w2_input_scale: Tensor | None
    w13_global_scale: Tensor | None  # these four divide
    w2_global_scale: Tensor | None
    w13_input_global_scale: Tensor | None
    w2_input_global_scale: Tensor | None
    w13_bias: Tensor | None  # float32 [E, W]
    w2_bias: Tensor | None  # float32 [E, H]


def check_fields(weights: Any) -> int:
    """Checks the fields of `MoEWeights` (which is above this room) against each other; see there.

    Returns:
        num_global_experts, which 0 leaves to be found.

    Raises:
        TypeError, ValueError: as `MoEWeights`.
    """
    if not isinstance(weights.activation, Activation):
        raise TypeError(f"activation: expected an Activation, got {weights.activation!r}")
    if not isinstance(weights.gate_up_order, GateUpOrder):
        raise TypeError(f"gate_up_order: expected a GateUpOrder, got {weights.gate_up_order!r}")
    if not isinstance(weights.word_order, WordOrder):
        raise TypeError(f"word_order: expected a WordOrder, got {weights.word_order!r}")
    kind = weights.weight_format
    if not isinstance(kind, WeightFormat):
        raise TypeError(f"weight_format: expected a WeightFormat, got {kind!r}")
    hidden, inter, rows = weights.hidden_size, weights.intermediate_size, weights.w13_rows
    for name, size in (("hidden_size", hidden), ("intermediate_size", inter)):
        check_int(name, size)
        if size <= 0 or size % kind.block:
            raise ValueError(f"{name}: expected a multiple of {kind.block}, got {size}")
    require_tensor("w13", weights.w13, torch.uint8, ("E", kind.weight_bytes(rows, hidden)))
    experts, device = weights.num_experts, weights.device
    if experts == 0:
        raise ValueError(f"w13: expected at least one expert, got {describe(weights.w13)}")
    shapes = {
        "w13": (experts, kind.weight_bytes(rows, hidden)),
        "w2": (experts, kind.weight_bytes(hidden, inter)),
        "w13_bias": (experts, rows),
        "w2_bias": (experts, hidden),
    }
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        if tensor is None and name.endswith("_bias"):
            continue
        require_tensor(name, tensor, torch.float32 if name.endswith("_bias") else torch.uint8, shape, device)
        require_contiguous(name, tensor)
    if (kind is WeightFormat.NVFP4) != isinstance(weights.tensor_scales, TensorScales):
        expected = "TensorScales" if kind is WeightFormat.NVFP4 else "None"
        got = type(weights.tensor_scales).__name__
        raise TypeError(f"tensor_scales: expected {expected} with weight_format {kind.value}, got {got}")
    if weights.tensor_scales is not None:
        refuse_gpu("w13", device, (hidden, inter))
        weights.tensor_scales.check(experts, weights.activation.is_gated, device)
    check_number("alpha", weights.alpha, experts, device)
    divides = " with activation 'situ'" if weights.activation is Activation.SITU else ""
    check_number("beta", weights.beta, experts, device, above_zero=divides)
    if weights.limit is not None:
        check_number("limit", weights.limit, experts, device)
    check_int("first_expert", weights.first_expert)
    check_int("num_global_experts", weights.num_global_experts)
    every: int = weights.num_global_experts or weights.first_expert + experts
    if every < experts and weights.num_global_experts:
        raise ValueError(
            f"num_global_experts: expected {experts} or more, which are here, or 0 to count them, got "
            f"{weights.num_global_experts}"
        )
    if not 0 <= weights.first_expert <= every - experts:
        raise ValueError(
            f"first_expert: expected 0 to {every - experts}, where the {experts} experts here fit into {every}, got "
            f"{weights.first_expert}"
        )
    return every


def operator_arguments(weights: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the layer's operator (csrc/moe/operators.cpp) takes of `MoEWeights`: w13 to limit, the rare ones by name."""
    alpha, alphas = split_number(weights.alpha, 0.0)
    beta, betas = split_number(weights.beta, 0.0)
    limit, limits = split_number(weights.limit, math.inf)
    tensors = (weights.w13, weights.w13_bias, weights.w2, weights.w2_bias)
    rare = {"first_expert": weights.first_expert or None, "alphas": alphas, "betas": betas, "limits": limits}
    if weights.tensor_scales is not None:
        rare |= {"weight_format": weights.weight_format.code, **weights.tensor_scales.operator_arguments()}
    return (
        (*tensors, weights.intermediate_size, weights.activation.code, alpha, beta, limit),
        {name: value for name, value in rare.items() if value is not None},
    )


def alone(value: Any) -> Any:
    """A tensor with no more memory than its own; anything else as it is."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone(memory_format=torch.contiguous_format)
    return value
