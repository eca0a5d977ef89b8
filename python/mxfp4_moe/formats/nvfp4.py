"""NVFP4: E2M1 codes, an E4M3 scale for each 16 of them, and one float32 for a tensor, an expert or a row.

A value is code * scale / global_scale. Two names for the float32 are in use, and one is the reciprocal of the other:
``global_scale`` multiplies what is quantized (FlashInfer; compressed-tensors' weight_global_scale), ``scale_2`` what is
read (NVIDIA ModelOpt's weight_scale_2, and its input_scale).

The quantizer is FlashInfer's, whose source it was read from: 0.7.2.post1, nv_internal/tensorrt_llm/kernels/
quantization_utils.cuh, cvt_warp_fp16_to_fp4, which is TensorRT-LLM's, without "4over6". Two things differ on purpose.

- That code takes reciprocals with rcp.approx.ftz, which may be an ulp away from the nearest float32; here they are
  rounded to nearest, as in FlashInfer's own test reference. Where the two are not the same, a value so close to the
  middle of two codes that an ulp decides may get the other code.
- A block of 16 with a NaN or an infinity gets the scale 0x7F, E4M3's NaN, and codes 0, so that the poison reaches the
  output. There a NaN becomes 6 and an infinity the largest number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe, has_values, require_blocks, require_tensor
from .._torch_state import exact
from .numbers import E4M3_MAX, E4M3_NAN, RCP_6, decode_e2m1, decode_e4m3, encode_e2m1, encode_e4m3

NVFP4_BLOCK = 16  # values that share one E4M3 scale
NVFP4_MAX = 6.0 * E4M3_MAX  # the largest code times the largest scale

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max


@exact
def nvfp4_global_scale(x: Tensor) -> Tensor:
    """The global scale that brings the largest magnitude to the largest number of NVFP4: 2688 / amax.

    1 where that says nothing: all zeros, or a NaN or an infinity, whose blocks are NaN under any scale. At most
    float32's largest number.

    Args:
        x: float32, bfloat16 or float16 [...].

    Returns:
        float32 [].
    """
    require_tensor("x", x, _FLOATS)
    return _to_largest(x.abs().amax() if x.numel() else x.new_zeros(()))


@exact
def nvfp4_row_scales(x: Tensor) -> Tensor:
    """`nvfp4_global_scale` of each row by itself: float32 [...] of [..., K]."""
    require_tensor("x", x, _FLOATS)
    require_blocks("x", x, NVFP4_BLOCK)
    return _to_largest(x.abs().amax(-1) if x.shape[-1] else x.sum(-1))


def _to_largest(amax: Tensor) -> Tensor:
    scale = (NVFP4_MAX / amax.to(torch.float32)).clamp_(max=_LARGEST)
    return scale.masked_fill_((amax == 0) | ~amax.isfinite(), 1.0)


@exact
def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 under a given global scale, by FlashInfer's rule (see above).

    Per block of 16, in float32: scale = E4M3(global_scale * (amax * fp32(1/6))), to nearest even, at most 448; codes =
    E2M1(x * (1 / (scale * (1 / global_scale)))), to nearest even, at most 6 (``cvt.rn.satfinite.e2m1x2.f32``). A block
    of zeros has the scale 0, and its codes keep the signs. So has a block whose scale rounds to 0; its codes are the
    largest, times 0 (of its zeros too: 0 times infinity is a NaN, which that instruction makes 6).

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16.
        global_scale: float32, finite and above 0; [] for all, or one for each row, of x's shape without K.

    Returns:
        packed uint8 [..., K/2] (low nibble = even k), scales uint8 [..., K/16], E4M3.

    Raises:
        TypeError, ValueError: another dtype or shape; a global scale that is not finite and above 0.
    """
    require_tensor("x", x, _FLOATS)
    require_blocks("x", x, NVFP4_BLOCK)
    scale = _checked_global_scale(global_scale, x)
    blocks = torch.unflatten(x.to(torch.float32), -1, (-1, NVFP4_BLOCK))
    amax = blocks.abs().amax(-1)
    scales = encode_e4m3(scale * (amax * RCP_6))
    multiplier = (decode_e4m3(scales) * scale.reciprocal()).reciprocal_()
    multiplier.masked_fill_(amax == 0, 0.0)
    poison = ~amax.isfinite()
    scaled = (blocks * multiplier.unsqueeze(-1)).nan_to_num_(nan=6.0, posinf=6.0, neginf=-6.0)
    packed = encode_e2m1(scaled.masked_fill_(poison.unsqueeze(-1), 0.0).flatten(-2))
    return packed, scales.masked_fill_(poison, E4M3_NAN)


@exact
def dequantize_nvfp4(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Values of NVFP4 data: code * scale, which is exact, divided by the global scale and rounded to float32.

    Args:
        packed: uint8 [..., K/2], low nibble = even k.
        scales: uint8 [..., K/16], E4M3; 0x7F and 0xFF are NaN.
        global_scale: as for `quantize_nvfp4`.

    Returns:
        float32 [..., K].
    """
    values = nvfp4_products(packed, scales)
    return values / _checked_global_scale(global_scale, values)


@exact
def nvfp4_products(packed: Tensor, scales: Tensor) -> Tensor:
    """Code times block scale, float32 [..., K]: exact, and exact in bfloat16 too (six bits, from 2^-10 to 2688)."""
    values = decode_e2m1(packed)
    require_blocks("packed", packed, NVFP4_BLOCK // 2)
    shape = [*values.shape[:-1], values.shape[-1] // NVFP4_BLOCK]
    require_tensor("scales", scales, torch.uint8, shape, values.device)
    return (torch.unflatten(values, -1, (-1, NVFP4_BLOCK)) * decode_e4m3(scales).unsqueeze(-1)).flatten(-2)


def _checked_global_scale(global_scale: Tensor, x: Tensor) -> Tensor:
    """It, as [..., 1] where each row has one."""
    require_tensor("global_scale", global_scale, torch.float32, None, x.device)
    if global_scale.dim() and global_scale.shape != x.shape[:-1]:
        raise ValueError(
            f"global_scale: expected float32 [] or {list(x.shape[:-1])}, one for each row, got {describe(global_scale)}"
        )
    if has_values(global_scale) and not bool((global_scale.isfinite() & (global_scale > 0)).all()):
        raise ValueError("global_scale: expected finite numbers above 0, got others")
    return global_scale.unsqueeze(-1) if global_scale.dim() else global_scale
