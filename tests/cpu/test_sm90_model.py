"""SM90's cost model, its fit, and what its choices lose on the measurements that ship as a tuned table."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest
from tuned_cases import BY_NAME, H200, LAYER, TILES

from mxfp4_moe._choice import choice, sm90_model, tuned
from mxfp4_moe._choice.facts import Layer
from mxfp4_moe._choice.rows import expected_active, row_probabilities
from mxfp4_moe.tiles import (
    MXFP4_BF16,
    MXFP4_FP16,
    MXFP4_MXFP4,
    MXFP4_MXFP8,
    NVFP4_BF16,
    NVFP4_FP16,
    NVFP4_NVFP4,
    Tile,
    expert_bytes,
)

H100 = BY_NAME["NVIDIA H100 80GB HBM3"]
SENSIBLE = [tile for tile in TILES if sm90_model.sensible(tile)]
TOKENS = (1, 2, 3, 7, 16, 60, 256, 900, 1024, 3000, 16384)


@pytest.mark.parametrize(
    ("rows", "m", "columns"),
    [(1, 8, 8), (9, 16, 16), (1, 32, 16), (17, 64, 32), (1, 128, 32), (100, 128, 112), (1, 256, 64), (65, 256, 96)],
)
def test_a_tile_computes_whole_steps_of_columns(rows: int, m: int, columns: int) -> None:
    assert sm90_model.width(rows, m) == columns


def test_rows_are_split_evenly() -> None:
    """Two tokens that both have every expert twice over, and so on: no chance in it."""
    assert dict(sm90_model.widths(130, 1, 1, 128)) == {80: 1.0, 64: 1.0}, "72 and 58 rows"
    assert dict(sm90_model.widths(128, 1, 1, 128)) == {128: 1.0}
    for m in (8, 32, 128):
        tiles = sum(count for _, count in sm90_model.widths(40, 3, 16, m))
        assert tiles == pytest.approx(sum(p * math.ceil(count / m) for count, p in row_probabilities(40, 3, 16)))


@pytest.mark.parametrize("tile", SENSIBLE, ids=lambda tile: tile.name)
def test_time_grows_with_work_and_falls_with_a_better_gpu(tile: Tile) -> None:
    for tokens in TOKENS:
        us = sm90_model.layer_us(tile, H100, LAYER, tokens)
        assert sm90_model.layer_us(tile, H100, LAYER, 2 * tokens) > us
        for better in (
            dataclasses.replace(H100, gb_per_s=1.2 * H100.gb_per_s),
            dataclasses.replace(H100, ghz=1.2 * H100.ghz),
        ):
            assert sm90_model.layer_us(tile, better, LAYER, tokens) < us
        weights = 128 * (1 - (31 / 32) ** tokens) * 13_219_200
        assert us > weights / H100.gb_per_s / 1e3, "the memory's floor"


@pytest.mark.parametrize("tile", SENSIBLE, ids=lambda tile: tile.name)
def test_each_pair_has_its_bytes_and_its_kernels_instructions(tile: Tile) -> None:
    def gemms(pair: str, gb_per_s: float) -> float:
        few = dataclasses.replace(sm90_model.CONSTANTS, around_us=0.0, row_us=0.0)
        return sm90_model.layer_us(tile, dataclasses.replace(H100, gb_per_s=gb_per_s), LAYER, 256, few, pair)

    def bytes_of(pair: str) -> float:
        return gemms(pair, 1.0) / gemms(MXFP4_BF16, 1.0)  # memory is all that counts

    assert bytes_of(NVFP4_BF16) == pytest.approx((0.5 + 1 / 16) / (0.5 + 1 / 32), rel=1e-5)  # and factors
    assert bytes_of(NVFP4_NVFP4) == bytes_of(NVFP4_BF16) == pytest.approx(bytes_of(NVFP4_FP16))
    assert bytes_of(MXFP4_FP16) == pytest.approx(1, rel=1e-5)
    us = {pair: gemms(pair, 1e9) for pair in (MXFP4_BF16, NVFP4_BF16, MXFP4_FP16, NVFP4_FP16)}  # and nothing that does
    fewer = ((MXFP4_BF16, NVFP4_BF16), (MXFP4_BF16, MXFP4_FP16), (NVFP4_BF16, NVFP4_FP16), (MXFP4_FP16, NVFP4_FP16))
    assert all(us[pair] < us[other] for pair, other in fewer), "the other has more instructions"
    for bandwidth in (1.0, H100.gb_per_s, 1e9):
        assert gemms(MXFP4_MXFP8, bandwidth) == gemms(MXFP4_BF16, bandwidth) == gemms(MXFP4_MXFP4, bandwidth)


def test_a_pairs_choice_is_by_its_own_time() -> None:
    """More bytes and instructions for each weight: of two tiles that were near each other, the other one."""
    of = {pair: sm90_model.choose(352, LAYER, H100, TILES, pair).mn for pair in (MXFP4_MXFP8, NVFP4_NVFP4)}
    assert of == {MXFP4_MXFP8: (16, 128), NVFP4_NVFP4: (32, 128)}
    assert {pair: choice.modelled(352, LAYER, H100, tuple(TILES), pair).mn for pair in of} == of


def test_the_sensible_tiles_are_those_that_were_found_to_be() -> None:
    """By measurements over all tiles (docs/performance.md); a tile that is new goes by the rule."""
    found = {(8, 64), (8, 128), (16, 64), (16, 128), (32, 64), (32, 128), (64, 128), (64, 256), (128, 256)}
    assert {tile.mn for tile in SENSIBLE} == found


def test_only_sensible_tiles_are_chosen_where_there_are_any() -> None:
    for device in (H100, H200):
        assert all(sm90_model.choose(tokens, LAYER, device, TILES) in SENSIBLE for tokens in (0, *TOKENS))
    left = [tile for tile in TILES if tile not in SENSIBLE]
    assert sm90_model.choose(64, LAYER, H100, left) in left
    with pytest.raises(ValueError, match="tiles"):
        sm90_model.choose(64, LAYER, H100, [])


def test_few_tokens_get_small_tiles_and_many_get_large_ones() -> None:
    chosen = {tokens: sm90_model.choose(tokens, LAYER, H100, TILES).m for tokens in (1, 64, 1024, 16384)}
    assert chosen[1] <= 16
    assert chosen[64] <= 16
    assert 32 <= chosen[1024] <= 64, "32 rows each"
    assert chosen[16384] == 128


def test_of_equals_the_one_with_fewest_weight_rows() -> None:
    small, large = Tile.from_mn((8, 64)), Tile.from_mn((8, 128))
    assert sm90_model.pick({large: 100.0, small: 100.9}) == small
    assert sm90_model.pick({large: 100.0, small: 101.1}) == large


def test_layers_with_repeated_and_single_experts() -> None:
    for experts, top_k in ((1, 1), (2, 5), (4, 4)):
        layer = Layer(experts=experts, top_k=top_k, hidden=64, intermediate=32)
        assert all(sm90_model.choose(tokens, layer, H100, TILES) in SENSIBLE for tokens in TOKENS)


def test_the_choice_is_the_models_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "look_up", lambda *arguments: None)
    choice.modelled.cache_clear()
    assert choice.choose_tile(4096, LAYER, H100, TILES) == Tile.from_mn((128, 256))


def test_a_new_number_of_tokens_costs_little_time() -> None:
    """A fifth of it on the machine that it was written on; a calculation of other order would show."""
    sm90_model.choose(5, LAYER, H100, TILES)
    best = math.inf
    for tokens in range(992, 1024, 4):
        start = time.perf_counter()
        sm90_model.choose(tokens, LAYER, H100, TILES)
        best = min(best, time.perf_counter() - start)
    assert best < 5e-3


def test_the_choice_is_near_the_measured_best() -> None:
    """By rows of m-tiles, which is what costs most when it is wrong: the model's m is the table's, or the next. Where a
    layer takes hardly longer than its weights need to be read, tiles are equals.
    """
    order = [8, 16, 32, 64, 128]
    path = tuned.SHIPPED / tuned.file_name(H100)
    for layer in tuned.parse(json.loads(path.read_text())):
        for entry in layer.entries:
            if entry.tokens < 16:
                continue  # one or two rows each: every small tile waits for the same weights
            sizes = layer.layer
            expert = expert_bytes(MXFP4_BF16, 2 * sizes.intermediate, sizes.hidden)
            expert += expert_bytes(MXFP4_BF16, sizes.hidden, sizes.intermediate)
            bytes_per_us = H100.gb_per_s * sm90_model.CONSTANTS.memory_efficiency * 1e3
            if entry.us < 1.1 * expected_active(entry.tokens, sizes) * expert / bytes_per_us:
                continue
            chosen = sm90_model.choose(entry.tokens, layer.layer, H100, TILES)
            assert abs(order.index(chosen.m) - order.index(entry.choice.gemm1.m)) <= 1, (layer.layer, entry)
