"""The number formats: E2M1, E4M3, E8M0, and the quantizers of MXFP8 and MXFP4.

Each is written as the formula of its format, bit by bit, and not as a kernel does it.
Sources: OCP Microscaling Formats (MX) v1.0; PTX ISA, "Alternate floating point formats".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._arguments import describe, has_values, require_blocks, require_tensor
from .._torch_state import exact

BLOCK = 32  # values that share one E8M0 scale (OCP MX v1.0, table 1)
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E8M0_ONE = 127  # the byte of 2^0
E8M0_MAX = 254  # the byte of 2^127
E8M0_NAN = 255

# Value of each 4-bit E2M1 code; bit 3 is the sign (OCP MX v1.0, section 5.3.3).
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES: tuple[float, ...] = (*_E2M1_MAGNITUDES, *(-m for m in _E2M1_MAGNITUDES))

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RCP_448 = float.fromhex("0x1.24924ap-9")  # 1/448 rounded to fp32: the kernel multiplies, it does not divide
RCP_6 = float.fromhex("0x1.555556p-3")  # 1/6 rounded to fp32, of the quantizers to FP4

# Code of a magnitude = how many of these it exceeds. Between codes i and i+1 lies their midpoint; a tie goes to the
# even code, so where that is the upper one (odd i) the bound is the float32 just below the midpoint.
_MIDPOINTS = [(E2M1_VALUES[i] + E2M1_VALUES[i + 1]) / 2 for i in range(7)]
_E2M1_BOUNDS = [m if i % 2 == 0 else m - 2.0 ** (math.frexp(m)[1] - 24) for i, m in enumerate(_MIDPOINTS)]


def decode_e2m1(packed: Tensor) -> Tensor:
    """Values of packed E2M1 codes.

    Args:
        packed: uint8 [..., K/2]; the low nibble of byte i is k=2i, the high nibble k=2i+1.

    Returns:
        float32 [..., K].
    """
    require_tensor("packed", packed, torch.uint8)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # of all 256 bytes
    return torch.nn.functional.embedding(packed.to(torch.int32), pairs).flatten(-2)


@exact
def encode_e2m1(x: Tensor) -> Tensor:
    """Packed E2M1 codes of values: round to nearest, ties to even, saturating at +-6.

    Args:
        x: float32, bfloat16 or float16 [..., K], K even; infinities saturate.

    Returns:
        uint8 [..., K/2], low nibble = even k.

    Raises:
        ValueError: odd K, or a NaN (E2M1 has none).
    """
    values = _float32("x", x, 2)
    if has_values(values) and bool(values.isnan().any()):
        raise ValueError(f"x: expected no NaN (E2M1 cannot hold one), got {describe(x)} with NaN")
    bounds = torch.tensor(_E2M1_BOUNDS, dtype=torch.float32, device=x.device)
    codes = torch.bucketize(values.abs(), bounds, out_int32=True).to(torch.uint8)
    codes |= values.signbit().to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


@exact
def decode_e4m3(codes: Tensor) -> Tensor:
    """Values of E4M3 codes (the "fn" kind: no infinities; 0x7F and 0xFF are NaN).

    Args:
        codes: uint8, any shape.

    Returns:
        float32, same shape.
    """
    require_tensor("codes", codes, torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


@exact
def encode_e4m3(x: Tensor) -> Tensor:
    """E4M3 codes of values: round to nearest, ties to even, saturating at +-448; any NaN becomes 0x7F.

    This is ``cvt.rn.satfinite.e4m3x2.f32`` of the PTX ISA.

    Args:
        x: float32, bfloat16 or float16, any shape.

    Returns:
        uint8, same shape.
    """
    values = _float32("x", x, 1)
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill_(values.isnan(), E4M3_NAN)


def decode_e8m0(scales: Tensor) -> Tensor:
    """Values of E8M0 scale bytes: 2^(byte-127); 255 is NaN. Byte 0, 2^-127, is a subnormal float32.

    Args:
        scales: uint8, any shape.

    Returns:
        float32, same shape.
    """
    require_tensor("scales", scales, torch.uint8)
    bits = scales.to(torch.int32) << 23
    bits.masked_fill_(scales == 0, 0x00400000).masked_fill_(scales == 255, 0x7FC00000)
    return bits.view(torch.float32)


def encode_e8m0(x: Tensor) -> Tensor:
    """E8M0 bytes of values, each rounded up to a power of two: at least 2^-127 (byte 0), at most 2^127 (byte 254).

    This is ``cvt.rp.satfinite.ue8m0x2.f32`` of the PTX ISA. A NaN or an infinity becomes 254 like every other value
    above 2^127, so callers that can meet one must look for it themselves.

    Args:
        x: float32, any shape, no value below 0.

    Returns:
        uint8, same shape.
    """
    require_tensor("x", x, torch.float32)
    bits = x.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Exponent field 0 holds the subnormals: everything up to 2^-127 (mantissa 0x400000) is byte 0, the rest 2^-126.
    round_up = torch.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    return (exponent + round_up).clamp_(max=E8M0_MAX).to(torch.uint8)


@exact
def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8: E4M3 codes and one E8M0 scale per 32 values, the scale rounded up so that nothing overflows.

    Per block: p = fp32(amax * fp32(1/448)), rounded up to a power of two (`encode_e8m0`), gives the byte; codes =
    E4M3(x * 2^(127-byte)), a product by an exact power of two. An all-zero block is byte 0 and codes 0, whatever the
    signs of its zeros. A block with a NaN or an infinity is byte 127 and all codes 0x7F, so that the poison reaches the
    output instead of a finite number that looks right.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        codes uint8 [..., K] in plain k order, scales uint8 [..., K/32].
    """
    blocks = torch.unflatten(_float32("x", x, BLOCK), -1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    scales = encode_e8m0(amax * _RCP_448)
    codes = encode_e4m3(blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1))
    codes.masked_fill_((amax == 0).unsqueeze(-1), 0)
    poison = ~amax.isfinite()
    codes.masked_fill_(poison.unsqueeze(-1), E4M3_NAN)
    scales.masked_fill_(poison, E8M0_ONE)
    return codes.flatten(-2), scales


@exact
def dequantize_mxfp8(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of MXFP8 data, rounded to float32 (exact unless code * scale leaves float32's range).

    Args:
        codes: uint8 [..., K], plain k order.
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    return _scale_blocks(decode_e4m3(codes), scales)


@exact
def mxfp8_to_bf16(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP8 rows as SM90's kernels read them: code times scale, rounded to nearest even in bfloat16.

    Both have few bits, so the product is exact from 2^-133 up to bfloat16's largest number, 2^128 - 2^120. What lies
    below becomes a multiple of 2^-133, zero among them; what lies above becomes infinity. Scale byte 255 is NaN.

    Args:
        codes: uint8 [..., K], plain k order.
        scales: uint8 [..., K/32].

    Returns:
        bfloat16 [..., K], plain k order.
    """
    return dequantize_mxfp8(codes, scales).to(torch.bfloat16)  # float32 has all of them, or infinity


@exact
def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 weights: packed E2M1 codes and one E8M0 scale per 32 values, by OCP MX v1.0 section 6.3.

    The scale is 2^(floor(log2(amax)) - 2), at least 2^-127, so the largest value of a block lands in [4, 8) and
    saturates at 6. An all-zero block is byte 0 and codes 0.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        packed uint8 [..., K/2] (low nibble = even k), scales uint8 [..., K/32].

    Raises:
        ValueError: K not a multiple of 32, or a value that is not finite.
    """
    blocks = torch.unflatten(_float32("x", x, BLOCK), -1, (-1, BLOCK))
    if has_values(blocks) and not bool(blocks.isfinite().all()):
        raise ValueError(f"x: expected finite values, got {describe(x)} with NaN or infinity")
    amax = blocks.abs().amax(-1)
    scales = ((amax.view(torch.int32) >> 23) - 2).clamp_(min=0).to(torch.uint8)
    scaled = blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1)
    return encode_e2m1(scaled.masked_fill_((amax == 0).unsqueeze(-1), 0.0).flatten(-2)), scales


@exact
def quantize_mxfp4_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 activations: as `quantize_mxfp4`, but with the scale rounded up so that nothing saturates.

    FlashInfer's rule (0.7.2.post1, nv_internal/tensorrt_llm/kernels/quantization_utils.cuh, cvt_warp_fp16_to_fp4 with
    UE8M0_SF). Per block: p = fp32(amax * fp32(1/6)), rounded up to a power of two (`encode_e8m0`), gives the byte;
    codes = E2M1(x * 2^(127-byte)), to nearest even (``cvt.rn.satfinite.e2m1x2.f32``). A block of zeros is byte 0, and
    its codes keep the signs. A block with a NaN or an infinity is byte 255, E8M0's NaN, and codes 0, so that the poison
    reaches the output; FlashInfer makes the largest numbers of them.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.

    Returns:
        packed uint8 [..., K/2] (low nibble = even k), scales uint8 [..., K/32].
    """
    blocks = torch.unflatten(_float32("x", x, BLOCK), -1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    poison = ~amax.isfinite()
    scales = encode_e8m0(amax * RCP_6)
    scaled = (blocks * decode_e8m0(E8M0_MAX - scales).unsqueeze(-1)).masked_fill_(poison.unsqueeze(-1), 0.0)
    return encode_e2m1(scaled.flatten(-2)), scales.masked_fill_(poison, E8M0_NAN)


@exact
def dequantize_mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """Values of MXFP4 data, rounded to float32 (exact unless code * scale leaves float32's range).

    Args:
        packed: uint8 [..., K/2], low nibble = even k.
        scales: uint8 [..., K/32].

    Returns:
        float32 [..., K].
    """
    return _scale_blocks(decode_e2m1(packed), scales)


def _float32(name: str, x: Tensor, multiple: int) -> Tensor:
    require_tensor(name, x, _FLOATS)
    if multiple > 1:
        require_blocks(name, x, multiple)
    return x.to(torch.float32)


def _scale_blocks(values: Tensor, scales: Tensor) -> Tensor:
    require_blocks("values", values, BLOCK)
    require_tensor("scales", scales, torch.uint8, [*values.shape[:-1], values.shape[-1] // BLOCK], values.device)
    return (torch.unflatten(values, -1, (-1, BLOCK)) * decode_e8m0(scales).unsqueeze(-1)).flatten(-2)
