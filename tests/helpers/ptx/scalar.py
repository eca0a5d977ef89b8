"""Instructions that compute each lane's result from the lane's own registers: name -> types and an expression.

The expressions are numpy's, over 32 lanes at once; {0}, {1} ... stand for the operands in the given types. A name that
is not here, modifiers included, is not known (compile.py refuses it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import floats

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8, f4 = np.int8, np.int16, np.int32, np.int64, np.float32

DTYPES: dict[str, Any] = {
    **{"u8": u1, "u16": u2, "u32": u4, "u64": u8, "b8": u1, "b16": u2, "b32": u4, "b64": u8},
    **{"s8": i1, "s16": i2, "s32": i4, "s64": i8, "f32": f4, "f16": u2, "pred": np.bool_},
}


@dataclass(frozen=True)
class Scalar:
    result: str  # type
    operands: tuple[str, ...]
    expression: str


SCALAR: dict[str, Scalar] = {}


def _define(name: str, result: str, operands: str, expression: str) -> None:
    assert name not in SCALAR, name
    SCALAR[name] = Scalar(result, tuple(operands.split()), expression)


# --- helpers that the expressions call ---------------------------------------------------------------------------


def shift_left(x: Any, by: Any) -> Any:
    """PTX clamps amounts above the width: everything is shifted out."""
    bits = x.dtype.itemsize * 8
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Any, by: Any) -> Any:
    """Signed types fill with the sign."""
    bits = x.dtype.itemsize * 8
    kept = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return kept if x.dtype.kind == "i" else np.where(by < bits, kept, x.dtype.type(0))


def divide(a: Any, b: Any) -> Any:
    """Toward zero. PTX leaves x / 0 open; here it is all ones, as hardware gives."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        quotient = a // safe
    else:
        floor = a // safe
        quotient = floor + ((floor < 0) & (floor * safe != a)).astype(a.dtype)
    return (
        np.where(b == 0, a.dtype.type(0) - a.dtype.type(0) - np.ones((), a.dtype), quotient)
        if (b == 0).any()
        else quotient
    )


def remainder(a: Any, b: Any) -> Any:
    return a - divide(a, b) * b


def permute_bytes(a: Any, b: Any, selector: Any) -> Any:
    """prmt.b32 in its default mode, sign replication (bit 3 of a selector) included."""
    source = np.stack([a, b], -1).view(u1)  # [32, 8], byte 0 of a first
    picks = selector[:, None] >> np.array([0, 4, 8, 12], u4) & u4(15)
    taken = np.take_along_axis(source, (picks & u4(7)).astype(np.intp), 1)
    taken = np.where(picks & u4(8), np.where(taken & u1(0x80), u1(0xFF), u1(0)), taken)
    return np.ascontiguousarray(taken).view(u4)[:, 0]


def funnel_right_wrap(low: Any, high: Any, by: Any) -> Any:
    """shf.r.wrap.b32: the low word of high:low >> (by mod 32)."""
    both = high.astype(u8) << u8(32) | low.astype(u8)
    return (both >> (by & u4(31)).astype(u8)).astype(u4)


def funnel_left_wrap(low: Any, high: Any, by: Any) -> Any:
    """shf.l.wrap.b32: the high word of high:low << (by mod 32)."""
    both = high.astype(u8) << u8(32) | low.astype(u8)
    return (both << (by & u4(31)).astype(u8) >> u8(32)).astype(u4)


def logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3.b32: bit 4a + 2b + c of the table, for each bit of the operands."""
    result = np.zeros_like(a)
    for row in range(8):
        x, y, z = (of if row & bit else ~of for of, bit in ((a, 4), (b, 2), (c, 1)))
        result |= np.where(table >> u4(row) & u4(1), x & y & z, u4(0))
    return result


def halves(x: Any) -> Any:
    """The two signed halves of each word, as .s16x2 reads it."""
    return np.ascontiguousarray(x).view(i2).reshape(-1, 2)


def words(x: Any) -> Any:
    """The inverse of `halves`."""
    return np.ascontiguousarray(x, i2).view(u4)[:, 0]


def reverse_bits(x: Any) -> Any:
    for by, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        x = (x >> u4(by) & u4(mask)) | (x & u4(mask)) << u4(by)
    return x


def leading_zeros(x: Any) -> Any:
    """bfind.shiftamt.u32: how far left the highest set bit must go; all ones where there is none."""
    _, exponent = np.frexp(x.astype(np.float64))
    return np.where(x == 0, u4(0xFFFFFFFF), (32 - exponent).astype(u4))


def count_bits(x: Any) -> Any:
    return np.unpackbits(np.ascontiguousarray(x).view(u1).reshape(-1, 4), axis=1).sum(1).astype(u4)


def insert_bits(x: Any, into: Any, position: Any, length: Any) -> Any:
    """bfi.b32: the lowest `length` bits of x, put into the other at `position`."""
    at = np.minimum(position & u4(255), u4(32)).astype(u8)
    mask = ((u8(1) << np.minimum(length & u4(255), u4(32)).astype(u8)) - u8(1)) << at
    return (into.astype(u8) & ~mask | x.astype(u8) << at & mask).astype(u4)


def extract_bits(x: Any, position: Any, length: Any) -> Any:
    """bfe.u32."""
    wide = x.astype(u8) >> np.minimum(position & u4(255), u4(63)).astype(u8)
    return (wide & ((u8(1) << np.minimum(length & u4(255), u4(32)).astype(u8)) - u8(1))).astype(u4)


HELPERS: dict[str, Any] = {
    **{f.__name__: f for f in (shift_left, shift_right, divide, remainder, permute_bytes, funnel_right_wrap)},
    **{f.__name__: f for f in (funnel_left_wrap, halves, words, logic)},
    **{f.__name__: f for f in (reverse_bits, leading_zeros, count_bits, extract_bits, insert_bits)},
    **{"np": np, "floats": floats, "u1": u1, "u2": u2, "u4": u4, "u8": u8, "i1": i1, "i2": i2, "i4": i4, "i8": i8},
    "f4": f4,
}

# --- the table ---------------------------------------------------------------------------------------------------

_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
for t in _INTEGERS:
    for name, sign in (("add", "+"), ("sub", "-")):
        _define(f"{name}.{t}", t, f"{t} {t}", f"{{0}} {sign} {{1}}")
    _define(f"mul.lo.{t}", t, f"{t} {t}", "{0} * {1}")
    _define(f"mad.lo.{t}", t, f"{t} {t} {t}", "{0} * {1} + {2}")
    _define(f"div.{t}", t, f"{t} {t}", "divide({0}, {1})")
    _define(f"rem.{t}", t, f"{t} {t}", "remainder({0}, {1})")
    _define(f"min.{t}", t, f"{t} {t}", "np.minimum({0}, {1})")
    _define(f"max.{t}", t, f"{t} {t}", "np.maximum({0}, {1})")
    _define(f"shr.{t}", t, f"{t} u32", "shift_right({0}, {1})")
    if t.startswith("s"):
        _define(f"neg.{t}", t, t, "-{0}")
for t, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
    to = DTYPES[wide].__name__
    _define(f"mul.wide.{t}", wide, f"{t} {t}", f"{{0}}.astype(np.{to}) * {{1}}.astype(np.{to})")
    _define(f"mad.wide.{t}", wide, f"{t} {t} {wide}", f"{{0}}.astype(np.{to}) * {{1}}.astype(np.{to}) + {{2}}")
_define(
    "mul.hi.u32", "u32", "u32 u32", "({0}.astype(np.uint64) * {1}.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)"
)
for t in ("b16", "b32", "b64", "pred"):
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _define(f"{name}.{t}", t, f"{t} {t}", f"{{0}} {sign} {{1}}")
    _define(f"not.{t}", t, t, "~{0}")
    if t != "pred":
        _define(f"shl.{t}", t, f"{t} u32", "shift_left({0}, {1})")
for t in ("pred", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32"):
    _define(f"mov.{t}", t, t, "{0}")
    if t != "pred":
        _define(f"selp.{t}", t, f"{t} {t} pred", "np.where({2}, {0}, {1})")
for t in (*_INTEGERS, "b16", "b32", "b64", "f32"):
    for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
        if t.startswith("b") and name not in ("eq", "ne"):
            continue
        # Of a NaN all are false; numpy says so too, except for !=.
        expression = "({0} < {1}) | ({0} > {1})" if t == "f32" and name == "ne" else f"{{0}} {sign} {{1}}"
        _define(f"setp.{name}.{t}", "pred", f"{t} {t}", expression)
_define("setp.nan.f32", "pred", "f32 f32", "np.isnan({0}) | np.isnan({1})")
_define("setp.neu.f32", "pred", "f32 f32", "{0} != {1}")
for to in ("u16", "u32", "u64", "s16", "s32", "s64", "s8", "u8"):
    for of in ("u16", "u32", "u64", "s16", "s32", "s64", "s8", "u8"):
        if to != of:
            _define(f"cvt.{to}.{of}", to, of, f"{{0}}.astype(np.{DTYPES[to].__name__})")

_define("prmt.b32", "b32", "b32 b32 b32", "permute_bytes({0}, {1}, {2})")
_define("shf.r.wrap.b32", "b32", "b32 b32 u32", "funnel_right_wrap({0}, {1}, {2})")
_define("shf.l.wrap.b32", "b32", "b32 b32 u32", "funnel_left_wrap({0}, {1}, {2})")
_define("add.s16x2", "b32", "b32 b32", "words(halves({0}) + halves({1}))")
for name, function in (("min", "minimum"), ("max", "maximum")):
    _define(f"{name}.s16x2", "b32", "b32 b32", f"words(np.{function}(halves({{0}}), halves({{1}})))")
_define("min.s16x2.relu", "b32", "b32 b32", "words(np.maximum(np.minimum(halves({0}), halves({1})), i2(0)))")
_define("lop3.b32", "b32", "b32 b32 b32 u32", "logic({0}, {1}, {2}, {3})")
_define("brev.b32", "b32", "b32", "reverse_bits({0})")
_define("bfind.shiftamt.u32", "u32", "u32", "leading_zeros({0})")
_define("popc.b32", "u32", "b32", "count_bits({0})")
_define("bfi.b32", "b32", "b32 b32 u32 u32", "insert_bits({0}, {1}, {2}, {3})")
_define("bfe.u32", "u32", "u32 u32 u32", "extract_bits({0}, {1}, {2})")

for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
    for rounding in ("", ".rn"):
        _define(f"{name}{rounding}.f32", "f32", "f32 f32", f"floats.canonical({{0}} {sign} {{1}})")
_define("div.rn.f32", "f32", "f32 f32", "floats.canonical({0} / {1})")
_define("rcp.rn.f32", "f32", "f32", "floats.canonical(np.float32(1) / {0})")
_define("sqrt.rn.f32", "f32", "f32", "floats.canonical(np.sqrt({0}))")
# Of a NaN and a number the number; +0 is more than -0.
_LARGER = "np.where(({0} == 0) & ({1} == 0), {0} + {1}, floats.canonical(np.fmax({0}, {1})))"
_define("max.f32", "f32", "f32 f32", _LARGER)
_define("fma.rn.f32", "f32", "f32 f32 f32", "floats.fma_rn({0}, {1}, {2})")
_define("fma.rm.f32", "f32", "f32 f32 f32", "floats.fma_rm({0}, {1}, {2})")
_define("neg.f32", "f32", "f32", "-{0}")
_define("abs.f32", "f32", "f32", "np.abs({0})")
_define("copysign.f32", "f32", "f32 f32", "np.copysign({1}, {0})")
_define("ex2.approx.ftz.f32", "f32", "f32", "floats.ex2_approx_ftz({0})")
_define("rcp.approx.ftz.f32", "f32", "f32", "floats.rcp_approx_ftz({0})")
_define("cvt.sat.f32.f32", "f32", "f32", "floats.saturate({0})")
_define("cvt.rzi.f32.f32", "f32", "f32", "np.trunc({0})")
_define("cvt.rn.bf16.f32", "b16", "f32", "floats.bf16_bits({0})")
_define("cvt.rn.f16.f32", "b16", "f32", "floats.f16_bits({0})")
_define("cvt.f32.bf16", "f32", "b16", "floats.from_bf16({0})")
_define("cvt.f32.f16", "f32", "b16", "floats.from_f16({0})")
_define("cvt.rn.bf16x2.f32", "b32", "f32 f32", "floats.pair(floats.bf16_bits({0}), floats.bf16_bits({1}))")
_define("cvt.rn.f16x2.f32", "b32", "f32 f32", "floats.pair(floats.f16_bits({0}), floats.f16_bits({1}))")
_define("cvt.rn.f16x2.e4m3x2", "b32", "b16", "floats.f16_of_e4m3_pair({0})")
_define("cvt.rn.satfinite.e4m3x2.f32", "b16", "f32 f32", "floats.e4m3_pair({0}, {1})")
_define("cvt.rn.satfinite.e2m1x2.f32", "b8", "f32 f32", "floats.e2m1_pair({0}, {1})")
_define("cvt.rn.f16x2.e2m1x2", "b32", "b8", "floats.f16_of_e2m1_pair({0})")
for t in ("bf16", "f16"):
    _define(f"fma.rn.{t}x2", "b32", "b32 b32 b32", f"floats.{t}_pair_fma({{0}}, {{1}}, {{2}})")
    for rounding in ("", ".rn"):
        _define(f"mul{rounding}.{t}x2", "b32", "b32 b32", f"floats.{t}_pair_fma({{0}}, {{1}}, u4(0x80008000))")
