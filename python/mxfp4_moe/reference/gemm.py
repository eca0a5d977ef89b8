"""The grouped GEMM under the arithmetic of an architecture, in pieces that fit the memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._torch_state import exact
from ..arithmetic import FP32_CHAIN, Arithmetic, gemm
from ..formats import (
    BLOCK,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
)

_MIB = 1 << 20


@exact
def grouped_gemm(
    codes: Tensor,
    row_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    expert_offsets: Tensor,
    *,
    arithmetic: Arithmetic = FP32_CHAIN,
) -> Tensor:
    """MXFP8 rows times the MXFP4 weight of their expert, in the arithmetic of an architecture (docs/arithmetic.md).

    The fp32 chain, per output: acc = +0; for each block of 32 in k order, block = the exact sum of the 32 products,
    rounded to fp32; s = 2^(sa-127) * 2^(sb-127) in fp32; acc = fma(block, s, acc). Here block * s and the sum are two
    fp32 operations: s is a power of two, so the product is exact and the pair equals the fma, except where block * s
    falls into the subnormals (below 2^-126) and loses bits, or overflows. Float64 sums of 32 products are exact in any
    order: an E4M3 x E2M1 product is an integer below 2^22 in units of 2^-10.

    Other rules add up in the tensor core: one step per block of 32, or two with k 0..15 and then k 16..31 of it where a
    step has 16 products.

    Args:
        codes: uint8 [R, K] E4M3, rows sorted by expert, plain k order; K a multiple of 32.
        row_scales: uint8 [R, K/32] E8M0.
        packed: uint8 [E, N, K/2] E2M1, low nibble = even k (checkpoint order, not prepared).
        scales: uint8 [E, N, K/32] E8M0.
        expert_offsets: int32 [E+1]; expert e owns rows [expert_offsets[e], expert_offsets[e+1]).
        arithmetic: the rule; `arithmetic.of_arch` gives that of an architecture's kernels.

    Returns:
        float32 [R, N]; rows of no expert are zero.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device; offsets that descend or pass R.
    """
    require_tensor("codes", codes, torch.uint8, ("R", "K"))
    k = codes.shape[1]
    if k % BLOCK:
        raise ValueError(f"codes: expected K a multiple of {BLOCK}, got uint8 {list(codes.shape)}")
    require_tensor("packed", packed, torch.uint8, ("E", "N", k // 2), codes.device)
    experts, n, _ = packed.shape
    require_tensor("scales", scales, torch.uint8, (experts, n, k // BLOCK), codes.device)
    return _grouped_gemm(codes, row_scales, lambda e: (packed[e], scales[e]), n, expert_offsets, experts, arithmetic)


def _grouped_gemm(
    codes: Tensor,
    row_scales: Tensor,
    weight: Callable[[int], tuple[Tensor, Tensor]],
    n: int,
    expert_offsets: Tensor,
    experts: int,
    arithmetic: Arithmetic,
) -> Tensor:
    """`grouped_gemm` with the plain weights of one expert, (packed [N, K/2], scales [N, K/32]), fetched when needed."""
    rows, k = codes.shape
    require_tensor("row_scales", row_scales, torch.uint8, (rows, k // BLOCK), codes.device)
    require_tensor("expert_offsets", expert_offsets, torch.int32, (experts + 1,), codes.device)
    offsets = expert_offsets.tolist()
    if offsets[0] < 0 or offsets[-1] > rows or offsets != sorted(offsets):
        raise ValueError(f"expert_offsets: expected ascending values in 0..{rows}, got {offsets}")
    out = torch.zeros(rows, n, dtype=torch.float32, device=codes.device)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            one = codes[begin:end], row_scales[begin:end], *weight(e), out[begin:end]
            if arithmetic == FP32_CHAIN:
                _gemm(*one)
            else:
                gemm(arithmetic, *one)
    return out


def _gemm(codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """One expert's rows in the fp32 chain; a CPU keeps the block sums in cache, a GPU gets few, large launches."""
    (m, k), n = codes.shape, packed.shape[0]
    weight_bytes, block_bytes = (128 * _MIB, 128 * _MIB) if codes.is_cuda else (64 * _MIB, 4 * _MIB)
    columns = min(n, max(128, weight_bytes // (12 * max(k, 1))))  # float32 and float64 of each weight
    rows = min(m, max(1, block_bytes // (16 * columns)))  # float64 sum, float32 sum, scale of each output
    blocks = max(1, block_bytes // (16 * columns * rows))

    a = decode_e4m3(codes).double().view(m, k // BLOCK, BLOCK).transpose(0, 1)
    a_scale = decode_e8m0(row_scales).t().unsqueeze(2)
    for c in range(0, n, columns):
        b = decode_e2m1(packed[c : c + columns]).double().view(-1, k // BLOCK, BLOCK).permute(1, 2, 0)
        b_scale = decode_e8m0(scales[c : c + columns]).t().unsqueeze(1)
        for r in range(0, m, rows):
            acc = out[r : r + rows, c : c + columns]
            for i in range(0, k // BLOCK, blocks):
                step = slice(i, i + blocks)
                products = torch.bmm(a[step, r : r + rows], b[step]).float()
                products *= a_scale[step, r : r + rows] * b_scale[step]
                for product in products:
                    acc += product
