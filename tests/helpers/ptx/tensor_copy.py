"""cp.async.bulk.tensor: boxes of a tensor in global memory to shared memory, by the async proxy.

A copy is issued, and lands at some later time that the scheduler draws: only then is its source read, its destination
written and its mbarrier told. Elements outside of the tensor arrive as zeros, and count as bytes all the same (PTX ISA,
"Tensor copy"; CUDA driver API, cuTensorMapEncodeTiled; for swizzles the CUDA programming guide, "Swizzle modes", and
CuTe's Swizzle<2,4,3> and <3,4,3>).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .barriers import MBarrier
from .faults import Fault, Kind
from .memory import SHARED_BASE
from .order import Ints

if TYPE_CHECKING:
    from .machine import Block

MAGIC = 0x50414D524F534E54
_LAYOUT = struct.Struct("<QIIQ5Q4Q5IHHHH")
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # CUtensorMapDataType
_SWIZZLES = {0: 0, 2: 64, 3: 128}  # CUtensorMapSwizzle: bytes of a row whose 16-byte chunks are exchanged


@dataclass(frozen=True)
class TensorMap:
    """A two-dimensional one. Index 0 is innermost."""

    element: int  # bytes
    address: int
    extents: tuple[int, int]
    stride: int  # bytes from row to row
    box: tuple[int, int]
    swizzle: int  # bytes; 0 for none

    @classmethod
    def decode(cls, data: bytes) -> TensorMap:
        magic, kind, rank, address, *rest = _LAYOUT.unpack(data[: _LAYOUT.size])
        extents, strides, box = rest[:5], rest[5:9], rest[9:14]
        interleave, swizzle, _, fill = rest[14:]
        if magic != MAGIC:
            raise Fault(Kind.COPY, f"no tensor map: magic {magic:#x}")
        if rank != 2 or interleave != 0 or fill != 0 or kind not in _ELEMENT_BYTES:
            raise Fault(Kind.UNKNOWN, f"tensor map of rank {rank}, type {kind}, interleave {interleave}, fill {fill}")
        if swizzle not in _SWIZZLES:
            raise Fault(Kind.UNKNOWN, f"tensor map with swizzle {swizzle}")
        element = _ELEMENT_BYTES[kind]
        found = cls(element, address, (extents[0], extents[1]), strides[0], (box[0], box[1]), _SWIZZLES[swizzle])
        found.check()
        return found

    def check(self) -> None:
        inner = self.box[0] * self.element
        wrong = (
            f"address {self.address:#x} is no multiple of 16" * (self.address % 16 != 0)
            or f"stride {self.stride} is no multiple of 16" * (self.stride % 16 != 0)
            or f"box {self.box} has a side outside 1..256" * (not all(0 < side <= 256 for side in self.box))
            or f"inner box of {inner} bytes is no multiple of 16" * (inner % 16 != 0)
            or f"inner box of {inner} bytes exceeds the swizzle's {self.swizzle}" * (0 < self.swizzle < inner)
        )
        if wrong:
            raise Fault(Kind.COPY, f"tensor map: {wrong}")

    @property
    def box_bytes(self) -> int:
        return self.box[0] * self.element * self.box[1]


@dataclass(frozen=True)
class Copy:
    """One copy in flight."""

    block: Block
    map: TensorMap
    to: int  # shared-memory address
    start: tuple[int, int]  # element coordinates of the box
    barrier: MBarrier
    known: Ints  # what the issuer knew
    waited: bool  # whether the issuer had passed griddepcontrol.wait
    place: str

    def check(self) -> None:
        needed = 8 * self.map.swizzle or 128
        if self.to % needed:
            raise Fault(
                Kind.ALIGNMENT, f"tensor copy to shared memory at {self.to:#x}, expected a multiple of {needed}"
            )
        if self.to < SHARED_BASE or self.to - SHARED_BASE + self.map.box_bytes > self.block.shared.size:
            raise Fault(
                Kind.BOUNDS,
                f"tensor copy of {self.map.box_bytes} bytes to byte {self.to - SHARED_BASE} of "
                f"{self.block.shared.size} of shared memory",
            )

    def land(self) -> None:
        """Moves the data and tells the mbarrier."""
        data = self._read()
        addresses = self.to + np.arange(data.size, dtype=np.int64).reshape(data.shape)
        if self.map.swizzle:
            # 16-byte chunk c of every 128 bytes r, as the address counts them, goes to chunk c ^ (r % 8); of rows of 64
            # bytes, which are halves of those, to c ^ (r % 4).
            addresses ^= (addresses >> 7 & (self.map.swizzle // 16 - 1)) << 4
        words = (addresses.reshape(-1, 4)[:, 0] - SHARED_BASE) >> 2
        phase = self.barrier.phase + 1
        self.block.shared.land(words, data.reshape(-1).view(np.uint32), self.known, self.barrier.slot, phase)
        self.barrier.complete_bytes(self.map.box_bytes, self.known)

    def _read(self) -> NDArray[np.uint8]:
        """The box's bytes [rows, inner bytes], zeros outside of the tensor."""
        m = self.map
        data = np.zeros((m.box[1], m.box[0] * m.element), np.uint8)
        (x, y), (width, height) = self.start, m.extents
        x0, x1 = max(x, 0), min(x + m.box[0], width)
        y0, y1 = max(y, 0), min(y + m.box[1], height)
        if x0 >= x1 or y0 >= y1:
            return data
        first = m.address + y0 * m.stride + x0 * m.element
        last = m.address + (y1 - 1) * m.stride + x1 * m.element
        launched = self.block.launched
        region = launched.memory.find(first, last, "tensor copy")
        rows = np.arange(y0, y1, dtype=np.int64)[:, None] * m.stride
        at = m.address - region.base + rows + np.arange(x0 * m.element, x1 * m.element)
        box = launched.memory.read_box(launched, self.waited, region, at)
        data[y0 - y : y1 - y, (x0 - x) * m.element : (x1 - x) * m.element] = box
        return data
