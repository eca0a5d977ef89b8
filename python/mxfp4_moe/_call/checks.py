"""What a call's arguments must be. Every check has passed before anything is launched.

The way through for a good argument is a few comparisons; words are found only for a bad one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._arguments import require_contiguous, require_tensor
from ..formats import BLOCK, WeightFormat, WordOrder, word_order_of
from ..routers import MAX_TOP_K, GroupScore, Router
from ..weights import MoEWeights
from .activation_format import check_activation_format, check_format_on
from .transforms import in_graph

MAX_EXPERTS = 1024  # csrc/moe/kernels.h, kMaxExperts
MAX_SLOTS = 2**31 - 1 - 1024  # tokens * top_k: rows are counted in int32; csrc/moe/checks.h, kMaxSlots

_HALVES = (torch.bfloat16, torch.float16)
_MXFP8 = (torch.uint8, torch.float8_e4m3fn)
_UINT8 = (torch.uint8,)
_IDS = (torch.int32, torch.int64)
_FLOAT32 = (torch.float32,)
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


def check_layer(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    activation_format: str = "mxfp8",
) -> torch.dtype:
    """Checks everything of a call but its output and its tile.

    Where a graph is traced, what depends on the GPU or would bound the number of tokens is left to the operator, which
    checks it in each call.

    Returns:
        The output dtype.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    device = check_devices(hidden_states, weights, activation_format)
    dtype = check_call(
        hidden_states,
        topk_weights,
        topk_ids,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        weights.hidden_size,
        device,
        activation_format,
    )
    if not in_graph(hidden_states):
        check_format_on(activation_format, device, weights.weight_format)
    tokens = 0 if in_graph(hidden_states) else topk_ids.shape[0]
    check_limits(weights.num_experts, tokens, topk_ids.shape[1])
    return dtype


def check_devices(hidden_states: Tensor, weights: MoEWeights, activation_format: str = "mxfp8") -> torch.device:
    """The device of a call.

    Raises:
        TypeError: hidden_states is no tensor.
        ValueError: neither CUDA nor CPU, or not where the weights are; an activation format that the GPU has no kernels
            for; weights in another word order than that of the kernels.
    """
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected bfloat16 or float16 [T, H], got {type(hidden_states).__name__}")
    device, on_gpu = hidden_states.device, hidden_states.is_cuda
    if not on_gpu and not hidden_states.is_cpu:
        raise ValueError(f"hidden_states: expected a CUDA or CPU tensor, got one on {device}")
    if weights.device != device:
        raise ValueError(
            f"weights: expected MoEWeights on {device}, where hidden_states is, got {weights.device}; "
            f"weights.to('{device}') copies them there"
        )
    if on_gpu and not in_graph(hidden_states):
        check_word_order(weights.word_order, device, activation_format, weights.weight_format)
    return device


def check_word_order(
    order: WordOrder,
    device: torch.device,
    activation_format: str = "mxfp8",
    weight_format: WeightFormat = WeightFormat.MXFP4,
) -> None:
    """Refuses weights that this GPU would read as others.

    Raises:
        ValueError: not the word order of the GPU's kernels for these activations, or it has none for them.
    """
    expected = word_order_of(device, activation_format)
    if order is expected:
        return
    if activation_format == "mxfp8":
        raise ValueError(
            f"weights: expected word order '{expected.value}' on {device}, got '{order.value}' of another device or of "
            f"other activations; weights.to('{device}') converts them"
        )
    check_format_on(activation_format, device, weight_format)
    raise ValueError(
        f"weights: expected word order '{expected.value}' on {device} for activation_format '{activation_format}', got "
        f"'{order.value}'; weights.to('{device}', activation_format='{activation_format}') converts them"
    )


def check_call(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    hidden_size: int,
    device: torch.device,
    activation_format: str = "mxfp8",
) -> torch.dtype:
    """Checks the tensors of a call; also on fake ones, while a graph is traced.

    Returns:
        The output dtype.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    dtype = check_hidden_states(
        hidden_states, hidden_states_scale, scale_layout, output_dtype, hidden_size, device, activation_format
    )
    tokens = hidden_states.shape[0]
    top_k = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.dim() == 2 else 0
    _check("topk_ids", topk_ids, _IDS, (tokens, top_k), (tokens, "k"), device)
    if top_k == 0:
        raise ValueError(f"topk_ids: expected [{tokens}, k] with k at least 1, got k = 0")
    _check("topk_weights", topk_weights, _FLOAT32, (tokens, top_k), (tokens, top_k), device)
    return dtype


def check_hidden_states(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    hidden_size: int,
    device: torch.device,
    activation_format: str = "mxfp8",
) -> torch.dtype:
    """The part of `check_call` that is about the hidden states, their format and the output dtype.

    Returns:
        The output dtype.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    tokens = hidden_states.shape[0] if hidden_states.dim() == 2 else 0
    dtypes = _HALVES if hidden_states_scale is None else _MXFP8
    _check("hidden_states", hidden_states, dtypes, (tokens, hidden_size), ("T", hidden_size), device)
    if hidden_states_scale is not None:
        if scale_layout not in reference.SCALE_LAYOUTS:
            raise ValueError(f"scale_layout: expected 'linear' or 'swizzled', got {scale_layout!r}")
        shape: tuple[int, ...] = (tokens, hidden_size // BLOCK)
        if scale_layout == "swizzled":
            shape = (-(-tokens // 128) * -(-hidden_size // 128) * 512,)
        _check("hidden_states_scale", hidden_states_scale, _UINT8, shape, shape, device)
    check_activation_format(activation_format, hidden_states_scale is not None, hidden_states.dtype)
    if output_dtype is None:
        return hidden_states.dtype if hidden_states_scale is None else torch.bfloat16
    if output_dtype not in _HALVES:
        raise TypeError(f"output_dtype: expected torch.bfloat16 or torch.float16, got {output_dtype}")
    return output_dtype


def check_output(
    output: Tensor | None, dtype: torch.dtype, tokens: int, hidden_size: int, device: torch.device
) -> None:
    """Checks the tensor to write to, where one was given.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    if output is not None:
        _check("output", output, (dtype,), (tokens, hidden_size), (tokens, hidden_size), device)


def check_limits(num_experts: int, tokens: int, top_k: int) -> None:
    """Refuses sizes that the kernels cannot count.

    Raises:
        ValueError: more than MAX_EXPERTS experts or MAX_SLOTS slots.
    """
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"weights: expected at most {MAX_EXPERTS} experts, got {num_experts}")
    if tokens * top_k > MAX_SLOTS:
        raise ValueError(f"topk_ids: expected at most {MAX_SLOTS} slots (tokens * top_k), got {tokens} * {top_k}")


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
    require_contiguous("router_logits", router_logits)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k: expected an integer, got {top_k!r}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        raise ValueError(f"top_k: expected 1 to {min(MAX_TOP_K, experts)} of {experts} experts, got {top_k}")
    return tokens, experts


def check_router(router_logits: Tensor, router: Router, topk_ids: Tensor | None = None) -> tuple[int, int]:
    """Checks the arguments of `select_experts`; also fake tensors, while a graph is traced.

    Returns:
        The shape of the logits, T and E.

    Raises:
        TypeError, ValueError: as `select_experts`.
    """
    if not isinstance(router, Router):
        raise TypeError(f"router: expected a Router, got {type(router).__name__}")
    tokens, experts = check_topk_softmax(router_logits, router.top_k)
    device, groups = router_logits.device, router.num_expert_group
    if (bias := router.e_score_correction_bias) is not None:
        _check("e_score_correction_bias", bias, _FLOAT32, (experts,), (experts,), device)
    if experts % groups:
        raise ValueError(f"num_expert_group: expected a divisor of {experts} experts, got {groups}")
    each = experts // groups
    if groups > 1 and each < 2 and router.group_score == GroupScore.TOP2_SUM:
        raise ValueError(f"num_expert_group: expected groups of two experts or more, got {groups} of {experts} experts")
    if each * router.topk_group < router.top_k:
        raise ValueError(
            f"topk_group: expected groups with {router.top_k} experts together, got {router.topk_group} of {each} each"
        )
    if topk_ids is not None:
        _check("topk_ids", topk_ids, _IDS, (tokens, router.top_k), (tokens, router.top_k), device)
    return tokens, experts


def _check(
    name: str,
    value: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    shown_shape: tuple[int | str, ...],
    device: torch.device,
) -> None:
    """One tensor argument; the way through for a good one is short, the words are found only for a bad one."""
    if (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.shape == shape
        and value.device == device
        and value.is_contiguous()
    ):
        return
    require_tensor(name, value, dtypes, shown_shape, device)
    raise ValueError(
        f"{name}: expected a contiguous tensor, got strides {list(value.stride())} for shape {list(value.shape)}"
    )
