"""The call: check every argument, choose a tile, run the layer. CPU tensors run `reference.fused_moe`.

Nothing is launched before the last check has passed, and nothing is compiled, ever. The path of a good call is kept
short: comparisons that succeed, two cached look-ups, one operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._checkpoints.fp16_factors import ready_for
from .._checkpoints.options import split_number
from .._checkpoints.tensor_scales import INPUT_ARGUMENTS, WEIGHT_ARGUMENTS
from ..weights import MoEWeights
from . import operators
from .activation_format import format_of_call
from .checks import check_layer, check_output
from .gradient import refuse_gradient
from .launch import run
from .selection import check_tile, tile_of_call
from .transforms import as_fake, in_graph, refuse_transforms


def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    tile_mn: tuple[int, int] | None = None,
    auto_tile_select: bool = True,
    output: Tensor | None = None,
    intermediate_rounding: bool = False,
    activation_format: str | None = None,
) -> Tensor:
    """One MoE layer with MXFP4 weights: sum over a token's experts of topk_weight * (w2 . act(w13 . x + b13) + b2).

    T tokens, k experts per token, E experts, H hidden size. Activations are quantized to MXFP8 before each of the two
    GEMMs, or to FP4, or taken as 16-bit floats (activation_format); weights may be NVFP4 (`MoEWeights`). A token's
    result depends on nothing but that token: the same bits in every batch and with every tile. For inference: a
    gradient that is asked for is an error of the backward pass. Work is queued on the current CUDA stream, without
    synchronization; CUDA graphs capture it, and any number of threads and streams may call at once. All tensors are
    contiguous and on one device.
    In a function under torch.compile or torch.export the call is one operator, `mxfp4_moe::moe_layer`, which chooses
    its tile when it runs: tile_mn is checked and auto_tile_select means nothing there.

    Limits: E up to 1024, T * k up to 2^31 - 1025; H and I are multiples of 32; products of sizes may pass 2^31.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0. A NaN or infinity makes its own token NaN, and no other.
            With hidden_states_scale: MXFP8, uint8 or float8_e4m3fn [T, H] (E4M3 codes; a NaN code, the same).
        topk_weights: float32 [T, k], the router weights; NaN and infinities reach their own token, and no other.
        topk_ids: int32 or int64 [T, k], k >= 1, ids of the whole layer's experts. An id of no expert in weights
            contributes nothing; a token with no valid id is zero. An expert may occur more than once in a token.
        weights: prepared weights on the same device.
        hidden_states_scale: uint8 E8M0 scales of MXFP8 hidden states, one for each 32 values (OCP MX v1.0). Bytes 0 to
            248 (2^121) count as they are; 249 to 254, which no finite bfloat16 needs, count as NaN, as does 255.
        scale_layout: "linear", [T, H/32]; or "swizzled", 128x4 with T padded to 128 and H/32 to 4 (as
            `formats.swizzle_scales`), flat, ceil(T/128) * ceil(H/128) * 512 bytes.
        output_dtype: bfloat16 or float16; by default the dtype of hidden_states, bfloat16 where they are MXFP8.
        tile_mn: GEMM tile (M, N) of the wheel's manifest, for measurements; every tile gives the same result. This
            one and the automatic choice give way to the nearest tile, with one warning, where the GPU's self-test
            blocked the tile or its library does not load.
        auto_tile_select: without tile_mn, choose the tile by the GPU's tuned table, else on
            SM12x by a cost model, else by the expected rows per expert; False takes (128, 128).
        output: tensor [T, H] of the output dtype to write the result to; may be hidden_states itself.
        intermediate_rounding: round GEMM1's values, before their bias, and the activation's to the output dtype, as
            FlashInfer does; there a value beyond float16's range becomes an infinity, which makes its token NaN unless
            the activation clamps it. Without it they stay in float32 until MXFP8, which is closer to the exact layer.
        activation_format: to what the values that each GEMM reads are brought before: "mxfp8"; "bf16", which is
            closer to the exact layer, and on SM90 as fast; "fp16", of float16 hidden states, which is closer yet where
            values are in float16's range: what the activation gives beyond it is infinite, and MXFP4 weights more than
            24 binades below the largest scale of their expert's matrix are rounded, with a warning (`formats.
            mxfp4_in_fp16`); or "mxfp4", which is farther from it, and of which SM12x multiplies twice as many. Of NVFP4
            weights "nvfp4", "bf16" or "fp16". None: "mxfp8", of NVFP4 weights "nvfp4". What devices take:
            `activation_formats`; on SM12x weights in its word order (`MoEWeights.to`). Hidden states that are MXFP8
            stay it.

    Returns:
        [T, H] in the output dtype: `output` where it was given.

    Raises:
        TypeError: an argument of another type or dtype, such as bfloat16 hidden_states with "fp16".
        ValueError: an argument of another shape, device or stride; a tile that is not in the manifest; weights on
            another device, or in another's word order; more experts or slots than the limits; an activation_format
            that is none, or that the device has no kernels for.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch; data
            not aligned to 16 bytes.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    activation_format = format_of_call(activation_format, weights)
    output_dtype = check_layer(
        hidden_states,
        topk_weights,
        topk_ids,
        weights,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        activation_format,
    )
    refuse_transforms("fused_moe", hidden_states, topk_weights)
    device, (tokens, top_k) = hidden_states.device, topk_ids.shape
    check_output(output, output_dtype, tokens, weights.hidden_size, device)
    if in_graph(hidden_states):
        check_tile(tile_mn)
        result = _traced(
            hidden_states,
            topk_weights,
            topk_ids,
            weights,
            hidden_states_scale,
            scale_layout,
            output_dtype,
            intermediate_rounding,
            activation_format,
        )
        if output is None:
            return result
        if torch.compiler.is_exporting():  # a program is called with any tensors: it checks them itself
            operators.write_output(output, result)
            return output
        return output.copy_(result)
    tile = tile_of_call(tile_mn, auto_tile_select, tokens, top_k, weights, device, activation_format)

    if hidden_states.is_cpu:
        ready_for(weights, activation_format)
        with torch.no_grad():
            result = reference.fused_moe(
                hidden_states,
                topk_weights,
                topk_ids,
                weights,
                hidden_states_scale=hidden_states_scale,
                scale_layout=scale_layout,
                output_dtype=output_dtype,
                intermediate_rounding=intermediate_rounding,
                activation_format=activation_format,
            )
            if output is not None:
                result = output.copy_(result)
        return refuse_gradient("fused_moe", result, hidden_states, topk_weights)
    if output is None:
        output = torch.empty_like(hidden_states, dtype=output_dtype)
    run(
        tile,
        hidden_states,
        hidden_states_scale,
        scale_layout,
        (topk_weights, topk_ids, None, 0),
        weights,
        output,
        intermediate_rounding,
        activation_format=activation_format,
    )
    return refuse_gradient("fused_moe", output, hidden_states, topk_weights)


def _traced(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype,
    intermediate_rounding: bool,
    activation_format: str,
) -> Tensor:
    """The call as a compiled graph sees it: tensors and constants, and no tile that would tie it to T."""
    factors = {} if weights.tensor_scales is None else dict(weights.operator_arguments[1])
    if activation_format == "fp16":
        factors |= zip(WEIGHT_ARGUMENTS, weights._fp16_in_graph(), strict=True)
    alpha, alphas = split_number(weights.alpha, 0.0)
    beta, betas = split_number(weights.beta, 0.0)
    limit, limits = split_number(weights.limit, None)
    result: Tensor = operators.moe_layer(
        hidden_states,
        topk_weights,
        topk_ids - weights.first_expert if weights.first_expert else topk_ids,
        as_fake(weights.w13, hidden_states),
        as_fake(weights.w13_bias, hidden_states),
        as_fake(weights.w2, hidden_states),
        as_fake(weights.w2_bias, hidden_states),
        weights.hidden_size,
        weights.intermediate_size,
        weights.word_order.value,
        weights.activation.value,
        alpha,
        beta,
        limit,
        as_fake(alphas, hidden_states),
        as_fake(betas, hidden_states),
        as_fake(limits, hidden_states),
        hidden_states_scale,
        scale_layout,
        output_dtype,
        intermediate_rounding,
        weights.num_global_experts,
        activation_format,
        *(as_fake(factors.get(name), hidden_states) for name in (*WEIGHT_ARGUMENTS, *INPUT_ARGUMENTS)),
        weights.weight_format.value,
    )
    return result
