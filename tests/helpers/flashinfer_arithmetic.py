"""MXFP8 and MXFP4 as FlashInfer 0.7.2.post1's CUDA kernels compute them, instruction by instruction.

Written down from the PTX that nvcc 13.0 makes of its quantizers with its own flags for SM12x: every multiplication,
comparison and reciprocal flushes subnormals (-use_fast_math), maxima ignore NaN, and values are clamped before they are
converted. `rcp.approx` leaves its last bit to the hardware, so the caller says which value 1/448 or 1/6 has.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

f4 = np.float32
Floats = NDArray[np.float32]


def flush(x: Floats) -> Floats:
    return np.where(np.abs(x) < f4(2.0**-126), np.copysign(f4(0), x), x).astype(f4)


def times(a: Floats, b: Floats | np.float32) -> Floats:
    """mul.ftz.f32"""
    with np.errstate(all="ignore"):
        return flush((flush(a) * flush(np.asarray(b, f4))).astype(f4))


def ue8m0_up(x: Floats) -> NDArray[np.int32]:
    """cvt.rp.satfinite.ue8m0x2.f32, of numbers that are not negative."""
    bits = x.view(np.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = np.where(exponent == 0, mantissa > 0x400000, mantissa != 0)
    return np.where(np.isnan(x), 255, np.minimum(exponent + up, 254)).astype(np.int32)


def near(value: float) -> list[np.float32]:
    """What rcp.approx.ftz may give for 1/value: within one unit of the last place."""
    exact = f4(1 / value)
    return [np.nextafter(exact, f4(0)), exact, np.nextafter(exact, f4(1))]


def mxfp8(x: Floats, rcp_448: np.float32) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blocks [N, 32] -> codes [N, 32] and scales [N]."""
    amax = np.fmax.reduce(np.abs(x), axis=-1)
    byte = ue8m0_up(times(amax, rcp_448))
    scale = np.exp2(byte.astype(np.float64) - 127).astype(f4)
    with np.errstate(divide="ignore"):
        back = np.where(flush(scale) != 0, flush((1 / np.where(flush(scale) != 0, scale, 1)).astype(f4)), f4(0))
    scaled = times(x, back[:, None].astype(f4))
    clamped = np.fmax(np.fmin(scaled, f4(448)), f4(-448))
    return clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), byte.astype(np.uint8)


def mxfp4(x: Floats, rcp_6: np.float32) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blocks [N, 32] -> codes 0..15 [N, 32] and scales [N]."""
    scale = times(np.fmax.reduce(np.abs(x), axis=-1), rcp_6)
    byte = ue8m0_up(scale)
    back = np.where(scale != 0, np.exp2(127 - byte.astype(np.float64)), 0).astype(f4)
    scaled = np.clip(times(x, back[:, None]), f4(-6), f4(6))
    return scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8), byte.astype(np.uint8)
