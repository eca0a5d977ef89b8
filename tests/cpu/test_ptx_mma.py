"""MMAs of the PTX executor: tiny kernels that ptxas takes too, the ISA's fragments, CuTe's layouts, and the model.

The MMA of the first pair of formats is in test_ptx_instructions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from ptx import fragments, tiny
from ptx.faults import Fault, Kind

from mxfp4_moe import arithmetic

RNG = np.random.default_rng(20)
FP4 = "mma.sync.aligned.kind::{}.block_scale.scale_vec::{}.m16n8k64.row.col.f32.e2m1.e2m1.f32.{}"
MXF4 = FP4.format("mxf4", "2X", "ue8m0")
MXF4_AS_NVF4 = FP4.format("mxf4nvf4", "2X", "ue8m0")
NVF4 = FP4.format("mxf4nvf4", "4X", "ue4m3")
BF16, F16 = (f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32" for t in ("bf16", "f16"))
RULES = {MXF4: arithmetic.SM12X_MXF4, MXF4_AS_NVF4: arithmetic.SM12X_MXF4, NVF4: arithmetic.SM12X_NVF4}
TWO = [(a, ta, b, tb) for a, ta, b, tb in ((0, 0, 0, 0), (2, 1, 0, 3), (0, 1, 2, 1), (2, 0, 2, 2))]
FOUR = [(0, ta, 0, tb) for ta in (0, 1) for tb in (0, 1, 2, 3)]
SELECTED = [*((MXF4, s) for s in TWO), *((MXF4_AS_NVF4, s) for s in TWO[:2]), *((NVF4, s) for s in FOUR)]


# ---- a tiny kernel: registers from memory, two MMAs in a row, registers to memory ------------------------------------


def body_of(name: str, selectors: tuple[int, ...] = ()) -> str:
    """Words of `a`: A's 4, B's 2, the scales' 2 and C's 4 registers, 32 lanes each. D's go to `b`."""
    loads = "".join(f"ld.global.u32 %r{20 + i}, [%d3+{128 * i}];" for i in range(12))
    scales = ""
    if selectors:
        byte_a, thread_a, byte_b, thread_b = selectors
        scales = f", %r26, {{{byte_a}, {thread_a}}}, %r27, {{{byte_b}, {thread_b}}}"
    a, b, c, d = "{%r20, %r21, %r22, %r23}", "{%r24, %r25}", "{%r28, %r29, %r30, %r31}", "{%r40, %r41, %r42, %r43}"
    twice = f"{name} {d}, {a}, {b}, {c}{scales}; {name} {d}, {a}, {b}, {d}{scales};"
    return loads + twice + "".join(f"st.global.u32 [%d4+{128 * i}], %r{40 + i};" for i in range(4))


def executed(body: str, words: np.ndarray) -> np.ndarray:
    """uint32 [12, 32] -> the registers of D [4, 32]."""
    run = tiny.Run(a=np.ascontiguousarray(words).reshape(-1))
    return run(body)[: 4 * 32].reshape(4, 32)


def a_place(lane: int, i: int, per_register: int) -> tuple[int, int]:
    """Row and column of A's element i of a lane: the ISA's formulas for m16n8k16 (2 to a register) and m16n8k64 (8)."""
    group, thread = lane // 4, lane % 4
    if per_register == 2:
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)
    row = group if i < 8 or 16 <= i < 24 else group + 8
    return row, thread * 8 + (i & 7) + (0 if i < 16 else 32)


def b_place(lane: int, i: int, per_register: int) -> tuple[int, int]:
    """Column and row of B's element i of a lane."""
    group, thread = lane // 4, lane % 4
    if per_register == 2:
        return group, thread * 2 + (i & 1) + (0 if i < 2 else 8)
    return group, thread * 8 + (i & 7) + (0 if i < 8 else 32)


def matrices(words: np.ndarray, per_register: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A [16, K], B [8, K] as integers and C float32 [16, 8], element by element."""
    size = 32 // per_register
    a, b = (np.zeros((rows, 8 * per_register), np.int64) for rows in (16, 8))
    acc = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for of, first, count, place in ((a, 0, 4, a_place), (b, 4, 2, b_place)):
            for i in range(count * per_register):
                word = int(words[first + i // per_register, lane])
                of[place(lane, i, per_register)] = word >> size * (i % per_register) & (1 << size) - 1
        for i in range(4):
            row, column = lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)
            acc[row, column] = words[8 + i : 9 + i, lane].view(np.float32)[0]
    return torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(acc)


def d_words(out: torch.Tensor) -> np.ndarray:
    words, values = np.zeros((4, 32), np.uint32), out.numpy().view(np.uint32)
    for lane in range(32):
        for i in range(4):
            words[i, lane] = values[lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)]
    return words


def any_words() -> np.ndarray:
    """Any codes, scales near one another with a NaN among them, accumulators of any exponent near the sums."""
    words = RNG.integers(0, 1 << 32, (12, 32), np.uint32)
    words[8:] = (
        (RNG.standard_normal((4, 32)) * 2.0 ** RNG.integers(-20, 60, (4, 32))).astype(np.float32).view(np.uint32)
    )
    return words


def of_fp4(name: str, selectors: tuple[int, ...], words: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """D of the first MMA and of the second, by the model."""
    byte_a, thread_a, byte_b, thread_b = selectors
    a, b, acc = matrices(words, 8)
    count = 4 if name == NVF4 else 2
    sf = words[6:8].view(np.uint8).reshape(2, 32, 4)
    sa = np.stack([sf[0, row % 8 * 4 + 2 * thread_a + row // 8, byte_a : byte_a + count] for row in range(16)])
    sb = np.stack([sf[1, column * 4 + thread_b, byte_b : byte_b + count] for column in range(8)])
    given = (a.to(torch.uint8), b.to(torch.uint8), torch.from_numpy(sa), torch.from_numpy(sb))
    once = arithmetic.fp4_mma(*given, acc, arithmetic=RULES[name])
    return once, arithmetic.fp4_mma(*given, once, arithmetic=RULES[name])


def scaled_words(low: int, high: int) -> np.ndarray:
    words = any_words()
    words[6:8] = RNG.integers(low, high, (2, 32, 4)).astype(np.uint8).view(np.uint32)[..., 0]
    return words


@pytest.mark.parametrize(("name", "selectors"), SELECTED)
def test_fp4_places_every_operand_and_scale(name: str, selectors: tuple[int, ...]) -> None:
    body = body_of(name, selectors)
    assert tiny.ptxas(body) == ""
    for ends in ((100, 150), (0, 256)):
        words = scaled_words(*ends)
        once, twice = of_fp4(name, selectors, words)
        assert not torch.equal(once, twice)
        assert np.array_equal(executed(body, words), d_words(twice))


def high_first(registers: np.ndarray) -> np.ndarray:
    return registers >> np.uint32(4) & np.uint32(0x0F0F0F0F) | (registers & np.uint32(0x0F0F0F0F)) << np.uint32(4)


ELEMENTS, SCALES, ACCUMULATORS = fragments.elements, fragments.scales, fragments.accumulators
MISTAKES: dict[str, dict[str, Callable[..., np.ndarray]]] = {
    # Of both operands that would be another order of k, which changes nothing.
    "high nibble first in A": {"elements": lambda r, bits: ELEMENTS(high_first(r) if r.shape[1] == 4 else r, bits)},
    "rows g and g + 8 exchanged": {"elements": lambda r, bits: np.roll(ELEMENTS(r, bits), 8, 1)},
    "halves of K exchanged": {"elements": lambda r, bits: np.roll(ELEMENTS(r, bits), 32, 2)},
    "the other thread of A": {"scales": lambda w, is_a, by, t, n: SCALES(w, is_a, by, 1 - t if is_a else t, n)},
    "the next thread of B": {"scales": lambda w, is_a, by, t, n: SCALES(w, is_a, by, t if is_a else (t + 1) % 4, n)},
    "the last scale first": {"scales": lambda *given: SCALES(*given)[..., ::-1].copy()},
    "columns exchanged": {"accumulators": lambda r: ACCUMULATORS(r)[..., ::-1]},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", [MXF4, NVF4])
def test_a_mistake_in_a_fragment_is_noticed(name: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, selectors = scaled_words(100, 120), (0, 0, 0, 1)
    for function, wrong in MISTAKES[mistake].items():
        monkeypatch.setattr(fragments, function, wrong)
    _, twice = of_fp4(name, selectors, words)
    assert not np.array_equal(executed(body_of(name, selectors), words), d_words(twice))


@pytest.mark.parametrize("name", [BF16, F16])
def test_floats_place_every_operand(name: str) -> None:
    body = body_of(name)
    assert tiny.ptxas(body) == ""
    dtype, rule = (torch.bfloat16, arithmetic.SM12X_BF16) if name == BF16 else (torch.float16, arithmetic.SM12X_FP16)
    for finite in (True, False):
        words = any_words()
        if finite:
            values = torch.from_numpy(RNG.standard_normal((6, 32, 2))).to(dtype)
            words[:6] = values.view(torch.int32).numpy().view(np.uint32)[..., 0]
            words[8:] = RNG.standard_normal((4, 32)).astype(np.float32).view(np.uint32)
        a, b, acc = matrices(words, 2)
        operands = [x.to(torch.int16).view(dtype) for x in (a, b)]
        once = arithmetic.float_mma(*operands, acc, arithmetic=rule)
        twice = arithmetic.float_mma(*operands, once, arithmetic=rule)
        assert bool(twice.isfinite().all()) == finite
        assert np.array_equal(executed(body, words), d_words(twice))


@pytest.mark.parametrize(
    ("name", "selectors"),
    [
        *((MXF4, s) for s in ((1, 0, 0, 0), (3, 0, 0, 0), (0, 2, 0, 0), (0, 0, 1, 0), (0, 0, 0, 4))),
        *((NVF4, s) for s in ((1, 0, 0, 0), (2, 0, 0, 0), (0, 0, 2, 0), (0, 2, 0, 0), (0, 0, 0, 4))),
        (MXF4, ()),
        (BF16, (0, 0, 0, 0)),
        (FP4.format("mxf4", "4X", "ue8m0"), (0, 0, 0, 0)),
        (FP4.format("mxf4nvf4", "2X", "ue4m3"), (0, 0, 0, 0)),
        (FP4.format("mxf4nvf4", "4X", "ue8m0"), (0, 0, 0, 0)),
    ],
)
def test_what_ptxas_refuses_is_refused(name: str, selectors: tuple[int, ...]) -> None:
    body = body_of(name, selectors)
    assert "error" in tiny.ptxas(body)
    with pytest.raises(Fault) as caught:
        executed(body, any_words())
    assert caught.value.kind is Kind.UNKNOWN


# ---- CuTe's layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("atom", "per_register"), [("cute_tables_fp4", 8), ("cute_tables_bf16", 2)])
@pytest.mark.parametrize(("operand", "count", "rows"), [("a", 4, 16), ("b", 2, 8)])
def test_fragments_are_those_of_cute(
    host: ModuleType, atom: str, per_register: int, operand: str, count: int, rows: int
) -> None:
    """CuTe's index of every element, row + rows * k, put into its register digit by digit, comes out in its place."""
    table = np.array(getattr(host, atom)()[operand])
    assert table.shape == (32, count * per_register)
    size = 32 // per_register
    found = np.zeros((rows, 8 * per_register), np.int64)
    for digit in range(0, 12, size):
        digits = (table >> digit & (1 << size) - 1).reshape(32, count, per_register).astype(np.uint64)
        registers = (digits << (size * np.arange(per_register, dtype=np.uint64))).sum(-1).astype(np.uint32).T[None]
        found += fragments.elements(registers, size)[0].astype(np.int64) << digit
    row, k = np.indices(found.shape)
    assert np.array_equal(found, row + rows * k)


@pytest.mark.parametrize("atom", ["cute_tables_fp4", "cute_tables_bf16"])
def test_accumulators_are_those_of_cute(host: ModuleType, atom: str) -> None:
    table = np.array(getattr(host, atom)()["c"])  # row + 16 * column
    placed = fragments.accumulators(table.T[None].astype(np.float32))[0]
    row, column = np.indices(placed.shape)
    assert np.array_equal(placed, row + 16 * column)
    assert np.array_equal(fragments.registers_of(placed[None])[0], table.T)


def test_scales_come_from_the_lanes_that_cute_fills(host: ModuleType) -> None:
    """CuTe gives the rows of both thread selectors of A, and of all four of B, so the lane read must have the row."""
    tables = host.cute_tables_fp4()
    lane = np.arange(32, dtype=np.uint32)[None]
    for operand, is_a, threads, rows in (("sfa", True, 2, 16), ("sfb", False, 4, 8)):
        for thread in range(threads):
            zero, selector = np.zeros(1, np.intp), np.full(1, thread)
            read = fragments.scales(lane, is_a, zero, selector, 1)[0, :, 0]
            assert [tables[operand][at][0] % rows for at in read] == list(range(rows))
