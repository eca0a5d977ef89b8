"""MXFP8 and MXFP4, against oracles that share no code with them."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from format_cases import random_bytes, random_float_bits, with_neighbours

from mxfp4_moe import formats


def test_encode_e8m0_rounds_up() -> None:
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    bits = random_float_bits(4096, seed=5)
    x = np.abs(np.concatenate((np.zeros(1, np.float32), with_neighbours(powers), bits[np.isfinite(bits)])))
    mantissa, exponent = np.frexp(x.astype(np.float64))  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    smallest_power = exponent - (mantissa == 0.5)
    expected = np.where(x == 0, 0, (smallest_power + 127).clip(0, 254)).astype(np.uint8)
    assert np.array_equal(formats.encode_e8m0(torch.from_numpy(x)).numpy(), expected)
    poison = torch.tensor([torch.inf, torch.nan])
    assert formats.encode_e8m0(poison).tolist() == [254, 254]


def mxfp8_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shape = (64, 96)
    normal = rng.normal(size=shape)
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64))
    # One block per value, the value its amax: powers of two, and where amax/448 passes a power of two.
    edges = with_neighbours(np.concatenate((powers, 448 * np.exp2(np.arange(-140, 119, dtype=np.float64)))))
    edges = edges[np.isfinite(edges)]
    edge_blocks = edges[:, None] * rng.uniform(-1, 1, (len(edges), 32)).astype(np.float32)
    edge_blocks[np.arange(len(edges)), rng.integers(0, 32, len(edges))] = edges
    # The same for the products that are subnormal themselves: every count of ulps near 2^-127 and 2^-126.
    tiny = (448 * np.exp2(rng.uniform(-130, -124, (256, 1)))).astype(np.float32)
    mixed = normal * np.exp2(rng.integers(-140, 120, (64, 1)))
    zeros = np.zeros(shape)
    zeros[::3] = -0.0
    zeros[5, 40] = 1e-3
    bits = random_float_bits(64 * 96, seed=4).reshape(shape)
    poisoned = normal.copy()
    poisoned[0, 3], poisoned[1, 40], poisoned[2, 95], poisoned[3, :32] = np.nan, np.inf, -np.inf, np.nan
    huge = np.full(shape, np.finfo(np.float32).max)
    huge[:, ::2] *= -0.3
    cases = {
        "normal": normal,
        "edges": edge_blocks,
        "subnormal products": tiny * rng.uniform(-1, 1, (256, 32)),
        "every magnitude": mixed,
        "zeros of both signs": zeros,
        "subnormals": rng.integers(-(2**23), 2**23, shape) * 2.0**-149,
        "huge": huge,
        "random bits": np.where(np.isfinite(bits), bits, 1),
        "not finite": poisoned,
        "many outliers": normal**9,
    }
    return {name: x.astype(np.float32) for name, x in cases.items()}


class TestMxfp8:
    @pytest.mark.parametrize("name", mxfp8_cases())
    def test_quantize_against_brute_force(self, name: str) -> None:
        x = mxfp8_cases()[name]
        codes, scales = formats.quantize_mxfp8(torch.from_numpy(x))
        expected_codes, expected_scales = oracles.mxfp8_quantize(x)
        assert np.array_equal(scales.numpy(), expected_scales)
        assert np.array_equal(codes.numpy(), expected_codes)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves_are_quantized_as_their_float32_values(self, dtype: torch.dtype) -> None:
        x = torch.randn(7, 3, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
        codes, scales = formats.quantize_mxfp8(x)
        expected_codes, expected_scales = oracles.mxfp8_quantize(x.float().numpy())
        assert np.array_equal(codes.numpy(), expected_codes)
        assert np.array_equal(scales.numpy(), expected_scales)

    @pytest.mark.parametrize(
        ("amax", "byte", "code"),
        [
            (448.0, 127, 0x7E),  # exactly the largest code at scale 1
            (math.nextafter(448.0, 500.0), 127, 0x7E),  # the float32 above 448 is still 448 when rounded from double
            (448.0 + 2.0**-15, 128, 0x76),  # one float32 ulp more needs scale 2
            (1.0, 119, 0x78),  # 1/448 rounds up to 2^-8
            (448 * 2.0**-127, 0, 0x7E),  # the smallest scale
            (449 * 2.0**-127, 1, 0x76),
            (2.0**-149, 0, 0x00),
        ],
    )
    def test_known_values(self, amax: float, byte: int, code: int) -> None:
        x = torch.zeros(1, 32)
        x[0, 7] = amax
        codes, scales = formats.quantize_mxfp8(x)
        assert (scales.item(), codes[0, 7].item()) == (byte, code)
        assert codes.count_nonzero() == (code != 0)

    def test_a_poisoned_block_decodes_to_nan(self) -> None:
        x = torch.ones(64)
        x[40] = math.inf
        values = formats.dequantize_mxfp8(*formats.quantize_mxfp8(x))
        assert values[:32].isfinite().all()
        assert values[32:].isnan().all()

    def test_dequantize(self) -> None:
        codes, scales = random_bytes(5, 96), random_bytes(5, 3, seed=1) // 2 + 60
        expected = oracles.mxfp8_values(codes.numpy(), scales.numpy())
        assert oracles.same_bits(formats.dequantize_mxfp8(codes, scales).numpy(), expected)

    def test_empty(self) -> None:
        codes, scales = formats.quantize_mxfp8(torch.zeros(0, 64))
        assert (codes.shape, scales.shape) == ((0, 64), (0, 2))

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected a last dimension that is a multiple of 32, got .*\[2, 40\]"):
            formats.quantize_mxfp8(torch.zeros(2, 40))
        with pytest.raises(TypeError, match=r"x: expected float32 or bfloat16 or float16 tensor, got float64 \[32\]"):
            formats.quantize_mxfp8(torch.zeros(32, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[2, 2\], got uint8 \[2, 1\]"):
            formats.dequantize_mxfp8(random_bytes(2, 64), random_bytes(2, 1))


class TestMxfp4:
    def test_quantize_against_brute_force(self) -> None:
        cases = mxfp8_cases()
        x = np.concatenate([cases[name].reshape(-1, 32) for name in cases if name != "not finite"])
        packed, scales = formats.quantize_mxfp4(torch.from_numpy(x))
        amax = np.abs(x).max(axis=1).astype(np.float64)
        exponent = np.frexp(amax)[1] - 1  # floor(log2(amax))
        expected = np.where(amax == 0, 0, np.maximum(exponent - 2 + 127, 0))
        assert np.array_equal(scales.numpy()[:, 0], expected)
        scaled = np.clip(x.astype(np.float64) * np.exp2(127.0 - expected)[:, None], -6, 6)
        scaled[amax == 0] = 0
        codes = scaled.astype(np.float32).astype(oracles.E2M1).view(np.uint8)
        assert np.array_equal(packed.numpy(), codes[:, 0::2] | codes[:, 1::2] << 4)

    def test_representable_values_come_back(self) -> None:
        packed, scales = random_bytes(20, 48), random_bytes(20, 3, seed=1) // 2 + 64
        packed[:, ::16] = 0x70  # each block holds a 6, so the scale is determined
        values = formats.dequantize_mxfp4(packed, scales)
        assert oracles.same_bits(values.numpy(), oracles.mxfp4_values(packed.numpy(), scales.numpy()))
        again_packed, again_scales = formats.quantize_mxfp4(values)
        assert torch.equal(again_packed, packed)
        assert torch.equal(again_scales, scales)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, bad: float) -> None:
        x = torch.zeros(2, 32)
        x[1, 1] = bad
        with pytest.raises(ValueError, match="x: expected finite values"):
            formats.quantize_mxfp4(x)
