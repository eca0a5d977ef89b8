"""FlashInfer's layouts of scale factors: linear, and tiles of 128 or 8 rows by four columns."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from ..formats import BLOCK, swizzle_scales, unswizzle_scales

_SHORT_ROWS = 8  # of a tile of layout_8x4


class SfLayout(IntEnum):
    """Layouts of scale factors, by FlashInfer's numbers."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


def block_scale_interleave(unswizzled_sf: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scales in the 128x4 order (`formats.swizzle_scales`), flat.

    Args:
        unswizzled_sf: uint8 or bfloat16 [N, K/32] or [E, N, K/32].
        out: contiguous tensor to write to, of the result's shape and dtype, on its device.

    Returns:
        [E * (N padded to 128) * (K/32 padded to 4)], dtype as unswizzled_sf; `out` where it was given.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape, device or stride.
    """
    require_tensor("unswizzled_sf", unswizzled_sf, (torch.uint8, torch.bfloat16))
    if unswizzled_sf.dim() not in (2, 3):
        raise ValueError(f"unswizzled_sf: expected [N, K/32] or [E, N, K/32], got {describe(unswizzled_sf)}")
    if unswizzled_sf.dtype is torch.uint8:
        result = swizzle_scales(unswizzled_sf).flatten()
    else:  # the order is the same whatever is put in order: low bytes, high bytes
        pairs = torch.unflatten(unswizzled_sf.contiguous().view(torch.uint8), -1, (-1, 2))
        halves = [swizzle_scales(pairs[..., i]).flatten() for i in range(2)]
        result = torch.stack(halves, -1).flatten().view(torch.bfloat16)
    if out is None:
        return result
    require_tensor("out", out, result.dtype, tuple(result.shape), result.device)
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    return out.copy_(result)


nvfp4_block_scale_interleave = block_scale_interleave  # FlashInfer's older name, which callers look for


def chosen_layout(swizzled: bool, layout: SfLayout | int | None) -> SfLayout:
    """What FlashInfer's two arguments of the same meaning say together."""
    if layout is not None:
        return sf_layout("sf_swizzle_layout", layout)
    return SfLayout.layout_128x4 if swizzled else SfLayout.layout_linear


def sf_layout(name: str, value: SfLayout | int) -> SfLayout:
    """The layout, or a ValueError that names the argument."""
    try:
        return SfLayout(-1 if isinstance(value, bool) else value)
    except ValueError:
        raise ValueError(f"{name}: expected an SfLayout, got {value!r}") from None


def padded_blocks(blocks: int, layout: SfLayout) -> int:
    """Columns of a row of scales as they are stored."""
    return blocks if layout is SfLayout.layout_linear else -(-blocks // 4) * 4


def padded_rows(rows: int, layout: SfLayout) -> int:
    """Rows of scales as they are stored."""
    height = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: _SHORT_ROWS, SfLayout.layout_linear: 1}[layout]
    return -(-rows // height) * height


def store_scales(scales: Tensor, layout: SfLayout) -> Tensor:
    """uint8 [rows, K/32] in a layout, flat."""
    if layout is SfLayout.layout_128x4:
        return swizzle_scales(scales).flatten()
    if layout is SfLayout.layout_linear:
        return scales.flatten()
    rows, blocks = scales.shape
    more = (0, padded_blocks(blocks, layout) - blocks, 0, padded_rows(rows, layout) - rows)
    padded = torch.nn.functional.pad(scales, more)
    tiles = torch.unflatten(torch.unflatten(padded, 1, (-1, 4)), 0, (-1, _SHORT_ROWS))
    return tiles.transpose(1, 2).flatten()


def load_scales(name: str, stored: Tensor, rows: int, k: int, layout: SfLayout) -> Tensor:
    """The inverse of `store_scales`, from any shape: uint8 [rows, k/32].

    Raises:
        TypeError, ValueError: another dtype, or another number of bytes.
    """
    require_tensor(name, stored, torch.uint8)
    blocks = k // BLOCK
    shape = [padded_rows(rows, layout), padded_blocks(blocks, layout)]
    if stored.numel() != shape[0] * shape[1]:
        raise ValueError(
            f"{name}: expected {shape} bytes of scales for [{rows}, {k}] in {layout.name}, got {describe(stored)}"
        )
    if layout is SfLayout.layout_linear:
        return stored.reshape(rows, blocks)
    if layout is SfLayout.layout_128x4:
        return unswizzle_scales(stored.reshape(-(-rows // 128), -(-k // 128), 512), rows, k)
    tiles = stored.reshape(shape[0] // _SHORT_ROWS, shape[1] // 4, _SHORT_ROWS, 4)
    return tiles.transpose(1, 2).reshape(shape)[:rows, :blocks].contiguous()
