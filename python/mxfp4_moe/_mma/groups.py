"""Steps of an MMA that adds groups of products exactly and aligns the groups: FP4 x FP4, exactly.

A group's sum is an integer number of quarters below 2^12, and the significands of two E4M3 scales make six more bits,
so float32 holds the one and float64 everything else, with room for the 35 bits of a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..formats import E4M3_NAN
from .numbers import exponent, pow2, to_float32, whole
from .operands import decoded

if TYPE_CHECKING:
    from ..arithmetic import Arithmetic

ScaleFormat = Literal["e8m0", "e4m3"]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Codes as groups of one scale each; a group's value is values * significand * 2^exponent."""

    values: Tensor  # float32 [steps, groups, R, L]
    significand: Tensor  # float64 [steps, groups, R]: 1 to 2, less of a subnormal scale, NaN of a NaN
    exponent: Tensor  # int32 the same
    last_bit: int  # values * significand are multiples of 2^last_bit

    def rows(self, steps: slice, rows: slice = slice(None)) -> Groups:
        return replace(
            self,
            values=self.values[steps, :, rows],
            significand=self.significand[steps, :, rows],
            exponent=self.exponent[steps, :, rows],
        )


def groups(arithmetic: Arithmetic, codes: Tensor, scales: Tensor, kind: ScaleFormat) -> Groups:
    """uint8 [R, K] E2M1 codes as 0..15, uint8 [R, K/32] E8M0 or [R, K/16] E4M3 scales; bit 7 of E4M3 is not read.

    K is filled up to whole steps with zeros, which change no sum: a zero's exponent is below that of every number.
    """
    (rows, k), size = codes.shape, arithmetic.group
    missing = -k % arithmetic.products
    block = k // scales.shape[-1] if k else size
    codes = torch.nn.functional.pad(codes, (0, missing))
    scales = torch.nn.functional.pad(scales, (0, missing // block), value=1).repeat_interleave(block // size, -1)
    if kind == "e8m0":
        nan = scales == 255
        significands, exponents = torch.ones_like(scales, dtype=torch.float64), scales.int() - 127
    else:
        magnitude = (scales & 0x7F).int()
        nan = magnitude == E4M3_NAN
        exponents = (magnitude >> 3).clamp(min=1) - 7
        significands = ((magnitude & 7) + 8 * (magnitude > 7)).double() / 8

    def by_step(x: Tensor, *more: int) -> Tensor:
        steps = (k + missing) // arithmetic.products
        return x.view(rows, steps, arithmetic.products // size, *more).movedim(0, 2).contiguous()

    return Groups(
        values=by_step(decoded(codes, "e2m1"), size),
        significand=by_step(significands.masked_fill(nan, float("nan"))),
        exponent=by_step(exponents.masked_fill(nan, 0).int()),
        last_bit=-1 if kind == "e8m0" else -4,
    )


class GroupSteps:
    """Steps of operands with the same numbers of steps and groups; `total` [steps, M, N] and so on, as `Steps`."""

    def __init__(self, arithmetic: Arithmetic, a: Groups, b: Groups) -> None:
        self.arithmetic, self.a, self.b = arithmetic, a, b
        significand = a.significand.unsqueeze(-1) * b.significand.unsqueeze(-2)
        self.terms = (a.values @ b.values.mT).double() * significand  # [steps, groups, M, N]
        own = a.exponent.unsqueeze(-1) + b.exponent.unsqueeze(-2)
        # A group whose products are all zeros is a zero; one whose products cancel is not.
        some = (a.values != 0).float() @ (b.values != 0).float().mT
        zero = (some == 0) | (significand == 0)
        self.exponents = own.masked_fill_(zero, arithmetic.zero_exponent)

    @property
    def total(self) -> Tensor:
        """The sums of the groups, float64."""
        return (self.terms * pow2(self.exponents)).sum(1)

    @property
    def top(self) -> Tensor:
        """The largest exponent of a step's groups."""
        return self.exponents.amax(1)

    def last_bit(self) -> Tensor:
        """The exponent of the last bit that groups can have."""
        return self.exponents.amin(1) + self.a.last_bit + self.b.last_bit

    def magnitude(self) -> Tensor:
        """The sum of the products' magnitudes."""
        significand = self.a.significand.unsqueeze(-1) * self.b.significand.unsqueeze(-2)
        sizes = (self.a.values.abs() @ self.b.values.abs().mT).double() * significand
        return (sizes * pow2(self.exponents)).sum(1)

    def __iter__(self) -> Iterator[GroupSteps]:
        for i in range(len(self.terms)):
            step = object.__new__(GroupSteps)
            one = slice(i, i + 1)
            step.arithmetic, step.a, step.b = self.arithmetic, self.a.rows(one), self.b.rows(one)
            step.terms, step.exponents = self.terms[one], self.exponents[one]
            yield step

    def add(self, acc: Tensor) -> Tensor:
        """The step's result for accumulators [steps, M, N], one each."""
        rule = self.arithmetic
        assert rule.bits is not None
        last = torch.maximum(self.top, exponent(acc, rule.zero_exponent)) - rule.bits
        kept = whole(self.terms * pow2(self.exponents - last.unsqueeze(1)), rule).sum(1)
        kept += whole(acc.double() * pow2(-last), rule)
        return to_float32(kept * pow2(last), rule)
