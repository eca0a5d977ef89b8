"""Checked calls on their way to the GPU: the operators, loaded once, and what reaches them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._install import errors, loading, wheel
from .._install.troubles import DOCTOR
from ..formats import WeightFormat
from ..routers import Router
from ..tiles import Tile
from ..weights import MoEWeights
from .activation_format import code_of, tiles_of


def run(
    tile: Tile,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    routing: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    weights: MoEWeights,
    output: Tensor,
    intermediate_rounding: bool,
    router: Router | None = None,
    activation_format: str = "mxfp8",
) -> None:
    """Launches a checked call on the GPU; routing: topk_weights and topk_ids, or router_logits and the router's top_k.

    What an argument costs on its way through torch's dispatcher is most of the operator's time, and one that is left
    to its default costs little: so the rare ones are named only where they say something.
    """
    op, tile = layer_operator_for(activation_format, hidden_states.device.index, tile, weights.weight_format)
    arguments, rare = weights.operator_arguments
    if hidden_states_scale is not None:
        hidden_states = hidden_states.view(torch.uint8)
        rare = {**rare, "hidden_states_scale": hidden_states_scale, "scale_is_swizzled": scale_layout == "swizzled"}
    if intermediate_rounding:
        rare = {**rare, "intermediate_rounding": True}
    if activation_format != "mxfp8":
        rare = {**rare, "activation_format": code_of(activation_format)}
        if activation_format == "fp16":
            w13_factors, w2_factors = weights.fp16_factors()
            rare |= {"w13_factors": w13_factors, "w2_factors": w2_factors}
    if router is not None and router.operator_arguments:
        rare = {**rare, **router.operator_arguments}
    try:
        op(hidden_states, *routing, *arguments, tile.m, tile.n, output, **rare)
    except RuntimeError as error:
        errors.explain(f"fused_moe cannot run on {hidden_states.device}", error)
        raise


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Launches a checked `topk_softmax` on the GPU."""
    device = router_logits.device
    try:
        result: tuple[Tensor, Tensor] = topk_kernel(device.index)(router_logits, top_k, renormalize)
    except RuntimeError as error:
        errors.explain(f"topk_softmax cannot run on {device}", error)
        raise
    return result


def select_experts(router_logits: Tensor, router: Router, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launches a checked `select_experts` on the GPU."""
    if router.is_topk_softmax and topk_ids is None:
        return topk_softmax(router_logits, router.top_k, router.renormalize)
    device = router_logits.device
    try:
        result: tuple[Tensor, Tensor] = experts_kernel(device.index)(
            router_logits, router.top_k, topk_ids=topk_ids, **router.operator_arguments
        )
    except RuntimeError as error:
        errors.explain(f"select_experts cannot run on {device}", error)
        raise
    return result


def layer_operator_for(
    activation_format: str, device_index: int, tile: Tile, weight_format: WeightFormat = WeightFormat.MXFP4
) -> tuple[Any, Tile]:
    """`layer_operator`, among the tiles that have a kernel for these formats; for MXFP8 activations those are all."""
    if activation_format == "mxfp8":
        return layer_operator(device_index, tile)
    return layer_operator(device_index, tile, tiles_of(activation_format, device_index, weight_format))


@functools.cache
def layer_operator(device_index: int, tile: Tile, among: tuple[Tile, ...] | None = None) -> tuple[Any, Tile]:
    """The layer's operator and the tile to call it with: loaded, on a supported device, and not blocked there."""
    name, capability = torch.cuda.get_device_name(device_index), torch.cuda.get_device_capability(device_index)
    check_capability(capability, f"{name} (cuda:{device_index})")
    tile = loading.load_nearest(tile, name, capability, among)
    return loading.moe_ops().fused_moe.default, tile


@functools.cache
def topk_kernel(device_index: int) -> Any:
    """The operator behind `topk_softmax`, once this device is known to be supported."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    check_capability(torch.cuda.get_device_capability(device_index), name)
    return loading.moe_ops().route_topk.default


@functools.cache
def experts_kernel(device_index: int) -> Any:
    """The operator behind `select_experts`, once this device is known to be supported."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    check_capability(torch.cuda.get_device_capability(device_index), name)
    return loading.moe_ops().route_experts.default


def check_capability(capability: tuple[int, int], name: str) -> None:
    """Refuses a GPU that the wheel has no machine code for.

    Args:
        capability: the GPU's compute capability.
        name: the GPU in words, for the message.

    Raises:
        LoadError: one sentence with the GPU's arch, the wheel's archs, and CUDA and torch versions.
    """
    if wheel.arch_for(capability) is None:
        having = ", ".join(f"sm_{arch}" for arch in wheel.built_archs())
        raise errors.LoadError(
            f"hidden_states: expected a tensor on a GPU that this wheel has machine code for ({having}), got one on "
            f"{name}, which is sm_{capability[0]}{capability[1]}; the wheel was built for {errors.built_for()}, "
            f"you have {errors.environment()}; {DOCTOR}"
        )
