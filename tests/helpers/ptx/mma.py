"""mma.sync: m16n8k32 of kind::mxf8f6f4, m16n8k64 of kind::mxf4 and kind::mxf4nvf4, m16n8k16 of bf16 and f16.

Which lane holds what is in fragments.py; the sums are mxfp4_moe.arithmetic's. Results are deferred: an accumulator
register holds a promise until something else than another MMA reads it, because numpy works on hundreds of MMAs at once
in little more time than on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mxfp4_moe import arithmetic

from . import fragments
from .faults import Fault, Kind
from .fragments import F32, U32

_CHUNK = 128  # MMAs at a time


@dataclass(frozen=True, order=True)
class Instruction:
    """What an MMA's name says: formats of A and B (e4m3, e2m1, bf16, f16), and scales of a row, 0, 1, 2 or 4."""

    a: str
    b: str
    scales: int

    @property
    def bits(self) -> int:
        """Of an element in its register: E2M1 has a byte where one scale is for all of k."""
        return {0: 16, 1: 8, 2: 4, 4: 4}[self.scales]

    @property
    def bytes_selected(self) -> tuple[int, ...]:
        """The byte selectors that it takes; the scales are in that byte and those above it."""
        return {0: (), 1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}[self.scales]


@dataclass(eq=False)
class Mma:
    """One MMA, perhaps not computed yet."""

    a: tuple[U32, ...]  # 4 registers of 32 lanes
    b: tuple[U32, ...]  # 2
    c: Any  # another Mma, or 4 registers
    scales: Sequence[U32]  # of A and of B, or none
    selectors: tuple[int, ...]  # byte and thread of A's scale, byte and thread of B's
    kind: Instruction
    place: str
    depth: int = 1
    result: F32 | None = None  # [4, 32]


@dataclass(frozen=True, eq=False)
class Promise:
    """Register `index` of an MMA's result."""

    mma: Mma
    index: int
    queue: Queue

    def force(self) -> U32:
        if self.mma.result is None:
            self.queue.flush()
        assert self.mma.result is not None
        return self.mma.result[self.index].view(np.uint32)


@dataclass
class Queue:
    """The MMAs of a machine that nobody has asked for yet."""

    pending: list[Mma] = field(default_factory=list)
    executed: int = 0

    def add(self, mma: Mma) -> tuple[Promise, ...]:
        self.pending.append(mma)
        return tuple(Promise(mma, i, self) for i in range(4))

    def flush(self) -> None:
        """Computes all, those on which others depend first."""
        pending, self.pending = self.pending, []
        self.executed += len(pending)
        levels: dict[tuple[int, Instruction], list[Mma]] = {}
        for mma in pending:
            levels.setdefault((mma.depth, mma.kind), []).append(mma)
        for key in sorted(levels):
            for at in range(0, len(levels[key]), _CHUNK):
                _compute(levels[key][at : at + _CHUNK], key[1])


def force(register: Any) -> U32:
    """A register's lanes, computed now if they were promised."""
    return register if isinstance(register, np.ndarray) else register.force()


def start(
    queue: Queue, d: Any, a: Any, b: Any, scales: Any, selectors: Any, kind: Instruction, place: str
) -> tuple[Promise, ...]:
    """Registers of D for registers C (`d`), A and B."""
    first = d[0].mma if isinstance(d[0], Promise) else None
    if first is not None and all(isinstance(r, Promise) and r.mma is first and r.index == i for i, r in enumerate(d)):
        c, depth = first, first.depth + 1
    else:
        c, depth = tuple(force(r).view(np.uint32) for r in d), 1
    return queue.add(Mma(a, b, c, scales, selectors, kind, place, depth))


def _compute(mmas: list[Mma], kind: Instruction) -> None:
    bits = kind.bits
    a, b = (
        fragments.elements(np.stack([np.stack(x) for x in of]), bits)
        for of in ([m.a for m in mmas], [m.b for m in mmas])
    )
    registers = np.stack([m.c.result if isinstance(m.c, Mma) else np.stack(m.c).view(np.float32) for m in mmas])
    acc = torch.from_numpy(np.ascontiguousarray(fragments.accumulators(registers)))
    if kind.scales == 0:
        dtype = torch.bfloat16 if kind.a == "bf16" else torch.float16
        rule = arithmetic.SM12X_BF16 if kind.a == "bf16" else arithmetic.SM12X_FP16
        operands = (torch.from_numpy(x.view(np.int16)).view(dtype) for x in (a, b))
        summed = arithmetic.float_mma(*operands, acc, arithmetic=rule)
    else:
        byte_a, thread_a, byte_b, thread_b = np.array([m.selectors for m in mmas], np.intp).T
        words_a, words_b = (np.stack([m.scales[i] for m in mmas]) for i in (0, 1))
        scales = (
            torch.from_numpy(fragments.scales(words_a, True, byte_a, thread_a, kind.scales)),
            torch.from_numpy(fragments.scales(words_b, False, byte_b, thread_b, kind.scales)),
        )
        if kind.scales == 1:
            plain = (torch.from_numpy(_plain(*x, mmas)) for x in ((a, "A", kind.a), (b, "B", kind.b)))
            one = (scale[..., 0] for scale in scales)
            formats: Any = {"a_format": kind.a, "b_format": kind.b}
            summed = arithmetic.block_scaled_mma(*plain, *one, acc, **formats, arithmetic=arithmetic.SM12X_MXF8F6F4)
        else:
            rule = arithmetic.SM12X_MXF4 if kind.scales == 2 else arithmetic.SM12X_NVF4
            summed = arithmetic.fp4_mma(torch.from_numpy(a), torch.from_numpy(b), *scales, acc, arithmetic=rule)
    for mma, result in zip(mmas, fragments.registers_of(summed.numpy()), strict=True):
        mma.result = result
        mma.c = None


def _plain(codes: NDArray[np.uint8], name: str, kind: str, mmas: list[Mma]) -> NDArray[np.uint8]:
    """Codes of 8-bit containers: E2M1 stands in bits 5..2, and the others must be zero."""
    if kind == "e4m3":
        return codes
    outside = (codes & 0xC3).any((1, 2))
    if outside.any():
        wrong = mmas[int(np.flatnonzero(outside)[0])]
        raise Fault(Kind.CONTAINER, f"of {name}", wrong.place)
    return codes >> 2
