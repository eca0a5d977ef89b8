"""Number formats against ml_dtypes, layouts against loops over their formulas. All comparisons are bitwise."""

from __future__ import annotations

import math
import pickle

import numpy as np
import oracles
import pytest
import torch
from format_cases import random_bytes, random_float_bits, with_neighbours

from mxfp4_moe import formats, tiles
from mxfp4_moe.formats import weight_layout

ALL_BYTES = torch.arange(256).to(torch.uint8)


class TestE2M1:
    def test_values(self) -> None:
        assert formats.E2M1_VALUES[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
        assert [math.copysign(1, v) for v in formats.E2M1_VALUES] == [1] * 8 + [-1] * 8

    def test_decode_every_byte(self) -> None:
        assert oracles.same_bits(formats.decode_e2m1(ALL_BYTES).numpy(), oracles.e2m1_values(ALL_BYTES.numpy()))

    def test_decode_keeps_leading_dimensions_and_order(self) -> None:
        packed = random_bytes(3, 5, 16)
        assert oracles.same_bits(formats.decode_e2m1(packed).numpy(), oracles.e2m1_values(packed.numpy()))

    def test_encode_against_ml_dtypes(self) -> None:
        magnitudes = np.array(formats.E2M1_VALUES[:8])
        edges = with_neighbours(np.concatenate((magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2, [5, 7, 8, 1e30])))
        bits = random_float_bits(20000)
        x = np.concatenate((edges, np.random.default_rng(1).uniform(-8, 8, 20000), bits[~np.isnan(bits)]))
        x = np.concatenate((x, [np.inf, -np.inf])).astype(np.float32)
        x = x[: len(x) // 2 * 2]
        expected = np.clip(x, -6, 6).astype(oracles.E2M1).view(np.uint8)
        packed = formats.encode_e2m1(torch.from_numpy(x)).numpy()
        assert np.array_equal(packed, expected[0::2] | expected[1::2] << 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_decode_then_encode_is_the_identity(self, dtype: torch.dtype) -> None:
        assert torch.equal(formats.encode_e2m1(formats.decode_e2m1(ALL_BYTES).to(dtype)), ALL_BYTES)

    def test_encode_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"x: expected no NaN .*, got float32 \[2\] with NaN"):
            formats.encode_e2m1(torch.tensor([0.0, math.nan]))
        with pytest.raises(ValueError, match=r"x: expected .* a multiple of 2, got float32 \[3\]"):
            formats.encode_e2m1(torch.zeros(3))


class TestE4M3:
    def test_decode_every_byte(self) -> None:
        assert oracles.same_bits(formats.decode_e4m3(ALL_BYTES).numpy(), oracles.e4m3_values(ALL_BYTES.numpy()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_encode_every_half(self, dtype: torch.dtype) -> None:
        x = torch.arange(65536).to(torch.int16).view(dtype)
        assert np.array_equal(formats.encode_e4m3(x).numpy(), oracles.e4m3_codes(x.float().numpy()))

    def test_encode_float32(self) -> None:
        values = oracles.e4m3_values(np.arange(127, dtype=np.uint8))
        ties = (values[1:] + values[:-1]) / 2
        edges = with_neighbours(np.concatenate((values, ties, [448, 464, 480, 1e30, 2.0**-149, 2.0**-126, 2.0**-10])))
        specials = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0], dtype=np.float32)
        for x in (edges, specials, random_float_bits(1 << 20), np.random.default_rng(2).normal(0, 100, 1 << 20)):
            x = x.astype(np.float32)
            assert np.array_equal(formats.encode_e4m3(torch.from_numpy(x)).numpy(), oracles.e4m3_codes(x))

    def test_ties_go_to_the_even_code(self) -> None:
        assert formats.encode_e4m3(torch.tensor([17.0, 19.0, -17.0])).tolist() == [0x58, 0x5A, 0xD8]


class TestE8M0:
    def test_decode_every_byte(self) -> None:
        assert oracles.same_bits(
            formats.decode_e8m0(ALL_BYTES).numpy(), ALL_BYTES.numpy().view(oracles.E8M0).astype(np.float32)
        )


class TestScaleSwizzle:
    @pytest.mark.parametrize("n", [1, 16, 31, 80, 128, 129, 300, 384])
    @pytest.mark.parametrize("k", [32, 96, 128, 160, 2880])
    def test_against_the_formula(self, n: int, k: int) -> None:
        scales = random_bytes(n, k // 32)
        expected = np.zeros(-(-n // 128) * -(-k // 128) * 512, dtype=np.uint8)
        for row in range(n):
            for block in range(k // 32):
                expected[oracles.scale_offset(row, block, k)] = scales[row, block]
        swizzled = formats.swizzle_scales(scales)
        assert swizzled.shape == (-(-n // 128), -(-k // 128), 512)
        assert swizzled.is_contiguous()
        assert np.array_equal(swizzled.flatten().numpy(), expected)
        assert torch.equal(formats.unswizzle_scales(swizzled, n, k), scales)

    def test_leading_dimensions(self) -> None:
        scales = random_bytes(2, 3, 130, 5)
        swizzled = formats.swizzle_scales(scales)
        assert swizzled.shape == (2, 3, 2, 2, 512)
        assert torch.equal(swizzled[1, 2], formats.swizzle_scales(scales[1, 2]))
        assert torch.equal(formats.unswizzle_scales(swizzled, 130, 160), scales)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[\.\.\., N, C\], got uint8 \[4\]"):
            formats.swizzle_scales(random_bytes(4))
        with pytest.raises(TypeError, match=r"scales: expected uint8 tensor, got float32 \[4, 4\]"):
            formats.swizzle_scales(torch.zeros(4, 4))
        with pytest.raises(ValueError, match="k: expected a multiple of 32, got 100"):
            formats.unswizzle_scales(random_bytes(1, 1, 512), 128, 100)
        with pytest.raises(ValueError, match=r"swizzled: expected uint8 \[\.\.\., 2, 1, 512\], got .*\[1, 1, 512\]"):
            formats.unswizzle_scales(random_bytes(1, 1, 512), 129, 128)


ORDERS = list(formats.WordOrder)


def codes_of(packed: torch.Tensor) -> np.ndarray:
    """[..., K/2] -> the K codes of 4 bits."""
    return np.stack((packed.numpy() & 15, packed.numpy() >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


class TestWordOrder:
    @pytest.mark.parametrize("order", ORDERS)
    def test_against_integers(self, order: formats.WordOrder) -> None:
        packed = random_bytes(2, 3, 64)
        blocks = codes_of(packed).reshape(-1, 32).tolist()
        words = [word for block in blocks for word in oracles.weight_words(block, order.value)]
        made = formats.pack_words(packed, order)
        assert made.shape == packed.shape
        assert made.numpy().tobytes() == b"".join(word.to_bytes(4, "little") for word in words)
        assert torch.equal(formats.unpack_words(made, order), packed)

    @pytest.mark.parametrize("order", ORDERS)
    def test_every_bit_has_a_place_of_its_own(self, order: formats.WordOrder) -> None:
        bits = torch.zeros(128, 16, dtype=torch.uint8)
        for i in range(128):
            bits[i, i // 8] = 1 << i % 8
        made = formats.pack_words(bits, order)
        assert torch.equal(formats.unpack_words(made, order), bits)
        places = torch.stack([made >> i & 1 for i in range(8)], -1).flatten(1)
        assert torch.equal(places.sum(0), torch.ones(128, dtype=torch.int64))
        assert torch.equal(places.sum(1), torch.ones(128, dtype=torch.int64))

    def test_containers_expand_as_the_kernel_expands_them(self) -> None:
        """SM12x: one mask for the even k, a rotation by 4 and the mask for the odd; codes in bits 5..2 of bytes."""
        packed = random_bytes(8, 16)
        words = formats.pack_words(packed, formats.WordOrder.CONTAINERS).numpy().view("<u4")
        even = (words & np.uint32(0x3C3C3C3C)) >> 2
        odd = ((words >> np.uint32(4) | words << np.uint32(28)) & np.uint32(0x3C3C3C3C)) >> 2
        assert np.array_equal(even.view(np.uint8), packed.numpy() & 15)
        assert np.array_equal(odd.view(np.uint8), packed.numpy() >> 4)

    def test_of_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        capability = {0: (9, 0), 1: (12, 0), 2: (12, 1), 3: (8, 9)}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
        weight_layout._order_of.cache_clear()
        orders = [formats.word_order_of(torch.device("cuda", index)) for index in capability]
        assert [order.value for order in orders] == ["pairs", "containers", "containers", "containers"]
        sm12x = [formats.word_order_of(torch.device("cuda", 1), name) for name in ("mxfp8", "bf16", "mxfp4", "nvfp4")]
        assert [order.value for order in sm12x] == ["containers", "pairs", "plain", "plain"]
        sm90 = {formats.word_order_of(torch.device("cuda", 0), name) for name in ("mxfp8", "bf16", "mxfp4", "nvfp4")}
        assert sm90 == {formats.WordOrder.PAIRS}
        weight_layout._order_of.cache_clear()
        for name in ("cpu", "meta"):
            assert formats.word_order_of(torch.device(name)) is formats.WordOrder.CONTAINERS

    def test_refuses_half_blocks(self) -> None:
        for order in ORDERS:
            with pytest.raises(ValueError, match=r"packed: expected .* a multiple of 16, got uint8 \[2, 24\]"):
                formats.pack_words(random_bytes(2, 24), order)
            with pytest.raises(ValueError, match=r"words: expected .* a multiple of 16, got uint8 \[2, 24\]"):
                formats.unpack_words(random_bytes(2, 24), order)

    def test_an_order_of_the_past_is_refused_where_weights_are_loaded(self) -> None:
        """Its words have the sizes of today's, so nothing else would notice."""
        with pytest.raises(ValueError, match="got 'halves', which SM90's kernels read no longer; prepare the weights"):
            formats.WordOrder("halves")
        with pytest.raises(ValueError, match="word order: expected 'containers', 'pairs' or 'plain', got 'other'"):
            formats.WordOrder("other")
        stored = pickle.dumps(formats.WordOrder.PAIRS)
        assert pickle.loads(stored) is formats.WordOrder.PAIRS
        old = pickle.dumps(formats.WordOrder.PAIRS, protocol=0).replace(b"pairs", b"halves")
        with pytest.raises(ValueError, match="prepare the weights from their checkpoint again"):
            pickle.loads(old)


class TestWeightBlocks:
    @pytest.mark.parametrize("words", [1, 2], ids=["mxfp4", "nvfp4"])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("n", [1, 16, 64, 96, 129, 320])
    @pytest.mark.parametrize("k", [32, 96, 128, 160, 448])
    def test_against_the_formula(self, n: int, k: int, order: formats.WordOrder, words: int) -> None:
        packed, scales = random_bytes(n, k // 2), random_bytes(n, k // 32 * words, seed=1)
        weight = formats.arrange_weights(packed, scales, order, words)
        assert weight.shape == (formats.weight_bytes(n, k, words),)
        expected = np.zeros(len(weight), dtype=np.uint8)  # padding rows and scales are zero
        codes = codes_of(packed)
        for row in range(n):
            for block in range(k // 32 * words):
                expected[oracles.weight_scale_offset(row, block, n, k, words)] = scales[row, block]
            for block in range(k // 32):
                for t, word in enumerate(oracles.weight_words(codes[row, 32 * block :][:32].tolist(), order.value)):
                    at = oracles.weight_word_offset(row, block, t, n, k, words)
                    expected[at : at + 4] = list(word.to_bytes(4, "little"))
        assert np.array_equal(weight.numpy(), expected)
        back, back_scales = formats.restore_weights(weight, n, k, order, words)
        assert torch.equal(back, packed)
        assert torch.equal(back_scales, scales)
        assert back.is_contiguous()
        assert back_scales.is_contiguous()
        for new in ORDERS:
            reordered = formats.reorder_words(weight, n, k, order, new, words)
            assert torch.equal(reordered, formats.arrange_weights(packed, scales, new, words))
            assert reordered.data_ptr() != weight.data_ptr()

    @pytest.mark.gpu
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(("n", "k"), [(16, 32), (129, 448), (5760, 2880)])
    def test_on_the_gpu(self, n: int, k: int, order: formats.WordOrder) -> None:
        packed, scales = random_bytes(n, k // 2), random_bytes(n, k // 32, seed=1)
        expected = formats.arrange_weights(packed, scales, order)
        weight = formats.arrange_weights(packed.cuda(), scales.cuda(), order)
        assert torch.equal(weight.cpu(), expected)
        back, back_scales = formats.restore_weights(weight, n, k, order)
        assert torch.equal(back.cpu(), packed)
        assert torch.equal(back_scales.cpu(), scales)
        for new in ORDERS:
            reordered = formats.reorder_words(weight, n, k, order, new)
            assert torch.equal(reordered.cpu(), formats.reorder_words(expected, n, k, order, new))

    @pytest.mark.parametrize("words", [1, 2], ids=["mxfp4", "nvfp4"])
    def test_rows_in_pieces(self, words: int) -> None:
        n, k, order = 210, 288, formats.WordOrder.PAIRS
        packed, scales = random_bytes(n, k // 2), random_bytes(n, k // 32 * words, seed=1)
        whole = formats.arrange_weights(packed, scales, order, words)
        weight = torch.full_like(whole, 0xEE)
        for begin, end in ((128, 210), (0, 64), (64, 128)):
            formats.write_rows(weight, n, k, begin, packed[begin:end], scales[begin:end], order, words)
            some, some_scales = formats.read_rows(whole, n, k, slice(begin, end), order, words)
            assert torch.equal(some, packed[begin:end])
            assert torch.equal(some_scales, scales[begin:end])
        assert torch.equal(weight, whole)

    def test_sizes(self) -> None:
        assert formats.weight_bytes(64, 128) == 4352
        assert formats.weight_bytes(65, 160) == 2 * (4352 + 256 + 1024)
        assert formats.weight_bytes(64, 128, 2) == 4608
        assert formats.weight_bytes(65, 160, 2) == 2 * (4608 + 512 + 1024)
        assert formats.weight_bytes(5760, 2880) == 5760 * 2880 // 2 + 5760 * 4 * 23

    def test_refuses(self) -> None:
        order = formats.WordOrder.CONTAINERS
        with pytest.raises(ValueError, match=r"packed: expected .* a multiple of 16, got uint8 \[4, 24\]"):
            formats.arrange_weights(random_bytes(4, 24), random_bytes(4, 1), order)
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[4, 2\], got uint8 \[4, 1\]"):
            formats.arrange_weights(random_bytes(4, 32), random_bytes(4, 1), order)
        with pytest.raises(ValueError, match=r"weight: expected uint8 \[4352\], got uint8 \[4351\]"):
            formats.restore_weights(random_bytes(4351), 64, 128, order)
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[4, 2\], got uint8 \[4, 1\]"):
            formats.arrange_weights(random_bytes(4, 16), random_bytes(4, 1), order, 2)
        with pytest.raises(ValueError, match="scale_words: expected 1 of MXFP4 or 2 of NVFP4, got 3"):
            formats.weight_bytes(64, 128, 3)
        with pytest.raises(ValueError, match="first: expected a multiple of 64, got 32"):
            formats.write_rows(random_bytes(4352), 64, 128, 32, random_bytes(32, 64), random_bytes(32, 4), order)
        with pytest.raises(ValueError, match="rows: expected a multiple of 64, got 32"):
            formats.write_rows(random_bytes(4352), 64, 128, 0, random_bytes(32, 64), random_bytes(32, 4), order)


class TestInterleave:
    def test_positions(self) -> None:
        codes = random_bytes(3, 2, 96)
        stored = formats.interleave_k(codes)
        for block in range(3):
            for s in range(16):
                assert torch.equal(stored[..., 32 * block + s], codes[..., 32 * block + 2 * s])
                assert torch.equal(stored[..., 32 * block + 16 + s], codes[..., 32 * block + 2 * s + 1])
        assert torch.equal(formats.deinterleave_k(stored), codes)

    def test_refuses_partial_blocks(self) -> None:
        for function in (formats.interleave_k, formats.deinterleave_k):
            with pytest.raises(ValueError, match="codes: expected a last dimension that is a multiple of 32"):
                function(random_bytes(2, 48))


class TestRowScales:
    @pytest.mark.parametrize("rows", [0, 1, 4, 6, 33])
    @pytest.mark.parametrize("k", [32, 128, 160, 2880])
    def test_positions(self, rows: int, k: int) -> None:
        scales = random_bytes(rows, k // 32)
        expected = np.zeros((-(-k // 128), -(-rows // 4) * 4, 4), dtype=np.uint8)
        for row in range(rows):
            for block in range(k // 32):
                expected[block // 4, row, block % 4] = scales[row, block]
        packed = formats.pack_row_scales(scales)
        assert packed.is_contiguous()
        assert np.array_equal(packed.numpy(), expected)
        assert torch.equal(formats.unpack_row_scales(packed, rows, k), scales)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[R, K/32\], got uint8 \[2, 2, 2\]"):
            formats.pack_row_scales(random_bytes(2, 2, 2))
        with pytest.raises(ValueError, match=r"packed: expected uint8 \[2, 8, 4\], got uint8 \[2, 4, 4\]"):
            formats.unpack_row_scales(random_bytes(2, 4, 4), 5, 160)


class TestMxfp8ToBf16:
    """Against float64, which holds every code times every scale."""

    CODES = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    SCALES = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 8).contiguous()
    EXACT = formats.decode_e4m3(CODES).double() * (SCALES[:, :1].double() - 127).exp2()

    def made(self) -> torch.Tensor:
        out = formats.mxfp8_to_bf16(self.CODES, self.SCALES)
        assert out.dtype is torch.bfloat16
        assert out.shape == self.CODES.shape
        return out.double()

    def test_exact_from_2_to_the_minus_133_to_the_largest(self) -> None:
        exact, size = self.EXACT, self.EXACT.abs()
        fits = (size <= 2.0**128 - 2.0**120) & ((exact * 2.0**133).frac() == 0)
        assert torch.equal(self.made()[fits], exact[fits])
        assert fits.sum() > 250 * len(exact)
        assert size[fits & (size > 0)].min() == 2.0**-133
        assert size[fits].max() == 1.875 * 2.0**127

    def test_below_multiples_of_2_to_the_minus_133_to_nearest_even(self) -> None:
        small = self.EXACT.abs() < 2.0**-126
        assert (self.EXACT[small] * 2.0**133).frac().any(), "otherwise nothing is rounded here"
        assert torch.equal(self.made()[small] * 2.0**133, (self.EXACT[small] * 2.0**133).round())

    def test_above_infinity_and_nan_stays_nan(self) -> None:
        large = self.EXACT.abs() >= 2.0**128
        assert large.any()
        assert torch.equal(self.made()[large], self.EXACT[large].sign() * torch.inf)
        assert torch.equal(self.made().isnan(), self.EXACT.isnan())
        assert formats.mxfp8_to_bf16(self.CODES[:1, :32], torch.full((1, 1), 255, dtype=torch.uint8)).isnan().all()

    def test_of_bfloat16_values_the_largest_alone_leave_the_range(self) -> None:
        """docs/arithmetic.md: E4M3 rounds 31/32 of 2^128 up."""
        x = torch.zeros(2, 32, dtype=torch.bfloat16)
        x[0, 3], x[1, 3] = 1.9375 * 2.0**127, 1.9296875 * 2.0**127
        out = formats.mxfp8_to_bf16(*formats.quantize_mxfp8(x))
        assert out[:, 3].tolist() == [float("inf"), 1.875 * 2.0**127]

    def test_signs_of_zeros_stay(self) -> None:
        assert torch.equal(self.made().signbit()[:, 128], torch.ones(255, dtype=torch.bool))

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[1, 2\], got uint8 \[1, 1\]"):
            formats.mxfp8_to_bf16(random_bytes(1, 64), random_bytes(1, 1))


class TestBytesOfAPair:
    """What tiles counts without torch is what quantizers and prepared weights have."""

    @pytest.mark.parametrize("kind", formats.WeightFormat)
    def test_weights(self, kind: formats.WeightFormat) -> None:
        n, k, halves = 192, 384, tiles.pair_of("bf16", kind.value)
        assert kind.weight_bytes(n, k) == n * k * tiles.value_bytes(kind.value)
        assert kind.weight_bytes(64, 128) == tiles.weight_block_bytes(halves)
        assert kind.scale_words == tiles.scale_words(halves)
        factors = 8 if kind is formats.WeightFormat.NVFP4 else 0  # of gates and of ups
        assert tiles.expert_bytes(halves, n, k) == kind.weight_bytes(n, k) + factors
        assert tiles.expert_bytes(tiles.pair_of("fp16", kind.value), n, k) == kind.weight_bytes(n, k) + 8

    def test_activations(self) -> None:
        rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
        made = {
            "mxfp8": formats.quantize_mxfp8(rows),
            "mxfp4": formats.quantize_mxfp4_activations(rows),
            "nvfp4": formats.quantize_nvfp4(rows, torch.tensor(1.0)),
            "bf16": (rows.bfloat16(),),
            "fp16": (rows.half(),),
        }
        for name, parts in made.items():
            assert sum(part.nbytes for part in parts) == rows.numel() * tiles.value_bytes(name), name
        assert {tiles.formats_of(pair)[1] for pair in tiles.PAIRS} == made.keys()
