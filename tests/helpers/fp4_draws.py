"""Operands of one MMA of FP4 x FP4, of many kinds, and what mmasim says of them."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mxfp4_moe import formats
from mxfp4_moe.arithmetic import SM12X_MXF4, SM12X_NVF4, Arithmetic

M, N = 48, 40
BYTE = torch.uint8
NAMES = {
    "kind::mxf4.block32.f32.e2m1.e2m1.f32.ue8m0": SM12X_MXF4,
    "kind::mxf4nvf4.block32.f32.e2m1.e2m1.f32.ue8m0": SM12X_MXF4,
    "kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3": SM12X_NVF4,
}


@contextlib.contextmanager
def mmasim_models() -> Iterator[Any]:
    """mmasim's models. Its module for float64 MMAs, which compiles C++ when it is imported, is left out."""
    name = "mmasim.arithmetic.fma"
    sys.modules[name] = types.ModuleType(name)
    from mmasim.nv_ptx import sim

    yield sim
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


def is_nvfp4(rule: Arithmetic) -> bool:
    return rule.operands == "nvfp4"


def scale_values(rule: Arithmetic, scales: torch.Tensor) -> torch.Tensor:
    return formats.decode_e4m3(scales & 0x7F) if is_nvfp4(rule) else formats.decode_e8m0(scales)


def values(rule: Arithmetic, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 of [R, K] codes with their scales in them."""
    block = 16 if is_nvfp4(rule) else 32
    plain = torch.tensor(formats.E2M1_VALUES, dtype=torch.float64)[codes.int()]
    return plain * scale_values(rule, scales).double().repeat_interleave(block, -1)


class Draw:
    """Codes [M, 64] and [N, 64], scales of a rule, accumulators [M, N]; `low` and `high` are the scale bytes' ends."""

    def __init__(self, rule: Arithmetic, seed: int) -> None:
        self.rule, self.g = rule, torch.Generator().manual_seed(seed)
        self.scales = (0x18, 0x60) if is_nvfp4(rule) else (110, 142)
        self.change: Callable[..., object] = lambda *_: None
        self.acc: Callable[[torch.Tensor], torch.Tensor] = lambda total: self.near(total, -30, 30)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.g)

    def near(self, total: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Accumulators of either sign with an exponent so far from that of the sum."""
        factor = self.integers(low, high, *total.shape).double().exp2() * (
            1 + torch.rand(total.shape, generator=self.g, dtype=torch.float64)
        )
        return (total.abs().clamp(min=2.0**-160) * factor * (2 * self.integers(0, 1, *total.shape) - 1)).float()

    def any_float32(self, shape: torch.Size) -> torch.Tensor:
        """Random bits: subnormal numbers, infinities and NaN among them."""
        words = self.integers(-(2**31), 2**31 - 1, *shape).to(torch.int32)
        special = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7FC00001, 1, -(2**31) + 1, 0x7FFFFF, 0x7F7FFFFF])
        words.view(-1)[: 4 * len(special)] = special.to(torch.int32).repeat(4)
        return words.view(torch.float32)

    def __call__(self) -> tuple[torch.Tensor, ...]:
        codes = [self.integers(0, 15, rows, 64).to(BYTE) for rows in (M, N)]
        count = 4 if is_nvfp4(self.rule) else 2
        scales = [self.integers(*self.scales, rows, count).to(BYTE) for rows in (M, N)]
        self.change(*codes, *scales)
        total = values(self.rule, codes[0], scales[0]) @ values(self.rule, codes[1], scales[1]).T
        return *codes, *scales, self.acc(total.nan_to_num())


def groups_that_cancel(a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor) -> None:
    """Products of +1 and -1 in turn in the first group, whose scales are the largest of all."""
    a[:, :16], b[:, :16:2], b[:, 1:16:2] = 2, 2, 10
    for scale in (sa, sb):
        scale[:, 0] = scale.max()


def zeros(a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor) -> None:
    """Of both signs: whole rows and whole groups of codes, and where there are such, of scales."""
    a[::2] &= 8
    b[::3] &= 8
    a[1::4, 16:32] = 8
    if int(sa.max()) < 0x80:
        sa[3::4, 1], sb[1::3, 2] = 0, 0


def every_kind(rule: Arithmetic) -> dict[str, Draw]:
    kinds = {name: Draw(rule, seed) for seed, name in enumerate(KINDS)}
    last = 0x7E if is_nvfp4(rule) else 254
    for name in ("every scale", "every scale, zero accumulators", "any accumulator"):
        kinds[name].scales = (0, last)
    kinds["every byte"].scales = (0, 255)
    kinds["small scales"].scales = (0, 0x10) if is_nvfp4(rule) else (0, 62)
    kinds["large scales"].scales = (0x70, 0x7E) if is_nvfp4(rule) else (185, 254)
    kinds["apart"].scales = (0, last) if is_nvfp4(rule) else (100, 154)
    for name in ("apart, zero accumulators", "groups that cancel"):
        kinds[name].scales = kinds["apart"].scales
    kinds["below the zeros' exponent"].scales = (0, 0x10) if is_nvfp4(rule) else (36, 60)
    for name in ("every scale, zero accumulators", "apart, zero accumulators", "below the zeros' exponent"):
        kinds[name].acc = lambda total: torch.zeros_like(total).float()
    kinds["small scales"].acc = lambda total: (bits(kinds["small scales"].any_float32(total.shape)) & -0x7F000001).view(
        torch.float32
    )
    kinds["zeros"].change = zeros
    kinds["zeros"].acc = lambda total: (total.sign() * 0.0).float()
    kinds["groups that cancel"].change = groups_that_cancel
    kinds["cancellation"].acc = lambda total: -total.float()
    kinds["nearly cancellation"].acc = lambda total: torch.nextafter(-total.float(), torch.tensor(0.0))
    kinds["exponents 60 apart"].acc = lambda total: kinds["exponents 60 apart"].near(total, -60, 60)
    for name in ("any accumulator", "every byte"):
        kinds[name].acc = lambda total, name=name: kinds[name].any_float32(total.shape)
    return kinds


KINDS = (
    *("usual", "every scale", "every scale, zero accumulators", "every byte", "small scales", "large scales", "apart"),
    *("apart, zero accumulators", "below the zeros' exponent", "zeros", "groups that cancel", "cancellation"),
    *("nearly cancellation", "exponents 60 apart", "any accumulator"),
)


def simulated(model: Any, rule: Arithmetic, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    a, b, sa, sb, acc = given
    dtype = torch.float8_e4m3fn if is_nvfp4(rule) else torch.float8_e8m0fnu
    packed = [x[:, 0::2] | x[:, 1::2] << 4 for x in (a, b)]
    out = model(packed[0], packed[1].T, acc, sa.view(dtype), sb.view(dtype).T)
    assert isinstance(out, torch.Tensor)
    return out
