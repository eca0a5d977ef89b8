"""`fused_moe` for every pair of formats: which of the chains computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import require_tensor
from ..arithmetic import Arithmetic
from ..formats import WeightFormat
from ..weights import MoEWeights
from . import chain, fp4


def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    intermediate_rounding: bool = False,
    activation_format: str | None = None,
    arithmetic: Arithmetic | None = None,
) -> Tensor:
    """One MoE layer: the sum over each token's experts of topk_weight * (w2 . act(w13 . x + bias) + bias).

    Activations are quantized to MXFP8 (`quantize_mxfp8`), MXFP4 (`quantize_mxfp4_activations`) or NVFP4
    (`quantize_nvfp4`), or rounded to bfloat16 or float16, before each GEMM. The second GEMM's rows are bfloat16 before
    the weighted sum; for a float16 output they are not, and the sum alone is rounded to it.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0. With hidden_states_scale: uint8 or float8_e4m3fn. With
            activation_format "fp16": float16.
        topk_weights: float32 [T, k], the router weights.
        topk_ids: int32 or int64 [T, k]; ids < 0 or >= E contribute nothing; an expert may repeat within a token.
        weights: prepared weights on the same device.
        hidden_states_scale, scale_layout: as for `mxfp8_rows`.
        output_dtype: bfloat16 or float16; None: the dtype of hidden_states, bfloat16 where that is MXFP8.
        intermediate_rounding: `activate` with the output dtype as its rounding.
        activation_format: of MXFP4 weights "mxfp8", the default, or "bf16", "mxfp4" and "fp16", none of hidden states
            that are MXFP8; of NVFP4 weights "nvfp4", the default, "bf16" or "fp16".
        arithmetic: of the two GEMMs; None: as for `grouped_gemm`, and SM12x's of FP4 x FP4.

    Returns:
        [T, H] in the output dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape or device.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    formats = weights.weight_format.activations
    if activation_format is None:
        activation_format = formats[0]
    if activation_format not in formats:
        expected = " or ".join(map(repr, formats))
        raise ValueError(
            f"activation_format: expected {expected} with {weights.weight_format.value} weights, got "
            f"{activation_format!r}"
        )
    if activation_format == "fp16" and hidden_states_scale is None:
        require_tensor("hidden_states", hidden_states, torch.float16)
    if weights.weight_format is WeightFormat.NVFP4 or activation_format == "mxfp4":
        if hidden_states_scale is not None:
            raise ValueError(
                f"hidden_states_scale: expected None with activation_format {activation_format!r}, which quantizes "
                "bfloat16 or float16 hidden_states itself, got scales of MXFP8"
            )
        return fp4.fused_moe(
            hidden_states,
            topk_weights,
            topk_ids,
            weights,
            activation_format=activation_format,
            output_dtype=output_dtype,
            intermediate_rounding=intermediate_rounding,
            arithmetic=arithmetic,
        )
    return chain.fused_moe(
        hidden_states,
        topk_weights,
        topk_ids,
        weights,
        hidden_states_scale=hidden_states_scale,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        intermediate_rounding=intermediate_rounding,
        activation_format=activation_format,
        arithmetic=arithmetic,
    )
