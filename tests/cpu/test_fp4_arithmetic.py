"""SM12x's rules of one MMA of FP4 x FP4, of bf16 and of fp16, against mmasim and fractions, bit by bit.

test_arithmetic.py has the other rules, test_pair_arithmetic.py whole sums. That each comparison can fail is shown with
neighbours of the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from fp4_draws import (
    BYTE,
    KINDS,
    NAMES,
    Draw,
    M,
    N,
    assert_same,
    bits,
    every_kind,
    is_nvfp4,
    mmasim_models,
    scale_values,
    simulated,
    values,
)

from mxfp4_moe import arithmetic, formats
from mxfp4_moe.arithmetic import (
    SM12X_BF16,
    SM12X_FP16,
    SM12X_MXF4,
    SM12X_NVF4,
    SM90_BF16,
    Arithmetic,
    float_mma,
    fp4_mma,
)

FP4 = (SM12X_MXF4, SM12X_NVF4)

each_fp4 = pytest.mark.parametrize("rule", FP4, ids=lambda rule: rule.name)
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    with mmasim_models() as models:
        yield models


# ---- one MMA of FP4 x FP4 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@each_name
def test_fp4_is_rtx_blackwell(name: str, kind: str, simulator: Any) -> None:
    rule = NAMES[name]
    given = every_kind(rule)[kind]()
    expected = simulated(simulator.MMABlockScale("RTX Blackwell", f"m16n8k64.{name}"), rule, given)
    assert_same(fp4_mma(*given, arithmetic=rule), expected)


def test_the_draws_reach_the_ends(simulator: Any) -> None:
    """NaN, infinities, subnormal sums, and both zeros as operands: otherwise the comparison says little."""
    for name, rule in NAMES.items():
        model = simulator.MMABlockScale("RTX Blackwell", f"m16n8k64.{name}")
        out = {kind: simulated(model, rule, draw()) for kind, draw in every_kind(rule).items()}
        assert out["every byte"].isnan().any()
        assert out["any accumulator"].isinf().any()
        if not is_nvfp4(rule):
            small = out["small scales"].abs()
            assert ((small > 0) & (small < 2.0**-126)).any()
            assert out["large scales"].isinf().any()


MUTATIONS = {
    "34 bits": {"bits": 34},
    "36 bits": {"bits": 36},
    "nearest": {"rounding": "nearest"},
    "groups of 8": {"group": 8},
    "groups of 32": {"group": 32},
    "products' zeros": {"zero_exponent": -133},
}


# NVFP4's scales are of 16 products, and never so small that the exponent of zeros matters.
SEEN = [
    (name, mutation)
    for name, rule in NAMES.items()
    for mutation in MUTATIONS
    if not (is_nvfp4(rule) and mutation in ("groups of 32", "products' zeros"))
]


@pytest.mark.parametrize(("name", "mutation"), SEEN)
def test_a_neighbour_of_the_rule_is_noticed(name: str, mutation: str, simulator: Any) -> None:
    rule = NAMES[name]
    mutant = replace(rule, **MUTATIONS[mutation])
    model = simulator.MMABlockScale("RTX Blackwell", f"m16n8k64.{name}")
    wrong = [
        kind
        for kind, draw in every_kind(rule).items()
        if not torch.equal(bits(fp4_mma(*(given := draw()), arithmetic=mutant)), bits(simulated(model, rule, given)))
    ]
    assert wrong


@each_fp4
def test_all_codes_and_all_scales(rule: Arithmetic, simulator: Any) -> None:
    """Each of 16 x 16 codes in each group, and each of 256 x 256 pairs of scale bytes."""
    name = next(name for name, known in NAMES.items() if known is rule)
    model = simulator.MMABlockScale("RTX Blackwell", f"m16n8k64.{name}")
    count = 4 if is_nvfp4(rule) else 2
    codes = torch.arange(16).to(BYTE)
    for group in range(4):
        a, b = torch.zeros(16, 64, dtype=BYTE), torch.zeros(16, 64, dtype=BYTE)
        a[:, 16 * group + 5], b[:, 16 * group + 5] = codes, codes
        one = torch.full((16, count), 0x38 if is_nvfp4(rule) else 127, dtype=BYTE)
        out = fp4_mma(a, b, one, one, torch.zeros(16, 16), arithmetic=rule)
        table = torch.tensor(formats.E2M1_VALUES)
        assert_same(out, table[:, None] * table + 0.0)
    byte = torch.arange(256).to(BYTE)[:, None].expand(-1, count).contiguous()
    one = torch.full((256, 64), 2, dtype=BYTE)
    given = (one, one, byte, byte, torch.zeros(256, 256))
    assert_same(fp4_mma(*given, arithmetic=rule), simulated(model, rule, given))


@each_fp4
def test_a_sum_that_fits_is_exact(rule: Arithmetic) -> None:
    """Scales so near each other that nothing is cut: the float64 sum, cut to float32."""
    draw = Draw(rule, 77)
    draw.scales = (0x30, 0x40) if is_nvfp4(rule) else (124, 130)
    draw.acc = lambda total: draw.integers(-(2**30), 2**30, *total.shape).float() / 64
    a, b, sa, sb, acc = draw()
    exact = values(rule, a, sa) @ values(rule, b, sb).T + acc.double()
    near = exact.float()
    beyond = near.double().abs() > exact.abs()
    assert beyond.any()
    expected = torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)
    assert_same(fp4_mma(a, b, sa, sb, acc, arithmetic=rule), expected)


def in_fractions(rule: Arithmetic, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The rule from its fields, group by group, of finite operands."""
    a, b, sa, sb, acc = given
    plain = [Fraction(value) for value in formats.E2M1_VALUES]
    block = 64 // sa.shape[1]

    def parts(value: float, lowest: int) -> tuple[Fraction, int]:
        exponent = max(math.frexp(value)[1] - 1, lowest)
        return Fraction(value) / Fraction(2) ** exponent, exponent

    assert rule.bits is not None
    rounded = math.trunc if rule.rounding == "cut" else round
    lowest = -6 if is_nvfp4(rule) else -127
    out = torch.empty_like(acc)
    for i in range(len(a)):
        for j in range(len(b)):
            terms = [parts(float(acc[i, j]), -126)]
            if not terms[0][0]:
                terms = [(Fraction(0), rule.zero_exponent)]
            for k in range(0, 64, rule.group):
                products = [plain[int(a[i, m])] * plain[int(b[j, m])] for m in range(k, k + rule.group)]
                (s, e), (t, f) = (parts(float(scale_values(rule, x[k // block])), lowest) for x in (sa[i], sb[j]))
                none = not any(products) or not s * t
                terms.append((sum(products, Fraction(0)) * s * t, rule.zero_exponent if none else e + f))
            unit = Fraction(2) ** (max(e for _, e in terms) - rule.bits)
            total = sum(rounded(s * Fraction(2) ** e / unit) for s, e in terms) * unit
            size = max(abs(total).numerator.bit_length() - abs(total).denominator.bit_length(), -126)
            size += abs(total) >= Fraction(2) ** (size + 1)
            size -= abs(total) < Fraction(2) ** size and size > -126
            last = Fraction(2) ** (size - 23)
            out[i, j] = float(rounded(total / last) * last) if abs(total) < 2**128 else math.copysign(math.inf, total)
    return out


@pytest.mark.parametrize(
    "kind", ["usual", "apart", "small scales", "groups that cancel", "nearly cancellation", "zeros"]
)
@pytest.mark.parametrize(
    "rule",
    [
        *FP4,
        replace(SM12X_MXF4, bits=30),
        replace(SM12X_MXF4, group=32),
        replace(SM12X_NVF4, group=8, rounding="nearest"),
    ],
    ids=lambda rule: rule.words(),
)
def test_every_rule_is_what_its_fields_say(rule: Arithmetic, kind: str) -> None:
    a, b, sa, sb, acc = every_kind(rule)[kind]()
    given = (a[:7], b[:6], sa[:7], sb[:6], acc[:7, :6].contiguous())
    assert_same(fp4_mma(*given, arithmetic=rule), in_fractions(rule, given) + 0.0)


@each_fp4
def test_batches_are_mmas_of_their_own(rule: Arithmetic) -> None:
    draws = [Draw(rule, seed)() for seed in range(6)]
    stacked = [torch.stack(x).unflatten(0, (2, 3)) for x in zip(*draws, strict=True)]
    out = fp4_mma(*stacked, arithmetic=rule)
    for i, draw in enumerate(draws):
        assert_same(out[i // 3, i % 3], fp4_mma(*draw, arithmetic=rule))


# ---- one MMA of bf16 and fp16 ----------------------------------------------------------------------------------------

FLOATS = {"bf16": (torch.bfloat16, SM12X_BF16), "f16": (torch.float16, SM12X_FP16)}


def float_operands(dtype: torch.dtype, seed: int, finite: bool) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def words(low: int, *shape: int) -> torch.Tensor:
        return torch.randint(-low, low, shape, generator=g)

    a, b = (words(2**15, rows, 16).to(torch.int16).view(dtype) for rows in (M, N))
    acc = words(2**31, M, N).to(torch.int32).view(torch.float32)
    if finite:
        a, b = (torch.where(x.isfinite(), x, 1.0).to(dtype) for x in (a, b))
        acc = (a.float() @ b.float().T).nan_to_num(1.0) * torch.exp2(words(30, M, N).float())
        acc = torch.where(acc.isfinite(), acc, -1.0)
    return a, b, acc


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("arch", ["RTX Blackwell", "Hopper"])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_rtx_blackwell_and_hopper(name: str, arch: str, finite: bool, simulator: Any) -> None:
    """The published models of the two architectures are the same for these."""
    dtype, rule = FLOATS[name]
    model = simulator.MMA(arch, f"m16n8k16.f32.{name}.{name}.f32")
    mutants = [replace(rule, bits=24), replace(rule, bits=26), replace(rule, rounding="nearest")]
    noticed = [False] * len(mutants)
    for seed in range(4):
        given = float_operands(dtype, seed, finite)
        expected = model(given[0], given[1].T, given[2])
        assert_same(float_mma(*given, arithmetic=rule), expected)
        for i, mutant in enumerate(mutants):
            noticed[i] |= not torch.equal(bits(float_mma(*given, arithmetic=mutant)), bits(expected))
    assert all(noticed)


def test_sm12x_bf16_is_sm90s_rule_by_another_source() -> None:
    assert replace(SM12X_BF16, name="", source="") == replace(SM90_BF16, name="", source="")


# ---- the data -------------------------------------------------------------------------------------------------------


@each_fp4
def test_a_family_has_no_rule_twice(rule: Arithmetic) -> None:
    family = arithmetic.family(rule)
    assert family[0] is rule
    assert len({other.words() for other in family}) == len(family) > 60
    assert (
        f"64 {'NVFP4' if is_nvfp4(rule) else 'MXFP4'} products in groups of 16 and the accumulator, 35 bits, cut"
        in (rule.words())
    )


def test_what_a_function_does_not_take_is_refused() -> None:
    for change in ({"group": 1}, {"group": 4}, {"products": 48}, {"bits": None, "accumulator": "outside"}):
        with pytest.raises(ValueError, match="SM12x mxf4: expected"):
            replace(SM12X_MXF4, **change)
    with pytest.raises(ValueError, match="SM12x mxf4nvf4: expected"):
        replace(SM12X_NVF4, group=32)
    given = Draw(SM12X_MXF4, 0)()
    with pytest.raises(ValueError, match="arithmetic: expected one of FP4 x FP4"):
        fp4_mma(*given, arithmetic=SM12X_BF16)
    with pytest.raises(ValueError, match="arithmetic: expected one of codes with a scale per 32"):
        arithmetic.block_scaled_mma(*given, a_format="e2m1", b_format="e2m1", arithmetic=SM12X_MXF4)
    zero = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="arithmetic: expected a rule that aligns products"):
        arithmetic.mma_step(SM12X_MXF4, zero.double(), zero.int(), torch.zeros(1))
    with pytest.raises(ValueError, match=r"a, b: expected torch.bfloat16 .* got torch.float16"):
        float_mma(*float_operands(torch.float16, 0, True))
