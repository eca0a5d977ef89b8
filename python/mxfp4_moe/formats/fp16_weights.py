"""Weights as MMAs of float16 read them: codes times a scale that is relative to the matrix's largest.

float16 has 30 binades of normal numbers, and E8M0 254. So an expert's matrix of MXFP4 is held relative to B, the
largest byte among its blocks that have a nonzero code: a weight is code * 2^(1 + b - B), and its sums are multiplied by
2^(B - 128) in the end. Blocks down to 24 binades below the largest are exact so; below that a weight is a multiple of
2^-24, rounded, and from 29 binades on it is 0. B counts as 2 at least, so that the factor is a normal float32. NVFP4's
scales are E4M3, whose products with codes float16 holds exactly, divided by 2^7, and its factors have that beside them.

The kernel makes a weight by one multiplication of halves, the code's three bits as a half (code * 2^-14) times the half
whose bits are x << 10, x = 30 + b - B and at least 0 (a zero); here it is the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe, require_blocks, require_tensor
from .._torch_state import exact
from .numbers import BLOCK, E2M1_VALUES, decode_e4m3
from .nvfp4 import NVFP4_BLOCK

FP16_EXACT_BINADES = 24  # below the largest scale, down to which MXFP4 weights are exact
FP16_NVFP4_UNIT = 128.0  # NVFP4 weights are divided by it, and their factors multiplied
_SMALLEST_LARGEST = 2
_MAGNITUDES = 0x77  # of two codes, without their signs
_INTEGERS = (torch.int32, torch.int64)


def largest_scale(packed: Tensor, scales: Tensor) -> Tensor:
    """B of one matrix: its largest E8M0 byte among blocks with a nonzero code, 2 at least: int32 [].

    Args:
        packed: uint8 [N, K/2] E2M1.
        scales: uint8 [N, K/32] E8M0.
    """
    return scale_ends(packed, scales)[0]


def scale_ends(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`largest_scale`, and the smallest byte among the same blocks: int32 [] twice; 2 and 255 where there are none."""
    _require_packed(packed, scales)
    if packed.numel() == 0:
        return scales.new_tensor(_SMALLEST_LARGEST).int(), scales.new_tensor(255).int()
    none = (torch.unflatten(packed, -1, (-1, BLOCK // 2)) & _MAGNITUDES).amax(-1) == 0
    largest = scales.masked_fill(none, 0).amax().int().clamp_(min=_SMALLEST_LARGEST)
    return largest, scales.masked_fill(none, 255).amin().int()


@exact
def fp16_factor(largest: Tensor) -> Tensor:
    """What the sums of a matrix are multiplied by, 2^(B - 128): int32 [...] to float32, normal numbers."""
    require_tensor("largest", largest, _INTEGERS)
    return ((largest.int() - 1) << 23).view(torch.float32)


def largest_of_factor(factor: Tensor) -> Tensor:
    """The inverse of `fp16_factor`, as kernels do it, from the exponent's bits alone: float32 [...] to int32."""
    require_tensor("factor", factor, torch.float32)
    return (factor.view(torch.int32) >> 23 & 255) + 1


@exact
def mxfp4_in_fp16(nibbles: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """Codes and scales as the weights that an MMA of float16 multiplies, rounded to nearest even where they must be.

    Args:
        nibbles: uint8 [N, K], codes 0 to 15.
        scales: uint8 [N, K/32] E8M0.
        largest: int32 [] or [N], B of the matrix; in blocks of a larger scale all codes are 0.

    Returns:
        float16 [N, K].
    """
    _require_codes(nibbles, scales, BLOCK)
    _require_largest(largest, nibbles)
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=nibbles.device)[nibbles.long()]
    below = (largest.unsqueeze(-1) if largest.dim() else largest).int() - scales.int()
    # Exact in float32, so that there is one rounding.
    power = ((1 - below.clamp(min=0, max=40) + 127) << 23).view(torch.float32).masked_fill_(below >= 30, 0.0)
    return (torch.unflatten(codes, -1, (-1, BLOCK)) * power.unsqueeze(-1)).flatten(-2).to(torch.float16)


@exact
def nvfp4_in_fp16(nibbles: Tensor, scales: Tensor) -> Tensor:
    """The same of NVFP4: products of codes and block scales over `FP16_NVFP4_UNIT`, exact.

    Args:
        nibbles: uint8 [N, K], codes 0 to 15.
        scales: uint8 [N, K/16] E4M3; bit 7, which there is none of, is not read.

    Returns:
        float16 [N, K].
    """
    _require_codes(nibbles, scales, NVFP4_BLOCK)
    codes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=nibbles.device)[nibbles.long()]
    factors = decode_e4m3(scales & 0x7F) / FP16_NVFP4_UNIT
    return (torch.unflatten(codes, -1, (-1, NVFP4_BLOCK)) * factors.unsqueeze(-1)).flatten(-2).to(torch.float16)


@exact
def count_rounded_in_fp16(packed: Tensor, scales: Tensor, largest: Tensor) -> Tensor:
    """How many nonzero codes of a matrix `mxfp4_in_fp16` rounds: int64 [].

    Args:
        packed: uint8 [N, K/2] E2M1.
        scales: uint8 [N, K/32] E8M0.
        largest: int32 [], `largest_scale` of them.
    """
    _require_packed(packed, scales)
    require_tensor("largest", largest, _INTEGERS, (), packed.device)
    far = largest - scales.int() > FP16_EXACT_BINADES
    codes = torch.unflatten(packed, -1, (-1, BLOCK // 2))[far]  # of few blocks, where there are any
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    below = scales[far].unsqueeze(-1)
    held = mxfp4_in_fp16(nibbles, below, largest).double()
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=packed.device)[nibbles.long()]
    power = (1 + below.int() - largest).double().exp2()
    return (held != values * power).sum()


def _require_packed(packed: Tensor, scales: Tensor) -> None:
    require_tensor("packed", packed, torch.uint8, ("N", "K/2"))
    require_blocks("packed", packed, BLOCK // 2)
    require_tensor("scales", scales, torch.uint8, (packed.shape[0], packed.shape[1] // (BLOCK // 2)), packed.device)


def _require_codes(nibbles: Tensor, scales: Tensor, block: int) -> None:
    require_tensor("nibbles", nibbles, torch.uint8, ("N", "K"))
    require_blocks("nibbles", nibbles, block)
    require_tensor("scales", scales, torch.uint8, (nibbles.shape[0], nibbles.shape[1] // block), nibbles.device)


def _require_largest(largest: Tensor, nibbles: Tensor) -> None:
    require_tensor("largest", largest, _INTEGERS, device=nibbles.device)
    if largest.dim() and largest.shape != nibbles.shape[:1]:
        raise ValueError(f"largest: expected int32 [] or [{nibbles.shape[0]}], got {describe(largest)}")
