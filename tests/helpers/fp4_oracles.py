"""Slow, plain counterparts of the FP4 quantizers, block by block, with numpy and ml_dtypes only.

They share no code with the library. Every operation is one float32 operation of numpy, in the order in which FlashInfer
0.7.2.post1 has them (quantization_utils.cuh, cvt_warp_fp16_to_fp4), with reciprocals rounded to nearest.
"""

from __future__ import annotations

import math

import numpy as np
import oracles

_SIXTH = np.float32(1.0) / np.float32(6.0)


def e2m1_code(value: np.float32) -> int:
    """`cvt.rn.satfinite.e2m1x2.f32` of one number: nearest even, at most 6, a NaN is +6."""
    if math.isnan(value):
        return 7
    with np.errstate(all="ignore"):
        return int(np.float32(np.clip(value, -6, 6)).astype(oracles.E2M1).view(np.uint8))


def _packed(codes: list[int]) -> list[int]:
    return [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]


def nvfp4_quantize(x: np.ndarray, global_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, K] and float32 [R] -> packed uint8 [R, K/2], scales uint8 [R, K/16]."""
    rows, k = x.shape
    packed, scales = np.zeros((rows, k // 2), np.uint8), np.zeros((rows, k // 16), np.uint8)
    with np.errstate(all="ignore"):
        for r in range(rows):
            g = np.float32(global_scale[r])
            for b in range(k // 16):
                block = x[r, 16 * b : 16 * b + 16]
                if not np.isfinite(block).all():
                    scales[r, b] = 0x7F
                    continue
                amax = np.abs(block).max()
                scales[r, b] = oracles.e4m3_codes(np.asarray(g * (amax * _SIXTH)))
                value = scales[r, b : b + 1].view(oracles.E4M3).astype(np.float32)[0]
                multiplier = np.float32(1) / (value * (np.float32(1) / g)) if amax else np.float32(0)
                packed[r, 8 * b : 8 * b + 8] = _packed([e2m1_code(one * multiplier) for one in block])
    return packed, scales


def mxfp4_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, K] -> packed uint8 [R, K/2], scales uint8 [R, K/32], the scale rounded up."""
    rows, k = x.shape
    packed, scales = np.zeros((rows, k // 2), np.uint8), np.zeros((rows, k // 32), np.uint8)
    for r in range(rows):
        for b in range(k // 32):
            block = x[r, 32 * b : 32 * b + 32]
            if not np.isfinite(block).all():
                scales[r, b] = 255
                continue
            part = float(np.abs(block).max() * _SIXTH)
            byte = 0
            while math.ldexp(1.0, byte - 127) < part:
                byte += 1
            scales[r, b] = byte
            values = [np.float32(float(one) * math.ldexp(1.0, 127 - byte)) for one in block]
            packed[r, 16 * b : 16 * b + 16] = _packed([e2m1_code(one) for one in values])
    return packed, scales


def nvfp4_values(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes times block scales, float64 [..., K]."""
    return oracles.e2m1_values(packed) * np.repeat(oracles.e4m3_values(scales), 16, axis=-1)
