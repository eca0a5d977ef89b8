"""The grouped GEMM under the arithmetic of an architecture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._torch_state import exact
from ..arithmetic import SM12X_MXF8F6F4, SM90_BF16, SM90_FP16, Arithmetic, gemm
from ..formats import BLOCK

Rows = tuple[Tensor, Tensor | None]  # what a GEMM reads: E4M3 codes and their scales, or 16-bit floats alone
_HALVES = {torch.bfloat16: SM90_BF16, torch.float16: SM90_FP16}


@exact
def grouped_gemm(
    rows: Tensor,
    row_scales: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    expert_offsets: Tensor,
    *,
    arithmetic: Arithmetic | None = None,
) -> Tensor:
    """MXFP8, bfloat16 or float16 rows times the MXFP4 weight of their expert, as an architecture adds.

    docs/arithmetic.md has the rules.

    A step takes a block of 32 k, or k 0..15 and then k 16..31 of it where it has 16 products. A rule that takes
    bfloat16 gets MXFP8 rows by `formats.mxfp8_to_bf16`. Under one of float16, weights are relative to the largest scale
    of their expert's matrix (`formats.mxfp4_in_fp16`).

    Args:
        rows: uint8 [R, K] E4M3, or bfloat16 or float16 [R, K]; sorted by expert, plain k order; K a multiple of 32.
        row_scales: uint8 [R, K/32] E8M0; None of bfloat16 and float16 rows.
        packed: uint8 [E, N, K/2] E2M1, low nibble = even k (checkpoint order, not prepared).
        scales: uint8 [E, N, K/32] E8M0.
        expert_offsets: int32 [E+1]; expert e owns rows [expert_offsets[e], expert_offsets[e+1]).
        arithmetic: the rule; `arithmetic.of_arch` gives that of an architecture's kernels. By default SM12x's of MXFP8
            rows, and SM90's of bfloat16 and float16.

    Returns:
        float32 [R, N]; rows of no expert are zero.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device; offsets that descend or pass R; bfloat16
            or float16 rows under a rule that takes others.
    """
    require_tensor("rows", rows, torch.uint8 if row_scales is not None else tuple(_HALVES), ("R", "K"))
    k = rows.shape[1]
    if k % BLOCK:
        raise ValueError(f"rows: expected K a multiple of {BLOCK}, got {describe(rows)}")
    require_tensor("packed", packed, torch.uint8, ("E", "N", k // 2), rows.device)
    experts, n, _ = packed.shape
    require_tensor("scales", scales, torch.uint8, (experts, n, k // BLOCK), rows.device)
    both = rows, row_scales
    return _grouped_gemm(both, lambda e: (packed[e], scales[e]), n, expert_offsets, experts, arithmetic)


def _grouped_gemm(
    rows: Rows,
    weight: Callable[[int], tuple[Tensor, Tensor]],
    n: int,
    expert_offsets: Tensor,
    experts: int,
    arithmetic: Arithmetic | None,
) -> Tensor:
    """`grouped_gemm` with the plain weights of one expert, (packed [N, K/2], scales [N, K/32]), fetched when needed."""
    values, row_scales = rows
    count, k = values.shape
    if row_scales is not None:
        require_tensor("row_scales", row_scales, torch.uint8, (count, k // BLOCK), values.device)
    if arithmetic is None:
        arithmetic = _HALVES[values.dtype] if row_scales is None else SM12X_MXF8F6F4
    if row_scales is None and arithmetic.operands != _HALVES[values.dtype].operands:
        expected = {"bf16": "bfloat16", "fp16": "float16"}.get(arithmetic.operands, "MXFP8")
        raise ValueError(f"rows: expected {expected} for the arithmetic {arithmetic.name!r}, got {describe(values)}")
    require_tensor("expert_offsets", expert_offsets, torch.int32, (experts + 1,), values.device)
    offsets = expert_offsets.tolist()
    if offsets[0] < 0 or offsets[-1] > count or offsets != sorted(offsets):
        raise ValueError(f"expert_offsets: expected ascending values in 0..{count}, got {offsets}")
    out = torch.zeros(count, n, dtype=torch.float32, device=values.device)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            own = slice(begin, end)
            gemm(arithmetic, values[own], None if row_scales is None else row_scales[own], *weight(e), out[own])
    return out
