"""What one MMA adds and how it rounds, as data per architecture, and the exact computation of it in plain torch.

Tensor cores do not add in IEEE arithmetic. A step takes L products of two operand values and the fp32 accumulator,
aligns them to the largest exponent among them, cuts each at a fixed number of bits below it, adds what is left exactly,
and cuts the sum to fp32. docs/arithmetic.md has the rules in words, their sources, and what follows for results.

Here a value is significand * 2^exponent, as its format stores it: 1 <= |significand| < 2 for normal numbers, less than
1 with the format's lowest exponent for subnormal ones. A product has the product of the significands (below 4) and the
sum of the exponents; it is not normalized before it is aligned. All results are bits, not approximations: significands
are integers in disguise, small enough for float64 (float32 in one place, which says why).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .archs import check_arch
from .formats import BLOCK, E2M1_VALUES, decode_e4m3, decode_e8m0

__all__ = ["FP32_CHAIN", "SM12X_MXF8F6F4", "SM90_BF16", "Arithmetic", "block_scaled_mma", "gemm", "mma_step", "of_arch"]

NAN_BITS = 0x7FFFFFFF  # the NaN that tensor cores write
ZERO_EXPONENT = -133  # with which a zero takes part in the alignment; no step cuts below 2^(-133 - bits)

Format = Literal["e4m3", "e2m1"]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """One rule. Steps follow each other in k order; the first has accumulator +0."""

    name: str
    products: int
    """Products per step, L: 32 (a block) or 16 (k 0..15 of a block, then k 16..31)."""
    bits: int | None
    """Fractional bits kept below the largest exponent of a step; None: all, and then the accumulator is outside."""
    rounding: Literal["cut", "nearest"]
    """Of aligned terms and of the sum: toward zero, or to nearest with ties to even."""
    accumulator: Literal["inside", "outside"]
    """inside: aligned and added with the products. outside: the step's exact sum, without its scales, is rounded to
    fp32, multiplied by the scale in fp32, and added to the accumulator in fp32."""
    operands: Literal["mx", "bf16"] = "mx"
    """mx: codes with their scale beside them. bf16: the products of code and scale, rounded to bfloat16, which is exact
    from 2^-133 up to bfloat16's largest number."""
    source: str

    def __post_init__(self) -> None:
        if (self.bits is None) != (self.accumulator == "outside") or self.products not in (16, 32):
            raise ValueError(f"{self.name}: expected bits with an accumulator inside, 16 or 32 products, got {self}")

    def words(self) -> str:
        """Such as '32 products and the accumulator, 25 bits, cut'."""
        if self.bits is None:
            return f"{self.products} products exactly, accumulator outside, {self.rounding}"
        return f"{self.products} products and the accumulator, {self.bits} bits, {self.rounding}"


FP32_CHAIN = Arithmetic(
    name="fp32 chain",
    products=32,
    bits=None,
    rounding="nearest",
    accumulator="outside",
    source="csrc/tile: the MMA sums one block from +0, which is exact, and one fma per block adds it",
)
SM12X_MXF8F6F4 = Arithmetic(
    name="SM12x mxf8f6f4",
    products=32,
    bits=25,
    rounding="cut",
    accumulator="inside",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'RTX Blackwell' mma kind::mxf8f6f4.block_scale m16n8k32",
)
SM90_BF16 = Arithmetic(
    name="SM90 bf16",
    products=16,
    bits=25,
    rounding="cut",
    accumulator="inside",
    operands="bf16",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'Hopper' mma m16n8k16 and wgmma k16 with bf16; measured on an H200",
)


def of_arch(arch: str) -> Arithmetic:
    """What the kernels of an arch such as '120f' compute."""
    return SM12X_MXF8F6F4 if check_arch(arch)[0] == 12 else FP32_CHAIN


def family(published: Arithmetic) -> tuple[Arithmetic, ...]:
    """The published rule and its neighbours: 20 to 30 bits or all, cut or nearest, accumulator inside or outside.

    With the accumulator outside, bits make no difference from 20 on: the products of a block span 20 bits.
    """
    rules = [published]
    for rounding in ("cut", "nearest"):
        for bits in (*range(20, 31), None):
            rule = Arithmetic(
                name="",
                products=published.products,
                bits=bits,
                rounding=rounding,
                accumulator="outside" if bits is None else "inside",
                operands=published.operands,
                source="a neighbour of the published rule",
            )
            if rule.words() != published.words():
                rules.append(rule)
    return tuple(rules)


def mma_step(
    arithmetic: Arithmetic, significands: Tensor, exponents: Tensor, acc: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """One step, product by product: the definition that the faster functions of this module are tested against.

    Args:
        arithmetic: the rule.
        significands: float64 [..., L], the products' significands; NaN and infinities go through.
        exponents: int32 [..., L], the products' exponents, -600..600; those of zeros do not matter.
        acc: float32 [...].
        scale: int32 [...], the exponent of the products' common scale, 0 by default.

    Returns:
        float32 [...]; a zero is +0 and a NaN has the bits 0x7FFFFFFF.
    """
    shift = torch.zeros_like(acc, dtype=torch.int32) if scale is None else scale
    if arithmetic.bits is None:
        return _outside(arithmetic, acc, (significands * pow2(exponents)).sum(-1), shift)
    exponents = torch.where(significands == 0, ZERO_EXPONENT, exponents + shift.unsqueeze(-1))
    last = torch.maximum(exponents.amax(-1), _exponent(acc)) - arithmetic.bits
    terms = torch.cat((significands, acc.double().unsqueeze(-1)), -1)
    exponents = torch.cat((exponents, torch.zeros_like(last).unsqueeze(-1)), -1)
    total = _whole(terms * pow2(exponents - last.unsqueeze(-1)), arithmetic).sum(-1)
    return _to_float32(total * pow2(last), arithmetic)


def block_scaled_mma(
    a_codes: Tensor,
    b_codes: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    acc: Tensor,
    *,
    a_format: Format,
    b_format: Format,
    arithmetic: Arithmetic = SM12X_MXF8F6F4,
) -> Tensor:
    """One block of 32 in k: ``mma.kind::mxf8f6f4.block_scale`` with scale_vec::1X and ue8m0, for any M and N.

    Args:
        a_codes: uint8 [..., M, 32], plain codes: E4M3, or E2M1 as 0..15.
        b_codes: uint8 [..., N, 32].
        a_scale: uint8 [..., M] E8M0; 255 is NaN.
        b_scale: uint8 [..., N].
        acc: float32 [..., M, N].
        a_format, b_format: "e4m3" or "e2m1".
        arithmetic: the rule; of a rule with 16 products two steps.

    Returns:
        float32 [..., M, N].
    """
    batch, (m, n) = acc.shape[:-2], acc.shape[-2:]
    a = _operand(a_codes.reshape(-1, m, BLOCK), a_scale.reshape(-1, m), a_format, arithmetic)
    b = _operand(b_codes.reshape(-1, n, BLOCK), b_scale.reshape(-1, n), b_format, arithmetic)
    acc = acc.reshape(-1, m, n)
    for k in range(0, BLOCK, arithmetic.products):
        part = slice(k, k + arithmetic.products)
        acc = _Steps(arithmetic, a.part(part), b.part(part)).add(acc)
    return acc.reshape(*batch, m, n)


def gemm(
    arithmetic: Arithmetic, codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, out: Tensor
) -> None:
    """One expert's rows under a rule, K/L steps from +0; memory stays bounded, whatever the shape.

    Args:
        codes: uint8 [M, K] E4M3, plain k order.
        row_scales: uint8 [M, K/32] E8M0.
        packed: uint8 [N, K/2] E2M1, low nibble = even k.
        scales: uint8 [N, K/32].
        out: float32 [M, N], written.
    """
    (m, k), n, products = codes.shape, packed.shape[0], arithmetic.products
    weight_bytes, step_bytes = (512 << 20, 64 << 20) if codes.is_cuda else (128 << 20, _STEP_BYTES_CPU)
    columns = min(n, max(64, weight_bytes // (40 * max(k, 1))))
    rows = min(m, max(1, step_bytes // (32 * columns)))
    many = max(1, step_bytes // (16 * rows * columns))  # steps whose sums are made at once
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    a = _operand(codes.view(m, -1, BLOCK), row_scales, "e4m3", arithmetic).by_step(products)
    for c in range(0, n, columns):
        some = slice(c, c + columns)
        b = _operand(nibbles[some].view(-1, k // BLOCK, BLOCK), scales[some], "e2m1", arithmetic).by_step(products)
        for r in range(0, m, rows):
            acc = torch.zeros_like(out[r : r + rows, some]).unsqueeze(0)
            for i in range(0, k // products, many):
                steps = slice(i, i + many)
                for step in _Steps(arithmetic, a.rows(steps, slice(r, r + rows)), b.rows(steps)):
                    acc = step.add(acc)
            out[r : r + rows, some] = acc[0]


@dataclass(frozen=True, kw_only=True)
class _Operand:
    """Codes as values of their block's scale: value * 2^scale."""

    values: Tensor  # float32 [..., R, L]; NaN where the code or the scale is
    weights: Tensor  # float32 [..., R, L]: 64^exponent, 0 for a zero
    scale: Tensor  # int32 [..., R]
    unit: int  # all values are multiples of 2^unit
    peak: int  # and all are below 2^peak

    def part(self, k: slice) -> _Operand:
        return replace(self, values=self.values[..., k], weights=self.weights[..., k])

    def by_step(self, products: int) -> _Operand:
        """From [R, blocks, 32] to [steps, R, L]."""
        parts = BLOCK // products

        def split(x: Tensor) -> Tensor:
            return x.view(len(x), -1, products).transpose(0, 1).contiguous()

        scale = self.scale.repeat_interleave(parts, -1).t().contiguous()
        return replace(self, values=split(self.values), weights=split(self.weights), scale=scale)

    def rows(self, steps: slice, rows: slice = slice(None)) -> _Operand:
        """Some steps and rows of what `by_step` gave."""
        return replace(
            self,
            values=self.values[steps, rows],
            weights=self.weights[steps, rows],
            scale=self.scale[steps, rows],
        )


def _operand(codes: Tensor, scale_bytes: Tensor, kind: Format, arithmetic: Arithmetic) -> _Operand:
    """uint8 [..., 32] codes of a format and uint8 [...] scales."""
    if kind == "e4m3":
        values, exponents, unit, peak = decode_e4m3(codes), (codes >> 3 & 15).clamp(min=1).int() - 7, -9, 9
    elif kind == "e2m1":
        values = torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]
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
    return _Operand(values=values, weights=weights, scale=scale, unit=unit, peak=peak)


class _Steps:
    """Steps with operands [steps, M, L] and [steps, N, L]: what all of them need is computed at once.

    Nothing is rounded product by product unless it must be: the sum of a step's products is exact in float64, and only
    where the last bit kept lies above the products' lowest are they looked at one by one.
    """

    def __init__(self, arithmetic: Arithmetic, a: _Operand, b: _Operand) -> None:
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

    def __iter__(self) -> Iterator[_Steps]:
        for i in range(len(self.total)):
            step = object.__new__(_Steps)
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
            return _outside(rule, acc, self.total, self.scale)
        last = torch.maximum(self.top, _exponent(acc)).sub_(rule.bits)
        one = pow2(last)
        per_one = ((2046 << 52) - one.view(torch.int64)).view(torch.float64)
        total = self.total * per_one
        level = last.sub_(self.scale)  # of the last bit kept, in the operands' own units
        lowest = self.a.unit + self.b.unit
        none = self.a.peak + self.b.peak + (rule.rounding == "nearest")  # from here on nothing is left of a product
        if int(level.max()) > lowest:
            total.masked_fill_((level >= none) & total.isfinite(), 0.0)
            self._one_by_one(total, level, (level > lowest) & (level < none))
        total += _whole(acc.double() * per_one, rule)
        return _to_float32(total * one, rule)

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
            total[place] = _whole(products, self.arithmetic).sum(-1, dtype=torch.float64)


_STEP_BYTES_CPU = 1 << 20  # what stays in a core's cache
_PLACES_CPU, _PLACES_CUDA = 1 << 13, 1 << 20


def _outside(arithmetic: Arithmetic, acc: Tensor, total: Tensor, scale: Tensor) -> Tensor:
    """acc + round(total) * 2^scale in fp32 operations; an fma would differ only where the product is subnormal.

    2^scale is the product of two fp32 numbers, so it is 0 or infinite beyond fp32's range.
    """
    factor = pow2(scale).float()
    if arithmetic.rounding == "nearest":
        return acc + total.float() * factor
    product = _to_float32(_to_float32(total, arithmetic).double() * factor.double(), arithmetic).double()
    exact = acc.double()
    near = exact + product
    back = near - exact
    lost = (exact - (near - back)) + (product - back)  # near + lost is exact (two-sum)
    cut = _to_float32(near, arithmetic)
    # Where near is a float32 number that lies beyond the exact sum, the cut is the number before it.
    beyond = (cut.double() == near) & (lost * near < 0)
    return torch.where(beyond, torch.nextafter(cut, torch.zeros_like(cut)), cut)


def pow2(exponents: Tensor) -> Tensor:
    """2^e, float64, for int32 -1022 <= e <= 1023."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(x: Tensor) -> Tensor:
    """Of float32 numbers as they are stored: -126 if subnormal, 128 if not finite; ZERO_EXPONENT for zeros."""
    stored = (x.view(torch.int32) >> 23 & 255).clamp_(min=1).sub_(127)
    return stored.masked_fill_(x == 0, ZERO_EXPONENT)


def _whole(x: Tensor, arithmetic: Arithmetic) -> Tensor:
    """x rounded to integers, in place."""
    return x.trunc_() if arithmetic.rounding == "cut" else x.round_()


def _to_float32(x: Tensor, arithmetic: Arithmetic) -> Tensor:
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
