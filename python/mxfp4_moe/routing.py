"""From the router's logits: the experts of each token and their weights, and the whole layer behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._call import launch, operators
from ._call.checks import check_devices, check_hidden_states, check_limits, check_output, check_topk_softmax
from ._call.fused_moe import fused_moe
from ._call.gradient import refuse_gradient
from ._call.selection import tile_of_call
from ._call.transforms import in_graph, refuse_transforms
from .weights import MoEWeights


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token, best first, and their softmax weights. One kernel; plain torch on CPU tensors.

    Equal logits: the lower expert comes first, on every device (torch.topk leaves that open). A NaN counts as the
    largest logit, as in torch.topk, so it is chosen and makes all weights of its token NaN; so do a +inf, and a token
    whose chosen logits are all -inf, as in torch.softmax. Other tokens are not touched. For inference: a
    gradient that is asked for is an error of the backward pass.

    Args:
        router_logits: float32, bfloat16 or float16 [T, E], contiguous; E from 1 to 1024, T may be 0.
        top_k: k, from 1 to 16 and at most E.
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


def fused_moe_from_logits(
    hidden_states: Tensor,
    router_logits: Tensor,
    top_k: int,
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
) -> Tensor:
    """`topk_softmax` and `fused_moe` in one call, with the same result and, up to 512 tokens, one kernel less.

    On SM90 up to 1024 tokens.

    Args:
        hidden_states: as `fused_moe`, [T, H].
        router_logits: as `topk_softmax`, [T, E] with the E of the whole layer (also where weights are a slice of it),
            on the same device.
        top_k, renormalize: as `topk_softmax`.
        weights and the rest: as `fused_moe`.

    Returns:
        [T, H] in the output dtype: `output` where it was given.

    Raises:
        TypeError, ValueError, RuntimeError: as the two.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
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
        )
    device = check_devices(hidden_states, weights)
    dtype = check_hidden_states(
        hidden_states, hidden_states_scale, scale_layout, output_dtype, weights.hidden_size, device
    )
    check_limits(weights.num_experts, rows, top_k)
    check_output(output, dtype, rows, weights.hidden_size, device)
    tile = tile_of_call(tile_mn, auto_tile_select, rows, top_k, weights, device)
    if output is None:
        output = torch.empty_like(hidden_states, dtype=dtype)
    launch.run(
        tile,
        hidden_states,
        hidden_states_scale,
        scale_layout,
        (None, None, router_logits, top_k),
        weights,
        output,
        intermediate_rounding,
        renormalize,
    )
    return refuse_gradient("fused_moe_from_logits", output, hidden_states, router_logits)
