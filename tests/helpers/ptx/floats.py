"""Floating-point instructions over arrays, as PTX defines them: exact where it says so.

`ex2.approx`, `rcp.approx` and their like are approximations whose last bits PTX leaves to the hardware (ex2: 2 ulp,
rcp: 1 ulp); here they are the correctly rounded values, up to float64's own exp2. Whoever compares what came through
one of them needs that tolerance. NaNs are the canonical 0x7FFFFFFF.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
f4, f8, u1, u2, u4, i8 = np.float32, np.float64, np.uint8, np.uint16, np.uint32, np.int64

_NAN = np.array(0x7FFFFFFF, u4).view(f4)


def canonical(x: Array) -> Array:
    """Every NaN as the one that arithmetic instructions give."""
    return np.where(np.isnan(x), _NAN, x) if np.isnan(x).any() else x


def _odd_sum(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded to odd, so that rounding it to float32 is as if there were no other rounding."""
    product = a.astype(f8) * b.astype(f8)  # exact: 48 bits
    addend = c.astype(f8)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # exact (Knuth's two-sum)
    bits = total.view(i8)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    if not inexact.any():
        return total
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(f8)


def fma_rn(a: Array, b: Array, c: Array) -> Array:
    return canonical(_odd_sum(a, b, c).astype(f4))


def fma_rm(a: Array, b: Array, c: Array) -> Array:
    """Toward minus infinity."""
    exact = _odd_sum(a, b, c)
    rounded = exact.astype(f4)
    return canonical(np.where(rounded > exact, np.nextafter(rounded, f4(-np.inf)), rounded))


def _flush(x: Array) -> Array:
    """.ftz: subnormals to zeros of their sign."""
    return np.where(np.abs(x) < f4(2.0**-126), np.copysign(f4(0), x), x)


def ex2_approx_ftz(x: Array) -> Array:
    return canonical(_flush(np.exp2(_flush(x).astype(f8)).astype(f4)))


def rcp_approx_ftz(x: Array) -> Array:
    return canonical(_flush((1.0 / _flush(x).astype(f8)).astype(f4)))


def saturate(x: Array) -> Array:
    """cvt.sat: to [0, 1]; NaN to +0."""
    return np.where(x > 0, np.minimum(x, f4(1)), f4(0)).astype(f4)


def bf16_bits(x: Array) -> Array:
    """cvt.rn.bf16: uint16; NaN to 0x7FFF."""
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + (bits >> u4(16) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def f16_bits(x: Array) -> Array:
    """cvt.rn.f16: uint16; NaN to 0x7FFF."""
    return np.where(np.isnan(x), u2(0x7FFF), x.astype(np.float16).view(u2))


def from_bf16(bits: Array) -> Array:
    return canonical((bits.astype(u4) << u4(16)).view(f4))


def from_f16(bits: Array) -> Array:
    return canonical(bits.view(np.float16).astype(f4))


def e4m3_bits(x: Array) -> Array:
    """cvt.rn.satfinite.e4m3: uint8; beyond +-448 to +-448, NaN to 0x7F."""
    magnitude = np.minimum(np.abs(x).astype(f8), 448.0)
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(exponent - 1, -6)
    # In units of the last place: 8 to 16 of them for a normal number, 16 being the next exponent's 8.
    units = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int32)
    code = np.where(units < 8, units, (exponent + 6) * 8 + units)
    code = np.minimum(code, 0x7E) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(u1)


def pair(high: Array, low: Array) -> Array:
    """Two 16-bit halves as one word; the instructions name the high one first."""
    return high.astype(u4) << u4(16) | low.astype(u4)


def narrow(x: Array) -> Array:
    """float64 to float32, rounded to odd: rounding the result once more is as if there were no other rounding."""
    near = x.astype(f4)
    bits = near.view(u4)
    inexact = (near.astype(f8) != x) & np.isfinite(near) & (bits & u4(1) == 0)
    away = np.abs(near.astype(f8)) > np.abs(x)
    odd = np.where(inexact, np.where(away, bits - u4(1), bits + u4(1)), bits).view(f4)
    # Past the largest number the nearest one is infinity, and so is every narrower format's.
    return np.where(np.isinf(near), near, odd)


def bf16_pair_fma(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.bf16x2; mul.bf16x2 is the one with -0."""
    halves = []
    for by in (u4(16), u4(0)):
        x, y, z = (from_bf16((word >> by & u4(0xFFFF)).astype(u2)) for word in (a, b, c))
        halves.append(bf16_bits(narrow(_odd_sum(x, y, z))))
    return pair(*halves)


def f16_pair_fma(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f16x2; mul.f16x2 is the one with -0."""
    halves = []
    for by in (u4(16), u4(0)):
        x, y, z = (from_f16((word >> by & u4(0xFFFF)).astype(u2)) for word in (a, b, c))
        halves.append(f16_bits(narrow(_odd_sum(x, y, z))))
    return pair(*halves)


def e2m1_bits(x: Array) -> Array:
    """cvt.rn.satfinite.e2m1: codes 0..15; beyond +-6 to +-6, NaN to +6."""
    magnitude = np.minimum(np.abs(x).astype(f8), 6.0)
    _, exponent = np.frexp(magnitude)
    exponent = np.maximum(exponent - 1, 0)
    # In halves of the binade: 2 and 3 for a normal number, 4 being the next exponent's 2.
    units = np.rint(np.ldexp(magnitude, 1 - exponent)).astype(np.int32)
    code = np.where(units < 2, units, exponent * 2 + units)
    code = code | np.where(np.signbit(x), 8, 0)
    return np.where(np.isnan(x), 7, code).astype(u1)


def e2m1_pair(high: Array, low: Array) -> Array:
    return e2m1_bits(high) << u1(4) | e2m1_bits(low)


def f16_of_e2m1_pair(codes: Array) -> Array:
    """Two E2M1 codes as two halves, which is exact."""
    values = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float16)
    table = np.concatenate((values, -values)).view(u2)
    return pair(table[codes >> u1(4) & u1(15)], table[codes & u1(15)])


def e4m3_pair(high: Array, low: Array) -> Array:
    return e4m3_bits(high).astype(u2) << u2(8) | e4m3_bits(low).astype(u2)


def f16_of_e4m3_pair(codes: Array) -> Array:
    """Two E4M3 codes as two halves, which is exact; NaN is 0x7FFF."""
    code = codes.astype(u4)

    def half(code: Array) -> Array:
        units, exponent = (code & 7).astype(f8), (code >> u4(3) & u4(15)).astype(np.int32)
        value = np.where(exponent == 0, np.ldexp(units, -9), np.ldexp(units + 8, exponent - 10))
        bits = np.where(code & u4(0x80), -value, value).astype(np.float16).view(u2)
        return np.where(code & u4(0x7F) == 0x7F, u2(0x7FFF), bits)

    return pair(half(code >> u4(8)), half(code))
