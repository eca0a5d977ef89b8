"""Numbers as tensor cores see them: powers of two, exponents, and the roundings that rules name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..arithmetic import Arithmetic

NAN_BITS = 0x7FFFFFFF  # the NaN that tensor cores write
ZERO_EXPONENT = -133  # with which a zero takes part where products are aligned; no step cuts below 2^(-133 - bits)


def pow2(exponents: Tensor) -> Tensor:
    """2^e, float64, for int32 -1022 <= e <= 1023."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def exponent(x: Tensor, of_zero: int = ZERO_EXPONENT) -> Tensor:
    """Of float32 numbers as they are stored: -126 if subnormal, 128 if not finite."""
    stored = (x.view(torch.int32) >> 23 & 255).clamp_(min=1).sub_(127)
    return stored.masked_fill_(x == 0, of_zero)


def whole(x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """x rounded to integers, in place."""
    return x.trunc_() if arithmetic.rounding == "cut" else x.round_()


def to_float32(x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """float64 numbers rounded to float32, those of 2^128 and more to infinity; zeros become +0."""
    if arithmetic.rounding == "cut":
        cut = (x.view(torch.int64) & -(1 << 29)).view(torch.float64)
        small = x.abs() < 2.0**-126
        if bool(small.any()):
            cut = torch.where(small, (x * 2.0**149).trunc_() * 2.0**-149, cut)
        x = cut
    result = x.float().add_(0.0)
    result.view(torch.int32).masked_fill_(result.isnan(), NAN_BITS)
    return result
