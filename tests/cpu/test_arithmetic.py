"""The rules of arithmetic.py against the published simulator (mmasim) and fractions (oracles.py), bit by bit."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import archs, arithmetic, formats, reference
from mxfp4_moe._mma import numbers, pieces, steps
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, SM90_BF16, Arithmetic, block_scaled_mma, mma_step

ORDERS = [("e4m3", "e2m1"), ("e2m1", "e4m3")]
M, N = 48, 40
FAMILY = arithmetic.family(SM12X_MXF8F6F4)  # the named rules first
OUTSIDE = next(rule for rule in FAMILY if rule.accumulator == "outside" and rule.rounding == "nearest")


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    """mmasim's models. Its module for float64 MMAs, which compiles C++ when it is imported, is left out."""
    name = "mmasim.arithmetic.fma"
    sys.modules[name] = types.ModuleType(name)
    from mmasim.arithmetic import fdpa
    from mmasim.nv_ptx import sim

    yield types.SimpleNamespace(fdpa=fdpa, sim=sim)
    del sys.modules[name]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, NaN's and zero's too."""
    wrong = (bits(actual) != bits(expected)).nonzero()
    assert not len(wrong), (
        f"{len(wrong)} of {actual.numel()} differ, first at {wrong[0].tolist()}: "
        f"{bits(expected)[tuple(wrong[0])]:x} expected, {bits(actual)[tuple(wrong[0])]:x} got"
    )


# ---- one block -------------------------------------------------------------------------------------------------------


class Draw:
    """Operands of one block: codes [M, 32] and [N, 32] in either order, scale bytes, accumulators [M, N]."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scales, self.codes = (107, 147), (0, 255)
        self.acc: Callable[[torch.Tensor], torch.Tensor] = lambda total: self.near(total, -30, 30)
        self.change: Callable[..., object] = lambda *_: None

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def near(self, total: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Accumulators of either sign with an exponent so far from that of the block's sum."""
        factor = self.integers(low, high, *total.shape).double().exp2() * (
            1 + torch.rand(total.shape, generator=self.generator)
        )
        return (total.abs().clamp(min=2.0**-160) * factor * (2 * self.integers(0, 1, *total.shape) - 1)).float()

    def __call__(self, order: tuple[str, str]) -> tuple[torch.Tensor, ...]:
        e4m3 = self.integers(*self.codes, M, 32).to(torch.uint8)
        e4m3[(e4m3 & 0x7F) == 0x7F] = 0x08
        e2m1 = self.integers(0, 15, N, 32).to(torch.uint8)
        sa, sb = (self.integers(*self.scales, size).to(torch.uint8) for size in (M, N))
        self.change(e4m3, e2m1, sa, sb)
        total = exact_block(e4m3, sa) @ exact_block(e2m1, sb, "e2m1").T
        acc = self.acc(total.nan_to_num())
        if order[0] == "e2m1":
            return e2m1, e4m3, sb, sa, acc.T.contiguous()
        return e4m3, e2m1, sa, sb, acc


def exact_block(codes: torch.Tensor, scale: torch.Tensor, kind: str = "e4m3") -> torch.Tensor:
    """float64 values with their scales in them, by ml_dtypes."""
    dtype = oracles.E4M3 if kind == "e4m3" else oracles.E2M1
    values = torch.from_numpy(codes.numpy().view(dtype).astype(np.float64))
    return values * torch.from_numpy(scale.numpy().view(oracles.E8M0).astype(np.float64))[:, None]


def every_kind() -> dict[str, Draw]:
    kinds = {name: Draw(seed) for seed, name in enumerate(KINDS)}
    kinds["every scale"].scales = (0, 254)
    kinds["small scales"].scales = (0, 70)
    kinds["tiny scales"].scales = (0, 40)
    kinds["below the zeros' exponent"].scales = (47, 55)
    kinds["below the zeros' exponent"].acc = lambda total: torch.zeros_like(total).float()
    kinds["overflow"].scales = (180, 196)
    for name in ("small scales", "tiny scales"):
        kinds[name].acc = lambda total: subnormal_accumulators(total)
    kinds["subnormal codes"].change = lambda e4m3, e2m1, sa, sb: (e4m3.bitwise_and_(0x87), e2m1.bitwise_and_(9))
    zeros = kinds["zeros of both signs"]
    zeros.change = lambda e4m3, e2m1, sa, sb: (e4m3[::2].bitwise_and_(0x80), e2m1[::3].bitwise_and_(8))
    zeros.acc = lambda total: (total.sign() * 0.0).float()
    kinds["cancellation"].acc = lambda total: -total.float()
    kinds["nearly cancellation"].acc = lambda total: torch.nextafter(-total.float(), torch.tensor(0.0))
    kinds["exponents 60 apart"].acc = lambda total: kinds["exponents 60 apart"].near(total, -60, 60)
    kinds["any accumulator"].acc = lambda total: any_float32(total.shape, 5)
    kinds["any of everything"].acc = lambda total: any_float32(total.shape, 6)
    kinds["any of everything"].scales = (0, 255)
    nan = kinds["NaN codes"]
    nan.change = lambda e4m3, e2m1, sa, sb: e4m3.view(-1)[:: 32 * 5 + 1].fill_(0xFF)
    kinds["NaN scales"].change = lambda e4m3, e2m1, sa, sb: (sa[::3].fill_(255), sb[1::7].fill_(255))
    return kinds


KINDS = (
    *("usual", "every scale", "small scales", "tiny scales", "overflow", "subnormal codes", "zeros of both signs"),
    *("cancellation", "nearly cancellation", "exponents 60 apart", "any accumulator", "any of everything"),
    *("NaN codes", "NaN scales", "below the zeros' exponent"),
)


def any_float32(shape: torch.Size, seed: int) -> torch.Tensor:
    """Random bits: subnormal numbers, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    special = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7FC00001, 1, -(2**31) + 1, 0x7FFFFF, 0x7F7FFFFF])
    words.view(-1)[: 4 * len(special)] = special.to(torch.int32).repeat(4)
    return words.view(torch.float32)


def subnormal_accumulators(total: torch.Tensor) -> torch.Tensor:
    return (any_float32(total.shape, 7).view(torch.int32) & -0x7F000001).view(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS, ids=" x ".join)
def test_sm12x_is_rtx_blackwell(order: tuple[str, str], kind: str, simulator: Any) -> None:
    a, b, sa, sb, acc = every_kind()[kind](order)
    kinds = ".".join(order)
    model = simulator.sim.MMABlockScale("RTX Blackwell", f"m16n8k32.kind::mxf8f6f4.block32.f32.{kinds}.f32.ue8m0")
    expected = model(
        theirs(a, order[0]),
        theirs(b, order[1]).T,
        acc,
        sa.view(torch.float8_e8m0fnu)[:, None],
        sb.view(torch.float8_e8m0fnu)[None],
    )
    assert_same(block_scaled_mma(a, b, sa, sb, acc, a_format=order[0], b_format=order[1]), expected)


def theirs(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes as mmasim takes them: E2M1 in bits 5..2 of a byte."""
    return codes.view(torch.float8_e4m3fn) if kind == "e4m3" else codes << 2


@pytest.mark.parametrize("bits_kept", range(20, 31))
def test_other_widths_are_the_simulators(bits_kept: int, simulator: Any) -> None:
    rule = replace(SM12X_MXF8F6F4, name="other", bits=bits_kept)
    for kind, draw in every_kind().items():
        a, b, sa, sb, acc = draw(ORDERS[0])
        model = simulator.fdpa.MMA_ST_FDPA(bits_kept, "RZ-FP32", 32, numbers.ZERO_EXPONENT, "e4m3", "e2m1")
        scales = sa.view(torch.float8_e8m0fnu)[:, None], sb.view(torch.float8_e8m0fnu)[None]
        expected = model(theirs(a, "e4m3"), theirs(b, "e2m1").T, acc, *scales)
        out = block_scaled_mma(a, b, sa, sb, acc, a_format="e4m3", b_format="e2m1", arithmetic=rule)
        assert torch.equal(bits(out), bits(expected)), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("instruction", ["MMA", "WGMMA"])
def test_sm90_is_hopper(instruction: str, kind: str, simulator: Any) -> None:
    """A block is two steps, k 0..15 and k 16..31; the operands are codes times scales, in bfloat16."""
    a, b, sa, sb, acc = every_kind()[kind](ORDERS[0])
    bf16 = [(formats.decode_e4m3(a) * formats.decode_e8m0(sa)[:, None]).bfloat16()]
    bf16.append((torch.tensor(formats.E2M1_VALUES)[b.int()] * formats.decode_e8m0(sb)[:, None]).bfloat16())
    if instruction == "MMA":
        model = simulator.sim.MMA("Hopper", "m16n8k16.f32.bf16.bf16.f32")
    else:
        model = simulator.sim.WGMMA("Hopper", "m64n8k16.f32.bf16.bf16")
    expected = acc
    for k in (slice(0, 16), slice(16, 32)):
        expected = model(bf16[0][:, k], bf16[1][:, k].T, expected)
    out = block_scaled_mma(a, b, sa, sb, acc, a_format="e4m3", b_format="e2m1", arithmetic=SM90_BF16)
    assert_same(out, expected)


@pytest.mark.parametrize("rule", FAMILY, ids=lambda rule: rule.words())
def test_every_rule_is_what_its_fields_say(rule: Arithmetic) -> None:
    """Against fractions, where everything is finite."""
    names = (
        "usual",
        "small scales",
        "below the zeros' exponent",
        "subnormal codes",
        "nearly cancellation",
        "exponents 60 apart",
    )
    for name in names:
        a, b, sa, sb, acc = every_kind()[name](ORDERS[0])
        a, b, sa, sb, acc = a[:12], b[:10], sa[:12], sb[:10], acc[:12, :10].contiguous()
        out = block_scaled_mma(a, b, sa, sb, acc, a_format="e4m3", b_format="e2m1", arithmetic=rule)
        expected = oracles.mma_block(a.numpy(), b.numpy(), sa.numpy(), sb.numpy(), acc.numpy(), rule)
        assert oracles.same_bits(out.numpy(), expected), name


@pytest.mark.parametrize("rule", [rule for rule in FAMILY if rule.products == 32], ids=lambda rule: rule.words())
def test_a_step_product_by_product_is_the_same(rule: Arithmetic) -> None:
    for name, draw in every_kind().items():
        a, b, sa, sb, acc = draw(ORDERS[0])
        nan = (sa == 255)[:, None, None] | (sb == 255)[None, :, None]
        values = formats.decode_e4m3(a).double()[:, None] * torch.tensor(formats.E2M1_VALUES).double()[b.int()]
        exponents = ((a >> 3 & 15).clamp(min=1).int() - 7)[:, None] + (b >> 1 & 3).clamp(min=1).int() - 1
        significands = torch.where(nan, float("nan"), values * numbers.pow2(-exponents))
        scale = (sa.int() - 127)[:, None] + (sb.int() - 127)
        scale = scale.masked_fill(nan[..., 0], 0)
        out = block_scaled_mma(a, b, sa, sb, acc, a_format="e4m3", b_format="e2m1", arithmetic=rule)
        step = mma_step(rule, significands, exponents, acc, scale=scale)
        same = (bits(out) == bits(step)) | (out.isnan() & step.isnan())
        assert bool(same.all()), name


def test_batches_are_blocks_of_their_own() -> None:
    draws = [Draw(seed)(ORDERS[0]) for seed in range(6)]
    stacked = [torch.stack(x).unflatten(0, (2, 3)) for x in zip(*draws, strict=True)]
    out = block_scaled_mma(*stacked, a_format="e4m3", b_format="e2m1")
    for i, draw in enumerate(draws):
        assert_same(out[i // 3, i % 3], block_scaled_mma(*draw, a_format="e4m3", b_format="e2m1"))


@pytest.mark.parametrize("rule", [SM12X_MXF8F6F4, SM90_BF16, OUTSIDE], ids=lambda rule: rule.words())
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_gives_nothing(shape: tuple[int, int], rule: Arithmetic) -> None:
    (m, n), byte = shape, torch.uint8
    operands = (torch.zeros(rows, 32, dtype=byte) for rows in shape)
    scales = (torch.zeros(rows, dtype=byte) for rows in shape)
    out = block_scaled_mma(*operands, *scales, torch.zeros(m, n), a_format="e4m3", b_format="e2m1", arithmetic=rule)
    assert out.shape == (m, n)


# ---- whole sums ------------------------------------------------------------------------------------------------------


def problem(k: int, scales: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = Draw(seed)
    codes = draw.integers(0, 255, 9, k).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    row_scales = draw.integers(*scales, 9, k // 32).to(torch.uint8)
    packed = draw.integers(0, 255, 3, 48, k // 2).to(torch.uint8)
    weight_scales = draw.integers(*scales, 3, 48, k // 32).to(torch.uint8)
    return codes, row_scales, packed, weight_scales, torch.tensor([0, 4, 4, 8], dtype=torch.int32)


@pytest.mark.parametrize("scales", [(117, 132), (97, 157), (0, 254)], ids=["usual", "61 of them", "all"])
@pytest.mark.parametrize("rule", [*FAMILY[:3], *FAMILY[5::6]], ids=lambda rule: rule.words())
def test_a_gemm_is_its_steps(rule: Arithmetic, scales: tuple[int, int]) -> None:
    codes, row_scales, packed, weight_scales, _ = args = problem(160, scales)
    if rule.operands == "bf16":
        weight_scales.clamp_(min=1)  # so that there is a byte of half of it
    out = reference.grouped_gemm(*args, arithmetic=rule)
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    unit = 2 if rule.operands == "bf16" else 1  # of half weights
    for e, rows in ((0, slice(0, 4)), (2, slice(4, 8))):
        acc = torch.zeros(4, 48)
        for i in range(5):
            block = slice(32 * i, 32 * i + 32)
            byte = weight_scales[e][:, i] - (unit - 1)
            operands = codes[rows, block], nibbles[e][:, block], row_scales[rows, i], byte
            acc = block_scaled_mma(*operands, acc, a_format="e4m3", b_format="e2m1", arithmetic=rule)
        acc *= unit
        same = (bits(out[rows]) == bits(acc)) | (out[rows].isnan() & acc.isnan())
        assert bool(same.all())
    assert not out[8].any(), "rows of no expert"


def any_bf16(*shape: int, seed: int) -> torch.Tensor:
    """Random bits: every exponent as often, subnormal numbers, and now and then an infinity or NaN."""
    words = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    return words.view(torch.bfloat16)


BF16_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "usual": lambda x: x.float().sign() * (1 + (x.view(torch.int16) & 1023).float() / 1024).pow(9),
    "any bits": lambda x: x,
    "finite": lambda x: torch.where(x.isfinite(), x, 1.0),
    "tiny": lambda x: (x.view(torch.int16) & -0x7E01).view(torch.bfloat16),  # below 2^-123
    "huge": lambda x: torch.where(x.isfinite(), (x.view(torch.int16) | 0x7800).view(torch.bfloat16), 0.0),
    "sparse": lambda x: torch.where(x.view(torch.int16) % 3 == 0, x, 0.0).nan_to_num(0.0),
}


@pytest.mark.parametrize("scales", [(117, 132), (0, 253), (0, 3), (246, 253)], ids=str)
@pytest.mark.parametrize("kind", BF16_ROWS)
@pytest.mark.parametrize("instruction", ["MMA", "WGMMA"])
def test_a_gemm_of_bf16_rows_is_hoppers(instruction: str, kind: str, scales: tuple[int, int], simulator: Any) -> None:
    """Any bfloat16 rows, all scales that weights have: half weights in the MMAs, and twice the sum."""
    k, n = 192, 40
    rows = BF16_ROWS[kind](any_bf16(24, k, seed=len(kind))).bfloat16()
    _, _, packed, weight_scales, _ = problem(k, scales)
    out = reference.grouped_gemm(rows, None, packed[:1, :n], weight_scales[:1, :n], offsets_of(24))
    values = formats.decode_e2m1(packed[0, :n]).double() * (
        weight_scales[0, :n].double() - 128
    ).exp2().repeat_interleave(32, -1)
    weights = values.bfloat16()
    assert torch.equal(weights.double(), values), "exact"
    if instruction == "MMA":
        model = simulator.sim.MMA("Hopper", "m16n8k16.f32.bf16.bf16.f32")
    else:
        model = simulator.sim.WGMMA("Hopper", "m64n8k16.f32.bf16.bf16")
    expected = torch.zeros(24, n)
    for at in range(0, k, 16):
        expected = model(rows[:, at : at + 16], weights[:, at : at + 16].T, expected)
    assert_same(out, 2 * expected)


def offsets_of(rows: int) -> torch.Tensor:
    return torch.tensor([0, rows], dtype=torch.int32)


def test_a_gemm_of_mxfp8_rows_is_that_of_their_bf16_rows() -> None:
    """Under SM90's rule; also where products of code and scale leave bfloat16's range."""
    for scales in ((117, 132), (0, 20), (235, 248)):
        codes, row_scales, *rest = problem(160, scales)
        expected = reference.grouped_gemm(formats.mxfp8_to_bf16(codes, row_scales), None, *rest)
        assert_same(reference.grouped_gemm(codes, row_scales, *rest, arithmetic=SM90_BF16), expected)


def test_half_weights_differ_at_the_ends_of_float32_alone() -> None:
    """A sum that leaves float32 and comes back stays a number, and the last bit of a subnormal one is cut earlier."""
    one = torch.full((1, 1, 1), 127, dtype=torch.uint8)

    def total(values: list[float], weights: list[float], scale: int = 127) -> float:
        rows = torch.zeros(1, 32)
        rows[0, : len(values)] = torch.tensor(values)
        packed = torch.zeros(1, 1, 32)
        packed[0, 0, : len(weights)] = torch.tensor(weights)
        out = reference.grouped_gemm(
            rows.bfloat16(), None, formats.encode_e2m1(packed), one + (scale - 127), offsets_of(1)
        )
        return out.item()

    large = 2.0**127
    assert total([large, large], [1, 0.5]) == 1.5 * 2.0**127
    assert total([large, large], [1, 1]) == float("inf")
    apart = [large] * 2 + [0.0] * 14 + [-large] * 2  # 2^128 after the first MMA
    assert total(apart, [1] * 18) == 0.0
    assert total([*apart, large], [1] * 19) == large
    assert total([2.0**-133], [1], scale=127 - 15) == 2.0**-148
    assert total([2.0**-133], [1], scale=127 - 16) == 0.0, "2^-150 in the accumulator, whose last bit is 2^-149"
    assert total([2.0**-126], [6], scale=253) == 6.0


def test_nvfp4_weights_have_a_unit_of_128() -> None:
    """2^-7 of each under rows of bfloat16: as with halves, and seven bits of subnormal sums are cut."""
    scale, one = torch.full((1, 2), 0x38, dtype=torch.uint8), [1.0] + [0.0] * 31

    def total(value: float, rule: Arithmetic = SM90_BF16, weights: list[float] = one) -> float:
        rows, out = torch.zeros(1, 32), torch.empty(1, 1)
        rows[0, 0], rows[0, 16] = value, -value
        packed = formats.encode_e2m1(torch.tensor([weights]))
        arithmetic.gemm(rule, rows.bfloat16(), None, packed, scale, out, pair="nvfp4_bf16")
        return out.item()

    assert [total(2.0**power) for power in (-133, 0, 127)] == [2.0**-133, 1.0, 2.0**127]
    both = [6.0] + [0.0] * 15 + [6.0] + [0.0] * 15  # 6 * 2^127 after the first MMA
    assert total(2.0**127, weights=both) == 0.0
    half = [0.5] + [0.0] * 31
    scale[:] = 0x01  # 2^-9
    assert total(2.0**-132, weights=half) == 2.0**-142
    assert total(2.0**-133, weights=half) == 0.0, "2^-150 in the accumulator, whose last bit is 2^-149"


@pytest.mark.parametrize("rule", [SM12X_MXF8F6F4, SM90_BF16], ids=lambda rule: rule.name)
def test_sizes_of_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, rule: Arithmetic) -> None:
    args = problem(960, (97, 157))
    whole = reference.grouped_gemm(*args, arithmetic=rule)
    monkeypatch.setattr(pieces, "_STEP_BYTES_CPU", 1 << 12)
    monkeypatch.setattr(steps, "_PLACES_CPU", 7)
    assert_same(reference.grouped_gemm(*args, arithmetic=rule), whole)


def test_the_rules_differ_where_it_matters() -> None:
    """Otherwise nothing here would notice one rule in place of another."""
    args = problem(2880, (97, 157))
    results = {rule.words(): reference.grouped_gemm(*args, arithmetic=rule) for rule in FAMILY}
    names = list(results)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(results[one], results[other]), f"{one}, {other}"


# ---- the data --------------------------------------------------------------------------------------------------------


def test_every_arch_has_a_rule() -> None:
    for arch in archs.ARCHS:
        assert arithmetic.of_arch(arch) is (SM90_BF16 if arch.startswith("90") else SM12X_MXF8F6F4)
    with pytest.raises(archs.ArchError, match="arch '80'"):
        arithmetic.of_arch("80")


def test_rules_that_are_none_are_refused() -> None:
    for change in ({"bits": None}, {"accumulator": "outside"}, {"products": 8}):
        with pytest.raises(ValueError, match="SM12x mxf8f6f4: expected"):
            replace(SM12X_MXF8F6F4, **change)
    with pytest.raises(ValueError, match="format: expected 'e4m3' or 'e2m1', got 'e5m2'"):
        block_scaled_mma(*Draw(0)(ORDERS[0]), a_format="e5m2", b_format="e2m1")  # type: ignore[arg-type]


def test_a_sum_by_hand() -> None:
    """1 + 32 * 2^-26 at 25 bits: each small product is cut, however many there are; to nearest they count."""
    significands = torch.ones(1, 32, dtype=torch.float64)
    exponents = torch.full((1, 32), -26, dtype=torch.int32)
    one = torch.ones(1)
    assert mma_step(SM12X_MXF8F6F4, significands, exponents, one).item() == 1.0
    assert mma_step(replace(SM12X_MXF8F6F4, bits=26), significands, exponents, one).item() == float(
        1 + Fraction(4, 2**23)
    )
    assert mma_step(SM12X_MXF8F6F4, significands, exponents, -one * 0).item() == 2.0**-21


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_outside_that_is_cut_by_hand(sign: float) -> None:
    """What is far too small to be added still takes a float32 number to the one before it."""
    rule = next(rule for rule in FAMILY if rule.accumulator == "outside" and rule.rounding == "cut")
    significands = torch.zeros(1, 32, dtype=torch.float64)
    significands[0, 3] = -sign
    exponents = torch.full((1, 32), -90, dtype=torch.int32)
    one = torch.full((1,), sign)
    assert mma_step(rule, significands, exponents, one).item() == sign * (1 - 2.0**-24)
    assert mma_step(rule, -significands, exponents, one).item() == sign
    assert mma_step(OUTSIDE, significands, exponents, one).item() == sign
