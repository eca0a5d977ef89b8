"""The stand-in for SM12x's MMA (csrc/tile/sm12x/emulated_mma.cuh), a warp's registers on the host, against its rule.

What is tested is the function that the GPU runs; on the GPU, shuffles fetch the other lanes' registers. Expected values
are `arithmetic.block_scaled_mma`'s, which test_arithmetic.py holds against mmasim. Which element is in which register
is written here once more, from the PTX ISA's pictures of m16n8k32.
"""

from __future__ import annotations

from types import ModuleType

import numpy
import pytest
import torch
from torch import Tensor

from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, block_scaled_mma

M, N, K, NAN = 16, 8, 32, 0x7FFFFFFF
LANE = torch.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4
FINITE_E4M3 = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
both_orders = pytest.mark.parametrize("fp4_is_a", [False, True], ids=["e4m3 x e2m1", "e2m1 x e4m3"])


def random(shape: tuple[int, ...], low: int, high: int, g: torch.Generator) -> Tensor:
    """uint8 from low to high."""
    return torch.randint(low, high + 1, shape, generator=g).to(torch.uint8)


class Problem:
    """Of some warps: plain codes [W, M or N, K], the four bytes of scale words [W, M or N, 4], c float32 [W, M, N]."""

    def __init__(self, warps: int, fp4_is_a: bool, seed: int) -> None:
        self.g, self.fp4_is_a = torch.Generator().manual_seed(seed), fp4_is_a
        act = FINITE_E4M3[torch.randint(0, len(FINITE_E4M3), (warps, N if fp4_is_a else M, K), generator=self.g)]
        weight = random((warps, M if fp4_is_a else N, K), 0, 15, self.g)
        self.a, self.b = (weight, act) if fp4_is_a else (act, weight)
        self.a_scale, self.b_scale = (random((warps, rows, 4), 117, 137, self.g) for rows in (M, N))
        self.c = torch.randn(warps, M, N, generator=self.g) * torch.exp2(
            torch.randint(-20, 40, (warps, M, N), generator=self.g).float()
        )

    @property
    def act(self) -> Tensor:
        return self.b if self.fp4_is_a else self.a

    def registers(self) -> Tensor:
        """int64 [W, 12, 32]: a0 .. a3, b0, b1, scale words, c0 .. c3, as the PTX ISA places them."""
        warps = len(self.a)
        a, b = (x << 2 if (x is self.a) == self.fp4_is_a else x for x in (self.a, self.b))  # E2M1 in bits 5..2
        words_a, words_b = (x.contiguous().view(torch.int32).long() & 0xFFFFFFFF for x in (a, b))  # [W, rows, K / 4]
        scale_a, scale_b = (x.contiguous().view(torch.int32)[..., 0].long() for x in (self.a_scale, self.b_scale))
        unused = torch.randint(0, 1 << 32, (warps, 32), generator=self.g)  # of lanes that the instruction does not read
        from_a = torch.where(QUAD < 2, scale_a[:, GROUP + 8 * (QUAD % 2)], unused)
        from_b = torch.where(QUAD == 0, scale_b[:, GROUP], unused)
        c = self.c.view(torch.int32).long()
        return torch.stack(
            [
                *(words_a[:, GROUP + 8 * (reg % 2), QUAD + 4 * (reg // 2)] for reg in range(4)),
                *(words_b[:, GROUP, QUAD + 4 * reg] for reg in range(2)),
                *(from_a, from_b),
                *(c[:, GROUP + 8 * (reg // 2), QUAD * 2 + reg % 2] for reg in range(4)),
            ],
            1,
        )

    def emulated(self, host: ModuleType, byte: int) -> Tensor:
        """The accumulators' bits, int64 [W, M, N]."""
        lanes = run(host, self.registers(), self.fp4_is_a, byte)
        out = torch.full(self.c.shape, -1)
        for reg in range(4):
            out[:, GROUP + 8 * (reg // 2), QUAD * 2 + reg % 2] = lanes[:, reg]
        assert not (out < 0).any()
        return out

    def expected(self, byte: int) -> Tensor:
        a_format, b_format = ("e2m1", "e4m3") if self.fp4_is_a else ("e4m3", "e2m1")
        scales = self.a_scale[..., byte], self.b_scale[..., byte]
        return bits(block_scaled_mma(self.a, self.b, *scales, self.c, a_format=a_format, b_format=b_format))

    def check(self, host: ModuleType, byte: int = 0) -> Tensor:
        """The bits, which must be the rule's."""
        out, expected = self.emulated(host, byte), self.expected(byte)
        wrong = (out != expected).nonzero()
        assert not len(wrong), (
            f"{len(wrong)} of {out.numel()} values differ, first at {wrong[0].tolist()}: expected "
            f"{int(expected[tuple(wrong[0])]):#x}, got {int(out[tuple(wrong[0])]):#x}"
        )
        return out


def run(host: ModuleType, registers: Tensor, fp4_is_a: bool, byte: int = 0) -> Tensor:
    """int64 [W, 12, 32] -> d0 .. d3 of every lane, int64 [W, 4, 32]."""
    words = (registers & 0xFFFFFFFF).numpy().astype(numpy.uint32)
    return torch.from_numpy(host.emulated_mma(words, fp4_is_a, byte).astype(numpy.int64))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & 0xFFFFFFFF


@both_orders
@pytest.mark.parametrize("byte", range(4))
def test_random_warps(host: ModuleType, byte: int, fp4_is_a: bool) -> None:
    out = Problem(200, fp4_is_a, seed=byte).check(host, byte)
    assert len(out.unique()) > out.numel() // 2


@both_orders
@pytest.mark.parametrize("center", [0, 3, 60, 100, 150, 190, 240, 251])
def test_scales_and_accumulators_over_their_whole_range(host: ModuleType, center: int, fp4_is_a: bool) -> None:
    """Products that vanish beside the accumulator and the other way round, subnormal sums, sums beyond fp32."""
    problem = Problem(150, fp4_is_a, seed=center)
    shape = problem.a_scale.shape[:1]
    for scale in (problem.a_scale, problem.b_scale):
        near = center + torch.randint(-3, 4, (*shape, 1, 1), generator=problem.g)
        scale.copy_((near + torch.randint(-3, 4, scale.shape, generator=problem.g)).clamp(0, 254).to(torch.uint8))
    exponent = torch.randint(0, 255, problem.c.shape, generator=problem.g)
    around = (2 * center - 127 + torch.randint(-40, 41, problem.c.shape, generator=problem.g)).clamp(0, 254)
    field = torch.where(torch.rand(problem.c.shape, generator=problem.g) < 0.5, exponent, around)
    pattern = torch.randint(0, 1 << 23, problem.c.shape, generator=problem.g) | field << 23
    pattern |= torch.randint(0, 2, problem.c.shape, generator=problem.g) << 31
    problem.c = pattern.to(torch.int32).view(torch.float32)
    problem.c[::5] = 0.0
    problem.c[1::5] *= -0.0
    out = problem.check(host)
    infinite, subnormal = (out & 0x7FFFFFFF) == 0x7F800000, (out & 0x7F800000) == 0
    assert bool(infinite.any()) == (center >= 190)
    assert bool(subnormal[2::5].any()) == (center <= 60)
    assert not (out == 0x80000000).any(), "a sum is never -0"


@both_orders
def test_few_products_of_many_zeros(host: ModuleType, fp4_is_a: bool) -> None:
    """Zeros, of both signs, have the exponent -133: it counts only where nothing larger is there."""
    for seed, (scale, size) in enumerate([(127, 1.0), (60, 2.0**-140), (58, 0.0), (66, 2.0**-126), (1, 2.0**-149)]):
        problem = Problem(100, fp4_is_a, seed)
        for codes, sign in ((problem.a, 0x8 if fp4_is_a else 0x80), (problem.b, 0x80 if fp4_is_a else 0x8)):
            zero = torch.rand(codes.shape, generator=problem.g) < 0.85
            codes[zero] = random(codes.shape, 0, 1, problem.g)[zero] * sign
        problem.a_scale.fill_(scale)
        problem.b_scale.fill_(scale)
        problem.c = torch.where(torch.rand(problem.c.shape, generator=problem.g) < 0.5, size, -size)
        problem.check(host)


@both_orders
def test_sums_below_the_smallest_number_are_zero(host: ModuleType, fp4_is_a: bool) -> None:
    """One product of 1 and -1 under scales around 2^-149: of both signs it is cut to +0, or is the smallest number."""
    problem = Problem(16, fp4_is_a, seed=5)
    for codes in (problem.a, problem.b, problem.c):
        codes.zero_()
    (problem.a if fp4_is_a else problem.b)[..., 3] = 0x2  # 1
    problem.act[..., 3] = 0x38  # 1
    problem.act[:, ::2, 3] = 0xB8  # -1
    problem.a_scale[..., 0] = torch.arange(45, 61, dtype=torch.uint8)[:, None]
    problem.b_scale.fill_(52)
    found = set(problem.check(host).flatten().tolist())
    assert {0, 0x1, 0x80000001} <= found
    assert 0x80000000 not in found


@both_orders
def test_sums_that_cancel(host: ModuleType, fp4_is_a: bool) -> None:
    """k and k + 16 cancel but for one bit, or entirely; the accumulator too."""
    problem = Problem(200, fp4_is_a, seed=7)
    problem.b[..., 16:] = problem.b[..., :16]
    problem.a[..., 16:] = problem.a[..., :16] ^ (0x8 if fp4_is_a else 0x80)
    problem.c *= torch.exp2(torch.randint(-40, 1, problem.c.shape, generator=problem.g).float())
    out = problem.check(host)
    problem.c.zero_()
    assert not problem.check(host).any()
    problem.act[..., 0] ^= 1
    problem.act[problem.act & 0x7F == 0x7F] = 0x08
    assert problem.check(host).any()
    assert out.any()


@both_orders
def test_nan_and_infinity(host: ModuleType, fp4_is_a: bool) -> None:
    problem = Problem(6, fp4_is_a, seed=3)
    problem.act[0, 5, 31] = 0x7F
    problem.act[1, 2, 0] = 0xFF
    problem.a_scale[2, 9, 0] = problem.b_scale[3, 4, 0] = 0xFF
    problem.c[4, 3, 3], problem.c[4, 12, 6] = torch.inf, -torch.inf
    problem.c[4, 15, 7], problem.c[0, 5, 5] = torch.nan, torch.inf
    problem.act[4, 3 if not fp4_is_a else 6, 1] = 0x7F  # beside an infinity
    out = problem.check(host)
    rows = out == NAN
    assert rows[2, 9].all() and rows[2].sum() == N  # noqa: PT018
    assert rows[3, :, 4].all() and rows[3].sum() == M  # noqa: PT018
    assert (rows[0, :, 5] if fp4_is_a else rows[0, 5]).all()
    assert int(rows[1].sum()) == (M if fp4_is_a else N)
    assert not rows[5].any()


@both_orders
def test_the_other_bits_of_a_container_are_seen(host: ModuleType, fp4_is_a: bool) -> None:
    """The hardware takes bits 1..0 as mantissa; here any bit outside 5..2 makes NaN, so that none goes unseen."""
    problem = Problem(8, fp4_is_a, seed=1)
    registers = problem.registers()
    for warp, bit in enumerate((0, 1, 6, 7)):
        registers[warp, 2 if fp4_is_a else 1 + 4, 13] |= 1 << (8 * warp + bit)
    counts = (run(host, registers, fp4_is_a) == NAN).flatten(1).sum(1).tolist()
    assert counts == [N if fp4_is_a else M] * 4 + [0] * 4


@both_orders
@pytest.mark.parametrize("mistake", ["register", "lane", "byte", "scale lane", "rows"])
def test_a_mistake_is_seen(host: ModuleType, mistake: str, fp4_is_a: bool) -> None:
    """The comparison fails where an operand is in the wrong place."""
    problem = Problem(20, fp4_is_a, seed=9)
    registers = problem.registers()
    wrong, byte = registers.clone(), 0
    if mistake == "register":
        wrong[:, [1, 2]] = registers[:, [2, 1]]
    elif mistake == "lane":
        wrong[:, 4, [4, 5]] = registers[:, 4, [5, 4]]
    elif mistake == "byte":
        byte = 1
    elif mistake == "scale lane":
        wrong[:, 6, 0::4], wrong[:, 6, 1::4] = registers[:, 6, 1::4], registers[:, 6, 0::4]
    else:
        wrong[:, [8, 9]] = registers[:, [10, 11]]
    assert not torch.equal(run(host, registers, fp4_is_a), run(host, wrong, fp4_is_a, byte))


@both_orders
def test_the_rule_is_the_published_one(host: ModuleType, fp4_is_a: bool) -> None:
    """The validated model itself, in case our own arithmetic module and the emulation share a mistake."""
    mmasim = pytest.importorskip("mmasim.nv_ptx")
    kinds = ("e2m1", "e4m3") if fp4_is_a else ("e4m3", "e2m1")
    model = mmasim.MMABlockScale(
        "RTX Blackwell", f"m16n8k32.kind::mxf8f6f4.block32.f32.{kinds[0]}.{kinds[1]}.f32.ue8m0"
    )
    problem = Problem(20, fp4_is_a, seed=11)
    expected = []
    for w in range(20):
        a, b = (
            x[w] << 2 if kind == "e2m1" else x[w].view(torch.float8_e4m3fn)
            for x, kind in ((problem.a, kinds[0]), (problem.b, kinds[1]))
        )
        scales = (x[w, :, :1].contiguous().view(torch.float8_e8m0fnu) for x in (problem.a_scale, problem.b_scale))
        a_scale, b_scale = scales
        expected.append(bits(model(a, b.T, problem.c[w], a_scale, b_scale.T)))
    assert SM12X_MXF8F6F4.bits == 25
    assert torch.equal(problem.emulated(host, 0), torch.stack(expected))
