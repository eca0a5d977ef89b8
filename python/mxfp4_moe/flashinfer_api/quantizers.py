"""FlashInfer's quantizers and layouts of scales, by its names and rules."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._torch_state import exact
from ..formats import (
    BLOCK,
    E8M0_MAX,
    decode_e8m0,
    dequantize_mxfp4,
    dequantize_mxfp8,
    encode_e2m1,
    encode_e8m0,
    quantize_mxfp8,
    swizzle_scales,
    unswizzle_scales,
)

_HALVES = (torch.bfloat16, torch.float16)
_RCP_6 = float.fromhex("0x1.555556p-3")  # 1/6 rounded to fp32


class SfLayout(IntEnum):
    """Layouts of scale factors, by FlashInfer's numbers."""

    layout_128x4 = 0
    layout_8x4 = 1  # refused
    layout_linear = 2


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | int | None = None,
) -> tuple[Tensor, Tensor]:
    """MXFP8: E4M3 codes and one E8M0 scale per 32 values, as `formats.quantize_mxfp8`.

    Args:
        input: bfloat16 or float16 [..., K], K a multiple of 32.
        is_sf_swizzled_layout: scales 128x4-swizzled, else linear.
        alignment: K is padded to a multiple of it with zeros; a multiple of 32.
        enable_pdl, backend: taken and not needed.
        sf_swizzle_layout: goes before is_sf_swizzled_layout where it is given.

    Returns:
        codes float8_e4m3fn [..., padded K] (on the CPU too, where FlashInfer gives uint8), and scales uint8, flat:
        M x padded K / 32 of them, swizzled with M = rows padded to 128 and the blocks to 4.
    """
    require_tensor("input", input, _HALVES)
    if input.dim() == 0 or input.shape[-1] % BLOCK:
        raise ValueError(f"input: expected a last dimension that is a multiple of {BLOCK}, got {describe(input)}")
    if alignment < 1 or alignment % BLOCK:
        raise ValueError(f"alignment: expected a multiple of {BLOCK}, got {alignment}")
    layout = _layout("sf_swizzle_layout", _chosen(is_sf_swizzled_layout, sf_swizzle_layout))
    padded = torch.nn.functional.pad(input, (0, -input.shape[-1] % alignment))
    codes, scales = quantize_mxfp8(padded)
    return codes.view(torch.float8_e4m3fn), _store_scales(scales, layout).flatten()


def mxfp8_dequantize_host(
    input: Tensor,
    scale_tensor: Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: SfLayout | int | None = None,
) -> Tensor:
    """Values of MXFP8 data.

    Args:
        input: float8_e4m3fn or uint8 [M, K], on any device.
        scale_tensor: uint8 scales as `mxfp8_quantize` gives them.
        is_sf_swizzled_layout, sf_swizzle_layout: their layout.

    Returns:
        float32 [M, K].
    """
    require_tensor("input", input, (torch.float8_e4m3fn, torch.uint8), ("M", "K"))
    layout = _layout("sf_swizzle_layout", _chosen(is_sf_swizzled_layout, sf_swizzle_layout))
    rows, k = input.shape
    return dequantize_mxfp8(input.view(torch.uint8), _load_scales("scale_tensor", scale_tensor, rows, k, layout))


@exact
def mxfp4_quantize(
    a: Tensor,
    backend: str = "cuda",
    enable_pdl: bool | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
) -> tuple[Tensor, Tensor]:
    """MXFP4 by FlashInfer's rule: the scale is amax / 6 rounded up to a power of two, so nothing saturates.

    `MoEWeights.from_float` and `formats.quantize_mxfp4` follow OCP MX instead, which rounds down.

    Args:
        a: bfloat16 or float16 [M, K], K a multiple of 32; finite.
        backend, enable_pdl: taken and not needed.
        sfLayout: layout of the scales.

    Returns:
        packed uint8 [M, K/2] (low nibble = even k), scales uint8 [M padded to 128, K/32 padded to 4] swizzled, or
        [M, K/32] linear; on the device of a (FlashInfer moves them to the GPU).
    """
    require_tensor("a", a, _HALVES, ("M", "K"))
    if a.shape[1] % BLOCK:
        raise ValueError(f"a: expected K a multiple of {BLOCK}, got {describe(a)}")
    if not bool(a.isfinite().all()):
        raise ValueError(f"a: expected finite values, got {describe(a)} with NaN or infinity")
    layout = _layout("sfLayout", sfLayout)
    blocks = torch.unflatten(a.to(torch.float32), -1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    scales = encode_e8m0(amax * _RCP_6)
    scaled = blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1)
    packed = encode_e2m1(scaled.masked_fill_((amax == 0).unsqueeze(-1), 0.0).flatten(-2))
    stored = _store_scales(scales, layout)
    return packed, stored.view(-1, -(-scales.shape[1] // 4) * 4) if layout is SfLayout.layout_128x4 else stored


def mxfp4_dequantize(a_fp4: Tensor, a_sf: Tensor, sfLayout: SfLayout | int = SfLayout.layout_128x4) -> Tensor:
    """Values of MXFP4 data, float32 [M, K] on the CPU (as FlashInfer's).

    Args:
        a_fp4: packed uint8 [M, K/2].
        a_sf: uint8 scales as `mxfp4_quantize` gives them, in any shape.
        sfLayout: their layout.
    """
    require_tensor("a_fp4", a_fp4, torch.uint8, ("M", "K/2"))
    packed, (rows, half_k) = a_fp4.cpu(), a_fp4.shape
    scales = _load_scales("a_sf", a_sf.cpu(), rows, half_k * 2, _layout("sfLayout", sfLayout))
    return dequantize_mxfp4(packed, scales)


def block_scale_interleave(unswizzled_sf: Tensor) -> Tensor:
    """Scales in the 128x4 order (`formats.swizzle_scales`), flat.

    Args:
        unswizzled_sf: uint8 [N, K/32] or [E, N, K/32].

    Returns:
        uint8 [E * (N padded to 128) * (K/32 padded to 4)].
    """
    require_tensor("unswizzled_sf", unswizzled_sf, torch.uint8)
    if unswizzled_sf.dim() not in (2, 3):
        raise ValueError(f"unswizzled_sf: expected uint8 [N, K/32] or [E, N, K/32], got {describe(unswizzled_sf)}")
    return swizzle_scales(unswizzled_sf).flatten()


def _chosen(swizzled: bool, layout: SfLayout | int | None) -> SfLayout | int:
    if layout is not None:
        return layout
    return SfLayout.layout_128x4 if swizzled else SfLayout.layout_linear


def _layout(name: str, value: SfLayout | int) -> SfLayout:
    try:
        layout = SfLayout(value)
    except ValueError:
        raise ValueError(f"{name}: expected an SfLayout, got {value!r}") from None
    if layout is SfLayout.layout_8x4:
        raise NotImplementedError(
            f"{name}: layout_8x4 is not in this library, which has layout_128x4 and layout_linear"
        )
    return layout


def _store_scales(scales: Tensor, layout: SfLayout) -> Tensor:
    """[..., K/32] -> swizzled tiles of all rows, or as they are."""
    return swizzle_scales(scales.flatten(0, -2)) if layout is SfLayout.layout_128x4 else scales


def _load_scales(name: str, stored: Tensor, rows: int, k: int, layout: SfLayout) -> Tensor:
    """The inverse of `_store_scales`, from any shape."""
    require_tensor(name, stored, torch.uint8)
    shape = [rows, k // BLOCK] if layout is SfLayout.layout_linear else [-(-rows // 128), -(-k // 128), 512]
    if stored.numel() != shape[0] * shape[1] * (1 if len(shape) == 2 else shape[2]):
        raise ValueError(f"{name}: expected {shape} bytes of scales for [{rows}, {k}], got {describe(stored)}")
    tiles = stored.reshape(shape)
    return tiles if layout is SfLayout.layout_linear else unswizzle_scales(tiles, rows, k)
