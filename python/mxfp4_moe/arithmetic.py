"""What one MMA adds and how it rounds, as data per architecture, and the exact computation of it in plain torch.

Tensor cores do not add in IEEE arithmetic. A step takes L products of two operand values and the fp32 accumulator,
aligns them to the largest exponent among them, cuts each at a fixed number of bits below it, adds what is left exactly,
and cuts the sum to fp32. An MMA of FP4 x FP4 first adds groups of 16 products exactly, and aligns the groups.
docs/arithmetic.md has the rules in words, their sources, and what follows for results.

Here a value is significand * 2^exponent, as its format stores it: 1 <= |significand| < 2 for normal numbers, less than
1 with the format's lowest exponent for subnormal ones. A product has the product of the significands (below 4) and the
sum of the exponents; it is not normalized before it is aligned. A group has the sum of the exponents of its two scales,
and all else in its significand. A zero has an exponent of its own, far down. All results are bits, not approximations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ._mma.groups import GroupSteps, ScaleFormat, groups
from ._mma.numbers import NAN_BITS, ZERO_EXPONENT, exponent, pow2, to_float32, whole
from ._mma.operands import Format, decoded, float_operand, operand
from ._mma.pieces import accumulator_unit, pieces
from ._mma.steps import Steps, outside
from ._torch_state import exact
from .archs import check_arch
from .formats import BLOCK, FP16_NVFP4_UNIT, decode_e8m0, fp16_factor, largest_of_factor, largest_scale

__all__ = [
    "SM12X_BF16",
    "SM12X_FP16",
    "SM12X_MXF4",
    "SM12X_MXF8F6F4",
    "SM12X_NVF4",
    "SM90_BF16",
    "SM90_FP16",
    "Arithmetic",
    "block_scaled_mma",
    "family",
    "float_mma",
    "fp4_mma",
    "gemm",
    "mma_step",
    "of_arch",
]


# Sizes of groups by operands: all of a group's products have the same scale.
_GROUPS = {"mx": (1,), "bf16": (1,), "fp16": (1,), "mxfp4": (8, 16, 32), "nvfp4": (8, 16)}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """One rule. Steps follow each other in k order; the first has accumulator +0."""

    name: str
    products: int
    """Products per step, L: 32 (a block), 16 (k 0..15 of a block, then k 16..31) or 64 (two blocks)."""
    bits: int | None
    """Fractional bits kept below the largest exponent of a step; None: all, and then the accumulator is outside."""
    rounding: Literal["cut", "nearest"]
    """Of aligned terms and of the sum: toward zero, or to nearest with ties to even."""
    accumulator: Literal["inside", "outside"]
    """inside: aligned and added with the products. outside: the step's exact sum, without its scales, is rounded to
    fp32, multiplied by the scale in fp32, and added to the accumulator in fp32."""
    operands: Literal["mx", "bf16", "fp16", "mxfp4", "nvfp4"] = "mx"
    """mx: codes with their scale beside them. bf16: the products of code and scale, rounded to bfloat16, which is exact
    from 2^-133 up to bfloat16's largest number. fp16: float16. mxfp4, nvfp4: E2M1 codes on both sides, with an E8M0
    scale per 32 or an E4M3 scale per 16 beside them."""
    group: int = 1
    """Products that are added exactly before anything is aligned. The exponent of a group of more than one is that of
    its scales, whatever its products are, but for one whose products or scales are all zeros: that is a zero."""
    zero_exponent: int = ZERO_EXPONENT
    """With which zeros, the accumulator's too, take part in the alignment."""
    source: str

    def __post_init__(self) -> None:
        if (self.bits is None) != (self.accumulator == "outside") or self.products not in (16, 32, 64):
            raise ValueError(
                f"{self.name}: expected bits with an accumulator inside, 16, 32 or 64 products, got {self}"
            )
        if self.group not in _GROUPS[self.operands] or (self.group > 1 and self.bits is None):
            raise ValueError(
                f"{self.name}: expected groups of one of {_GROUPS[self.operands]} {self.operands} products, and bits "
                f"where it is more than one, got {self}"
            )

    def words(self) -> str:
        """Such as '32 products and the accumulator, 25 bits, cut'; no two rules have the same."""
        kinds = {"mx": "", "bf16": "bfloat16 ", "fp16": "float16 ", "mxfp4": "MXFP4 ", "nvfp4": "NVFP4 "}
        what = f"{self.products} {kinds[self.operands]}products"
        if self.group > 1:
            what += f" in groups of {self.group}"
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


SM12X_BF16 = replace(
    SM90_BF16,
    name="SM12x bf16",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'RTX Blackwell' mma m16n8k16 with bf16",
)
SM12X_FP16 = replace(
    SM12X_BF16,
    name="SM12x fp16",
    operands="fp16",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'RTX Blackwell' mma m16n8k16 with f16 and an f32 accumulator",
)
SM90_FP16 = replace(
    SM90_BF16,
    name="SM90 fp16",
    operands="fp16",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'Hopper' mma m16n8k16 and wgmma k16 with f16 and an f32 accumulator",
)
SM12X_MXF4 = Arithmetic(
    name="SM12x mxf4",
    products=64,
    group=16,
    bits=35,
    rounding="cut",
    accumulator="inside",
    operands="mxfp4",
    zero_exponent=-139,
    source="arXiv 2511.10909 and mmasim 2.1.1, 'RTX Blackwell' mma kind::mxf4.block_scale m16n8k64 with scale_vec::2X, "
    "and kind::mxf4nvf4 with ue8m0",
)
SM12X_NVF4 = replace(
    SM12X_MXF4,
    name="SM12x mxf4nvf4",
    operands="nvfp4",
    source="arXiv 2511.10909 and mmasim 2.1.1, 'RTX Blackwell' mma kind::mxf4nvf4.block_scale m16n8k64 with "
    "scale_vec::4X and ue4m3",
)

_OF_PAIR = {  # SM12x's rule, by what the kernels' MMA reads
    "mxfp4_mxfp8": SM12X_MXF8F6F4,
    "mxfp4_mxfp4": SM12X_MXF4,
    "nvfp4_nvfp4": SM12X_NVF4,
    "mxfp4_bf16": SM12X_BF16,
    "nvfp4_bf16": SM12X_BF16,
    "mxfp4_fp16": SM12X_FP16,
    "nvfp4_fp16": SM12X_FP16,
}


def of_arch(arch: str, pair: str = "mxfp4_mxfp8") -> Arithmetic:
    """What the kernels of an arch such as '120f' compute.

    Args:
        arch: the arch.
        pair: formats of weights and activations: mxfp4_mxfp8, mxfp4_bf16, mxfp4_mxfp4, nvfp4_nvfp4, nvfp4_bf16,
            mxfp4_fp16 or nvfp4_fp16. SM90 multiplies those of fp16 in float16, and all others in bfloat16.

    Raises:
        ArchError: the kernels have no code for the arch.
        ValueError: another pair.
    """
    rule = _OF_PAIR[_known(pair)]
    if check_arch(arch)[0] == 12:
        return rule
    return SM90_FP16 if rule is SM12X_FP16 else SM90_BF16


def _known(pair: str) -> str:
    if pair not in _OF_PAIR:
        raise ValueError(f"pair: expected one of {', '.join(_OF_PAIR)}, got {pair!r}")
    return pair


def family(published: Arithmetic) -> tuple[Arithmetic, ...]:
    """The published rule, the other named ones that read the same, and neighbours: other bits, cut or nearest.

    Of a rule that aligns products 20 to 30 bits, and the accumulator inside or outside. There bits make no difference
    from 20 on, for E4M3 x E2M1: the exponent of a product is at most 10, and its last bit is 2^-10. Of a rule that
    aligns groups 24 to 40 bits, and groups of 8, 16 or, with a scale per 32, 32.
    """
    grouped = published.group > 1
    rules = {published.words(): published}
    for rule in () if grouped else (SM12X_MXF8F6F4, SM90_BF16):
        rules.setdefault(rule.words(), rule)
    sizes = [size for size in _GROUPS[published.operands] if size != published.group]
    widths: tuple[int | None, ...] = tuple(range(24, 41)) if grouped else (*range(20, 31), None)
    roundings: tuple[Literal["cut", "nearest"], ...] = ("cut", "nearest")
    for group, rounding, bits in itertools.product((published.group, *sizes), roundings, widths):
        rule = replace(
            published,
            name="",
            group=group,
            bits=bits,
            rounding=rounding,
            accumulator="outside" if bits is None else "inside",
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
        arithmetic: a rule that aligns products.
        significands: float64 [..., L], the products' significands; NaN and infinities go through.
        exponents: int32 [..., L], the products' exponents, -600..600; those of zeros do not matter.
        acc: float32 [...].
        scale: int32 [...], the exponent of the products' common scale, 0 by default.

    Returns:
        float32 [...]; a zero is +0 and a NaN has the bits 0x7FFFFFFF.
    """
    if arithmetic.group > 1:
        raise ValueError(f"arithmetic: expected a rule that aligns products, got {arithmetic.words()!r}")
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
    if arithmetic.operands not in ("mx", "bf16"):
        raise ValueError(f"arithmetic: expected one of codes with a scale per 32, got {arithmetic.words()!r}")
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
            a, b = (float_operand(x[..., part].contiguous()) for x in both)
        else:
            a, b = (operand(codes[..., part], scale, kind) for codes, scale, kind in operands)
        acc = Steps(arithmetic, a, b).add(acc)
    return acc.reshape(*batch, m, n)


@exact
def fp4_mma(
    a_codes: Tensor,
    b_codes: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    acc: Tensor,
    *,
    arithmetic: Arithmetic = SM12X_MXF4,
) -> Tensor:
    """64 k of FP4 x FP4: ``mma.kind::mxf4`` or ``kind::mxf4nvf4`` m16n8k64 with block_scale, for any M and N.

    Args:
        a_codes: uint8 [..., M, 64] E2M1, plain codes 0..15.
        b_codes: uint8 [..., N, 64].
        a_scales: uint8 [..., M, 2] E8M0, of k 0..31 and 32..63 (scale_vec::2X, ue8m0; 255 is NaN); or of a rule of
            NVFP4 uint8 [..., M, 4] E4M3, one per 16 (4X, ue4m3; 0x7F is NaN, and bit 7, which there is none of, is not
            read).
        b_scales: uint8 [..., N, 2] or [..., N, 4].
        acc: float32 [..., M, N].
        arithmetic: a rule of FP4 x FP4.

    Returns:
        float32 [..., M, N].
    """
    if arithmetic.group == 1:
        raise ValueError(f"arithmetic: expected one of FP4 x FP4, got {arithmetic.words()!r}")
    kind: ScaleFormat = "e4m3" if arithmetic.operands == "nvfp4" else "e8m0"
    batch, (m, n) = acc.shape[:-2], acc.shape[-2:]
    count = batch.numel()

    def steps_of(x: Tensor, rows: int) -> Tensor:  # all MMAs' rows side by side, as the steps of one operand
        return x.reshape(count, rows, x.shape[-1]).transpose(0, 1).flatten(1)

    a = groups(arithmetic, steps_of(a_codes, m), steps_of(a_scales, m), kind)
    b = groups(arithmetic, steps_of(b_codes, n), steps_of(b_scales, n), kind)
    return GroupSteps(arithmetic, a, b).add(acc.reshape(count, m, n)).reshape(*batch, m, n)


@exact
def float_mma(a: Tensor, b: Tensor, acc: Tensor, *, arithmetic: Arithmetic = SM12X_BF16) -> Tensor:
    """16 k of bfloat16 or float16: ``mma.m16n8k16`` with a float32 accumulator, for any M and N.

    Args:
        a: bfloat16 or float16, as the rule takes, [..., M, 16].
        b: the same [..., N, 16].
        acc: float32 [..., M, N].
        arithmetic: a rule of bfloat16 or float16.

    Returns:
        float32 [..., M, N].
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic.operands)
    if dtype is None or a.dtype != dtype or b.dtype != dtype:
        raise ValueError(f"a, b: expected {dtype} for the arithmetic {arithmetic.name!r}, got {a.dtype} and {b.dtype}")
    batch, (m, n) = acc.shape[:-2], acc.shape[-2:]
    count = batch.numel()
    operands = (float_operand(x.reshape(count, rows, x.shape[-1]).contiguous()) for x, rows in ((a, m), (b, n)))
    return Steps(arithmetic, *operands).add(acc.reshape(count, m, n)).reshape(*batch, m, n)


@exact
def gemm(
    arithmetic: Arithmetic,
    rows: Tensor,
    row_scales: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    pair: str | None = None,
    factor: Tensor | None = None,
) -> None:
    """One expert's rows under a rule, K/L steps from +0; memory stays bounded, whatever the shape.

    Under a rule that takes bfloat16 the kernels hold half of each MXFP4 weight, so that the largest ones fit, and
    2^-7 of each NVFP4 weight, so that what makes it fits, and double the sums in the end, or multiply them by 2^7. That
    is the same but at the ends of float32's range: a sum that leaves it for a while may come back, and the last bits of
    subnormal ones are cut one bit earlier, or seven. Under a rule of float16 all of that is in `factor`.

    Args:
        rows: uint8 [M, K] E4M3, plain k order; bfloat16 or float16 [M, K], for a rule that takes it; or uint8 [M, K/2]
            E2M1, low nibble = even k, of pairs with MXFP4 or NVFP4 activations.
        row_scales: uint8 [M, K/32] E8M0, or [M, K/16] E4M3 of NVFP4; None of bfloat16 and float16 rows.
        packed: uint8 [N, K/2] E2M1, low nibble = even k.
        scales: uint8 [N, K/32] E8M0, or [N, K/16] E4M3 of NVFP4.
        out: float32 [M, N], written.
        pair: as for `of_arch`. By default the one that the rule is for, mxfp4_mxfp8 or mxfp4_bf16, or mxfp4_fp16.
        factor: float32, of a shape that broadcasts to [M, N]: what scales per tensor, expert or row come to. Finished
            sums are multiplied by it, with one rounding to nearest. Of MXFP4 under a rule of float16 it is
            `formats.fp16_factor` of what each weight row is relative to, by default of these weights' own; of NVFP4
            there `formats.FP16_NVFP4_UNIT` times the weights' factor, by default 1.
    """
    if pair is None:
        own = {"mxfp4": "mxfp4_mxfp4", "nvfp4": "nvfp4_nvfp4", "fp16": "mxfp4_fp16"}
        pair = own.get(arithmetic.operands, "mxfp4_bf16" if row_scales is None else "mxfp4_mxfp8")
    operands = _OF_PAIR[_known(pair)].operands
    if arithmetic.operands != operands and (arithmetic.operands != "bf16" or operands == "fp16"):
        raise ValueError(f"pair: expected one that the arithmetic {arithmetic.name!r} takes, got {pair!r}")
    unit, largest = accumulator_unit(arithmetic, pair), None
    if pair == "mxfp4_fp16":
        factor = fp16_factor(largest_scale(packed, scales)) if factor is None else factor
        largest = largest_of_factor(factor.expand(max(len(rows), 1), len(packed))[0])
    elif pair == "nvfp4_fp16" and factor is None:
        factor = out.new_tensor(FP16_NVFP4_UNIT)
    for place, steps in pieces(arithmetic, pair, rows, row_scales, packed, scales, largest):
        acc = torch.zeros_like(out[place]).unsqueeze(0)
        for step in steps:
            acc = step.add(acc)
        out[place] = unit * acc[0]
    if factor is not None:
        out *= factor
        out.view(torch.int32).masked_fill_(out.isnan(), NAN_BITS)
