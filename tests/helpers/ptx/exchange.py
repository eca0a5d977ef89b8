"""Instructions by which the lanes of a warp exchange registers: shfl, match, redux, elect, ldmatrix, movmatrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
Bools = NDArray[np.bool_]
_LANE = np.arange(32)


def shuffle(kind: str, value: U32, by: U32, clamp: U32) -> tuple[U32, Bools, Any]:
    """shfl.sync: the values, whether the source is in range, and the source lanes. By the ISA's own pseudocode."""
    bval, cval = (by & 31).astype(np.int64), (clamp & 31).astype(np.int64)
    mask = (clamp >> 8 & 31).astype(np.int64)
    maximum = (_LANE & mask) | (cval & ~mask)
    minimum = _LANE & mask
    if kind == "up":
        source = _LANE - bval
        inside = source >= maximum
    elif kind == "down":
        source = _LANE + bval
        inside = source <= maximum
    elif kind == "bfly":
        source = _LANE ^ bval
        inside = source <= maximum
    else:
        source = minimum | (bval & ~mask)
        inside = source <= maximum
    source = np.where(inside, source, _LANE)
    return value[source], inside, source


def match_any(value: U32, lanes: Any) -> U32:
    """Of each lane, which of `lanes` hold its value."""
    same = value[:, None] == value[lanes][None, :]
    return (same * (np.uint64(1) << lanes.astype(np.uint64))).sum(1).astype(np.uint32)


def matrix_rows(addresses: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """ldmatrix: the address of the word that each lane gets of each matrix, [32, count].

    Lane 8i + r names row r of matrix i; lane 4g + t gets word t of row g.
    """
    rows = addresses[: 8 * count].reshape(count, 8)
    return (rows[:, _LANE // 4] + _LANE % 4 * 4).T


def transpose_matrix(value: U32) -> U32:
    """movmatrix.trans.b16: an 8x8 matrix of halves, two to a lane."""
    halves = np.ascontiguousarray(value).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(halves.T).reshape(-1).view(np.uint32)
