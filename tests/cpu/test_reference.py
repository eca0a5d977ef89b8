"""The reference against slower computations that share no code with it (oracles.py)."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mxfp4_moe import formats, reference
from mxfp4_moe.arithmetic import SM12X_MXF8F6F4, SM90_BF16, Arithmetic

RULES = [SM12X_MXF8F6F4, SM90_BF16]


def random_bytes(low: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)


class TestGroupedGemm:
    def inputs(
        self, counts: list[int], n: int, k: int, scales: tuple[int, int] = (117, 132), seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, experts = sum(counts), len(counts)
        codes = random_bytes(0, 255, rows, k, seed=seed)
        codes[(codes & 0x7F) == 0x7F] = 0
        return (
            codes,
            random_bytes(*scales, rows, k // 32, seed=seed + 1),
            random_bytes(0, 255, experts, n, k // 2, seed=seed + 2),
            random_bytes(*scales, experts, n, k // 32, seed=seed + 3),
            offsets_of(counts),
        )

    @pytest.mark.parametrize("scales", [(117, 132), (70, 184)], ids=str)
    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
    @pytest.mark.parametrize(("counts", "n", "k"), [([3, 0, 1, 5], 16, 96), ([2], 48, 160), ([0, 7], 16, 32)])
    def test_is_the_rule_in_fractions(
        self, counts: list[int], n: int, k: int, rule: Arithmetic, scales: tuple[int, int]
    ) -> None:
        codes, row_scales, packed, weight_scales, offsets = self.inputs(counts, n, k, scales)
        out = reference.grouped_gemm(codes, row_scales, packed, weight_scales, offsets, arithmetic=rule).numpy()
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        unit = Fraction(1, 2) if rule is SM90_BF16 else Fraction(1)
        for e in range(len(counts)):
            rows = slice(offsets[e], offsets[e + 1])
            arrays = (t.numpy() for t in (codes[rows], row_scales[rows], nibbles[e], weight_scales[e]))
            assert oracles.same_bits(out[rows], oracles.gemm(*arrays, rule, unit=unit))

    def test_bfloat16_rows_in_fractions(self) -> None:
        """Exponents over 160 binades, so that sums lose whole products."""
        k, n = 96, 16
        _, _, packed, weight_scales, offsets = self.inputs([5], n, k)
        generator = torch.Generator().manual_seed(4)
        exponents = torch.randint(-100, 60, (5, k), generator=generator).double()
        rows = (torch.randn(5, k, generator=generator, dtype=torch.float64) * exponents.exp2()).bfloat16()
        rows[0] = torch.randn(k, generator=generator).bfloat16()
        out = reference.grouped_gemm(rows, None, packed, weight_scales, offsets).numpy()
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        arrays = (t.numpy() for t in (rows.double(), nibbles[0], weight_scales[0]))
        assert oracles.same_bits(out, oracles.bf16_gemm(*arrays, SM90_BF16))

    def test_who_names_no_arithmetic_gets_that_of_the_format(self) -> None:
        args = self.inputs([9], 48, 640, (100, 150))
        given = {rule.name: reference.grouped_gemm(*args, arithmetic=rule) for rule in RULES}
        assert torch.equal(reference.grouped_gemm(*args), given[SM12X_MXF8F6F4.name])
        assert not torch.equal(*given.values())
        rows = formats.mxfp8_to_bf16(*args[:2])
        assert torch.equal(reference.grouped_gemm(rows, None, *args[2:]), given[SM90_BF16.name])

    def test_integers_are_exact(self) -> None:
        # Sums of at most 288 products of small integers at scale 1: every float32 step is exact.
        rng = np.random.default_rng(0)
        counts, n, k = [5, 2], 32, 288
        a = rng.integers(-16, 17, (7, k)).astype(np.float32)
        b = rng.choice([-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6], (2, n, k)).astype(np.float32)
        codes, packed = formats.encode_e4m3(torch.from_numpy(a)), formats.encode_e2m1(torch.from_numpy(b))
        one = torch.full((2, n, k // 32), 127, dtype=torch.uint8)
        out = reference.grouped_gemm(codes, one[0, :7], packed, one, offsets_of(counts)).numpy()
        assert np.array_equal(out[:5], a[:5] @ b[0].T)
        assert np.array_equal(out[5:], a[5:] @ b[1].T)

    def test_block_sums_are_cut_once(self) -> None:
        # 30 * 448*6 has a float32 ulp of 2^-7: two of 2^-8 count together; one by one in float32 they would be lost.
        experts = 32
        a = torch.full((32,), 448.0)
        b = torch.full((32,), 6.0)
        a[:2], b[:2] = 2.0**-8, 1.0
        a, b = (torch.stack([t.roll(i) for i in range(experts)]) for t in (a, b))
        one = torch.full((experts, 1), 127, dtype=torch.uint8)
        weights = formats.encode_e2m1(b).unsqueeze(1)
        out = reference.grouped_gemm(formats.encode_e4m3(a), one, weights, one.unsqueeze(1), offsets_of([1] * experts))
        assert (out == 30 * 448 * 6 + 2.0**-7).all()

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
    def test_random_values_against_float64(self, rule: Arithmetic) -> None:
        counts, n, k = [33, 0, 90], 80, 2880
        codes, row_scales, packed, weight_scales, offsets = self.inputs(counts, n, k)
        out = reference.grouped_gemm(codes, row_scales, packed, weight_scales, offsets, arithmetic=rule).numpy()
        a = oracles.mxfp8_values(codes.numpy(), row_scales.numpy())
        b = oracles.mxfp4_values(packed.numpy(), weight_scales.numpy())
        for e in range(3):
            rows = slice(offsets[e], offsets[e + 1])
            # Each step cuts its L products and the accumulator 25 bits below the largest, and its sum to float32; no
            # exponent is above that of the sum of magnitudes.
            step = (rule.products + 1) * 2.0**-25 + 2.0**-23
            bound = k // rule.products * step * (np.abs(a[rows]) @ np.abs(b[e]).T)
            assert (np.abs(out[rows] - a[rows] @ b[e].T) <= bound).all()

    def test_nan_stays_in_its_row_and_uncovered_rows_are_zero(self) -> None:
        codes, row_scales, packed, weight_scales, _ = self.inputs([3, 3], 16, 64)
        codes[1, 40] = 0x7F
        out = reference.grouped_gemm(codes, row_scales, packed, weight_scales, offsets_of([2, 1]))
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()
        assert out[3:].count_nonzero() == 0

    def test_refuses(self) -> None:
        codes, row_scales, packed, weight_scales, offsets = self.inputs([2, 2], 16, 64)
        gemm = reference.grouped_gemm
        with pytest.raises(TypeError, match=r"rows: expected uint8 \[R, K\], got float32 \[4, 64\]"):
            gemm(codes.float(), row_scales, packed, weight_scales, offsets)
        with pytest.raises(ValueError, match=r"rows: expected K a multiple of 32, got uint8 \[4, 48\]"):
            gemm(codes[:, :48], row_scales, packed, weight_scales, offsets)
        with pytest.raises(TypeError, match=r"rows: expected bfloat16 or float16 \[R, K\], got uint8 \[4, 64\]"):
            gemm(codes, None, packed, weight_scales, offsets)
        with pytest.raises(ValueError, match="rows: expected MXFP8 for the arithmetic 'SM12x mxf8f6f4', got bfloat16"):
            gemm(codes.bfloat16(), None, packed, weight_scales, offsets, arithmetic=SM12X_MXF8F6F4)
        with pytest.raises(ValueError, match=r"row_scales: expected uint8 \[4, 2\], got uint8 \[4, 1\]"):
            gemm(codes, row_scales[:, :1], packed, weight_scales, offsets)
        with pytest.raises(ValueError, match=r"packed: expected uint8 \[E, N, 32\], got uint8 \[2, 16, 16\]"):
            gemm(codes, row_scales, packed[..., :16], weight_scales, offsets)
        with pytest.raises(ValueError, match=r"scales: expected uint8 \[2, 16, 2\], got uint8 \[1, 16, 2\]"):
            gemm(codes, row_scales, packed, weight_scales[:1], offsets)
        with pytest.raises(ValueError, match=r"packed: .* on cpu, got uint8 \[2, 16, 32\] on meta"):
            gemm(codes, row_scales, packed.to("meta"), weight_scales, offsets)
        with pytest.raises(TypeError, match=r"expert_offsets: expected int32 \[3\], got int64 \[3\]"):
            gemm(codes, row_scales, packed, weight_scales, offsets.long())
        for bad in ([0, 3, 2], [0, 2, 5], [-1, 2, 4]):
            with pytest.raises(ValueError, match=r"expert_offsets: expected ascending values in 0\.\.4"):
                gemm(codes, row_scales, packed, weight_scales, torch.tensor(bad, dtype=torch.int32))


ids_lists = st.integers(0, 4).flatmap(lambda k: st.lists(st.lists(st.integers(-2, 8), min_size=k, max_size=k)))


class TestRoute:
    @given(ids=ids_lists, experts=st.integers(1, 7), wide=st.booleans())
    @example(ids=[], experts=3, wide=False)
    @example(ids=[[-1, 9]], experts=3, wide=True)
    @example(ids=[[2, 2, 2], [0, 2, 0]], experts=3, wide=False)
    def test_against_lists(self, ids: list[list[int]], experts: int, wide: bool) -> None:
        k = len(ids[0]) if ids else 2
        topk_ids = torch.tensor(ids, dtype=torch.int64 if wide else torch.int32).reshape(len(ids), k)
        offsets, row_slot, slot_row = reference.route(topk_ids, experts)
        flat = [e for token in ids for e in token]
        rows = [slot for e in range(experts) for slot, id_ in enumerate(flat) if id_ == e]
        assert [t.dtype for t in (offsets, row_slot, slot_row)] == [torch.int32] * 3
        assert row_slot.tolist() == rows + [-1] * (len(flat) - len(rows))
        assert slot_row.tolist() == [rows.index(slot) if slot in rows else -1 for slot in range(len(flat))]
        count = Counter(flat)
        assert offsets.tolist() == [sum(count[i] for i in range(e)) for e in range(experts + 1)]

    def test_refuses(self) -> None:
        with pytest.raises(TypeError, match=r"topk_ids: expected int32 or int64 \[T, k\], got float32 \[2, 2\]"):
            reference.route(torch.zeros(2, 2), 4)
        with pytest.raises(ValueError, match=r"topk_ids: expected int32 or int64 \[T, k\], got int32 \[2\]"):
            reference.route(torch.zeros(2, dtype=torch.int32), 4)
        with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
            reference.route(torch.zeros(2, 2, dtype=torch.int32), 0)


class TestMTiles:
    @given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=12), tile_m=st.sampled_from([8, 16, 64, 128, 256]))
    @example(counts=[0, 0], tile_m=8)
    @example(counts=[1] * 12, tile_m=128)
    def test_covers_every_row_once(self, counts: list[int], tile_m: int) -> None:
        offsets = offsets_of(counts)
        tiles = reference.m_tiles(offsets, tile_m)
        assert tiles.dtype == torch.int32
        assert tiles.shape == (sum(-(-c // tile_m) for c in counts), 4)
        covered = []
        for expert, begin, end, zero in tiles.tolist():
            assert zero == 0
            assert offsets[expert] <= begin < end <= offsets[expert + 1]
            assert (begin - offsets[expert]) % 8 == 0
            assert end - begin <= tile_m
            covered += range(begin, end)
        assert covered == list(range(sum(counts)))  # in order, so experts and rows ascend
        for expert in range(len(counts)):
            sizes = [end - begin for of, begin, end, _ in tiles.tolist() if of == expert]
            assert len(set(sizes[:-1])) <= 1  # equal, but for what is left
        active = min(sum(counts), len(counts))
        assert len(tiles) <= (sum(counts) + active * (tile_m - 1)) // tile_m

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="tile_m: expected at least 1, got 0"):
            reference.m_tiles(offsets_of([1]), 0)
        with pytest.raises(TypeError, match=r"expert_offsets: expected int32 \[E\+1\], got int64 \[2\]"):
            reference.m_tiles(offsets_of([1]).long(), 8)
