"""Which lane's register holds which element of the matrices of mma.sync m16n8k16, m16n8k32 and m16n8k64.

PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k32" and "... for
mma.m16n8k64", and "Block scaling for mma.sync" for the scales. The three are one layout: lane 4g + t, a register has
32 / bits elements side by side in k, t-th in its half of K; A's registers are rows g and g + 8 of the first half of K
and then of the second, B's are column g of the first half and of the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]


def elements(registers: U32, bits: int) -> NDArray[Any]:
    """[n, 4 registers of A or 2 of B, 32 lanes] -> [n, 16 rows or 8 columns, K]: uint16, or uint8 of 8 and 4 bits."""
    n, count, _ = registers.shape
    words = np.ascontiguousarray(registers)
    if bits == 16:
        parts = words.view(np.uint16).reshape(n, count, 8, 4, 2)
    else:
        parts = words.view(np.uint8).reshape(n, count, 8, 4, 4)
    if bits == 4:  # low nibble first
        parts = np.stack((parts & 15, parts >> 4), -1).reshape(n, count, 8, 4, 8)
    halves = parts.reshape(n, 2, count // 2, 8, 4, -1)  # half of K, row g or g + 8, g, t, element
    matrix = halves.transpose(0, 2, 3, 1, 4, 5).reshape(n, 8 * (count // 2), -1)
    return np.ascontiguousarray(matrix)


def scales(words: U32, is_a: bool, byte: NDArray[np.intp], thread: NDArray[np.intp], count: int) -> NDArray[np.uint8]:
    """[n, 32 lanes] -> [n, rows or columns, count]: bytes `byte` and on, in k order, of the lanes of a thread selector.

    Of A selector 0 is lanes 0 and 1 of a quad, 1 is lanes 2 and 3; the first has row g, the second row g + 8. Of B it
    is the lane of the quad that has column g.
    """
    row = np.arange(16 if is_a else 8)
    lanes = row % 8 * 4 + row // 8 + (2 if is_a else 1) * thread[:, None]
    picked = np.take_along_axis(words, lanes, 1)[..., None]
    shifts = (byte[:, None, None] + np.arange(count)) * 8
    return (picked >> shifts.astype(np.uint32) & np.uint32(0xFF)).astype(np.uint8)


def accumulators(registers: F32) -> F32:
    """[n, 4, 32 lanes] -> [n, 16, 8]: 0 and 1 hold row g, 2 and 3 row g + 8; lane 4g + t columns 2t and 2t + 1."""
    return registers.reshape(-1, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)


def registers_of(matrix: F32) -> F32:
    """The way back, [n, 16, 8] -> [n, 4, 32 lanes]."""
    spread = matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, 32)
    return np.ascontiguousarray(spread)
