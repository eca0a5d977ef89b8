"""The router's last step: from logits to the experts of each token and their weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _load, ops, reference
from .formats import require_tensor
from .fused_moe import MAX_EXPERTS, check_capability

MAX_TOP_K = 16  # csrc/moe/moe.h, kMaxTopK

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
    if device.type == "cpu":
        with torch.no_grad():
            return reference.topk_softmax(router_logits, top_k, renormalize)
    if device.type != "cuda":
        raise ValueError(f"router_logits: expected a CUDA or CPU tensor, got one on {device}")
    try:
        result = _kernel(device.index)(router_logits, top_k, renormalize)
    except RuntimeError as error:
        _load.explain(f"topk_softmax cannot run on {device}", error)
        raise
    return result


def check_topk_softmax(router_logits: Tensor, top_k: int) -> None:
    """Checks the arguments of `topk_softmax`; also fake tensors, while a graph is traced.

    Raises:
        TypeError, ValueError: as `topk_softmax`.
    """
    require_tensor("router_logits", router_logits, _LOGITS, ("T", "E"))
    experts = router_logits.shape[1]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"router_logits: expected 1 to {MAX_EXPERTS} experts, got {experts}")
    if not router_logits.is_contiguous():
        raise ValueError(f"router_logits: expected a contiguous tensor, got strides {list(router_logits.stride())}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k: expected an integer, got {top_k!r}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        raise ValueError(f"top_k: expected 1 to {min(MAX_TOP_K, experts)} of {experts} experts, got {top_k}")


@functools.cache
def _kernel(device_index: int) -> Any:
    """The operator, once this device is known to be supported."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    check_capability(torch.cuda.get_device_capability(device_index), name)
    return _load.moe_ops().route_topk.default
