"""Conversions and packed products of the PTX executor: every code, halves of units, and kernels that ptxas takes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import floats, tiny

from mxfp4_moe import formats

RNG = np.random.default_rng(21)


def near_e2m1(count: int) -> np.ndarray:
    """float32: any bits, values about the codes, and what lies halfway and just beside halfway."""
    middle = np.arange(-14, 15, dtype=np.float32) / 4
    beside = [np.nextafter(middle, np.float32(side)) for side in (-9, 9)]
    spread = (RNG.standard_normal(count) * 3).astype(np.float32)
    special = np.array([np.inf, -np.inf, 5, -5, 5.5, 6, 7, 2.0**-149, -(2.0**-149), 0.0, -0.0], np.float32)
    any_bits = RNG.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    return np.concatenate((middle, *beside, spread, special, any_bits[~np.isnan(any_bits)]))


def test_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    x = near_e2m1(20000)
    codes = floats.e2m1_bits(x)
    expected = formats.encode_e2m1(torch.from_numpy(np.repeat(x, 2))).numpy() & 15
    assert np.array_equal(codes, expected)
    assert floats.e2m1_bits(np.array([np.nan, -np.nan], np.float32)).tolist() == [7, 7], "PTX ISA, cvt: +MAX_NORM"


def test_a_kernel_that_packs_e2m1() -> None:
    """The high nibble is the first operand, as CUDA's own __nv_cvt_float2_to_fp4x2 uses it."""
    body = (
        "ld.global.u32 %r20, [%d3]; ld.global.u32 %r21, [%d3+128];"
        "{ .reg .b8 two; cvt.rn.satfinite.e2m1x2.f32 two, %r20, %r21; mov.b16 %h1, {two, 0}; }"
        "cvt.u32.u16 %r22, %h1; st.global.u32 [%d4], %r22;"
        "{ .reg .b8 p; .reg .b8 q; cvt.rn.satfinite.e2m1x2.f32 p, %r20, %r21;"
        "cvt.rn.satfinite.e2m1x2.f32 q, %r21, %r20;"
        "mov.b32 %r23, {p, q, q, p}; } st.global.u32 [%d4+128], %r23;"
    )
    assert tiny.ptxas(body) == ""
    x = RNG.choice(near_e2m1(200), 64).astype(np.float32)
    high, low = (floats.e2m1_bits(part).astype(np.uint32) for part in (x[:32], x[32:]))
    out = tiny.Run(a=x.view(np.uint32))(body)
    one, other = high << 4 | low, low << 4 | high
    assert np.array_equal(out[:32], one)
    assert np.array_equal(out[32:64], one | other << 8 | other << 16 | one << 24)


def test_a_kernel_that_unpacks_e2m1() -> None:
    """All 256 bytes, four to a lane; the low half is the low nibble."""
    places = "".join(
        f"cvt.rn.f16x2.e2m1x2 %r{30 + i}, x{i}; st.global.u32 [%d4+{128 * i}], %r{30 + i};" for i in range(4)
    )
    declared = " ".join(f".reg .b8 x{i};" for i in range(4))
    body = f"ld.global.u32 %r20, [%d3]; {{ {declared} mov.b32 {{x0, x1, x2, x3}}, %r20; {places} }}"
    assert tiny.ptxas(body) == ""
    found = {}
    for first in (0, 128):
        codes = np.arange(first, first + 128, dtype=np.uint8)
        words = np.concatenate((codes.view(np.uint32), np.zeros(96, np.uint32)))
        out = tiny.Run(a=words)(body).reshape(4, 32)
        for i in range(4):
            found.update(zip(codes[i::4].tolist(), out[i].view(np.float16).reshape(32, 2).tolist(), strict=True))
    for code, values in found.items():
        assert values == [formats.E2M1_VALUES[code & 15], formats.E2M1_VALUES[code >> 4]], code
    assert len(found) == 256


def test_a_kernel_that_makes_scales_of_e4m3() -> None:
    """There is no conversion to ue4m3: a positive number's E4M3 is its UE4M3. The first operand is the high byte."""
    body = (
        "ld.global.u32 %r20, [%d3]; ld.global.u32 %r21, [%d3+128]; cvt.rn.satfinite.e4m3x2.f32 %h1, %r20, %r21;"
        "cvt.u32.u16 %r22, %h1; st.global.u32 [%d4], %r22;"
        "cvt.rn.f16x2.e4m3x2 %r23, %h1; st.global.u32 [%d4+128], %r23;"
    )
    assert tiny.ptxas(body) == ""
    assert "Unknown modifier" in tiny.ptxas(body.replace("e4m3x2.f32", "ue4m3x2.f32"))
    x = np.abs(RNG.standard_normal(64) * 2.0 ** RNG.integers(-12, 10, 64)).astype(np.float32)
    x[:3] = np.nan, np.inf, 2.0**-11
    out = tiny.Run(a=x.view(np.uint32))(body)
    codes = formats.encode_e4m3(torch.from_numpy(x))
    assert np.array_equal(out[:32], codes[:32].numpy().astype(np.uint32) << 8 | codes[32:].numpy())
    halves = out[32:64].view(np.float16).reshape(32, 2).astype(np.float32)
    assert np.array_equal(halves[:, 1], formats.decode_e4m3(codes[:32]).numpy(), equal_nan=True)
    assert np.array_equal(halves[:, 0], formats.decode_e4m3(codes[32:]).numpy())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_packed_products_round_once(name: str, dtype: torch.dtype) -> None:
    """fma and mul of pairs against fractions: the nearest number, or of two the even one."""
    body = (
        "ld.global.u32 %r20, [%d3]; ld.global.u32 %r21, [%d3+128]; ld.global.u32 %r22, [%d3+256];"
        f"fma.rn.{name}x2 %r30, %r20, %r21, %r22; st.global.u32 [%d4], %r30;"
        f"mul.rn.{name}x2 %r31, %r20, %r21; st.global.u32 [%d4+128], %r31;"
        f"mul.{name}x2 %r32, %r20, %r21; st.global.u32 [%d4+256], %r32;"
    )
    assert tiny.ptxas(body) == ""
    seen = 0
    for _ in range(30):
        a, b = (torch.from_numpy(RNG.integers(0, 1 << 16, 64).astype(np.uint16).view(np.int16)) for _ in range(2))
        product = a.view(dtype).double() * b.view(dtype).double()
        c = (-product * torch.from_numpy(RNG.uniform(0.9, 1.1, 64) * 2.0 ** RNG.integers(-9, 9, 64))).to(dtype)
        words = [x.view(torch.int16).numpy().view(np.uint32) for x in (a, b, c)]
        out = tiny.Run(a=np.concatenate(words))(body)[:96].view(np.int16).reshape(3, 64)
        assert np.array_equal(out[1], out[2])
        for values, addend in ((out[0], c.double()), (out[1], torch.zeros(64).double())):
            for x, y, z, bits in zip(a.view(dtype), b.view(dtype), addend, values, strict=True):
                result = torch.tensor(bits, dtype=torch.int16).view(dtype)
                if not bool(torch.stack((x.double(), y.double(), z, result.double())).isfinite().all()):
                    continue
                exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
                gap = abs(Fraction(float(result)) - exact)
                one = int(bits) & 0xFFFF
                around = (one + 1, one - 1 if one & 0x7FFF else one ^ 0x8001)  # of a zero, the smallest of both signs
                beside = [torch.from_numpy(np.array(o, np.uint16).view(np.int16)).view(dtype) for o in around]
                others = [abs(Fraction(float(o)) - exact) for o in beside if bool(o.isfinite())]
                assert all(gap < other or (gap == other and int(bits) % 2 == 0) for other in others)
                seen += 1
    assert seen > 1000
