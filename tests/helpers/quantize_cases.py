"""What `mxfp8_quantize` must write, byte by byte, and inputs for it: of its kernel as PTX, of a GPU, and of the CPU."""

from __future__ import annotations

import fp4_oracles
import numpy as np
import oracles
import torch
from moe_cases import special_rows
from torch import Tensor

LAYOUTS = (0, 1, 2)  # SfLayout: 128x4, 8x4, linear
_HEIGHTS = {0: 128, 1: 8}


def rows_of(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Special rows, again and again; float32 has values between bfloat16's, and amax at and next to ties of a scale."""
    x = special_rows(width, torch.bfloat16 if dtype is torch.float32 else dtype).repeat(-(-rows // 9), 1)[:rows]
    x = x.to(dtype).contiguous()
    if dtype is torch.float32:
        g = torch.Generator().manual_seed(rows)
        x *= 1 + torch.rand(x.shape, generator=g) * 2.0**-8
        bits = torch.tensor([448.0]).view(torch.int32)
        x[:4, 1:32].clamp_(-1, 1)
        for row in range(min(rows, 4)):  # 448 itself, its neighbours, and denormals
            x[row, 0] = (bits + row - 1).view(torch.float32)[0] if row < 3 else 2.0**-140
    return x


def scale_offset_8x4(row: int, block: int, k: int) -> int:
    return (row // 8 * -(-k // 128) + block // 4) * 32 + row % 8 * 4 + block % 4


def _stored(scales: np.ndarray, layout: int) -> Tensor:
    """Scales [rows, blocks] in a layout, flat, with zeros where it has room for more."""
    rows, blocks = scales.shape
    if layout == 2:
        return torch.from_numpy(scales.flatten())
    height = _HEIGHTS[layout]
    offset = oracles.scale_offset if layout == 0 else scale_offset_8x4
    stored = np.zeros(-(-rows // height) * height * -(-blocks // 4) * 4, np.uint8)
    for row, block in np.ndindex(rows, blocks):
        stored[offset(row, block, 32 * blocks)] = scales[row, block]
    return torch.from_numpy(stored)


def expected_fp4(x: Tensor, global_scale: Tensor | None, layout: int) -> tuple[Tensor, Tensor]:
    """Packed codes [rows, k / 2] and scales, flat, with all padding zero: NVFP4, or MXFP4 without a global scale."""
    values = x.float().cpu().numpy()
    if global_scale is None:
        packed, scales = fp4_oracles.mxfp4_quantize(values)
    else:
        packed, scales = fp4_oracles.nvfp4_quantize(values, np.full(len(values), global_scale.item(), np.float32))
    return torch.from_numpy(packed), _stored(scales, layout)


def expected(x: Tensor, padded_k: int, layout: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, padded_k] and scales, flat, with all padding zero; blocks of zeros keep their signs."""
    values = torch.nn.functional.pad(x.float().cpu(), (0, padded_k - x.shape[1])).numpy()
    codes, scales = oracles.mxfp8_quantize(values)
    blocks = values.reshape(len(values), padded_k // 32, 32)
    signs = np.where(np.signbit(blocks) & (blocks == 0).all(-1, keepdims=True), np.uint8(0x80), np.uint8(0))
    codes = codes | signs.reshape(codes.shape)
    return torch.from_numpy(codes), _stored(scales, layout)
