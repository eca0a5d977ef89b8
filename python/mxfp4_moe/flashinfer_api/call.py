"""FlashInfer's call, and the layer behind the modes of it that are here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._call.fused_moe import fused_moe
from .._call.gradient import refuse_gradient
from ..activations import Activation
from ..formats import BLOCK, E8M0_ONE
from .activation_type import ActivationType, activation_of
from .given_weights import SWIGLU_NAMES, GivenWeights
from .modes import CODES, Mode, TheirNames, mode_of, refuse_modes, refuse_on
from .nvfp4_input import layer_of_codes
from .weight_cache import prepared_weights
from .workspace import check_output_dtype, check_workspace


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
    use_fused_finalize: bool = True,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    clamped_relu2_limit: Tensor | None = None,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
    backend: str = "cutlass",
    auto_tile_select: bool = True,
    tile_mn: tuple[int, int] | None = None,
    raw_weights: str | None = None,
) -> list[Tensor]:
    """One MoE layer. T tokens, k experts per token, E experts on this rank; W = 2I for gated activations, else I.

    The first call with a set of weights prepares them (seconds for a large layer); later calls find them by a few
    comparisons. They are freed with the tensors that they came from, and made anew when torch has counted a write to
    one of those. Writes that torch does not count are those through ``.data``, by other libraries' kernels, and to
    tensors made under inference mode: call `forget_weights` after such a write. While a CUDA graph is captured nothing
    can be prepared: call once before. What becomes of the raw weights: `set_raw_weights`.

    Values are rounded where FlashInfer rounds them: GEMM1 and the activation to output_dtype, ahead of MXFP8. That is
    `fused_moe` with intermediate_rounding=True; its default keeps both in float32, so its bits are others.

    bf16 x MXFP4 (use_w4_group_scaling=True) is `fused_moe` with activation_format="bf16": SM90 and CPU tensors, and
    SM12x with a wheel that has it. Its weights and scales come from `interleave_moe_weights_for_sm90_mixed_gemm` and
    `interleave_moe_scales_for_sm90_mixed_gemm`, FlashInfer's or the ones here; I and H are multiples of 128. Scales
    of 2^-127 count as they are, where FlashInfer's kernel reads 0.

    NVFP4 x NVFP4 is here for CPU tensors alone, with I and H multiples of 128 and input in bfloat16, float16 or NVFP4;
    sums are multiplied by fc1_global and fc2_global as they are but for a few roundings.

    FP8 x MXFP4 is here as MXFP8 x MXFP4 with activation scales of 1: float8 input without input_sf, five quant_scales,
    use_mxfp8_act_scaling=False. Between the GEMMs are MXFP8's own scales, which keep more than one scale for all does.

    Args:
        input: float8_e4m3fn [T, H], or bfloat16 or float16 [T, H], which are quantized to MXFP8 on the way. bf16 x
            MXFP4: bfloat16. NVFP4: bfloat16, float16, or quantized under fc1 act global, uint8 [T, H/2] (low nibble =
            even k) or its view as int64.
        token_selected_experts: int32 [T, k], ids of the whole layer's experts.
        token_final_scales: float32 [T, k], or None for ones.
        fc1_expert_weights: int64 [E, W, H/16], packed MXFP4; rows [up; gate] for gated activations. bf16 x MXFP4:
            uint8 [E, W, H/2], interleaved.
        fc2_expert_weights: int64 [E, H, I/16], or uint8 [E, H, I/2].
        output_dtype: bfloat16 or float16; bf16 x MXFP4: bfloat16.
        quant_scales: [fc1 int32 [E, W padded to 128, ceil(H/128)], ignored, fc2 int32 [E, H padded to 128,
            ceil(I/128)], ignored]; 128x4-swizzled E8M0 bytes. FlashInfer ignores the other two in this mode as well.
            FP8 x MXFP4: [fc1, fc1 global float32 [E], fc2 act global float32 [] or [E], fc2, fc2 global float32 [E]],
            where fc1 global is 1, and fc2 act global times fc2 global is.
            bf16 x MXFP4: [fc1 int32 [E, W/64, H/128, 16, 4], fc2 int32 [E, H/64, I/128, 16, 4]], views of folded
            scales, or those themselves, uint8 [..., 16].
            NVFP4: [fc1 act global float32 [] or [E], fc1 int32 [E, W, H/64], fc1 global float32 [E], fc2 act global,
            fc2 int32 [E, H, I/64], fc2 global], with E4M3 bytes in place of E8M0.
        fc1_expert_biases: [E, W], rows as fc1_expert_weights.
        fc2_expert_biases: [E, H], added on tp_rank 0 only, before the router scale.
        input_sf: uint8 E8M0 scales of float8 input: 128x4-swizzled, flat; or [T, H/32] with swizzled_input_sf=False.
            Of NVFP4 input its E4M3 scales, the same with [T, H/16].
        swiglu_alpha, swiglu_beta, swiglu_limit: float32 [E]; missing ones are 1, 0 and no limit.
        situ_beta, situ_linear_beta: of ActivationType.Situ, float32 [E]; missing ones are 4 and 25.
        clamped_relu2_limit: of ActivationType.ClampedRelu2, float32 [1], for all experts; FlashInfer has it for other
            formats and GPUs.
        tp_size, tp_rank, ep_size, ep_rank: the weights passed in are this rank's own. Ids of other ranks' experts
            contribute nothing; summing the ranks' outputs is the caller's all-reduce.
        output: tensor [T, H] of output_dtype to write to.
        activation_type: see `ActivationType`.
        use_w4_group_scaling: True for bf16 x MXFP4, and for nothing else here.
        use_fused_finalize: True allows a sum in no fixed order, which nothing here makes use of: sums are always in the
            order of a token's experts.
        workspace_buffer: uint8 or int8, of one dimension, on the input's device; checked, and not needed, as
            tune_max_num_tokens and enable_pdl: tiles are not tuned by calls, scratch is torch's caching allocator's.
        backend: "cutlass".
        auto_tile_select, tile_mn: the tile, as in `fused_moe`.
        raw_weights: what becomes of the raw weights if this call prepares them; None for `set_raw_weights`'s choice.
        others: modes that are not here; anything but their defaults is refused.

    Returns:
        [output], output [T, H]. A gradient that is asked for is an error of the backward pass.

    Raises:
        NotImplementedError: an argument that asks for a mode that is not here.
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        RuntimeError: weights not seen before while a CUDA graph is captured, or whose memory was freed; see also
            `fused_moe`.
    """
    for name, given_ones in (("quant_scales", quant_scales), ("profile_ids", profile_ids)):
        if given_ones is not None and not isinstance(given_ones, Sequence):
            raise TypeError(f"{name}: expected a list or a tuple, got {type(given_ones).__name__}")
    refuse_modes(
        backend=backend,
        use_deepseek_fp8_block_scale=use_deepseek_fp8_block_scale,
        min_latency_mode=min_latency_mode,
        use_packed_weights=use_packed_weights,
        use_wfp4afp8_humming=use_wfp4afp8_humming,
        more={
            "enable_alltoall": (enable_alltoall, "all-to-all communication"),
            "cluster_size": (cluster_size != 1 or cluster_rank != 0, "clusters of ranks"),
            "profile_ids": (any(i != -1 for i in profile_ids or ()), "FlashInfer kernel profiles"),
        },
    )
    if profile_ids is not None and len(profile_ids) != 2:
        raise ValueError(f"profile_ids: expected two, of the first and the second GEMM, got {len(profile_ids)}")
    swiglu = (swiglu_alpha, swiglu_beta, swiglu_limit)
    activation = activation_of(activation_type, any(number is not None for number in swiglu))
    (alpha, beta, limit), number_names = _numbers(
        activation, swiglu, {"situ_beta": situ_beta, "situ_linear_beta": situ_linear_beta}, clamped_relu2_limit
    )
    for name, value in (("input", input), ("fc1_expert_weights", fc1_expert_weights)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    scales = () if quant_scales is None else tuple(quant_scales)
    mode = mode_of(
        input.dtype,
        fc1_expert_weights.dtype,
        use_w4_group_scaling=use_w4_group_scaling,
        use_mxfp8_act_scaling=use_mxfp8_act_scaling,
        names=("input", "fc1_expert_weights"),
        on_cpu=input.is_cpu,
        num_scales=len(scales),
    )
    mode.check_num_scales(len(scales))
    check_output_dtype(output_dtype, mode)
    check_workspace(workspace_buffer, input.device)
    require_tensor("token_selected_experts", token_selected_experts, torch.int32, ("T", "k"))
    if fc1_expert_weights.device != input.device:
        raise ValueError(
            f"fc1_expert_weights: expected a tensor on {input.device}, where input is, got one on "
            f"{fc1_expert_weights.device}"
        )
    if token_final_scales is None:
        shape, device = token_selected_experts.shape, token_selected_experts.device
        token_final_scales = torch.ones(shape, dtype=torch.float32, device=device)
    refuse_on(mode, input.device)
    is_nvfp4_already = mode is Mode.NVFP4 and input.dtype in CODES
    scale_layout = "linear"
    if not is_nvfp4_already:
        input_sf, scale_layout = _input_scales(input, input_sf, mode is Mode.FP8, swizzled_input_sf)
    given = GivenWeights(
        fc1_expert_weights,
        scales[mode.fc1],
        fc2_expert_weights,
        scales[mode.fc2],
        fc1_expert_biases,
        fc2_expert_biases,
        alpha,
        beta,
        limit,
        mode.scale(scales, "fc1 global"),
        mode.scale(scales, "fc2 act global"),
        mode.scale(scales, "fc2 global"),
        activation,
        (ep_rank, ep_size, tp_rank, tp_size),
        number_names,
        mode.scale(scales, "fc1 act global"),
        mode,
    )
    own_names = dict(zip(("alpha", "beta", "limit"), number_names, strict=True))
    of_fc1, of_fc2 = mode.argument("fc1 scales"), mode.argument("fc2 scales")
    with TheirNames(fc1_scale=of_fc1, fc2_scale=of_fc2, **own_names):
        weights = prepared_weights(given, raw_weights)
        with torch.no_grad():
            if is_nvfp4_already:
                routing = (token_final_scales, token_selected_experts)
                result = layer_of_codes(input, input_sf, swizzled_input_sf, *routing, weights, output_dtype, output)
            else:
                result = fused_moe(
                    input,
                    token_final_scales,
                    token_selected_experts,
                    weights,
                    hidden_states_scale=input_sf,
                    scale_layout=scale_layout,
                    output_dtype=output_dtype,
                    tile_mn=tile_mn,
                    auto_tile_select=auto_tile_select,
                    output=output,
                    intermediate_rounding=True,
                    activation_format=mode.activation_format,
                )
    asking = (input, token_final_scales, fc1_expert_biases, fc2_expert_biases, alpha, beta, limit)
    return [refuse_gradient("cutlass_fused_moe", result, *(tensor for tensor in asking if tensor is not None))]


def _numbers(
    activation: Activation,
    swiglu: tuple[Tensor | None, Tensor | None, Tensor | None],
    situ: dict[str, Tensor | None],
    clamped_relu2_limit: Tensor | None,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], tuple[str, str, str]]:
    """The activation's alpha, beta and limit, and the arguments that they are. Others than its own are refused."""
    is_clamped = activation is Activation.CLAMPED_RELU2
    if is_clamped != (clamped_relu2_limit is not None):
        expected = "float32 [1] with" if is_clamped else "None without"
        got = "None" if is_clamped else "a limit"
        raise ValueError(f"clamped_relu2_limit: expected {expected} ActivationType.ClampedRelu2, got {got}")
    is_situ = activation is Activation.SITU
    for name, value in situ.items():
        if value is not None and not is_situ:
            raise ValueError(f"{name}: expected None without ActivationType.Situ, got a value")
    for name, value in zip(SWIGLU_NAMES, swiglu, strict=True):
        if value is not None and (is_clamped or is_situ):
            raise ValueError(f"{name}: expected None with an activation that has other numbers, got a value")
    if is_clamped:
        return (None, None, clamped_relu2_limit), (*SWIGLU_NAMES[:2], "clamped_relu2_limit")
    if is_situ:
        return (None, situ["situ_beta"], situ["situ_linear_beta"]), (SWIGLU_NAMES[0], "situ_beta", "situ_linear_beta")
    return swiglu, SWIGLU_NAMES


def _input_scales(input: Tensor, input_sf: Tensor | None, plain_fp8: bool, swizzled: bool) -> tuple[Tensor | None, str]:
    """The scales in the shape that `fused_moe` takes, and their layout; FlashInfer looks at their bytes alone."""
    if input.dtype is not torch.float8_e4m3fn or plain_fp8:
        if input_sf is not None:
            kind = "FP8 x MXFP4" if plain_fp8 else "input that is not float8_e4m3fn"
            raise ValueError(f"input_sf: expected None for {kind}, got it with {describe(input)}")
        if not plain_fp8:
            return None, "linear"
    require_tensor("input", input, input.dtype, ("T", "H"))
    shape = [input.shape[0], input.shape[1] // BLOCK]
    if plain_fp8:
        return torch.full(shape, E8M0_ONE, dtype=torch.uint8, device=input.device), "linear"
    if input_sf is None:
        raise ValueError("input_sf: expected the scales of float8_e4m3fn input, got None")
    require_tensor("input_sf", input_sf, torch.uint8, None, input.device)
    if swizzled:
        return input_sf.reshape(-1), "swizzled"
    if input_sf.is_contiguous() and input_sf.numel() == shape[0] * shape[1]:
        return input_sf.view(shape), "linear"
    return input_sf, "linear"
