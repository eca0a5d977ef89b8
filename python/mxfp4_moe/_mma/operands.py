"""Operands of MMAs that align products: codes with their scale beside them, and 16-bit floats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..formats import BLOCK, E2M1_VALUES, NVFP4_BLOCK, decode_e4m3, decode_e8m0
from .numbers import pow2

Format = Literal["e4m3", "e2m1"]

CENTER = 84  # keeps 64^exponent in float64's range for exponents down to -254 in one operand and -84 in the other


@dataclass(frozen=True, kw_only=True)
class Operand:
    """Numbers as values of a common scale: value * 2^scale."""

    values: Tensor  # float32 of codes, float64 of floats [..., R, L]; NaN where the code or the scale is
    weights: Tensor  # the same: 64^exponent, times 64^CENTER of floats, 0 for a zero
    scale: Tensor  # int32 [..., R]
    unit: Tensor  # int32 [..., R] or []: all values are multiples of 2^unit
    peak: int  # and all are below 2^peak

    def part(self, k: slice) -> Operand:
        return replace(self, values=self.values[..., k], weights=self.weights[..., k])

    def by_step(self) -> Operand:
        """From [R, steps, L] to [steps, R, L]."""
        turned = {name: getattr(self, name).transpose(0, 1).contiguous() for name in ("values", "weights")}
        unit = self.unit.t().contiguous() if self.unit.dim() else self.unit
        return replace(self, **turned, scale=self.scale.t().contiguous(), unit=unit)

    def rows(self, steps: slice, rows: slice = slice(None)) -> Operand:
        """Some steps and rows of what `by_step` gave."""
        return replace(
            self,
            values=self.values[steps, rows],
            weights=self.weights[steps, rows],
            scale=self.scale[steps, rows],
            unit=self.unit[steps, rows] if self.unit.dim() else self.unit,
        )


def operand(codes: Tensor, scale_bytes: Tensor, kind: Format) -> Operand:
    """uint8 [..., L] codes of a format and uint8 [...] scales, for MMAs that take both."""
    if kind == "e4m3":
        exponents, unit, peak = (codes >> 3 & 15).clamp(min=1).int() - 7, -9, 9
    else:
        exponents, unit, peak = (codes >> 1 & 3).clamp(min=1).int() - 1, -1, 3
    nan = scale_bytes == 255
    values = decoded(codes, kind).masked_fill(nan.unsqueeze(-1), float("nan"))
    return Operand(
        values=values,
        weights=pow2(6 * exponents).float().masked_fill(values == 0, 0.0),
        scale=(scale_bytes.int() - 127).masked_fill(nan, 0),
        unit=torch.tensor(unit, dtype=torch.int32, device=codes.device),
        peak=peak,
    )


def float_operand(x: Tensor) -> Operand:
    """bfloat16 or float16 [..., L], any; the scale is that of the largest."""
    mantissa, field = (7, 255) if x.dtype == torch.bfloat16 else (10, 31)
    stored = x.view(torch.int16).int()
    exponents = stored >> mantissa & field
    significand = (stored & (1 << mantissa) - 1) + (exponents != 0).int() * (1 << mantissa)
    exponents = exponents.clamp_(min=1).sub_(field >> 1)
    scale = exponents.amax(-1)
    exponents -= scale.unsqueeze(-1)
    zero = significand == 0
    # The exponent of the last bit that is set, as float32 stores it.
    last = exponents - mantissa + (((significand & -significand).float().view(torch.int32) >> 23) - 127)
    return Operand(
        values=x.double() * pow2(-scale).unsqueeze(-1),
        weights=pow2(6 * (exponents + CENTER)).masked_fill_(zero, 0.0),
        scale=scale,
        unit=last.masked_fill_(zero, 0).amin(-1),
        peak=1,
    )


def decoded(codes: Tensor, kind: Format) -> Tensor:
    """float32 values of uint8 codes; E2M1 as 0..15."""
    if kind == "e4m3":
        return decode_e4m3(codes)
    if kind == "e2m1":
        return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)[codes.long()]
    raise ValueError(f"format: expected 'e4m3' or 'e2m1', got {kind!r}")


WEIGHT_UNITS = {"mxfp4": 2.0, "nvfp4": 128.0}
"""What kernels that read bfloat16 divide weights by, and multiply sums by (kUnit, csrc/tile/bf16/bf16_weights.cuh)."""


def unit_weights(nibbles: Tensor, scales: Tensor, weights: str) -> Tensor:
    """uint8 [N, K] codes and their scales as kernels that read bfloat16 multiply them: values over `WEIGHT_UNITS`.

    Of MXFP4 halves, uint8 scales [N, K/32]: all that weights may have, up to 2^126, are exact so: 6 * 2^126 alone would
    not fit. Of NVFP4, uint8 scales [N, K/16], 2^-7 of the values, whose kernels multiply codes by factors that bfloat16
    would not hold otherwise.
    """
    if weights == "nvfp4":
        return fp4_to_bf16(nibbles, scales, NVFP4_BLOCK) / WEIGHT_UNITS[weights]
    values = torch.unflatten(decoded(nibbles, "e2m1") / WEIGHT_UNITS[weights], -1, (-1, BLOCK))
    return (values * decode_e8m0(scales).unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


def fp4_to_bf16(nibbles: Tensor, scales: Tensor, block: int) -> Tensor:
    """uint8 [R, K] codes times their scales, in bfloat16: exact of NVFP4, and of MXFP4 up to 2^127.

    Scales are E8M0 of blocks of 32, uint8 [R, K/32], or E4M3 of blocks of 16, uint8 [R, K/16].
    """
    factors = decode_e8m0(scales) if block == BLOCK else decode_e4m3(scales & 0x7F)
    values = torch.unflatten(decoded(nibbles, "e2m1"), -1, (-1, block))
    return (values * factors.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
