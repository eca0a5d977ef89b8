"""What the PTX executor computes: instructions against independent arithmetic, fragments against the ISA's maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import floats, mma, scalar
from ptx.faults import Kind
from ptx.tiny import Run, fails, works

from mxfp4_moe import arithmetic, formats

RNG = np.random.default_rng(15)


def any_floats(count: int) -> np.ndarray:
    """All exponents; and every 50th a special one."""
    x = RNG.integers(0, 1 << 32, count, np.uint32).view(np.float32).copy()
    x[::50] = RNG.choice(np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, 2**-149, 448, 464], np.float32), len(x[::50]))
    return x


def test_fma_rounds_once() -> None:
    a, b = (any_floats(4000) for _ in range(2))
    with np.errstate(all="ignore"):
        near = (-a.astype(np.float64) * b * RNG.uniform(0.9, 1.1, 4000)).astype(np.float32)
        c = np.where(RNG.random(4000) < 0.5, any_floats(4000), near)
        nearest, down = floats.fma_rn(a, b, c), floats.fma_rm(a, b, c)
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)).tolist():
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if abs(exact) >= Fraction(2) ** 127:
            continue
        low = np.float32(down[i])
        assert Fraction(float(low)) <= exact < Fraction(float(np.nextafter(low, np.float32(np.inf))))
        candidates = [low, np.nextafter(low, np.float32(np.inf))]
        gaps = [abs(Fraction(float(x)) - exact) for x in candidates]
        even = candidates[0].view(np.uint32) % 2
        best = candidates[gaps[1] < gaps[0] or (gaps[0] == gaps[1] and bool(even))]
        assert nearest[i] == best


def test_conversions() -> None:
    with np.errstate(all="ignore"):
        x = any_floats(20000)
        near = (RNG.standard_normal(20000) * 2.0 ** RNG.integers(-12, 12, 20000)).astype(np.float32)
        x = np.concatenate([x, near])
        t = torch.from_numpy(x)
        number = ~np.isnan(x)
        for bits, dtype in ((floats.bf16_bits(x), torch.bfloat16), (floats.f16_bits(x), torch.float16)):
            expected = t.to(dtype).view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(bits[number], expected[number])
            assert (bits[~number] == 0x7FFF).all()
        clamped = np.clip(x, -448, 448)
        expected = formats.encode_e4m3(torch.from_numpy(np.where(number, clamped, 0))).numpy()
        codes = floats.e4m3_bits(x)
        assert np.array_equal(codes[number], expected[number])
        assert (codes[~number] == 0x7F).all()
    every = np.arange(256, dtype=np.uint16)
    decoded = floats.from_f16((floats.f16_of_e4m3_pair(every) & np.uint32(0xFFFF)).astype(np.uint16))
    expected = formats.decode_e4m3(torch.arange(256).to(torch.uint8)).numpy()
    assert np.array_equal(decoded, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("shr.s32", (-8, 40), -1),
        ("shr.u32", (8, 40), 0),
        ("shl.b32", (3, 32), 0),
        ("mul.wide.s16", (-3, 5), -15),
        ("prmt.b32", (0x33221100, 0x77665544, 0x3715), 0x33771155),
        ("prmt.b32", (0x80, 0, 0x8888), 0xFFFFFFFF),
        ("shf.r.wrap.b32", (0x76543210, 0x76543210, 4), 0x07654321),
        ("shf.l.wrap.b32", (0x76543210, 0x76543210, 4), 0x65432107),
        *[
            ("lop3.b32", (0x0F0F0F0F, 0x33333333, 0x55555555, table), value)
            for table, value in ((0xCA, 0x53535353), (0x80, 0x01010101), (0x1E, 0x78787878))
        ],
        ("add.s16x2", (0x00FE0003, 0xFF02FF90), 0x0000FF93),
        *[("min.s16x2.relu", (0x0000FF93, 0x001E001E), 0), ("min.s16x2.relu", (0x00200005, 0x001E001E), 0x1E0005)],
        ("bfind.shiftamt.u32", (1,), 31),
        ("bfind.shiftamt.u32", (0,), -1),
        ("brev.b32", (1,), 0x80000000),
        ("popc.b32", (0xF0F,), 8),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfi.b32", (0xABCD, 0x11111111, 8, 12), 0x111BCD11),
        *[("bfi.b32", (5, 7, 28, 32), 0x50000007), ("bfi.b32", (5, 7, 32, 4), 7), ("bfi.b32", (5, 7, 4, 0), 7)],
        ("cvt.s8.s32", (0x1FF,), -1),
        ("selp.b32", (1, 2, True), 1),
        ("mad.lo.s64", (-3, 5, 1), -14),
        ("max.f32", (2.0, -3.0), 2.0),
        ("max.f32", (math.nan, -3.0), -3.0),
        ("sqrt.rn.f32", (2.0,), math.sqrt(2)),
        *[("rcp.rn.f32", (3.0,), 1 / 3), ("rcp.rn.f32", (2.0**-149,), math.inf), ("rcp.rn.f32", (-0.0,), -math.inf)],
    ],
)
def test_scalars(name: str, values: Sequence[float], expected: float) -> None:
    known = scalar.SCALAR[name]
    given = [np.full(32, np.array(v).astype(scalar.DTYPES[t])) for v, t in zip(values, known.operands, strict=True)]
    text = known.expression.format(*(f"given[{i}]" for i in range(len(given))))
    with np.errstate(all="ignore"):
        result = eval(text, {**scalar.HELPERS, "given": given})
    assert result.tolist() == [np.array(expected).astype(scalar.DTYPES[known.result])] * 32


def test_exchange_instructions() -> None:
    lane = np.arange(32)
    for text, expected in [
        ("shfl.sync.up.b32 %r4|%p1, %r0, 3, 0, -1;", np.where(lane >= 3, lane - 3, lane)),
        ("shfl.sync.idx.b32 %r4|%p1, %r0, 5, 31, -1;", np.full(32, 5)),
        ("redux.sync.max.u32 %r4, %r0, -1;", np.full(32, 31)),
        ("and.b32 %r5, %r0, 3; match.any.sync.b32 %r4, %r5, -1;", np.array([0x11111111 << i % 4 for i in range(32)])),
        ("shl.b32 %r5, %r0, 16; movmatrix.sync.aligned.m8n8.trans.b16 %r4, %r5;", None),
    ]:
        out = Run()(text + "st.global.u32 [%d4], %r4;")[:32]
        if expected is None:  # lane 4g + t held (0, 4g + t) at columns 2t and 2t + 1 of row g
            matrix = np.zeros((8, 8), np.int64)
            matrix[:, 1::2] = lane.reshape(8, 4)
            expected = matrix.T[:, 0::2].reshape(-1) | matrix.T[:, 1::2].reshape(-1) << 16
        assert out.tolist() == expected.tolist(), text


def test_ldmatrix() -> None:
    """Rows of 16 bytes, row r of matrix i at the address of lane 8i + r: here in reverse order."""
    body = "".join(f"st.shared.u32 [%r3+{at}], %r{5 + i};" for i, at in enumerate(range(0, 512, 128)))
    body = "".join(f"add.s32 %r{5 + i}, %r0, {32 * i};" for i in range(4)) + body + "bar.warp.sync -1;"
    body += "sub.s32 %r9, 31, %r0; shl.b32 %r9, %r9, 4; add.s32 %r9, %r1, %r9;"
    body += "ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r20, %r21, %r22, %r23}, [%r9];"
    for matrix in range(4):
        out = Run()(body + f"st.global.u32 [%d4], %r{20 + matrix};")[:32].reshape(8, 4)
        rows = 31 - (8 * matrix + np.arange(8))
        assert np.array_equal(out, rows[:, None] * 4 + np.arange(4))


def test_the_larger_zero_is_the_positive_one() -> None:
    text = scalar.SCALAR["max.f32"].expression
    zeros = np.array([0.0, -0.0, 0.0, -0.0], np.float32), np.array([-0.0, 0.0, 0.0, -0.0], np.float32)
    result = eval(text.format("a", "b"), {**scalar.HELPERS, "a": zeros[0], "b": zeros[1]})
    assert np.signbit(result).tolist() == [False, False, False, True]


# ---- the MMA ---------------------------------------------------------------------------------------------------------

MMA = "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32.{}.{}.f32.ue8m0"


def spread(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices to registers, element by element by the ISA's maps for m16n8k32."""
    ra, rb, rc = np.zeros((4, 32, 4), np.uint8), np.zeros((2, 32, 4), np.uint8), np.zeros((4, 32), np.float32)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(16):  # a_i: row, column
            row = group if i < 4 or 8 <= i < 12 else group + 8
            column = thread * 4 + (i & 3) + (0 if i < 8 else 16)
            ra[i // 4, lane, i % 4] = a[row, column]
        for i in range(8):
            rb[i // 4, lane, i % 4] = b[group, thread * 4 + (i & 3) + (0 if i < 4 else 16)]
        for i in range(4):
            rc[i, lane] = acc[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    return ra.view(np.uint32)[..., 0], rb.view(np.uint32)[..., 0], rc


@pytest.mark.parametrize("formats_", [("e4m3", "e2m1"), ("e2m1", "e4m3")])
def test_mma_places_every_operand(formats_: tuple[str, str]) -> None:
    codes = {
        "e4m3": lambda *s: RNG.integers(0x20, 0x50, s).astype(np.uint8),
        "e2m1": lambda *s: RNG.integers(0, 16, s).astype(np.uint8),
    }
    for byte_a, thread_a, byte_b, thread_b in [(0, 0, 0, 0), (1, 0, 2, 0), (3, 1, 1, 3), (2, 1, 0, 2)]:
        a, b = codes[formats_[0]](16, 32), codes[formats_[1]](8, 32)
        acc = RNG.standard_normal((16, 8)).astype(np.float32)
        words = RNG.integers(120, 134, (2, 32, 4)).astype(np.uint8)
        contained = [x << 2 if kind == "e2m1" else x for x, kind in zip((a, b), formats_, strict=True)]
        ra, rb, rc = spread(*contained, acc)
        queue, kind = mma.Queue(), mma.Instruction(*formats_, scales=1)
        # Two in a row, the second on the first's result.
        selectors = (byte_a, thread_a, byte_b, thread_b)
        scales = tuple(np.ascontiguousarray(w).view(np.uint32)[:, 0] for w in words)
        first = mma.start(queue, tuple(rc.view(np.uint32)), tuple(ra), tuple(rb), scales, selectors, kind, "")
        second = mma.start(queue, first, tuple(ra), tuple(rb), scales, selectors, kind, "")
        scale_a = [words[0, 4 * (row % 8) + 2 * thread_a + row // 8, byte_a] for row in range(16)]
        scale_b = [words[1, 4 * column + thread_b, byte_b] for column in range(8)]
        given = [torch.tensor(np.array(x)) for x in (a, b, scale_a, scale_b)]
        once = arithmetic.block_scaled_mma(*given, torch.from_numpy(acc), a_format=formats_[0], b_format=formats_[1])
        twice = arithmetic.block_scaled_mma(*given, once, a_format=formats_[0], b_format=formats_[1])
        for registers, expected in ((first, once), (second, twice)):
            _, _, out = spread(*contained, expected.numpy())
            assert np.array_equal(np.stack([mma.force(r) for r in registers]), out.view(np.uint32))
        assert queue.executed == 2


def test_containers() -> None:
    registers = "{%r20, %r21, %r22, %r23}, {%r24, %r25, %r26, %r27}, {%r28, %r29}, {%r20, %r21, %r22, %r23}"
    body = "".join(f"mov.b32 %r{i}, 0;" for i in range(20, 30)) + "mov.b32 %r30, 0x7F7F7F7F; {}"
    body += MMA.format("e4m3", "e2m1") + f" {registers}, %r30, {{0,0}}, %r30, {{0,0}}; st.global.u32 [%d4], %r20;"
    works(body.replace("{}", "mov.b32 %r28, 0x3C3C3C3C;", 1))
    for bits in ("0x01000000", "0x00000200", "0x00400000", "0x00000080"):
        fails(Kind.CONTAINER, body.replace("{}", f"mov.b32 %r28, {bits};", 1), "mma.sync")
    for selectors in ("{4,0}", "{0,2}"):
        fails(Kind.UNKNOWN, body.replace("{}", "", 1).replace("{0,0}", selectors, 1), "selectors")
