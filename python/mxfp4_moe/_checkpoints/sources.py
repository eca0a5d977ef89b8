"""Where an expert's rows come from: a `Source` gives the rows of one expert as MXFP4 or NVFP4, whatever is stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._arguments import has_values
from ..formats import BLOCK, NVFP4_BLOCK, quantize_mxfp4, quantize_nvfp4, unswizzle_scales

Rows = Callable[[Tensor], tuple[Tensor, Tensor]]  # row numbers [n] -> packed [n, K/2], scales [n, K/block]
Source = Callable[[int, int, int], Rows]  # (expert, first k, past the last k) -> the rows of that expert

NVFP4_SCALE_MAX = 0x7E  # 448; above are E4M3's NaN and what has a sign, which an MMA does not look at
WEIGHT_SCALE_MAX = 253  # of a larger one 6, even halved, is no bf16 (csrc/tile/bf16/bf16_weights.cuh)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def mxfp4_source(name: str, packed: Callable[[int], Tensor], scales: Callable[[int], Tensor]) -> Source:
    """Of packed [N, K/2] or [N, K/32, 16] and scales [N, K/32] per expert; name is that of the scales."""

    def expert(e: int, begin: int, end: int) -> Rows:
        expert_scales = scales(e)
        _refuse_scales(name, expert_scales, e)
        blocks = packed(e).flatten(1)[:, begin // 2 : end // 2]
        expert_scales = expert_scales[:, begin // BLOCK : end // BLOCK]
        return lambda rows: (blocks[rows], expert_scales[rows])

    return expert


def nvfp4_source(name: str, packed: Callable[[int], Tensor], scales: Callable[[int], Tensor]) -> Source:
    """Of packed [N, K/2] and E4M3 scales uint8 [N, K/16] per expert; name is that of the scales."""

    def expert(e: int, begin: int, end: int) -> Rows:
        expert_scales = scales(e)
        wrong = expert_scales > NVFP4_SCALE_MAX
        if has_values(expert_scales) and bool(wrong.any()):
            row, block = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: expected E4M3 bytes 0..{NVFP4_SCALE_MAX} (448), got {int(expert_scales[row, block])} at "
                f"[{e}, {row}, {block}]"
            )
        codes = packed(e)[:, begin // 2 : end // 2]
        expert_scales = expert_scales[:, begin // NVFP4_BLOCK : end // NVFP4_BLOCK]
        return lambda rows: (codes[rows], expert_scales[rows])

    return expert


def nvfp4_float_source(weight: Callable[[int], Tensor], global_scales: Callable[[int, Tensor], Tensor]) -> Source:
    """Of finite floating point weights [N, K] per expert, quantized under global scales: (expert, rows) -> [rows]."""

    def expert(e: int, begin: int, end: int) -> Rows:
        values = weight(e)[:, begin:end]
        return lambda rows: quantize_nvfp4(values[rows], global_scales(e, rows))

    return expert


def float_source(name: str, weight: Callable[[int], Tensor]) -> Source:
    """Of floating point weights [N, K] per expert, any strides."""

    def expert(e: int, begin: int, end: int) -> Rows:
        values = weight(e)[:, begin:end]

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
            try:
                return quantize_mxfp4(values[rows])
            except ValueError as error:  # dtype and shape are known to be right
                raise ValueError(f"{name}: expected finite values, got NaN or infinity in expert {e}") from error

        return quantize

    return expert


def flashinfer_source(name: str, words: Tensor, swizzled: Tensor, n: int, k: int) -> Source:
    packed = words.view(torch.uint8)
    return mxfp4_source(name, packed.__getitem__, lambda e: flashinfer_scales(swizzled[e], n, k))


def flashinfer_scales(swizzled: Tensor, n: int, k: int) -> Tensor:
    """uint8 [n, k/32] of one expert's int32 [n padded to 128, k/128]."""
    return unswizzle_scales(swizzled.view(torch.uint8).view(ceil_div(n, 128), ceil_div(k, 128), 512), n, k)


def _refuse_scales(name: str, scales: Tensor, expert: int) -> None:
    """255 is no number; a weight under 2^127 (254) is infinite in bfloat16, and SM90's kernels have no room for it."""
    if has_values(scales) and bool((scales > WEIGHT_SCALE_MAX).any()):
        row, block = (scales > WEIGHT_SCALE_MAX).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected E8M0 bytes 0..{WEIGHT_SCALE_MAX} (2^126), got {int(scales[row, block])} at "
            f"[{expert}, {row}, {block}]"
        )
