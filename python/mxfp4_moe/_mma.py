"""Steps of an MMA, many at once and exactly: what arithmetic.py's rules and accuracy.py's bound are computed with.

Significands are integers in disguise, small enough for float64 (float32 in one place, which says why), so that no
operation here rounds unless the rule does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .formats import BLOCK, E2M1_VALUES, decode_e4m3, decode_e8m0

if TYPE_CHECKING:
    from .arithmetic import Arithmetic

Format = Literal["e4m3", "e2m1"]

NAN_BITS = 0x7FFFFFFF  # the NaN that tensor cores write
ZERO_EXPONENT = -133  # with which a zero takes part in the alignment; no step cuts below 2^(-133 - bits)

_STEP_BYTES_CPU = 1 << 20  # what stays in a core's cache
_PLACES_CPU, _PLACES_CUDA = 1 << 13, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Operand:
    """Codes as values of their block's scale: value * 2^scale."""

    values: Tensor  # float32 [..., R, L]; NaN where the code or the scale is
    weights: Tensor  # float32 [..., R, L]: 64^exponent, 0 for a zero
    scale: Tensor  # int32 [..., R]
    unit: int  # all values are multiples of 2^unit
    peak: int  # and all are below 2^peak

    def part(self, k: slice) -> Operand:
        return replace(self, values=self.values[..., k], weights=self.weights[..., k])

    def by_step(self, products: int) -> Operand:
        """From [R, blocks, 32] to [steps, R, L]."""
        parts = BLOCK // products

        def split(x: Tensor) -> Tensor:
            return x.view(len(x), x.shape[1] * parts, products).transpose(0, 1).contiguous()

        scale = self.scale.repeat_interleave(parts, -1).t().contiguous()
        return replace(self, values=split(self.values), weights=split(self.weights), scale=scale)

    def rows(self, steps: slice, rows: slice = slice(None)) -> Operand:
        """Some steps and rows of what `by_step` gave."""
        return replace(
            self,
            values=self.values[steps, rows],
            weights=self.weights[steps, rows],
            scale=self.scale[steps, rows],
        )


def operand(codes: Tensor, scale_bytes: Tensor, kind: Format, arithmetic: Arithmetic) -> Operand:
    """uint8 [..., 32] codes of a format and uint8 [...] scales."""
    if kind == "e4m3":
        values, exponents, unit, peak = decode_e4m3(codes), (codes >> 3 & 15).clamp(min=1).int() - 7, -9, 9
    elif kind == "e2m1":
        values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)[codes.long()]
        exponents, unit, peak = (codes >> 1 & 3).clamp(min=1).int() - 1, -1, 3
    else:
        raise ValueError(f"format: expected 'e4m3' or 'e2m1', got {kind!r}")
    nan = scale_bytes == 255
    scale = (scale_bytes.int() - 127).masked_fill(nan, 0)
    if arithmetic.operands == "bf16":
        folded = (values * decode_e8m0(scale_bytes).unsqueeze(-1)).bfloat16()
        values = (folded.double() * pow2(-scale).unsqueeze(-1)).float()
        stored = (folded.view(torch.int16).int() >> 7 & 255).clamp(min=1) - 127
        exponents = (stored - scale.unsqueeze(-1)).clamp(-9, 9)  # NaN's would leave the range
    values = values.masked_fill(nan.unsqueeze(-1), float("nan"))
    weights = pow2(6 * exponents).float().masked_fill(values == 0, 0.0)
    return Operand(values=values, weights=weights, scale=scale, unit=unit, peak=peak)


class Steps:
    """Steps with operands [steps, M, L] and [steps, N, L]: what all of them need is computed at once.

    Nothing is rounded product by product unless it must be: the sum of a step's products is exact in float64, and only
    where the last bit kept lies above the products' lowest are they looked at one by one.
    """

    def __init__(self, arithmetic: Arithmetic, a: Operand, b: Operand) -> None:
        self.arithmetic, self.a, self.b = arithmetic, a, b
        self.scale = a.scale.unsqueeze(-1) + b.scale.unsqueeze(-2)
        if arithmetic.bits is None:
            self.total = a.values.double() @ b.values.double().mT
            return
        scaled = [(x.values.double() * pow2(x.scale).unsqueeze(-1)) for x in (a, b)]
        self.total = scaled[0] @ scaled[1].mT
        # The largest exponent of a step's products, by a product of float32 matrices: 64^e of the largest outweighs the
        # other 31, so the sum's own exponent is 6 e and at most 5 more. 10923 / 2^16 is a sixth, 21 keeps it positive.
        weight = a.weights @ b.weights.mT
        largest = ((weight.view(torch.int32) >> 23) - 1) * 10923 >> 16
        self.top = (largest - 21 + self.scale).masked_fill_(weight == 0, ZERO_EXPONENT)

    def __iter__(self) -> Iterator[Steps]:
        for i in range(len(self.total)):
            step = object.__new__(Steps)
            one = slice(i, i + 1)
            step.arithmetic, step.a, step.b = self.arithmetic, self.a.rows(one), self.b.rows(one)
            step.scale, step.total = self.scale[one], self.total[one]
            if self.arithmetic.bits is not None:
                step.top = self.top[one]
            yield step

    def add(self, acc: Tensor) -> Tensor:
        """The step's result for accumulators [steps, M, N], one each."""
        rule = self.arithmetic
        if rule.bits is None:
            return outside(rule, acc, self.total, self.scale)
        last = torch.maximum(self.top, exponent(acc)).sub_(rule.bits)
        one = pow2(last)
        per_one = ((2046 << 52) - one.view(torch.int64)).view(torch.float64)
        total = self.total * per_one
        level = last.sub_(self.scale)  # of the last bit kept, in the operands' own units
        lowest = self.a.unit + self.b.unit
        none = self.a.peak + self.b.peak + (rule.rounding == "nearest")  # from here on nothing is left of a product
        if bool((level > lowest).any()):
            total.masked_fill_((level >= none) & total.isfinite(), 0.0)
            self._one_by_one(total, level, (level > lowest) & (level < none))
        total += whole(acc.double() * per_one, rule)
        return to_float32(total * one, rule)

    def _one_by_one(self, total: Tensor, level: Tensor, which: Tensor) -> None:
        """Puts sums of rounded products, in units of 2^level, where `which` says."""
        places = which.flatten().nonzero().squeeze(1)
        _, m, n = total.shape
        a, b = self.a.values.flatten(0, 1), self.b.values.flatten(0, 1)
        total, level = total.view(-1), level.view(-1)
        for place in torch.split(places, _PLACES_CUDA if total.is_cuda else _PLACES_CPU):
            row = place // n
            column = place - row * n + row // m * n
            # Products are integers of at most 22 bits in their unit: float32 holds them, and what is left of them.
            products = a.index_select(0, row) * b.index_select(0, column)
            products *= pow2(-level[place]).float().unsqueeze(-1)
            total[place] = whole(products, self.arithmetic).sum(-1, dtype=torch.float64)


def pieces(
    arithmetic: Arithmetic, codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor
) -> Iterator[tuple[tuple[slice, slice], Iterator[Steps]]]:
    """A GEMM's output in pieces, each with its steps in k order, one at a time. Arguments as those of `gemm`."""
    (m, k), n, products = codes.shape, packed.shape[0], arithmetic.products
    weight_bytes, step_bytes = (512 << 20, 64 << 20) if codes.is_cuda else (128 << 20, _STEP_BYTES_CPU)
    columns = max(1, min(n, max(64, weight_bytes // (40 * max(k, 1)))))
    rows = max(1, min(m, step_bytes // (32 * columns)))
    many = max(1, step_bytes // (16 * rows * columns))  # steps whose sums are made at once
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    a = operand(codes.view(m, k // BLOCK, BLOCK), row_scales, "e4m3", arithmetic).by_step(products)
    for c in range(0, n, columns):
        some = slice(c, c + columns)
        b = operand(nibbles[some].view(-1, k // BLOCK, BLOCK), scales[some], "e2m1", arithmetic).by_step(products)
        for r in range(0, m, rows):
            place = slice(r, r + rows), some
            starts = range(0, k // products, many)
            together = (Steps(arithmetic, a.rows(s, place[0]), b.rows(s)) for s in (slice(i, i + many) for i in starts))
            yield place, (step for steps in together for step in steps)


def outside(arithmetic: Arithmetic, acc: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    """acc + round(total) * 2^scale in fp32 operations; an fma would differ only where the product is subnormal.

    2^scale is the product of two fp32 numbers, so it is 0 or infinite beyond fp32's range.
    """
    factor = pow2(scale).float()
    if arithmetic.rounding == "nearest":
        return acc + total.float() * factor
    product = to_float32(to_float32(total, arithmetic).double() * factor.double(), arithmetic).double()
    exact = acc.double()
    near = exact + product
    back = near - exact
    lost = (exact - (near - back)) + (product - back)  # near + lost is exact (two-sum)
    cut = to_float32(near, arithmetic)
    # Where near is a float32 number that lies beyond the exact sum, the cut is the number before it.
    beyond = (cut.double() == near) & (lost * near < 0)
    return torch.where(beyond, torch.nextafter(cut, torch.zeros_like(cut)), cut)


def pow2(exponents: Tensor) -> Tensor:
    """2^e, float64, for int32 -1022 <= e <= 1023."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def exponent(x: Tensor) -> Tensor:
    """Of float32 numbers as they are stored: -126 if subnormal, 128 if not finite; ZERO_EXPONENT for zeros."""
    stored = (x.view(torch.int32) >> 23 & 255).clamp_(min=1).sub_(127)
    return stored.masked_fill_(x == 0, ZERO_EXPONENT)


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
