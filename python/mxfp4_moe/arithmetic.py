"""What one MMA adds and how it rounds, as data per architecture, and the exact computation of it in plain torch.

Tensor cores do not add in IEEE arithmetic. A step takes L products of two operand values and the fp32 accumulator,
aligns them to the largest exponent among them, cuts each at a fixed number of bits below it, adds what is left exactly,
and cuts the sum to fp32. docs/arithmetic.md has the rules in words, their sources, and what follows for results.

Here a value is significand * 2^exponent, as its format stores it: 1 <= |significand| < 2 for normal numbers, less than
1 with the format's lowest exponent for subnormal ones. A product has the product of the significands (below 4) and the
sum of the exponents; it is not normalized before it is aligned. A zero has the exponent -133. All results are bits, not
approximations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._mma import (
    ZERO_EXPONENT,
    Format,
    Steps,
    bf16_operand,
    decoded,
    exponent,
    operand,
    outside,
    pieces,
    pow2,
    to_float32,
    whole,
)
from ._torch_state import exact
from .archs import check_arch
from .formats import BLOCK, decode_e8m0

__all__ = [
    "SM12X_MXF8F6F4",
    "SM90_BF16",
    "Arithmetic",
    "block_scaled_mma",
    "family",
    "gemm",
    "mma_step",
    "of_arch",
]


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
        """Such as '32 products and the accumulator, 25 bits, cut'; no two rules have the same."""
        what = f"{self.products} {'bfloat16 ' if self.operands == 'bf16' else ''}products"
        if self.bits is None:
            return f"{what} exactly, accumulator outside, {self.rounding}"
        return f"{what} and the accumulator, {self.bits} bits, {self.rounding}"


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
    return SM12X_MXF8F6F4 if check_arch(arch)[0] == 12 else SM90_BF16


def family(published: Arithmetic) -> tuple[Arithmetic, ...]:
    """The published rule, the other named one, and neighbours: 20 to 30 bits, cut or nearest, accumulator in or out.

    With the accumulator outside, bits make no difference from 20 on, for E4M3 x E2M1: the exponent of a product is at
    most 10, and its last bit is 2^-10.
    """
    rules: dict[str, Arithmetic] = {}
    for rule in (published, SM12X_MXF8F6F4, SM90_BF16):
        rules.setdefault(rule.words(), rule)
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
            rules.setdefault(rule.words(), rule)
    return tuple(rules.values())


@exact
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
        return outside(arithmetic, acc, (significands * pow2(exponents)).sum(-1), shift)
    exponents = torch.where(significands == 0, ZERO_EXPONENT, exponents + shift.unsqueeze(-1))
    last = torch.maximum(exponents.amax(-1), exponent(acc)) - arithmetic.bits
    terms = torch.cat((significands, acc.double().unsqueeze(-1)), -1)
    exponents = torch.cat((exponents, torch.zeros_like(last).unsqueeze(-1)), -1)
    total = whole(terms * pow2(exponents - last.unsqueeze(-1)), arithmetic).sum(-1)
    return to_float32(total * pow2(last), arithmetic)


@exact
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
    count = batch.numel()
    operands = (
        (a_codes.reshape(count, m, BLOCK), a_scale.reshape(count, m), a_format),
        (b_codes.reshape(count, n, BLOCK), b_scale.reshape(count, n), b_format),
    )
    if arithmetic.operands == "bf16":
        both = [(decoded(codes, kind) * decode_e8m0(scale).unsqueeze(-1)).bfloat16() for codes, scale, kind in operands]
    acc = acc.reshape(count, m, n)
    for k in range(0, BLOCK, arithmetic.products):
        part = slice(k, k + arithmetic.products)
        if arithmetic.operands == "bf16":
            a, b = (bf16_operand(x[..., part].contiguous()) for x in both)
        else:
            a, b = (operand(codes[..., part], scale, kind) for codes, scale, kind in operands)
        acc = Steps(arithmetic, a, b).add(acc)
    return acc.reshape(*batch, m, n)


@exact
def gemm(
    arithmetic: Arithmetic, rows: Tensor, row_scales: Tensor | None, packed: Tensor, scales: Tensor, out: Tensor
) -> None:
    """One expert's rows under a rule, K/L steps from +0; memory stays bounded, whatever the shape.

    Under a rule that takes bfloat16 the kernels hold half of each weight, so that the largest ones fit, and double the
    sums in the end. That is the same but at the ends of float32's range: a sum that leaves it for a while may come
    back, and the last bits of subnormal ones are cut one bit earlier.

    Args:
        rows: uint8 [M, K] E4M3, plain k order; or bfloat16 [M, K], for a rule that takes it.
        row_scales: uint8 [M, K/32] E8M0; None of bfloat16 rows.
        packed: uint8 [N, K/2] E2M1, low nibble = even k.
        scales: uint8 [N, K/32].
        out: float32 [M, N], written.
    """
    for place, steps in pieces(arithmetic, rows, row_scales, packed, scales):
        acc = torch.zeros_like(out[place]).unsqueeze(0)
        for step in steps:
            acc = step.add(acc)
        out[place] = 2 * acc[0] if arithmetic.operands == "bf16" else acc[0]
