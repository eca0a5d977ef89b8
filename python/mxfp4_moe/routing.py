"""From the router's logits: the experts of each token and their weights, and the whole layer behind them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from ._arguments import require_device
from ._call import launch, operators
from ._call.activation_format import check_format_on, format_of_call
from ._call.checks import (
    check_devices,
    check_hidden_states,
    check_limits,
    check_output,
    check_router,
    check_topk_softmax,
)
from ._call.fused_moe import fused_moe
from ._call.gradient import refuse_gradient
from ._call.selection import tile_of_call
from ._call.transforms import as_fake, in_graph, refuse_transforms
from ._checkpoints.options import check_layer
from ._checkpoints.router import router_fields
from .reference import routers as reference_routers
from .routers import GroupScore, Router, ScoringFunc
from .weights import MoEWeights

__all__ = [
    "GroupScore",
    "Router",
    "ScoringFunc",
    "fused_moe_from_logits",
    "load_router",
    "select_experts",
    "topk_softmax",
]


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token, best first, and their softmax weights. One kernel; plain torch on CPU tensors.

    Equal logits: the lower expert comes first, on every device (torch.topk leaves that open). A NaN counts as the
    largest logit, as in torch.topk, so it is chosen and makes all weights of its token NaN; so do a +inf, and a token
    whose chosen logits are all -inf, as in torch.softmax. Other tokens are not touched. For inference: a
    gradient that is asked for is an error of the backward pass.

    Args:
        router_logits: float32, bfloat16 or float16 [T, E], contiguous; E from 1 to 1024, T may be 0.
        top_k: k, from 1 to 32 and at most E.
        renormalize: softmax over the k chosen logits, so that a token's weights add up to 1; else over all E.

    Returns:
        topk_weights float32 [T, k], topk_ids int32 [T, k], as `fused_moe` takes them.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: another shape, stride or device; k or E outside its range.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch.
    """
    check_topk_softmax(router_logits, top_k)
    refuse_transforms("topk_softmax", router_logits)
    device = router_logits.device
    if in_graph(router_logits):
        result: tuple[Tensor, Tensor] = operators.topk_softmax(router_logits, top_k, renormalize)
        return result
    if router_logits.is_cpu:
        with torch.no_grad():
            topk_weights, topk_ids = reference.topk_softmax(router_logits, top_k, renormalize)
    elif router_logits.is_cuda:
        topk_weights, topk_ids = launch.topk_softmax(router_logits, top_k, renormalize)
    else:
        raise ValueError(f"router_logits: expected a CUDA or CPU tensor, got one on {device}")
    return refuse_gradient("topk_softmax", topk_weights, router_logits), topk_ids


def select_experts(router_logits: Tensor, router: Router, topk_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token under any router, best first, and their weights. One kernel; plain torch on the CPU.

    What is chosen, what of equals comes first and what NaN and infinities do is said by `Router`. For inference: a
    gradient that is asked for is an error of the backward pass.

    Args:
        router_logits: float32, bfloat16 or float16 [T, E], contiguous; E from 1 to 1024, T may be 0.
        router: the rule; its e_score_correction_bias on the same device.
        topk_ids: int32 or int64 [T, k], contiguous: experts that are fixed, by the token's id for instance
            (DeepSeek-V4's first layers: ``tid2eid[input_ids]``). Then nothing is chosen, and the weights are those of
            these experts; bias and groups mean nothing. An id of no expert becomes -1, with weight 0.

    Returns:
        topk_weights float32 [T, k], topk_ids int32 [T, k], as `fused_moe` takes them.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: another shape, stride or device; E that does not fit the router's k, bias and groups.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch.
    """
    check_router(router_logits, router, topk_ids)
    refuse_transforms("select_experts", router_logits)
    if in_graph(router_logits):
        result: tuple[Tensor, Tensor] = operators.select_experts(
            router_logits,
            topk_ids,
            as_fake(router.e_score_correction_bias, router_logits),
            router.top_k,
            ScoringFunc(router.scoring_func).value,
            router.renormalize,
            router.num_expert_group,
            router.topk_group,
            GroupScore(router.group_score).value,
            float(router.routed_scaling_factor),
        )
        return result
    if router_logits.is_cpu:
        with torch.no_grad():
            topk_weights, chosen = reference_routers.select_experts(router_logits, router, topk_ids)
    elif router_logits.is_cuda:
        topk_weights, chosen = launch.select_experts(router_logits, router, topk_ids)
    else:
        raise ValueError(f"router_logits: expected a CUDA or CPU tensor, got one on {router_logits.device}")
    return refuse_gradient("select_experts", topk_weights, router_logits), chosen


def load_router(
    path: str | Path, *, layer: int, prefix: str | None = None, device: torch.device | str = "cpu"
) -> Router:
    """The router of one layer of a model's checkpoint: its rule from config.json, its correction bias from the files.

    Args:
        path, layer, prefix: as for `MoEWeights.from_pretrained`.
        device: where to put e_score_correction_bias.

    Raises:
        FileNotFoundError, RuntimeError: as `MoEWeights.from_pretrained`.
        TypeError: an argument of another type.
        ValueError: the same; no config.json, a model whose router is not known, a config that does not say what is
            needed, no bias where the model has one, or a layer whose experts are fixed by token id; says what to do.
    """
    check_layer(layer)
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str or None, got {prefix!r}")
    return Router(**router_fields(path, layer=layer, prefix=prefix, device=require_device("device", device)))


def fused_moe_from_logits(
    hidden_states: Tensor,
    router_logits: Tensor,
    top_k: int | Router,
    weights: MoEWeights,
    *,
    renormalize: bool = True,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    tile_mn: tuple[int, int] | None = None,
    auto_tile_select: bool = True,
    output: Tensor | None = None,
    intermediate_rounding: bool = False,
    activation_format: str | None = None,
) -> Tensor:
    """`select_experts` (or `topk_softmax`) and `fused_moe` in one call, with the same bits and often one kernel less.

    One less up to 128 slots (T * k), and with at most 256 experts up to 512 tokens and 8192 slots, on SM90 twice as
    many; of `topk_softmax`'s rule with at most 256 experts alone.

    Args:
        hidden_states: as `fused_moe`, [T, H].
        router_logits: as `topk_softmax`, [T, E] with the E of the whole layer (also where weights are a slice of it),
            on the same device.
        top_k: a `Router`, or a number: k of `topk_softmax`.
        renormalize: as `topk_softmax`; a Router has its own.
        weights and the rest: as `fused_moe`.

    Returns:
        [T, H] in the output dtype: `output` where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as the two.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    activation_format = format_of_call(activation_format, weights)
    if isinstance(top_k, Router):
        rows, experts = check_router(router_logits, top_k)
    else:
        rows, experts = check_topk_softmax(router_logits, top_k)
    if experts != weights.num_global_experts:
        raise ValueError(
            f"router_logits: expected one for each of the layer's {weights.num_global_experts} experts, "
            f"got {list(router_logits.shape)}"
        )
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected bfloat16 or float16 [T, H], got {type(hidden_states).__name__}")
    same_rows = hidden_states.dim() > 0 and hidden_states.shape[0] == rows
    if not same_rows or hidden_states.device != router_logits.device:
        raise ValueError(
            f"router_logits: expected {[*hidden_states.shape[:1], weights.num_global_experts]}, as many rows as "
            f"hidden_states, on {hidden_states.device}, got {list(router_logits.shape)} on {router_logits.device}"
        )
    refuse_transforms("fused_moe_from_logits", hidden_states, router_logits)
    if in_graph(hidden_states) or not hidden_states.is_cuda:
        if isinstance(top_k, Router):
            topk_weights, topk_ids = select_experts(router_logits, top_k)
        else:
            topk_weights, topk_ids = topk_softmax(router_logits, top_k, renormalize)
        return fused_moe(
            hidden_states,
            topk_weights,
            topk_ids,
            weights,
            hidden_states_scale=hidden_states_scale,
            scale_layout=scale_layout,
            output_dtype=output_dtype,
            tile_mn=tile_mn,
            auto_tile_select=auto_tile_select,
            output=output,
            intermediate_rounding=intermediate_rounding,
            activation_format=activation_format,
        )
    router = top_k if isinstance(top_k, Router) else _softmax_router(top_k, bool(renormalize))
    device = check_devices(hidden_states, weights, activation_format)
    dtype = check_hidden_states(
        hidden_states,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        weights.hidden_size,
        device,
        activation_format,
    )
    check_format_on(activation_format, device, weights.weight_format)
    check_limits(weights.num_experts, rows, router.top_k)
    check_output(output, dtype, rows, weights.hidden_size, device)
    tile = tile_of_call(tile_mn, auto_tile_select, rows, router.top_k, weights, device, activation_format)
    if output is None:
        output = torch.empty_like(hidden_states, dtype=dtype)
    launch.run(
        tile,
        hidden_states,
        hidden_states_scale,
        scale_layout,
        (None, None, router_logits, router.top_k),
        weights,
        output,
        intermediate_rounding,
        router,
        activation_format,
    )
    return refuse_gradient("fused_moe_from_logits", output, hidden_states, router_logits)


@functools.cache
def _softmax_router(top_k: int, renormalize: bool) -> Router:
    """`topk_softmax`'s, made once: a call of the layer has no time for it."""
    return Router(top_k=top_k, renormalize=renormalize)
