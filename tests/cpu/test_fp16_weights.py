"""Weights as MMAs of float16 read them: against numpy's float16 and against the multiplication that kernels do."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import formats

CODES = torch.arange(16, dtype=torch.uint8)
VALUES = np.arange(16, dtype=np.uint8).view(oracles.E2M1).astype(np.float64)


def blocks_of_all_codes(scales: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales of one row: in each block of 32 all codes, twice."""
    block = torch.cat((CODES, CODES)).view(16, 2)
    packed = (block[:, 0] | block[:, 1] << 4).repeat(len(scales))
    return packed.unsqueeze(0), torch.tensor([scales], dtype=torch.uint8)


def nibbles_of(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def as_the_kernel(code: int, scale: int, largest: int) -> np.float16:
    """The code's three bits as a half, times the half whose bits are x << 10."""
    half = np.array([(code & 7) << 9 | (code & 8) << 12], dtype=np.uint16).view(np.float16)
    x = min(max(0, 30 + scale - largest), 30)
    return np.float16(half[0] * np.array([x << 10], dtype=np.uint16).view(np.float16)[0])


@pytest.mark.parametrize("largest", [2, 40, 127, 253])
def test_mxfp4_is_rounded_once_and_as_the_kernel_multiplies(largest: int) -> None:
    below = [distance for distance in range(50) if largest - distance >= 0]
    packed, scales = blocks_of_all_codes([largest - distance for distance in below])
    found = formats.mxfp4_in_fp16(nibbles_of(packed), scales, torch.tensor(largest)).view(len(below), 32).numpy()
    for row, distance in zip(found, below, strict=True):
        exact = VALUES * 2.0 ** (1 - distance)
        assert np.array_equal(row[:16], exact.astype(np.float16)), distance
        assert np.array_equal(row[16:], row[:16])
        assert [as_the_kernel(code, largest - distance, largest) for code in range(16)] == row[:16].tolist(), distance
        assert np.array_equal(row[:16].astype(np.float64), exact) == (distance <= formats.FP16_EXACT_BINADES)
        assert (row == 0).all() == (distance >= 29), distance


def test_rows_may_be_relative_to_scales_of_their_own() -> None:
    packed, scales = blocks_of_all_codes([100, 110])
    both = formats.mxfp4_in_fp16(nibbles_of(packed.repeat(2, 1)), scales.repeat(2, 1), torch.tensor([110, 130]))
    for row, largest in zip(both, (110, 130), strict=True):
        assert torch.equal(row, formats.mxfp4_in_fp16(nibbles_of(packed), scales, torch.tensor(largest))[0])
    assert not torch.equal(both[0], both[1])


def test_zeros_under_a_larger_scale_stay_zeros() -> None:
    packed, scales = blocks_of_all_codes([120, 121, 151, 253])
    packed[:, 16:] &= 0x88
    assert int(formats.largest_scale(packed, scales)) == 120
    found = formats.mxfp4_in_fp16(nibbles_of(packed), scales, torch.tensor(120)).view(4, 32)
    assert (found[1:] == 0).all()
    assert (found[0] != 0).sum() == 28


@pytest.mark.parametrize(
    ("scales", "zeros", "largest", "smallest"),
    [
        ([120, 3, 90], [], 120, 3),
        ([120, 3, 90], [0], 90, 3),
        ([120, 3, 90], [1], 120, 90),
        ([1, 0], [], 2, 0),
        ([200, 7], [0, 1], 2, 255),
    ],
)
def test_the_largest_scale_is_one_of_a_block_with_a_weight(
    scales: list[int], zeros: list[int], largest: int, smallest: int
) -> None:
    packed, given = blocks_of_all_codes(scales)
    for block in zeros:
        packed[:, 16 * block : 16 * block + 16] &= 0x88  # zeros of both signs
    assert [int(end) for end in formats.scale_ends(packed, given)] == [largest, smallest]
    assert int(formats.largest_scale(packed, given)) == largest
    one_code = torch.zeros_like(packed)
    one_code[0, 5] = 0x10
    assert int(formats.largest_scale(one_code, given)) == max(scales[0], 2)


def test_a_matrix_of_nothing() -> None:
    nothing = torch.empty(0, 16, dtype=torch.uint8), torch.empty(0, 1, dtype=torch.uint8)
    assert [int(end) for end in formats.scale_ends(*nothing)] == [2, 255]


def test_the_factor_has_the_largest_scale_in_its_exponent() -> None:
    largest = torch.arange(2, 255, dtype=torch.int32)
    factors = formats.fp16_factor(largest)
    assert torch.equal(factors.double(), (largest.double() - 128).exp2())
    assert float(factors.min()) == torch.finfo(torch.float32).tiny, "the smallest normal number"
    assert torch.equal(formats.largest_of_factor(factors), largest)


def test_nvfp4_is_exact_in_fp16() -> None:
    scales = torch.arange(0x7F, dtype=torch.uint8)
    found = formats.nvfp4_in_fp16(CODES.repeat(1, 127), scales.unsqueeze(0)).view(127, 16).numpy().astype(np.float64)
    of_scales = scales.numpy().view(oracles.E4M3).astype(np.float64)
    assert np.array_equal(found * formats.FP16_NVFP4_UNIT, of_scales[:, None] * VALUES)
    assert np.abs(found).max() == 21
    assert np.abs(found[found != 0]).min() == 2.0**-17


def test_rounded_codes_are_counted() -> None:
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (40, 96), generator=g).to(torch.uint8)
    scales = torch.randint(100, 141, (40, 6), generator=g).to(torch.uint8)
    largest = formats.largest_scale(packed, scales)
    held = formats.mxfp4_in_fp16(nibbles_of(packed), scales, largest).double().numpy()
    power = np.exp2(1.0 + scales.numpy().astype(np.float64) - int(largest)).repeat(32, 1)
    exact = VALUES[nibbles_of(packed).numpy()] * power
    count = int(formats.count_rounded_in_fp16(packed, scales, largest))
    assert count == (held != exact).sum() > 100
    assert int(formats.count_rounded_in_fp16(packed, scales.clamp(min=116), largest)) == 0
