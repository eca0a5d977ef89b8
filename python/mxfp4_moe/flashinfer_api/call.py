"""FlashInfer's call: which of its modes is asked for, and the layer behind the one that is here."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._call.fused_moe import fused_moe
from .._install import loading, wheel
from ..activations import Activation
from ..formats import BLOCK
from ..weights import MoEWeights
from .weight_cache import prepared_weights

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)


class ActivationType(IntEnum):
    """What stands between the GEMMs, by FlashInfer's numbers; `Activation` has the formulas."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3  # with swiglu_alpha, swiglu_beta or swiglu_limit: SwigluBias
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7  # swiglu_limit is 7.0 where it is not given
    GegluTanh = 8
    Identity = 9
    Situ = 10  # refused
    InvalidType = 11  # refused

    @property
    def is_gated(self) -> bool:
        """Whether fc1 holds an up and a gate row per output."""
        return self is ActivationType.Situ or (self in _ACTIVATIONS and _ACTIVATIONS[self].is_gated)


_ACTIVATIONS = {
    ActivationType.Gelu: Activation.GELU,
    ActivationType.Relu: Activation.RELU,
    ActivationType.Silu: Activation.SILU,
    ActivationType.Swiglu: Activation.SWIGLU,
    ActivationType.Geglu: Activation.GEGLU,
    ActivationType.SwigluBias: Activation.SWIGLU_OAI,
    ActivationType.Relu2: Activation.RELU2,
    ActivationType.SwigluStep: Activation.SWIGLU_STEP,
    ActivationType.GegluTanh: Activation.GEGLU_TANH,
    ActivationType.Identity: Activation.IDENTITY,
}


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor],
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = False,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
) -> list[Tensor]:
    """One MoE layer. T tokens, k experts per token, E experts on this rank; W = 2I for gated activations, else I.

    The first call with a set of weights prepares them (seconds for a large layer, a second copy in memory); later
    calls find them by a few comparisons. The copy is freed with the tensors that it came from, and made anew when
    torch has counted a write to one of them. Writes that torch does not count are those through ``.data``, by other
    libraries' kernels, and to tensors made under inference mode: call `forget_weights` after such a write. While a
    CUDA graph is captured nothing can be prepared: call once before.

    Values are rounded where FlashInfer rounds them: GEMM1 and the activation to output_dtype, ahead of MXFP8. That is
    `fused_moe` with intermediate_rounding=True; its default keeps both in float32, so its bits are others.

    Args:
        input: float8_e4m3fn [T, H] with input_sf, or bfloat16 or float16 [T, H] without.
        token_selected_experts: int32 [T, k], ids of the whole layer's experts.
        token_final_scales: float32 [T, k], or None for ones.
        fc1_expert_weights: int64 [E, W, H/16], packed MXFP4; rows [up; gate] for gated activations.
        fc2_expert_weights: int64 [E, H, I/16].
        output_dtype: bfloat16 or float16.
        quant_scales: [fc1 int32 [E, W padded to 128, ceil(H/128)], ignored, fc2 int32 [E, H padded to 128,
            ceil(I/128)], ignored]; 128x4-swizzled E8M0 bytes. FlashInfer ignores the other two in this mode as well.
        fc1_expert_biases: [E, W], rows as fc1_expert_weights.
        fc2_expert_biases: [E, H], added on tp_rank 0 only, before the router scale.
        input_sf: uint8 E8M0 scales of float8 input: 128x4-swizzled, flat; or [T, H/32] with swizzled_input_sf=False.
        swiglu_alpha, swiglu_beta, swiglu_limit: float32 [E]; missing ones are 1, 0 and no limit.
        tp_size, tp_rank, ep_size, ep_rank: the weights passed in are this rank's own. Ids of other ranks' experts
            contribute nothing; summing the ranks' outputs is the caller's all-reduce.
        output: tensor [T, H] of output_dtype to write to.
        activation_type: see `ActivationType`.
        use_fused_finalize: True asks for a sum by atomics, in no fixed order, and is refused. The default differs from
            FlashInfer's, whose True stands for either.
        tune_max_num_tokens, enable_pdl, workspace_buffer: taken and not needed: tiles are not tuned by calls, and
            scratch comes from torch's caching allocator.
        others: modes that are not here; anything but their defaults is refused.

    Returns:
        [output], output [T, H].

    Raises:
        NotImplementedError: an argument that asks for a mode that is not here.
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        RuntimeError: weights not seen before while a CUDA graph is captured; see also `fused_moe`.
    """
    _refuse_modes(
        {
            "enable_alltoall": (enable_alltoall, "all-to-all communication"),
            "use_deepseek_fp8_block_scale": (use_deepseek_fp8_block_scale, "DeepSeek FP8 block scales"),
            "use_w4_group_scaling": (use_w4_group_scaling, "4-bit weights with group scales (INT4, W4A16)"),
            "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
            "use_packed_weights": (use_packed_weights, "packed uint4 weights (INT4, W4A16)"),
            "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
            "use_fused_finalize": (use_fused_finalize, "sums by atomics, whose order changes from run to run"),
            "cluster_size": (cluster_size != 1 or cluster_rank != 0, "clusters of ranks"),
            "profile_ids": (any(i != -1 for i in profile_ids or ()), "FlashInfer kernel profiles"),
            "situ_beta": (situ_beta is not None or situ_linear_beta is not None, "SiTU activation"),
        }
    )
    kind = _activation_type(activation_type)
    _check_quantization(input, fc1_expert_weights, quant_scales, input_sf, use_mxfp8_act_scaling)
    require_tensor("token_selected_experts", token_selected_experts, torch.int32, ("T", "k"))
    if output_dtype not in _HALVES:
        raise ValueError(f"output_dtype: expected torch.bfloat16 or torch.float16, got {output_dtype}")
    if token_final_scales is None:
        token_final_scales = torch.ones(
            token_selected_experts.shape, dtype=torch.float32, device=token_selected_experts.device
        )

    numbers = (swiglu_alpha, swiglu_beta, swiglu_limit)
    weights: MoEWeights = prepared_weights(
        (
            fc1_expert_weights,
            quant_scales[0],
            fc2_expert_weights,
            quant_scales[2],
            fc1_expert_biases,
            fc2_expert_biases,
        ),
        numbers,
        _activation(kind, numbers),
        (ep_rank, ep_size, tp_rank, tp_size),
    )
    scale_layout = "swizzled" if swizzled_input_sf else "linear"
    if input_sf is not None:
        input_sf = _input_scales(input, input_sf, scale_layout)
    result = fused_moe(
        input,
        token_final_scales,
        token_selected_experts,
        weights,
        hidden_states_scale=input_sf,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        output=output,
        intermediate_rounding=True,
    )
    return [result]


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts_total: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype = torch.bfloat16,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    min_latency_mode: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_fused_finalize: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    device: torch.device | str | None = None,
) -> int:
    """Bytes that `cutlass_fused_moe` needs as workspace_buffer: 0, its scratch comes from torch's caching allocator.

    Raises:
        NotImplementedError: a mode that is not here.
        ValueError: a size below 1, or a rank outside its group.
    """
    _refuse_modes(
        {
            "min_latency_mode": (min_latency_mode, "minimum-latency mode"),
            "use_deepseek_fp8_block_scale": (use_deepseek_fp8_block_scale, "DeepSeek FP8 block scales"),
            "use_w4_group_scaling": (use_w4_group_scaling, "4-bit weights with group scales (INT4, W4A16)"),
            "use_packed_weights": (use_packed_weights, "packed uint4 weights (INT4, W4A16)"),
            "use_wfp4afp8_humming": (use_wfp4afp8_humming, "folded weight scales with FP8 activations"),
            "use_fused_finalize": (use_fused_finalize, "sums by atomics, whose order changes from run to run"),
        }
    )
    _activation_type(activation_type)
    sizes = {
        "max_num_tokens": max_num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts_total": num_experts_total,
        "top_k": top_k,
        "tp_size": tp_size,
        "ep_size": ep_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    for name, rank, size in (("tp_rank", tp_rank, tp_size), ("ep_rank", ep_rank, ep_size)):
        if not 0 <= rank < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {rank}")
    if num_experts_total % ep_size:
        raise ValueError(f"num_experts_total: expected a multiple of ep_size = {ep_size}, got {num_experts_total}")
    return 0


def _refuse_modes(modes: dict[str, tuple[bool, str]]) -> None:
    for name, (asked, what) in modes.items():
        if asked:
            raise NotImplementedError(f"{name}: this library has no {what}; it has MXFP8 x MXFP4 only")


def _refuse_quantization(argument: str, quantization: str) -> None:
    manifest = loading.manifest()
    profile = (wheel.read_report() or {}).get("profile") or manifest.default_profile
    refusal = manifest.refusal(profile, quantization)
    assert refusal is not None, "what the wheel has is not refused"
    raise NotImplementedError(f"{argument}: {refusal}")


def _activation_type(value: ActivationType | int) -> ActivationType:
    try:
        kind = ActivationType(value)
    except ValueError:
        raise ValueError(f"activation_type: expected an ActivationType, got {value!r}") from None
    if kind not in _ACTIVATIONS:
        having = ", ".join(k.name for k in _ACTIVATIONS)
        raise NotImplementedError(f"activation_type: {kind.name} is not in this library, which has {having}")
    return kind


def _activation(kind: ActivationType, numbers: tuple[Tensor | None, ...]) -> Activation:
    if kind is ActivationType.Swiglu and any(number is not None for number in numbers):
        return Activation.SWIGLU_OAI
    return _ACTIVATIONS[kind]


def _check_quantization(
    input: Tensor, weights: Tensor, quant_scales: Sequence[Tensor], input_sf: Tensor | None, mxfp8: bool
) -> None:
    """Finds out which of FlashInfer's modes the tensors mean, as it does from dtypes, and refuses all but one."""
    for name, value in (("input", input), ("fc1_expert_weights", weights)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if weights.dtype in _FLOATS:
        _refuse_quantization("fc1_expert_weights", f"{str(input.dtype).removeprefix('torch.')}_unquantized")
    if weights.dtype is torch.float8_e4m3fn:
        _refuse_quantization("fc1_expert_weights", "mxfp8_mxfp8" if mxfp8 else "fp8_fp8")
    if weights.dtype is torch.uint8:  # MXFP4 for MXFP8 input comes as int64 views
        _refuse_quantization("fc1_expert_weights (uint8)", "bfloat16_int4")
    scales = () if quant_scales is None else quant_scales
    if weights.dtype is torch.int64:
        if input.dtype in (torch.uint8, torch.int64) or len(scales) == 6:
            _refuse_quantization("quant_scales", "nvfp4_nvfp4")
        if input.dtype is torch.float8_e4m3fn and not mxfp8:
            _refuse_quantization("use_mxfp8_act_scaling", "fp8_mxfp4")
    if input.dtype is torch.float8_e4m3fn and input_sf is None:
        raise ValueError("input_sf: expected the scales of float8_e4m3fn input, got None")
    if input.dtype is not torch.float8_e4m3fn and input_sf is not None:
        raise ValueError(f"input_sf: expected None for input that is not float8_e4m3fn, got it with {describe(input)}")
    if len(scales) != 4:
        raise ValueError(
            f"quant_scales: expected 4 tensors [fc1 scales, unused, fc2 scales, unused], got {len(scales)}"
        )


def _input_scales(input: Tensor, input_sf: Tensor, scale_layout: str) -> Tensor:
    """The scales in the shape that `fused_moe` takes; FlashInfer looks at their bytes alone."""
    require_tensor("input_sf", input_sf, torch.uint8, None, input.device)
    shape = [input.shape[0], input.shape[-1] // BLOCK]
    if scale_layout == "linear" and input_sf.is_contiguous() and input_sf.numel() == shape[0] * shape[1]:
        return input_sf.view(shape)
    return input_sf.reshape(-1) if scale_layout == "swizzled" else input_sf
