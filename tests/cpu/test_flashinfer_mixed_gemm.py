"""The layout of bf16 x MXFP4: the two functions that make it, bit by bit from its definition, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api.mixed_gemm import restore_scales, restore_weights

WEIGHTS = fi.interleave_moe_weights_for_sm90_mixed_gemm
SCALES = fi.interleave_moe_scales_for_sm90_mixed_gemm

# Bits of a code, the sign first, in the low half of a word: by (row of the group / 8, second of the two pairs of k).
BITS = {
    (0, 0): (15, 8, 7, 6),
    (1, 0): (12, 5, 4, 3),
    (0, 1): (9, 2, 1, 0),
    (1, 1): (14, 11, 10, 13),
}


def some_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def interleaved(packed: np.ndarray) -> np.ndarray:
    """[N, K/2], code by code, from where thread t of an m16n8k16 MMA holds it."""
    rows, k = packed.shape[0], 2 * packed.shape[1]
    words = np.zeros((rows, k // 8), np.uint32)
    for row in range(rows):
        for column in range(k):
            code = packed[row, column // 2] >> column % 2 * 4 & 15
            mma, t = column % 64 // 16, column % 8 // 2
            bits = BITS[row % 16 // 8, column % 16 // 8]
            to_row = row // 16 * 16 + mma % 2 * 8 + row % 8
            word = column // 64 * 8 + mma // 2 * 4 + t
            for i, bit in enumerate(bits):
                words[to_row, word] |= np.uint32((int(code) >> 3 - i & 1) << bit + column % 2 * 16)
    return words.view(np.uint8)


@pytest.mark.parametrize(("rows", "k"), [(16, 64), (48, 128), (32, 320)])
def test_weights_code_by_code(rows: int, k: int) -> None:
    packed = some_bytes(2, rows, k // 2, seed=rows)
    before = packed.clone()
    made = WEIGHTS(packed, "fp4")
    assert made.dtype is torch.uint8
    for expert, result in zip(packed, made, strict=True):
        assert np.array_equal(result.numpy(), interleaved(expert.numpy()))
    assert torch.equal(packed, before)
    assert torch.equal(made, WEIGHTS(packed))
    assert not torch.equal(made, packed)


@pytest.mark.parametrize(
    ("row", "column", "code", "to_row", "to_byte", "expected"),
    [
        (0, 0, 0b1000, 0, 0, "00 80 00 00"),  # its sign alone, at bit 15
        (0, 1, 0b0111, 0, 0, "00 00 c0 01"),  # the odd k: bits 24..22
        (8, 17, 0b1001, 8, 0, "00 00 08 10"),  # the second MMA goes to row 8; sign at 28, magnitude at 21..19
        (1, 14, 0b0101, 1, 12, "05 00 00 00"),  # t = 3, the second pair of k: bits 2..0
        (9, 60, 0b1111, 9, 24, "00 6c 00 00"),  # the fourth MMA, t = 2: sign 14, ee 11..10, m 13
        (23, 105, 0b0010, 23, 48, "00 00 02 00"),  # the second 64 k, its third MMA: bit 17
    ],
)
def test_weights_by_hand(row: int, column: int, code: int, to_row: int, to_byte: int, expected: str) -> None:
    packed = torch.zeros(1, 32, 64, dtype=torch.uint8)
    packed[0, row, column // 2] = code << 4 * (column % 2)
    made = WEIGHTS(packed)[0]
    assert bytes(made[to_row, to_byte : to_byte + 4].tolist()).hex(" ") == expected
    made[to_row, to_byte : to_byte + 4] = 0
    assert not made.any()


@pytest.mark.parametrize(("rows", "k"), [(64, 128), (128, 384)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_one_by_one(rows: int, k: int, dtype: torch.dtype) -> None:
    scales = some_bytes(3, rows, k // 32)
    made = SCALES(scales.view(dtype))
    assert made.dtype is dtype
    assert made.shape == (3, rows // 64, k // 128, 16, 16)
    assert made.is_contiguous()
    assert made.view(torch.int32).shape == (3, rows // 64, k // 128, 16, 4)
    for e in range(3):
        for row in range(rows):
            for block in range(k // 32):
                place = (e, row // 64, block // 4, row % 16, row % 64 // 16 * 4 + block % 4)
                assert made.view(torch.uint8)[place] == scales[e, row, block]
    assert torch.equal(made.view(torch.uint8), SCALES(scales, 32))


def test_back() -> None:
    packed, scales = some_bytes(2, 2 * 144, 160), some_bytes(2, 192, 12)
    assert all(torch.equal(restore_weights(made), expert) for made, expert in zip(WEIGHTS(packed), packed, strict=True))
    assert all(torch.equal(restore_scales(made), expert) for made, expert in zip(SCALES(scales), scales, strict=True))
    every = torch.arange(256, dtype=torch.uint8).repeat(1, 16, 1)  # every pair of codes in every row of a group
    assert torch.equal(restore_weights(WEIGHTS(every)[0]), every[0])


def test_strided() -> None:
    packed = some_bytes(2, 32, 128)[..., ::2]
    assert torch.equal(WEIGHTS(packed), WEIGHTS(packed.contiguous()))
    scales = some_bytes(2, 128, 8).transpose(1, 2)[..., :64]
    assert torch.equal(SCALES(scales.transpose(1, 2)), SCALES(scales.transpose(1, 2).contiguous()))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: WEIGHTS(some_bytes(1, 16, 32), "int4"),
            NotImplementedError,
            "quant_type: this library has no 'int4', INT",
        ),
        (lambda: WEIGHTS(some_bytes(1, 16, 32), "fp4_fp8"), NotImplementedError, "quant_type: this library has no 'f"),
        (lambda: WEIGHTS(some_bytes(1, 16, 32), "fp8"), ValueError, "quant_type: expected 'fp4', got 'fp8'"),
        (
            lambda: WEIGHTS(some_bytes(16, 32)),
            ValueError,
            r"weight: expected uint8 \[E, N, K/2\], got uint8 \[16, 32\]",
        ),
        (lambda: WEIGHTS(some_bytes(1, 16, 32).int()), TypeError, r"weight: expected uint8 \[E, N, K/2\], got int32"),
        (lambda: WEIGHTS(some_bytes(1, 24, 32)), ValueError, "weight: expected N a multiple of 16 and K of 64, got 24"),
        (lambda: WEIGHTS(some_bytes(1, 16, 48)), ValueError, "weight: expected N .* of 64, got 16 and 96"),
        (lambda: WEIGHTS([1]), TypeError, "weight: expected .*, got list"),
        (
            lambda: SCALES(some_bytes(1, 64, 4), 128),
            NotImplementedError,
            "group_size: this library has MXFP4 only, whose group is 32, got 128",
        ),
        (lambda: SCALES(torch.ones(1, 64, 4).bfloat16()), TypeError, "scales: expected uint8 or float8_e8m0fnu"),
        (lambda: SCALES(some_bytes(64, 4)), ValueError, r"scales: expected .*, got uint8 \[64, 4\]"),
        (lambda: SCALES(some_bytes(1, 32, 4)), ValueError, "scales: expected N a multiple of 64 and K of 128, got 32"),
        (lambda: SCALES(some_bytes(1, 64, 6)), ValueError, "scales: expected .*, got 64 and 192"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        call()
