"""FlashInfer's quantizers, by its names and rules.

Where they differ from FlashInfer 0.7.2.post1 on purpose:

- A NaN or an infinity makes its block NaN; there it becomes the largest code.
- MXFP8 blocks whose amax is at most 448 * 2^-127 keep their values, under the scale 2^-127. FlashInfer multiplies those
  by 0. Its kernels are also compiled to flush fp32 subnormals, which are numbers here: blocks below 448 * 2^-126 and
  values below 2^-126 in any block are zero there.
- E8M0 byte 0 is 2^-127 to the dequantizers, as OCP MX has it; to FlashInfer's it is 0.
- Where all is finite and no subnormal, bytes are the same, zeros of either sign included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._call import gradient
from .._call.transforms import in_graph, refuse_transforms
from .._torch_state import exact
from ..formats import (
    BLOCK,
    decode_e8m0,
    dequantize_mxfp4,
    dequantize_mxfp8,
    quantize_mxfp4_activations,
    quantize_mxfp8,
)
from . import quantize_kernels
from .nvfp4 import OMITTED, quantized, refuse_4over6
from .scale_layouts import SfLayout, chosen_layout, load_scales, padded_blocks, padded_rows, sf_layout, store_scales

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)
_CODES = (torch.float8_e4m3fn, torch.uint8)
_PACKED = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
_BACKENDS = ("cuda", "cute-dsl")


# ---- MXFP8 -----------------------------------------------------------------------------------------------------------


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | int | None = None,
) -> tuple[Tensor, Tensor]:
    """MXFP8: E4M3 codes and one E8M0 scale per 32 values, as `formats.quantize_mxfp8`; zeros keep their signs.

    On the GPU one kernel, which a CUDA graph captures; under torch.compile one operator, mxfp4_moe::quantize_mxfp8.
    For inference: a gradient that is asked for is an error of the backward pass.

    Args:
        input: bfloat16, float16 or float32 [..., K], K a multiple of 32 (FlashInfer has float32 for "cute-dsl" alone).
        is_sf_swizzled_layout: scales 128x4-swizzled, else linear.
        alignment: K is padded to a multiple of it with zeros; a multiple of 32.
        enable_pdl, backend: "cuda" or "cute-dsl", with the same results; taken and not needed.
        sf_swizzle_layout: goes before is_sf_swizzled_layout where it is given.

    Returns:
        codes float8_e4m3fn [..., padded K] (on the CPU too, where FlashInfer gives uint8), and scales uint8, flat:
        M x padded K / 32 of them, swizzled with M = rows padded to 128 (or 8) and the blocks to 4; padding is zero.

    Raises:
        TypeError: another type or dtype.
        ValueError: another shape or alignment, a layout or a backend that FlashInfer does not have.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch.
    """
    require_tensor("input", input, _FLOATS)
    if input.dim() == 0 or input.shape[-1] == 0 or input.shape[-1] % BLOCK:
        raise ValueError(f"input: expected a last dimension that is a multiple of {BLOCK}, got {describe(input)}")
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise TypeError(f"alignment: expected an integer, got {type(alignment).__name__}")
    if alignment < 1 or alignment % BLOCK:
        raise ValueError(f"alignment: expected a multiple of {BLOCK}, got {alignment}")
    _check_backend(backend)
    layout = chosen_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    k = input.shape[-1]
    padded_k = -(-k // alignment) * alignment
    rows = input.reshape(-1, k)
    refuse_transforms("mxfp8_quantize", input)
    if in_graph(input):
        codes, scales = _quantize_mxfp8(rows, padded_k, int(layout))
        return codes.view(*input.shape[:-1], padded_k), scales
    quantize = _mxfp8_cuda if input.is_cuda else _mxfp8_torch
    codes, scales = quantize(rows.detach(), padded_k, int(layout))
    return gradient.refuse_gradient("mxfp8_quantize", codes.view(*input.shape[:-1], padded_k), input), scales


def _mxfp8_torch(rows: Tensor, padded_k: int, layout: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(rows.detach(), (0, padded_k - rows.shape[1]))
    codes, scales = quantize_mxfp8(padded)
    codes |= ((codes == 0) & padded.signbit()).to(torch.uint8) << 7
    return codes.view(torch.float8_e4m3fn), store_scales(scales, SfLayout(layout))


def _mxfp8_cuda(rows: Tensor, padded_k: int, layout: int) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_kernels.mxfp8(rows, padded_k, layout)
    return codes.view(torch.float8_e4m3fn), scales


def _mxfp8_fake(rows: Tensor, padded_k: int, layout: int) -> tuple[Tensor, Tensor]:
    order = SfLayout(layout)
    codes = rows.new_empty((rows.shape[0], padded_k), dtype=torch.float8_e4m3fn)
    scales = padded_rows(rows.shape[0], order) * padded_blocks(padded_k // BLOCK, order)
    return codes, rows.new_empty((scales,), dtype=torch.uint8)


_LIBRARY = torch.library.Library("mxfp4_moe", "FRAGMENT")  # type: ignore[no-untyped-call]
_NAME = _LIBRARY.define(  # type: ignore[no-untyped-call]
    "quantize_mxfp8(Tensor rows, SymInt padded_k, int layout) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
_LIBRARY.impl(_NAME, _mxfp8_torch, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl(_NAME, _mxfp8_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"mxfp4_moe::{_NAME}", _mxfp8_fake, lib=_LIBRARY)
gradient.refuse_in_graphs(_LIBRARY, _NAME, "mxfp8_quantize", 1)
_quantize_mxfp8 = torch.ops.mxfp4_moe.quantize_mxfp8.default


def mxfp8_dequantize_host(
    input: Tensor,
    scale_tensor: Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: SfLayout | int | None = None,
) -> Tensor:
    """Values of MXFP8 data.

    Args:
        input: float8_e4m3fn or uint8 [M, K], on any device.
        scale_tensor: uint8 scales as `mxfp8_quantize` gives them, on the same device.
        is_sf_swizzled_layout, sf_swizzle_layout: their layout.

    Returns:
        float32 [M, K].
    """
    require_tensor("input", input, _CODES, ("M", "K"))
    require_tensor("scale_tensor", scale_tensor, torch.uint8, None, input.device)
    layout = chosen_layout(is_sf_swizzled_layout, sf_swizzle_layout)
    rows, k = input.shape
    if k % BLOCK:
        raise ValueError(f"input: expected K a multiple of {BLOCK}, got {describe(input)}")
    return dequantize_mxfp8(input.view(torch.uint8), load_scales("scale_tensor", scale_tensor, rows, k, layout))


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------


@exact
def mxfp4_quantize(
    a: Tensor,
    backend: str = "cuda",
    enable_pdl: bool | None = None,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
) -> tuple[Tensor, Tensor]:
    """MXFP4 by FlashInfer's rule: the scale is amax / 6 rounded up to a power of two, so nothing saturates.

    `MoEWeights.from_float` and `formats.quantize_mxfp4` follow OCP MX instead, which rounds down. On the GPU one
    kernel, which a CUDA graph captures.

    Args:
        a: bfloat16 or float16 [M, K], K a multiple of 32. Or [..., M, K], whose leading dimensions are more
            rows: in the scales too, as FlashInfer has it. So those of 3-D weights [E, N, K] are those of E experts, one
            after the other, where N is a multiple of 128.
        backend, enable_pdl: taken and not needed; "cuda" or "cute-dsl".
        sfLayout: layout of the scales.

    Returns:
        packed uint8 [..., M, K/2] (low nibble = even k), scales uint8 [rows padded to 128 (or 8), K/32 padded to 4]
        swizzled, or [rows, K/32] linear; on the device of a (FlashInfer moves them to the GPU).

    Raises:
        TypeError, ValueError: another type, dtype or shape, a layout or a backend that FlashInfer does not have.
        RuntimeError: as `mxfp8_quantize`.
    """
    _check_backend(backend)
    return _quantize_mxfp4("a", a, sf_layout("sfLayout", sfLayout), "mxfp4_quantize")


@exact
def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    nvfp4_4over6: object = OMITTED,
) -> tuple[Tensor, Tensor]:
    """FlashInfer's quantizer to FP4: NVFP4 (sf_vec_size=16), or MXFP4 (sf_vec_size=32, sf_use_ue8m0=True).

    As `nvfp4_quantize` and `mxfp4_quantize`.

    Args:
        input: as for those two; or its transpose, [K, M] with a stride of 1 in K, which gives transposed results.
        global_scale: of NVFP4 a tensor of one number, or None for 1; of MXFP4 None, or a tensor of 1.0, which is what
            MXFP4 has.
        is_sf_swizzled_layout, is_sf_8x4_layout: linear where the first is False, else 128x4 or 8x4.
        is_global_scale_inversed: global_scale is the reciprocal of NVFP4's.
        enable_pdl: taken and not needed.
        backend: "cuda" or "cute-dsl", with the same results.
        nvfp4_4over6: None or nothing.

    Returns:
        packed uint8 [M, K/2] and scales uint8 [rows, columns] in their layout.

    Raises:
        NotImplementedError: other blocks and scales, a recipe of nvfp4_4over6, or a global scale of MXFP4.
        TypeError, ValueError: as those two.
    """
    kind = (sf_vec_size, bool(sf_use_ue8m0))
    if kind not in ((16, False), (32, True)):
        raise NotImplementedError(
            "sf_vec_size, sf_use_ue8m0: this library has NVFP4, which is sf_vec_size=16 with sf_use_ue8m0=False, and "
            f"MXFP4, which is 32 with True, got sf_vec_size={sf_vec_size} with sf_use_ue8m0={sf_use_ue8m0}"
        )
    _check_backend(backend)
    is_nvfp4 = kind[0] == 16
    if is_nvfp4:
        refuse_4over6(nvfp4_4over6)
    elif nvfp4_4over6 is not OMITTED and nvfp4_4over6 is not None:
        raise ValueError(f"nvfp4_4over6: expected None, since MXFP4 has no such recipe, got {nvfp4_4over6!r}")
    if global_scale is not None and not is_nvfp4:
        require_tensor("global_scale", global_scale, _FLOATS)
        if bool((global_scale != 1).any()):
            raise NotImplementedError("global_scale: this library has no global scales of MXFP4; it has None, or 1.0")
    if not is_sf_swizzled_layout:
        layout = SfLayout.layout_linear
    else:
        layout = SfLayout.layout_8x4 if is_sf_8x4_layout else SfLayout.layout_128x4
    require_tensor("input", input, _HALVES)
    if input.dim() < 2:
        raise ValueError(f"input: expected [..., M, K], got {describe(input)}")

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        if is_nvfp4:
            inverse = bool(is_global_scale_inversed)
            return quantized("input", rows, "global_scale", global_scale, inverse, layout, "fp4_quantize")
        return _quantize_mxfp4("input", rows, layout, "fp4_quantize")

    if input.stride(-2) != 1:
        return quantize(input)
    packed, scales = quantize(input.transpose(-2, -1))
    return packed.transpose(-2, -1), scales.transpose(-2, -1)


def mxfp4_dequantize(a_fp4: Tensor, a_sf: Tensor, sfLayout: SfLayout | int = SfLayout.layout_128x4) -> Tensor:
    """Values of MXFP4 data, float32 [M, K] on the CPU (as FlashInfer's).

    Args:
        a_fp4: packed uint8, int8 or float4_e2m1fn_x2 [M, K/2].
        a_sf: scales as `mxfp4_quantize` gives them, uint8 or float8_e8m0fnu, in any shape.
        sfLayout: their layout.
    """
    packed = _packed("a_fp4", a_fp4).cpu()
    require_tensor("a_sf", a_sf, (torch.uint8, torch.float8_e8m0fnu))
    rows, half_k = packed.shape
    layout = sf_layout("sfLayout", sfLayout)
    return dequantize_mxfp4(packed, load_scales("a_sf", a_sf.cpu().view(torch.uint8), rows, half_k * 2, layout))


@exact
def mxfp4_dequantize_host(weight: Tensor, scale: Tensor, group_size: int = 32) -> Tensor:
    """Values of MXFP4 data whose scales are linear, float32 [M, K]; zeros come out positive, as FlashInfer's.

    Args:
        weight: packed uint8 [M, K/2] on the CPU.
        scale: uint8 [M, K / group_size] on the CPU, E8M0.
        group_size: values under one scale, even.

    Raises:
        TypeError, ValueError: another type, dtype, shape or device.
    """
    require_tensor("weight", weight, torch.uint8, ("M", "K/2"), torch.device("cpu"))
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size: expected an integer, got {type(group_size).__name__}")
    rows, k = weight.shape[0], 2 * weight.shape[1]
    if group_size < 2 or group_size % 2 or k % group_size:
        raise ValueError(f"group_size: expected an even divisor of K = {k}, got {group_size}")
    require_tensor("scale", scale, torch.uint8, (rows, k // group_size), weight.device)
    ones = torch.full((rows, -(-k // BLOCK)), 127, dtype=torch.uint8, device=weight.device)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % (BLOCK // 2)))
    values = dequantize_mxfp4(padded, ones)[:, :k]
    return torch.unflatten(values, 1, (-1, group_size)).mul(decode_e8m0(scale).unsqueeze(-1)).flatten(1) + 0.0


def _quantize_mxfp4(name: str, a: Tensor, layout: SfLayout, what: str) -> tuple[Tensor, Tensor]:
    require_tensor(name, a, _HALVES)
    if a.dim() < 2 or a.shape[-1] == 0 or a.shape[-1] % BLOCK:
        raise ValueError(f"{name}: expected [..., M, K] with K a multiple of {BLOCK}, got {describe(a)}")
    rows = a.detach().reshape(-1, a.shape[-1])
    if rows.is_cuda and not in_graph(rows):
        packed, stored = quantize_kernels.fp4(what, rows, None, int(layout))
    else:
        packed, scales = quantize_mxfp4_activations(rows)
        stored = store_scales(scales, layout)
    return packed.view(*a.shape[:-1], a.shape[-1] // 2), stored.view(-1, padded_blocks(a.shape[-1] // BLOCK, layout))


def _packed(name: str, tensor: Tensor) -> Tensor:
    require_tensor(name, tensor, _PACKED, ("M", "K/2"))
    if tensor.shape[1] % (BLOCK // 2):
        raise ValueError(f"{name}: expected K a multiple of {BLOCK}, got {describe(tensor)}")
    return tensor.view(torch.uint8)


def _check_backend(backend: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
