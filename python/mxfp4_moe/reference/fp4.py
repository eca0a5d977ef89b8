"""The whole layer where weights are NVFP4, or activations FP4: as `chain.layer`, with scales beside the GEMMs' blocks.

A sum of NVFP4 products is multiplied by one float32: the product of what the weights' scale of the expert (and, of w13,
of gates or ups) and the row's scale multiply, rounded once; the product with the sum is rounded once more. All rows of
an expert are quantized under the global scale that the checkpoint has for its input. Where it has none, each row has
its own, 2688 / amax: not one for all rows, which would make a token's result depend on the others in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._torch_state import exact
from ..arithmetic import SM90_BF16, SM90_FP16, Arithmetic, gemm, of_arch
from ..formats import (
    FP16_NVFP4_UNIT,
    NVFP4_BLOCK,
    WeightFormat,
    nvfp4_row_scales,
    quantize_mxfp4_activations,
    quantize_nvfp4,
)
from ..weights import MoEWeights
from .activation import activate
from .chain import ROW_DTYPES, finalize, route

_HALVES = (torch.bfloat16, torch.float16)
_RULES = {"bf16": SM90_BF16, "fp16": SM90_FP16}  # of activations that are not quantized
_IDS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Fp4Rows:
    """What a GEMM reads, sorted by expert."""

    values: Tensor  # uint8 [R, K/2] E2M1, or bfloat16 or float16 [R, K]
    scales: Tensor | None  # uint8 [R, K/16] E4M3 of NVFP4, [R, K/32] E8M0 of MXFP4
    factor: Tensor | None  # float32 [R], what undoes NVFP4's global scale


def quantize_rows(values: Tensor, activation_format: str, given: tuple[Tensor, Tensor] | None) -> Fp4Rows:
    """Floats [R, K] as a GEMM reads them.

    Args:
        given: of NVFP4, the global scale of each row and its reciprocal, float32 [R]; None: from each row's amax.
    """
    if activation_format in _RULES:
        return Fp4Rows(values.to(torch.float16 if activation_format == "fp16" else torch.bfloat16), None, None)
    if activation_format == "mxfp4":
        return Fp4Rows(*quantize_mxfp4_activations(values), None)
    if given is None:
        scale = nvfp4_row_scales(values)
        given = scale, scale.reciprocal()
    return Fp4Rows(*quantize_nvfp4(values, given[0]), given[1])


@exact
def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    activation_format: str,
    output_dtype: torch.dtype | None = None,
    intermediate_rounding: bool = False,
    arithmetic: Arithmetic | None = None,
    hidden_states_scale: Tensor | None = None,
) -> Tensor:
    """`reference.fused_moe` of NVFP4 weights with "nvfp4", "bf16" or "fp16" activations, or of MXFP4 with "mxfp4".

    Args:
        hidden_states_scale: E4M3 bytes [T, H/16] of hidden states that are NVFP4 already, uint8 [T, H/2], under the
            global scales that the weights have for their input; with "nvfp4" and an output_dtype.
        arithmetic: of the two GEMMs; None: SM12x's of FP4 x FP4, and SM90's of bfloat16 and float16.
    """
    experts, hidden, inter, kind = (
        weights.num_experts,
        weights.hidden_size,
        weights.intermediate_size,
        weights.weight_format,
    )
    if hidden_states_scale is None:
        require_tensor("hidden_states", hidden_states, _HALVES, ("T", hidden), weights.device)
    else:
        require_tensor("hidden_states", hidden_states, torch.uint8, ("T", hidden // 2), weights.device)
        shape = (len(hidden_states), hidden // NVFP4_BLOCK)
        require_tensor("hidden_states_scale", hidden_states_scale, torch.uint8, shape, weights.device)
    require_tensor("topk_ids", topk_ids, _IDS, (len(hidden_states), "k"), weights.device)
    require_tensor("topk_weights", topk_weights, torch.float32, topk_ids.shape, weights.device)
    pair = f"{kind.value}_{activation_format}"
    rule = arithmetic or _RULES.get(activation_format) or of_arch("120f", pair)
    dtype = hidden_states.dtype if output_dtype is None else output_dtype

    offsets, row_slot, slot_row = route(topk_ids - weights.first_expert, experts)
    row_slot = row_slot[: int(offsets[-1])]
    row_expert = torch.repeat_interleave(torch.arange(experts, device=offsets.device), offsets.diff())
    inputs = _input_scales(weights, row_expert) if activation_format == "nvfp4" else (None, None)
    w13_factors, w2_factors = _column_factors(weights, FP16_NVFP4_UNIT if activation_format == "fp16" else 1.0)

    def grouped(rows: Fp4Rows, weight: Tensor, n: int, k: int, factors: Tensor | None) -> Tensor:
        out = torch.zeros(len(rows.values), n, dtype=torch.float32, device=rows.values.device)
        for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
            if end > begin:
                own = slice(begin, end)
                plain = kind.read_rows(weight[e], n, k, slice(0, n), weights.word_order)
                scales = None if rows.scales is None else rows.scales[own]
                factor = None if factors is None else factors[e]
                if rows.factor is not None and factor is not None:
                    factor = rows.factor[own].unsqueeze(1) * factor
                gemm(rule, rows.values[own], scales, *plain, out[own], pair=pair, factor=factor)
        return out

    token = row_slot // max(topk_ids.shape[1], 1)
    if hidden_states_scale is None:
        rows = quantize_rows(hidden_states[token], activation_format, inputs[0])
    else:
        assert inputs[0] is not None, "rows that are NVFP4 have a global scale"
        rows = Fp4Rows(hidden_states[token], hidden_states_scale[token], inputs[0][1])
    gemm1 = grouped(rows, weights.w13, weights.w13_rows, hidden, w13_factors)
    numbers = (weights.alpha, weights.beta, weights.limit)
    rounding = dtype if intermediate_rounding else None
    values = activate(gemm1, row_expert, weights.w13_bias, weights.activation, *numbers, rounding=rounding)
    rows = quantize_rows(values, activation_format, inputs[1])
    gemm2 = grouped(rows, weights.w2, hidden, inter, w2_factors)
    return finalize(gemm2.to(ROW_DTYPES[dtype]), topk_weights, slot_row, row_expert, weights.w2_bias)


def _input_scales(
    weights: MoEWeights, row_expert: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Of both GEMMs' rows, the global scale of each row's expert and its reciprocal; None if each row has its own."""
    assert weights.tensor_scales is not None
    encode, decode = weights.tensor_scales.input_global_scales(), weights.tensor_scales.input_factors()
    if encode is None or decode is None:
        return None, None
    w13, w2 = ((one[row_expert], other[row_expert]) for one, other in zip(encode, decode, strict=True))
    return w13, w2


def _column_factors(weights: MoEWeights, unit: float) -> tuple[Tensor | None, Tensor | None]:
    """What the sums of w13's rows and of w2's are multiplied by for the weights: float32 [E, W] and [E, 1]; or None.

    `unit` is what the weights are divided by that the sums are of.
    """
    if weights.weight_format is not WeightFormat.NVFP4:
        return None, None
    assert weights.tensor_scales is not None
    w13, w2 = (factors * unit for factors in weights.tensor_scales.factors())
    row = torch.arange(weights.w13_rows, device=weights.device)
    part = row % 16 // 8 if weights.activation.is_gated else torch.zeros_like(row)
    return w13[:, part], w2.unsqueeze(1)
