"""NVFP4, and MXFP4 of activations: bytes against oracles that go block by block, and what cannot be a number."""

from __future__ import annotations

import math

import fp4_oracles
import numpy as np
import oracles
import pytest
import torch
from format_cases import random_bytes
from fp4_cases import hard_values

from mxfp4_moe import formats


@pytest.mark.parametrize("scale", [1.0, 0.37, 448 * 6 / 3.21, 3e-6, 5e7, "each row"])
@pytest.mark.parametrize("name", hard_values(16))
def test_nvfp4_against_brute_force(name: str, scale: float | str) -> None:
    x = hard_values(16)[name]
    if isinstance(scale, str):
        given = np.exp2(np.random.default_rng(8).uniform(-9, 9, len(x))).astype(np.float32)
        ours = torch.from_numpy(given)
    else:
        given, ours = np.full(len(x), scale, np.float32), torch.tensor(scale)
    packed, scales = formats.quantize_nvfp4(torch.from_numpy(x), ours)
    expected_packed, expected_scales = fp4_oracles.nvfp4_quantize(x, given)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(packed.numpy(), expected_packed)


@pytest.mark.parametrize("name", hard_values(32))
def test_mxfp4_activations_against_brute_force(name: str) -> None:
    x = hard_values(32)[name]
    packed, scales = formats.quantize_mxfp4_activations(torch.from_numpy(x))
    expected_packed, expected_scales = fp4_oracles.mxfp4_quantize(x)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert np.array_equal(packed.numpy(), expected_packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_quantized_as_their_float32_values(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    scale = formats.nvfp4_row_scales(x)
    assert scale.shape == (5, 2)
    for got, expected in zip(
        (*formats.quantize_nvfp4(x, scale), *formats.quantize_mxfp4_activations(x)),
        (*formats.quantize_nvfp4(x.float(), scale), *formats.quantize_mxfp4_activations(x.float())),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("amax", "byte"), [(6.0, 127), (6.0 * (1 + 2.0**-22), 128), (4.0, 127), (3.0, 126)])
def test_the_scale_of_mxfp4_activations_is_rounded_up(amax: float, byte: int) -> None:
    """OCP's rule for weights, rounded down, has 127, 127, 127 and 126 there, and saturates at 6."""
    x = torch.zeros(1, 32)
    x[0, 9] = amax
    packed, scales = formats.quantize_mxfp4_activations(x)
    assert scales.item() == byte
    values = formats.dequantize_mxfp4(packed, scales)
    assert abs(values[0, 9] - amax) <= 2.0 ** (byte - 127)
    assert values.count_nonzero() == 1


def test_the_global_scale_brings_the_largest_to_2688() -> None:
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    amax = x.abs().amax(-1)
    assert torch.equal(formats.nvfp4_row_scales(x), 2688 / amax)
    assert torch.equal(formats.nvfp4_global_scale(x), 2688 / amax.amax())
    _, scales = formats.quantize_nvfp4(x, formats.nvfp4_row_scales(x))
    assert scales.amax(-1).tolist() == [0x7E] * 3, "448"


def test_global_scales_of_what_says_nothing() -> None:
    x = torch.zeros(5, 16)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = math.nan, math.inf, 2.0**-140, 3e38
    scales = formats.nvfp4_row_scales(x)
    assert scales.tolist() == [1.0, 1.0, 1.0, torch.finfo(torch.float32).max, float(2688 / torch.tensor(3e38))]
    assert formats.nvfp4_global_scale(torch.zeros(0, 32)).item() == 1
    assert formats.nvfp4_row_scales(torch.zeros(0, 32)).shape == (0,)


def test_poison_stays_in_its_block_and_zeros_keep_their_signs() -> None:
    x = torch.full((1, 64), 6.0)
    x[0, 20] = math.inf
    x[0, 32:48] = -0.0
    packed, scales = formats.quantize_nvfp4(x, torch.tensor(1.0))
    values = formats.dequantize_nvfp4(packed, scales, torch.tensor(1.0))
    assert values[0, 16:32].isnan().all()
    assert torch.equal(values.nan_to_num(9), x.clone().index_fill_(1, torch.arange(16, 32), 9.0))
    assert bool(values[0, 32:48].signbit().all())
    assert bool((packed[0, 16:24] == 0x88).all())
    packed, scales = formats.quantize_mxfp4_activations(x)
    values = formats.dequantize_mxfp4(packed, scales)
    assert values[0, :32].isnan().all()
    assert values[0, 32:].isfinite().all()


def test_a_block_whose_scale_rounds_to_zero_is_zero() -> None:
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 1], x[0, 2] = 1e-3, -1e-3, -0.0
    packed, scales = formats.quantize_nvfp4(x, torch.tensor(1.0))
    assert scales.item() == 0
    assert packed[0, :2].tolist() == [0xF7, 0x77], "6, -6, and NaNs, which are 6"
    assert not formats.dequantize_nvfp4(packed, scales, torch.tensor(1.0)).any()


def test_dequantize() -> None:
    packed, scales = random_bytes(5, 48), random_bytes(5, 6, seed=1) & 0x7F
    scales[scales == 0x7F] = 0x11
    given = torch.rand(5, generator=torch.Generator().manual_seed(2)) * 9
    exact = fp4_oracles.nvfp4_values(packed.numpy(), scales.numpy())
    assert oracles.same_bits(formats.nvfp4_products(packed, scales).numpy(), exact)
    assert torch.equal(
        formats.nvfp4_products(packed, scales).bfloat16().float(), formats.nvfp4_products(packed, scales)
    )
    expected = exact.astype(np.float32) / given.numpy()[:, None]
    assert oracles.same_bits(formats.dequantize_nvfp4(packed, scales, given).numpy(), expected)


@pytest.mark.parametrize(("rows", "k"), [(1, 16), (128, 64), (130, 80), (3, 176)])
def test_scales_of_16_in_the_128x4_order(rows: int, k: int) -> None:
    scales = random_bytes(2, rows, k // 16)
    swizzled = formats.swizzle_scales(scales)
    assert swizzled.shape == (2, -(-rows // 128), -(-k // 64), 512)
    flat = swizzled[1].flatten()
    for r, c in {(0, 0), (rows - 1, k // 16 - 1), (rows // 2, k // 32)}:
        assert flat[oracles.scale_offset(r, c, 2 * k)] == scales[1, r, c]
    assert torch.equal(formats.unswizzle_scales(swizzled, rows, k, formats.NVFP4_BLOCK), scales)


def test_refusals() -> None:
    good, one = torch.zeros(2, 32), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"x: expected a last dimension that is a multiple of 16, got .*\[2, 40\]"):
        formats.quantize_nvfp4(torch.zeros(2, 40), one)
    with pytest.raises(TypeError, match="x: expected float32 or bfloat16 or float16 tensor, got float64"):
        formats.quantize_nvfp4(good.double(), one)
    with pytest.raises(TypeError, match="global_scale: expected float32 tensor, got float64"):
        formats.quantize_nvfp4(good, one.double())
    with pytest.raises(ValueError, match=r"global_scale: expected float32 \[\] or \[2\], one for each row, got "):
        formats.quantize_nvfp4(good, torch.ones(3))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="global_scale: expected finite numbers above 0"):
            formats.quantize_nvfp4(good, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"scales: expected uint8 \[2, 2\], got uint8 \[2, 1\]"):
        formats.dequantize_nvfp4(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), one)
