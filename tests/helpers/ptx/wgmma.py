"""wgmma.mma_async m64nNk16 of bf16 and f16 with A in registers: a warp's 16 rows, as m16n8k16 of mma.py side by side.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". With A in registers a warp needs nothing of the other three
but their presence. It is as late as it may be: shared memory is read, and sums are made, when wgmma.wait_group says so;
who reads an accumulator before is told. B lies as SM90's kernels have it: K-major, rows of 128 bytes, groups of 8 rows
as far apart as the descriptor says, 16-byte chunks swizzled by the address's bits 7 to 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import mma
from .faults import Fault, Kind

if TYPE_CHECKING:
    from .warp import Warp

_LANE = np.arange(32)
_KINDS = {of: mma.Instruction(of, of, 0) for of in ("bf16", "f16")}
_SWIZZLE_128 = 1 << 62


@dataclass(eq=False)
class Started:
    """One instruction of a warp, whose sums are not there before the warp has waited for them."""

    d: Sequence[int]  # registers of the accumulators
    c: Sequence[Any]  # what was in them
    a: tuple[Any, ...]
    descriptor: int
    kind: mma.Instruction
    place: str
    result: list[Any] | None = None


@dataclass(frozen=True, eq=False)
class Running:
    """Register `index` of an instruction's accumulators."""

    of: Started
    index: int

    def now(self) -> Any:
        if self.of.result is None:
            raise Fault(Kind.RACE, "an accumulator of wgmma before wgmma.wait_group", self.of.place)
        return self.of.result[self.index]

    def force(self) -> Any:
        return mma.force(self.now())


@dataclass
class Groups:
    """What a warp has started: not committed yet, and committed."""

    open: list[Started] = field(default_factory=list)
    committed: list[list[Started]] = field(default_factory=list)

    def start(
        self, warp: Warp, d: Sequence[int], a: tuple[Any, ...], descriptor: Any, adds: Any, of: str, place: str
    ) -> None:
        if (descriptor != descriptor[0]).any() or not adds.all():
            raise Fault(Kind.UNKNOWN, "wgmma with descriptors of the lanes' own, or without its accumulators", place)
        number = int(descriptor[0])
        if number & ~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32) != _SWIZZLE_128:
            raise Fault(Kind.UNKNOWN, f"matrix descriptor {number:#x}", place)
        one = Started(d, [warp.R[n] for n in d], a, number, _KINDS[of], place)
        for index, n in enumerate(d):
            warp.R[n] = Running(one, index)
        self.open.append(one)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, warp: Warp, most: int) -> None:
        """Until no more than `most` groups run."""
        while len(self.committed) > most:
            for one in self.committed.pop(0):
                _finish(warp, one)


def _finish(warp: Warp, one: Started) -> None:
    c = [r.now() if isinstance(r, Running) else r for r in one.c]
    result: list[Any] = []
    for block in range(len(one.d) // 4):
        b = _words(warp, one.descriptor, block)
        result += mma.start(warp.mmas, tuple(c[4 * block :][:4]), one.a, b, [], (), one.kind, one.place)
    one.result = result
    for index, n in enumerate(one.d):
        held = warp.R[n]
        if isinstance(held, Running) and held.of is one:
            warp.R[n] = result[index]


def _words(warp: Warp, descriptor: int, block: int) -> tuple[Any, ...]:
    """B's registers of 8 columns: lane 4g + t has k = 2t, 2t + 1 of row g, and 8 further on."""
    first = (descriptor & 0x3FFF) << 4
    row = first + block * ((descriptor >> 32 & 0x3FFF) << 4) + _LANE // 4 * 128 + _LANE % 4 * 4
    shared, lanes = warp.block.shared, _LANE
    found = []
    for k in (0, 16):
        address = row + k
        address ^= (address >> 7 & 7) << 4
        found.append(shared.load(warp, lanes, shared.places(address, 4, "wgmma")).reshape(32))
    return tuple(found)
