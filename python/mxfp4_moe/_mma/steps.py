"""Steps of an MMA, many at once and exactly: what arithmetic.py's rules and accuracy.py's bound are computed with.

Significands are integers in disguise, small enough for float64 (for float32 where operands are codes), so that no
operation here rounds unless the rule does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .numbers import ZERO_EXPONENT, exponent, pow2, to_float32, whole
from .operands import CENTER, Operand

if TYPE_CHECKING:
    from ..arithmetic import Arithmetic

_POSITIVE = 300  # more than any exponent's magnitude, so that what is divided is positive

_PLACES_CPU, _PLACES_CUDA = 1 << 13, 1 << 20


class Steps:
    """Steps with operands [steps, M, L] and [steps, N, L]: what all of them need is computed at once.

    Nothing is rounded product by product unless it must be: only where the last bit kept lies above the products'
    lowest are they looked at one by one. Elsewhere all of their bits are kept, and their sum is exact in float64.
    """

    def __init__(self, arithmetic: Arithmetic, a: Operand, b: Operand) -> None:
        self.arithmetic, self.a, self.b = arithmetic, a, b
        self.scale = a.scale.unsqueeze(-1) + b.scale.unsqueeze(-2)
        if arithmetic.bits is None:
            self.total = a.values.double() @ b.values.double().mT
            return
        scaled = [(x.values.double() * pow2(x.scale).unsqueeze(-1)) for x in (a, b)]
        self.total = scaled[0] @ scaled[1].mT
        self.lowest = _outer(a.unit, b.unit)  # the exponent of the last bit that products have
        # The largest exponent of a step's products, by a product of matrices: 64^e of the largest outweighs the other
        # 31, so the sum's own exponent is 6 e and at most 5 more. 10923 / 2^16 is a sixth.
        weight = a.weights @ b.weights.mT
        if weight.dtype == torch.float32:
            stored, zero_at = weight.view(torch.int32) >> 23, 127
            center = 0
        else:
            stored, zero_at = (weight.view(torch.int64) >> 52).int(), 1023
            center = 2 * CENTER
        largest = (stored - zero_at + 6 * _POSITIVE) * 10923 >> 16
        self.top = (largest - (_POSITIVE + center) + self.scale).masked_fill_(weight == 0, ZERO_EXPONENT)

    def __iter__(self) -> Iterator[Steps]:
        for i in range(len(self.total)):
            step = object.__new__(Steps)
            one = slice(i, i + 1)
            step.arithmetic, step.a, step.b = self.arithmetic, self.a.rows(one), self.b.rows(one)
            step.scale, step.total = self.scale[one], self.total[one]
            if self.arithmetic.bits is not None:
                step.top = self.top[one]
                step.lowest = self.lowest[one] if self.lowest.dim() else self.lowest
            yield step

    def last_bit(self) -> Tensor:
        """The exponent of the last bit that products can have."""
        return self.lowest + self.scale

    def magnitude(self) -> Tensor:
        """The sum of the products' magnitudes, float64."""
        scaled = [x.values.abs().double() * pow2(x.scale).unsqueeze(-1) for x in (self.a, self.b)]
        return scaled[0] @ scaled[1].mT

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
        none = self.a.peak + self.b.peak + (rule.rounding == "nearest")  # from here on nothing is left of a product
        if bool((level > self.lowest).any()):
            total.masked_fill_((level >= none) & total.isfinite(), 0.0)
            self._one_by_one(total, level, (level > self.lowest) & (level < none))
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
            # Products of codes are integers of at most 22 bits in their unit, which float32 holds, and what is left of
            # them; of floats they are float64.
            products = a.index_select(0, row) * b.index_select(0, column)
            products *= pow2(-level[place]).to(products.dtype).unsqueeze(-1)
            total[place] = whole(products, self.arithmetic).sum(-1, dtype=torch.float64)


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


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Sums of [..., M] and [..., N], or of two numbers."""
    return a.unsqueeze(-1) + b.unsqueeze(-2) if a.dim() else a + b
