"""GEMMs of every pair of formats under the rule of their architecture, against mmasim, MMA by MMA and bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fp4_draws import BYTE, NAMES, assert_same, bits, is_nvfp4, mmasim_models, simulated, values

from mxfp4_moe import accuracy, archs, arithmetic, formats
from mxfp4_moe._mma import pieces
from mxfp4_moe.arithmetic import SM12X_MXF4, SM12X_NVF4

PAIRS = ("mxfp4_mxfp8", "mxfp4_bf16", "mxfp4_mxfp4", "nvfp4_nvfp4", "nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16")


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    with mmasim_models() as models:
        yield models


def problem(pair: str, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Rows [9, K], their scales, packed weights [48, K/2], their scales."""
    g = torch.Generator().manual_seed(seed)

    def fp4(rows: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        ends, block = ((0x20, 0x68), 16) if name == "nvfp4" else ((107, 140), 32)
        scales = torch.randint(*ends, (rows, k // block), generator=g).to(BYTE)
        return torch.randint(0, 256, (rows, k // 2), generator=g).to(BYTE), scales

    weights, activations = pair.split("_")
    if activations in ("bf16", "fp16"):
        dtype = torch.bfloat16 if activations == "bf16" else torch.float16
        rows, row_scales = (torch.randn(9, k, generator=g) * torch.randn(9, k, generator=g).exp2()).to(dtype), None
    elif activations == "mxfp8":
        rows, row_scales = formats.quantize_mxfp8(torch.randn(9, k, generator=g))
    else:
        rows, row_scales = fp4(9, activations)
    return rows, row_scales, *fp4(48, weights)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


@pytest.mark.parametrize("k", [32, 64, 96, 320])
@pytest.mark.parametrize("pair", ["mxfp4_mxfp4", "nvfp4_nvfp4"])
def test_a_gemm_is_its_mmas(pair: str, k: int, simulator: Any) -> None:
    """A K that ends within an MMA is filled up with zeros, whatever their scales are."""
    rule = arithmetic.of_arch("120f", pair)
    name = next(name for name, known in NAMES.items() if known is rule)
    model = simulator.MMABlockScale("RTX Blackwell", f"m16n8k64.{name}")
    rows, row_scales, packed, scales = problem(pair, k)
    assert row_scales is not None
    block = 16 if is_nvfp4(rule) else 32
    missing = -k % 64
    a, b = (torch.nn.functional.pad(unpacked(x), (0, missing)) for x in (rows, packed))
    sa, sb = (torch.nn.functional.pad(x, (0, missing // block), value=0x33) for x in (row_scales, scales))
    expected = torch.zeros(9, 48)
    for at in range(0, k, 64):
        own, of_scales = slice(at, at + 64), slice(at // block, (at + 64) // block)
        given = (a[:, own], b[:, own], sa[:, of_scales], sb[:, of_scales], expected)
        expected = simulated(model, rule, tuple(x.contiguous() for x in given))
    out = torch.full((9, 48), float("nan"))
    arithmetic.gemm(rule, rows, row_scales, packed, scales, out, pair=pair)
    assert_same(out, expected)
    arithmetic.gemm(rule, rows, row_scales, packed, scales, out)
    assert_same(out, expected)


IN_BF16 = [
    (arch, pair)
    for arch in ("90a", "120f")
    for pair in PAIRS
    if arithmetic.of_arch(arch, pair).operands == "bf16" and pair != "mxfp4_mxfp8"
]


@pytest.mark.parametrize(("arch", "pair"), IN_BF16)
def test_a_gemm_in_bf16_is_its_mmas(arch: str, pair: str, simulator: Any) -> None:
    """SM90 multiplies every pair in bfloat16, SM12x those with bfloat16 rows."""
    rule = arithmetic.of_arch(arch, pair)
    rows, row_scales, packed, scales = problem(pair, 96)
    model = simulator.MMA("Hopper" if arch == "90a" else "RTX Blackwell", "m16n8k16.f32.bf16.bf16.f32")
    halved = 2 if pair.startswith("mxfp4") else 1
    of_weights = SM12X_NVF4 if pair.startswith("nvfp4") else SM12X_MXF4
    exact = values(of_weights, unpacked(packed), scales) / halved
    w = exact.bfloat16()
    assert torch.equal(w.double(), exact)
    x = rows
    if row_scales is not None:
        exact = values(of_weights, unpacked(rows), row_scales)
        x = exact.bfloat16()
        assert torch.equal(x.double(), exact)
    expected = torch.zeros(9, 48)
    for at in range(0, 96, 16):
        expected = model(x[:, at : at + 16], w[:, at : at + 16].T, expected)
    out = torch.full((9, 48), float("nan"))
    arithmetic.gemm(rule, rows, row_scales, packed, scales, out, pair=pair)
    assert_same(out, halved * expected)


@pytest.mark.parametrize("arch", ["90a", "120f"])
@pytest.mark.parametrize("pair", ["mxfp4_fp16", "nvfp4_fp16"])
def test_a_gemm_in_fp16_is_its_mmas(arch: str, pair: str, simulator: Any) -> None:
    """Weights rounded by numpy, from what they are over a power of two: of MXFP4, what the given factor says."""
    rule = arithmetic.of_arch(arch, pair)
    rows, _, packed, given_scales = problem(pair, 96)
    scales = given_scales
    model = simulator.MMA("Hopper" if arch == "90a" else "RTX Blackwell", "m16n8k16.f32.f16.f16.f32")
    nvfp4 = pair.startswith("nvfp4")
    for largest, low in ((139, 115), (139, 0), (150, 0)):
        scales = given_scales.clamp(min=low)
        exact = values(SM12X_NVF4 if nvfp4 else SM12X_MXF4, unpacked(packed), scales)
        unit = 2.0**7 if nvfp4 else 2.0 ** (largest - 128)
        w = torch.from_numpy((exact / unit).numpy().astype(np.float16))
        assert torch.equal(w.double() * unit, exact) == (nvfp4 or low > 0), "what is further below is rounded"
        expected = torch.zeros(9, 48)
        for at in range(0, 96, 16):
            expected = model(rows[:, at : at + 16], w[:, at : at + 16].T, expected)
        out = torch.full((9, 48), float("nan"))
        factor = None if nvfp4 else torch.tensor(unit)
        arithmetic.gemm(rule, rows, None, packed, scales, out, pair=pair, factor=factor)
        assert_same(out, (unit * expected.double()).float())
    if not nvfp4:  # by default relative to the largest, and the pair that the rule is for
        own, given = torch.empty(9, 48), torch.tensor(2.0 ** (int(scales.max()) - 128))
        arithmetic.gemm(rule, rows, None, packed, scales, own)
        arithmetic.gemm(rule, rows, None, packed, scales, out, pair=pair, factor=given)
        assert_same(own, out)


def test_a_factor_multiplies_finished_sums() -> None:
    rows, row_scales, packed, scales = problem("nvfp4_nvfp4", 64)
    plain, out = torch.empty(9, 48), torch.empty(9, 48)
    arithmetic.gemm(SM12X_NVF4, rows, row_scales, packed, scales, plain)
    for factor in (torch.tensor(1 / 3), torch.rand(48) / 7, torch.rand(9, 1)):
        arithmetic.gemm(SM12X_NVF4, rows, row_scales, packed, scales, out, factor=factor)
        assert_same(out, (plain.double() * factor.double()).float())
    scales[3, 0] = 0x7F
    arithmetic.gemm(SM12X_NVF4, rows, row_scales, packed, scales, out, factor=torch.tensor(2.0))
    assert (bits(out[:, 3]) == 0x7FFFFFFF).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_sizes_of_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, pair: str) -> None:
    given, rule = problem(pair, 640), arithmetic.of_arch("120f", pair)
    whole, out = torch.empty(9, 48), torch.empty(9, 48)
    arithmetic.gemm(rule, *given, whole, pair=pair)
    monkeypatch.setattr(pieces, "_STEP_BYTES_CPU", 1 << 12)
    arithmetic.gemm(rule, *given, out, pair=pair)
    assert_same(out, whole)


@pytest.mark.parametrize("pair", ["mxfp4_mxfp4", "nvfp4_nvfp4"])
def test_the_coarsest_rule_covers_its_family(pair: str) -> None:
    """Of FP4 x FP4: the fewest bits and the smallest groups."""
    published = arithmetic.of_arch("120f", pair)
    rows, row_scales, packed, scales = problem(pair, 320)
    given = (rows, row_scales, packed[None], scales[None], torch.tensor([0, 9], dtype=torch.int32))
    (coarsest,) = accuracy.coarsest(published)
    sums, bound = accuracy.sums_and_bound(*given, arithmetic=coarsest, pair=pair)
    worst = 0.0
    for rule in arithmetic.family(published):
        out = torch.empty(9, 48)
        arithmetic.gemm(rule, rows, row_scales, packed, scales, out, pair=pair)
        error = (out.double() - sums).abs()
        assert (error <= bound).all(), rule.words()
        worst = max(worst, float((error / bound).max()))
    assert worst > 0.01


@pytest.mark.parametrize("arch", ["90a", "120f"])
@pytest.mark.parametrize("pair", PAIRS)
def test_sums_are_within_their_bound(pair: str, arch: str) -> None:
    rule = arithmetic.of_arch(arch, pair)
    rows, row_scales, packed, scales = problem(pair, 640)
    out = torch.empty(9, 48)
    arithmetic.gemm(rule, rows, row_scales, packed, scales, out, pair=pair)
    offsets = torch.tensor([0, 9], dtype=torch.int32)
    given = (rows, row_scales, packed[None], scales[None], offsets)
    sums, bound = accuracy.sums_and_bound(*given, arithmetic=rule, pair=pair)
    if pair.endswith("fp16"):  # the factor, a power of two, is left out
        factor = formats.FP16_NVFP4_UNIT if pair.startswith("nvfp4") else 2.0 ** (int(scales.max()) - 128)
        sums, bound = sums * factor, bound * factor
    error = (out.double() - sums).abs()
    assert (error <= bound).all()
    assert (error > 0).any()
    assert (bound < 1e-4 * sums.abs().mean()).all()


def test_every_arch_has_a_rule_for_every_pair() -> None:
    operands = ("mxf8f6f4", "bf16", "mxf4", "mxf4nvf4", "bf16", "fp16", "fp16")
    for arch in archs.ARCHS:
        for pair, own in zip(PAIRS, operands, strict=True):
            on_sm90 = "SM90 fp16" if own == "fp16" else "SM90 bf16"
            assert arithmetic.of_arch(arch, pair).name == (on_sm90 if arch == "90a" else f"SM12x {own}")
    for rule in (arithmetic.SM90_BF16, arithmetic.SM12X_MXF8F6F4):
        with pytest.raises(ValueError, match="pair: expected one that the arithmetic 'SM.*' takes, got 'nvfp4_fp16'"):
            arithmetic.gemm(rule, *problem("nvfp4_fp16", 64), torch.empty(9, 48), pair="nvfp4_fp16")
    with pytest.raises(ValueError, match="pair: expected one of mxfp4_mxfp8, .*, got 'mxfp4_fp6'"):
        arithmetic.of_arch("120f", "mxfp4_fp6")
    with pytest.raises(ValueError, match="pair: expected one that the arithmetic 'SM12x mxf4' takes"):
        arithmetic.gemm(SM12X_MXF4, *problem("nvfp4_nvfp4", 64), torch.empty(9, 48), pair="nvfp4_nvfp4")
