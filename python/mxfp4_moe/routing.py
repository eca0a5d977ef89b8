"""From the router's logits: the experts of each token and their weights, and the whole layer behind them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _load, ops, reference
from .formats import require_tensor
from .fused_moe import (
    MAX_EXPERTS,
    check_capability,
    check_devices,
    check_hidden_states,
    check_limits,
    check_output,
    fused_moe,
    run,
    tile_of_call,
)
from .weights import MoEWeights

MAX_TOP_K = 16  # csrc/moe/kernels.h, kMaxTopK

_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token, best first, and their softmax weights. One kernel; plain torch on CPU tensors.

    Equal logits: the lower expert comes first, on every device (torch.topk leaves that open). A NaN counts as the
    largest logit, as in torch.topk, so it is chosen and makes all weights of its token NaN; so do a +inf, and a token
    whose chosen logits are all -inf, as in torch.softmax. Other tokens are not touched. For inference: no gradient.

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
    if torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = ops.topk_softmax(router_logits.detach(), top_k, renormalize)
        return result
    check_topk_softmax(router_logits, top_k)
    device = router_logits.device
    if router_logits.is_cpu:
        with torch.no_grad():
            return reference.topk_softmax(router_logits, top_k, renormalize)
    if not router_logits.is_cuda:
        raise ValueError(f"router_logits: expected a CUDA or CPU tensor, got one on {device}")
    try:
        result = _kernel(device.index)(router_logits, top_k, renormalize)
    except RuntimeError as error:
        _load.explain(f"topk_softmax cannot run on {device}", error)
        raise
    return result


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
    compiling = torch.compiler.is_compiling()
    if not compiling:
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states: expected bfloat16 or float16 [T, H], got {type(hidden_states).__name__}")
        same_rows = hidden_states.dim() > 0 and hidden_states.shape[0] == rows
        if not same_rows or hidden_states.device != router_logits.device:
            raise ValueError(
                f"router_logits: expected {[*hidden_states.shape[:1], weights.num_global_experts]}, as many rows as "
                f"hidden_states, on {hidden_states.device}, got {list(router_logits.shape)} on {router_logits.device}"
            )
    if compiling or not hidden_states.is_cuda:
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
    run(
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
    return output


def check_topk_softmax(router_logits: Tensor, top_k: int) -> tuple[int, int]:
    """Checks the arguments of `topk_softmax`; also fake tensors, while a graph is traced.

    Returns:
        The shape of the logits, T and E.

    Raises:
        TypeError, ValueError: as `topk_softmax`.
    """
    if not isinstance(router_logits, Tensor) or router_logits.dtype not in _LOGITS or router_logits.dim() != 2:
        require_tensor("router_logits", router_logits, _LOGITS, ("T", "E"))  # finds the words
    tokens, experts = router_logits.shape
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"router_logits: expected 1 to {MAX_EXPERTS} experts, got {experts}")
    if not router_logits.is_contiguous():
        raise ValueError(f"router_logits: expected a contiguous tensor, got strides {list(router_logits.stride())}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k: expected an integer, got {top_k!r}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        raise ValueError(f"top_k: expected 1 to {min(MAX_TOP_K, experts)} of {experts} experts, got {top_k}")
    return tokens, experts


@functools.cache
def _kernel(device_index: int) -> Any:
    """The operator, once this device is known to be supported."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    check_capability(torch.cuda.get_device_capability(device_index), name)
    return _load.moe_ops().route_topk.default
