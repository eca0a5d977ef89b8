"""mma.sync...m16n8k32 with kind::mxf8f6f4.block_scale.scale_vec::1X, and the fragments of its operands.

Which lane holds what is the PTX ISA's "Matrix fragments for mma.m16n8k32" and "Warp level block scaling"; the sums are
mxfp4_moe.arithmetic's. Results are deferred: an accumulator register holds a promise until something else than another
MMA reads it, because numpy works on hundreds of MMAs at once in little more time than on one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mxfp4_moe import arithmetic

from .faults import Fault, Kind

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]
_CHUNK = 128  # MMAs at a time


@dataclass(eq=False)
class Mma:
    """One MMA, perhaps not computed yet."""

    a: tuple[U32, ...]  # 4 registers of 32 lanes
    b: tuple[U32, ...]  # 2
    c: Any  # another Mma, or 4 registers
    scales: tuple[U32, U32]
    selectors: tuple[int, int, int, int]  # byte and thread of A's scale, byte and thread of B's
    formats: tuple[str, str]
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
        levels: dict[tuple[int, tuple[str, str]], list[Mma]] = {}
        for mma in pending:
            levels.setdefault((mma.depth, mma.formats), []).append(mma)
        for key in sorted(levels):
            for at in range(0, len(levels[key]), _CHUNK):
                _compute(levels[key][at : at + _CHUNK], key[1])


def force(register: Any) -> U32:
    """A register's lanes, computed now if they were promised."""
    return register.force() if isinstance(register, Promise) else register


def start(
    queue: Queue, d: Any, a: Any, b: Any, scales: tuple[U32, U32], selectors: Any, formats: tuple[str, str], place: str
) -> tuple[Promise, ...]:
    """Registers of D for registers C (`d`), A and B."""
    first = d[0].mma if isinstance(d[0], Promise) else None
    if first is not None and all(isinstance(r, Promise) and r.mma is first and r.index == i for i, r in enumerate(d)):
        c, depth = first, first.depth + 1
    else:
        c, depth = tuple(force(r) for r in d), 1
    return queue.add(Mma(a, b, c, scales, selectors, formats, place, depth))


def _codes(registers: U32, is_a: bool, kind: str, mmas: list[Mma]) -> NDArray[np.uint8]:
    """[n, registers, 32 lanes] -> codes [n, rows (columns), 32 k]."""
    lanes = np.ascontiguousarray(registers).view(np.uint8).reshape(len(registers), -1, 8, 4, 4)  # group, thread, byte
    if is_a:  # registers: rows g and g + 8 of k 0..15, the same of k 16..31
        lanes = lanes.reshape(len(registers), 2, 2, 8, 4, 4).transpose(0, 2, 3, 1, 4, 5)
    else:
        lanes = lanes.transpose(0, 2, 1, 3, 4)
    codes = np.ascontiguousarray(lanes).reshape(len(registers), -1, 32)
    if kind == "e4m3":
        return codes
    outside = (codes & 0xC3).any((1, 2))
    if outside.any():
        wrong = mmas[int(np.flatnonzero(outside)[0])]
        raise Fault(Kind.CONTAINER, f"of {'A' if is_a else 'B'}", wrong.place)
    return codes >> 2


def _scales(words: U32, byte: NDArray[np.intp], lanes: NDArray[np.intp]) -> NDArray[np.uint8]:
    """[n, 32 lanes] -> [n, rows]: each MMA's byte of the words in its lanes [n, rows]."""
    picked = np.take_along_axis(words, lanes, 1)
    return (picked >> (byte[:, None] * 8).astype(np.uint32) & np.uint32(0xFF)).astype(np.uint8)


def _compute(mmas: list[Mma], formats: tuple[str, str]) -> None:
    a = _codes(np.stack([np.stack(m.a) for m in mmas]), True, formats[0], mmas)
    b = _codes(np.stack([np.stack(m.b) for m in mmas]), False, formats[1], mmas)
    byte_a, thread_a, byte_b, thread_b = np.array([m.selectors for m in mmas], np.intp).T
    row, column = np.arange(16), np.arange(8)
    # A: thread selector 0 is lanes 0 and 1 of a quad, 1 is lanes 2 and 3; the first has row g, the second g + 8.
    scale_a = _scales(np.stack([m.scales[0] for m in mmas]), byte_a, row % 8 * 4 + row // 8 + 2 * thread_a[:, None])
    scale_b = _scales(np.stack([m.scales[1] for m in mmas]), byte_b, column * 4 + thread_b[:, None])
    registers = np.stack([m.c.result if isinstance(m.c, Mma) else np.stack(m.c).view(np.float32) for m in mmas])
    # Registers 0 and 1 hold row g, 2 and 3 row g + 8; lane 4g + t has columns 2t and 2t + 1.
    acc = registers.reshape(-1, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)
    given = (torch.from_numpy(np.ascontiguousarray(x)) for x in (a, b, scale_a, scale_b, acc))
    summed = arithmetic.block_scaled_mma(
        *given, a_format=formats[0], b_format=formats[1], arithmetic=arithmetic.SM12X_MXF8F6F4
    ).numpy()
    out = summed.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, 32)
    for mma, result in zip(mmas, np.ascontiguousarray(out), strict=True):
        mma.result = result
        mma.c = None
