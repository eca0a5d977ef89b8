"""Layouts of activations and of scales: the ecosystem's swizzle, and the orders in which the kernels read rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe, require_blocks, require_count, require_multiple, require_tensor
from .numbers import BLOCK


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in the 128x4 order of cuBLAS and FlashInfer: one 512-byte tile per 128 rows and four blocks of k.

    With C blocks of k (K/32 of MXFP4 and MXFP8, K/16 of NVFP4) and nC = ceil(C/4), the scale of row r and block c moves
    to byte ``(r/128)*nC*512 + (c/4)*512 + (r%32)*16 + ((r%128)/32)*4 + c%4``. Rows pad to 128 and blocks to 4, with
    zero bytes.

    Args:
        scales: uint8 [..., N, C].

    Returns:
        uint8 [..., ceil(N/128), ceil(C/4), 512].
    """
    require_tensor("scales", scales, torch.uint8)
    if scales.dim() < 2:
        raise ValueError(f"scales: expected uint8 [..., N, C], got {describe(scales)}")
    n, c = scales.shape[-2:]
    padded = torch.nn.functional.pad(scales, (0, -c % 4, 0, -n % 128))
    # [row tile, r%128/32, r%32, k tile, c%4] -> [row tile, k tile, r%32, r%128/32, c%4]
    tiles = torch.unflatten(torch.unflatten(padded, -1, (-1, 4)), -3, (-1, 4, 32))
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-3)


def unswizzle_scales(swizzled: Tensor, n: int, k: int, block: int = BLOCK) -> Tensor:
    """The inverse of `swizzle_scales`; padding is dropped.

    Args:
        swizzled: uint8 [..., ceil(n/128), ceil(k/(4*block)), 512].
        n: rows.
        k: K in values (not blocks), a multiple of a block.
        block: values that share a scale, 32 or NVFP4's 16.

    Returns:
        uint8 [..., n, k/block].
    """
    require_count("n", n)
    require_multiple("block", block, 16)
    if block == 0:
        raise ValueError("block: expected 16 or 32, got 0")
    require_multiple("k", k, block)
    require_tensor("swizzled", swizzled, torch.uint8)
    tail = [-(-n // 128), -(-k // (4 * block)), 512]
    if list(swizzled.shape[-3:]) != tail:
        raise ValueError(f"swizzled: expected uint8 [..., {', '.join(map(str, tail))}], got {describe(swizzled)}")
    tiles = torch.unflatten(swizzled, -1, (32, 4, 4)).transpose(-3, -2).movedim(-4, -2)
    return tiles.flatten(-2).flatten(-4, -2)[..., :n, : k // block].contiguous()


def interleave_k(codes: Tensor) -> Tensor:
    """Each block of 32 stored as its 16 even k, then its 16 odd k: the kernel's order of the activations.

    Args:
        codes: [..., K], any dtype, K a multiple of 32.

    Returns:
        Same shape and dtype; position s < 16 of a block holds its k=2s, position 16+s its k=2s+1.
    """
    require_blocks("codes", codes, BLOCK)
    return torch.unflatten(codes, -1, (-1, 16, 2)).transpose(-1, -2).flatten(-3)


def deinterleave_k(codes: Tensor) -> Tensor:
    """The inverse of `interleave_k`."""
    require_blocks("codes", codes, BLOCK)
    return torch.unflatten(codes, -1, (-1, 2, 16)).transpose(-1, -2).flatten(-3)


def pack_row_scales(scales: Tensor) -> Tensor:
    """Activation scales as the kernel reads them: one 32-bit word holds a row's four scales of K=128.

    Args:
        scales: uint8 [R, K/32].

    Returns:
        uint8 [ceil(K/128), R4, 4], R4 = R rounded up to 4; byte b of word (kt, row) is k-block 4*kt+b; padding is zero.
    """
    require_tensor("scales", scales, torch.uint8, ("R", "K/32"))
    rows, c = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -c % 4, 0, -rows % 4))
    return torch.unflatten(padded, -1, (-1, 4)).transpose(0, 1).contiguous()


def unpack_row_scales(packed: Tensor, rows: int, k: int) -> Tensor:
    """The inverse of `pack_row_scales`; padding is dropped.

    Args:
        packed: uint8 [ceil(k/128), rows rounded up to 4, 4].
        rows: rows to return.
        k: K in values (not blocks), a multiple of 32.

    Returns:
        uint8 [rows, k/32].
    """
    require_count("rows", rows)
    require_multiple("k", k, BLOCK)
    require_tensor("packed", packed, torch.uint8, (-(-k // 128), -(-rows // 4) * 4, 4))
    return packed.transpose(0, 1).flatten(1)[:rows, : k // BLOCK].contiguous()
