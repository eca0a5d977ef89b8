"""SM12x's cost model, and the facts of a GPU that it goes by."""

from __future__ import annotations

import dataclasses
import random

import pytest
from tuned_cases import BY_NAME, GB10, LARGE, LAYER, MIDDLE, RTX_5090, SMALL, TILES

from mxfp4_moe._choice import choice, cost_model, facts, rows
from mxfp4_moe._choice.facts import PUBLISHED, DeviceFacts, Layer
from mxfp4_moe._install import wheel
from mxfp4_moe.tiles import FP4_PAIRS, PAIRS, Tile, load_manifest, prove, select_tile

BLACKWELL = [device for device in PUBLISHED if device.capability[0] == 12]


class Properties:
    """As torch gives them."""

    def __init__(self, name: str, sms: int, capability: tuple[int, int], **clocks: int) -> None:
        self.name, self.multi_processor_count, (self.major, self.minor) = name, sms, capability
        for key, value in clocks.items():
            setattr(self, key, value)


def test_a_gpu_that_says_its_clocks() -> None:
    clocks = {"memory_clock_rate": 14_001_000, "memory_bus_width": 512, "clock_rate": 2_410_000, "L2_cache_size": 7}
    said = facts.from_properties(Properties("NVIDIA GeForce RTX 5090", 170, (12, 0), **clocks))
    assert said.gb_per_s == pytest.approx(1792, rel=0.001)
    assert (said.ghz, said.l2_bytes, said.sms, said.capability) == (2.41, 7, 170, (12, 0))


@pytest.mark.parametrize(
    ("name", "sms", "capability", "like"),
    [
        ("NVIDIA GB10", 48, (12, 1), "NVIDIA GB10"),
        ("NVIDIA GeForce RTX 5070 Ti", 70, (12, 0), "NVIDIA GeForce RTX 5070 Ti"),
        ("NVIDIA GeForce RTX 5070 Laptop GPU", 36, (12, 0), "NVIDIA GeForce RTX 5070"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, (12, 0), "NVIDIA RTX PRO 6000 Blackwell"),
        ("Something new", 90, (12, 0), "NVIDIA GeForce RTX 5080"),
        ("Something new", 20, (12, 1), "NVIDIA GB10"),
        ("Something newer", 90, (12, 9), "NVIDIA GeForce RTX 5080"),
    ],
)
def test_a_gpu_that_does_not(name: str, sms: int, capability: tuple[int, int], like: str) -> None:
    silent = facts.from_properties(Properties(name, sms, capability, memory_clock_rate=0, clock_rate=0))
    assert (silent.gb_per_s, silent.ghz) == (BY_NAME[like].gb_per_s, BY_NAME[like].ghz)
    assert (silent.name, silent.sms, silent.capability) == (name, sms, capability)


def test_rows_of_an_expert_are_those_of_random_routing() -> None:
    rng = random.Random(3)
    layer = Layer(experts=16, top_k=3, hidden=64, intermediate=64)
    for tokens, m in ((5, 8), (40, 8), (700, 64)):
        counts = [0.0, 0.0]
        for _ in range(1500):
            # One expert is like any other: its rows are how many tokens picked it.
            mine = sum(rng.random() < layer.top_k / layer.experts for _ in range(tokens))
            counts[0] += -(-mine // m)
            counts[1] += mine > 0
        assert rows.expected_m_tiles(tokens, layer, m) == pytest.approx(16 * counts[0] / 1500, rel=0.05)
        assert rows.expected_active(tokens, layer) == pytest.approx(16 * counts[1] / 1500, rel=0.05)
    probabilities = rows.row_probabilities(40, 3, 16)
    assert sum(p for _, p in probabilities) == pytest.approx(1)
    assert sum(p * count for count, p in probabilities) == pytest.approx(40 * 3 / 16)
    assert rows.row_probabilities(7, 4, 4) == ((7, 1.0),)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(130, 18, 9), (65, 5, 2), (3, 4, 1), (900, 7, 4)])
def test_more_choices_than_experts_repeat_them(tokens: int, top_k: int, experts: int) -> None:
    """A layer takes such ids, and so does the choice of its tile."""
    probabilities = rows.row_probabilities(tokens, top_k, experts)
    assert sum(p for _, p in probabilities) == pytest.approx(1)
    assert sum(p * count for count, p in probabilities) == pytest.approx(tokens * top_k / experts)
    assert min(count for count, _ in probabilities) >= tokens * (top_k // experts)
    layer = Layer(experts=experts, top_k=top_k, hidden=64, intermediate=64)
    assert rows.expected_active(tokens, layer) == experts
    assert all(cost_model.choose(tokens, layer, device, TILES) in TILES for device in BLACKWELL)


@pytest.mark.parametrize("device", BLACKWELL, ids=lambda device: device.name)
def test_time_does_not_fall_with_tokens_nor_rise_with_a_better_gpu(device: DeviceFacts) -> None:
    better = (
        dataclasses.replace(device, gb_per_s=1.2 * device.gb_per_s),
        dataclasses.replace(device, ghz=1.2 * device.ghz),
        dataclasses.replace(device, sms=device.sms + 7),
        dataclasses.replace(device, l2_bytes=1 << 40),
    )
    for tile in TILES:
        before = 0.0
        for tokens in (1, 2, 3, 7, 16, 60, 256, 900, 1024, 3000, 16384):
            us = cost_model.layer_us(tile, device, LAYER, tokens)
            assert us >= before * 0.999, (tile, tokens)
            before = us
            assert all(cost_model.layer_us(tile, other, LAYER, tokens) <= us for other in better), (tile, tokens)
    larger = dataclasses.replace(LAYER, hidden=4096), dataclasses.replace(LAYER, intermediate=4096)
    us = cost_model.layer_us(MIDDLE, device, LAYER, 64)
    assert all(cost_model.layer_us(MIDDLE, device, layer, 64) > us for layer in larger)


@pytest.mark.parametrize("device", BLACKWELL, ids=lambda device: device.name)
def test_no_time_is_below_the_memorys_floor(device: DeviceFacts) -> None:
    for tokens in (1, 16, 256):
        weights = rows.expected_active(tokens, LAYER) * 13_219_200
        floor = weights / device.gb_per_s / 1e3
        fastest = min(cost_model.layer_us(tile, device, LAYER, tokens) for tile in TILES)
        assert floor < fastest < 2 * floor + 20, "near the floor where memory is all that counts"


@pytest.mark.parametrize("device", BLACKWELL, ids=lambda device: device.name)
def test_choices_are_sensible(device: DeviceFacts) -> None:
    chosen = {tokens: cost_model.choose(tokens, LAYER, device, TILES) for tokens in (1, 4, 64, 1024, 4096, 65536)}
    assert all(chosen[tokens].m == 8 for tokens in (1, 4, 64)), "one or two rows each: the least padding"
    assert 16 <= chosen[1024].m <= 64, "32 rows each"
    assert chosen[65536].m >= 32
    assert all(tile.n >= 64 for tile in chosen.values()), "narrow tiles load the same activations over and over"
    for tokens, tile in chosen.items():
        best = min(cost_model.layer_us(other, device, LAYER, tokens) for other in TILES)
        assert cost_model.layer_us(tile, device, LAYER, tokens) <= 1.01 * best


def test_up_to_512_tokens_the_mma_rate_changes_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/performance.md says of the number that is known least: with few tokens memory rules."""
    tokens = (1, 4, 16, 64, 256, 512)
    chosen = [cost_model.choose(count, LAYER, device, TILES) for device in BLACKWELL for count in tokens]
    large = cost_model.choose(16384, LAYER, RTX_5090, TILES)
    slower = dataclasses.replace(cost_model.ARCH_MODELS[12], mma_flops_per_clock=1024.0)
    monkeypatch.setitem(cost_model.ARCH_MODELS, 12, slower)
    assert chosen == [cost_model.choose(count, LAYER, device, TILES) for device in BLACKWELL for count in tokens]
    assert large.m >= 64 > cost_model.choose(16384, LAYER, RTX_5090, TILES).m, "a faster MMA asks for more reuse"


def test_sm12x_multiplies_at_the_rate_of_block_scaled_fp8() -> None:
    """Twice RTX 5090's published FP8 rate with float32 accumulation, 419 TFLOP/s."""
    rate = cost_model.ARCH_MODELS[12].mma_flops_per_clock * RTX_5090.sms * RTX_5090.ghz * 1e9
    assert rate == pytest.approx(2 * 419e12, rel=0.01)


@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_fp4_with_fp4_at_twice_that_rate(pair: str) -> None:
    """RTX 5090's published dense FP4 rate, 1676 TFLOP/s; a row has half the bytes, NVFP4's scales are twice as many."""
    fp4, mxfp8 = prove(LARGE, "120f", pair), prove(LARGE, "120f")
    rate = cost_model._model_of(RTX_5090, fp4).mma_flops_per_clock * RTX_5090.sms * RTX_5090.ghz * 1e9
    assert rate == pytest.approx(1676e12, rel=0.01)
    times = [cost_model.gemm_time(proof, RTX_5090, LAYER, 16384, 5760, 2880) for proof in (fp4, mxfp8)]
    assert times[0].mma_us == pytest.approx(times[1].mma_us / 2)
    assert times[0].us < times[1].us
    few = [cost_model.gemm_time(proof, RTX_5090, LAYER, 1, 5760, 2880).memory_us for proof in (fp4, mxfp8)]
    larger = (0.5 + 1 / 16) / (0.5 + 1 / 32) if pair == "nvfp4_nvfp4" else 1.0
    assert few[0] / few[1] == pytest.approx(larger, rel=2e-3)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_tile_that_does_not_activate_pays_for_its_sums(pair: str) -> None:
    """GEMM1's float32 sums are written and read, which with many rows costs more than a larger tile saves."""
    manifest = load_manifest()
    tiles = [tile for tile in manifest.tiles if pair in manifest.pairs_of("full", tile)]
    for device in BLACKWELL:
        for tokens in (1024, 4096, 16384):
            tile = cost_model.choose(tokens, LAYER, device, tiles, pair=pair)
            assert prove(tile, "120f", pair).activates, (device.name, tokens, tile)
    for tile in tiles:
        proof = prove(tile, "120f", pair)
        sizes = ((2 * LAYER.intermediate, LAYER.hidden), (LAYER.hidden, LAYER.intermediate))
        gemms = sum(cost_model.gemm_time(proof, RTX_5090, LAYER, 4096, *nk, written=0).us for nk in sizes)
        floor = 2 * 4 * 4096 * LAYER.top_k * 2 * LAYER.intermediate / RTX_5090.gb_per_s / 1e3
        more = cost_model.layer_us(tile, RTX_5090, LAYER, 4096, pair=pair) - gemms
        assert more < 0.5 * floor if proof.activates else more > 0.5 * floor, (tile, more, floor)


@pytest.mark.parametrize(
    ("pair", "large", "small"), [("mxfp4_bf16", 3.46, 19.06), ("mxfp4_fp16", 3.65, 22.75), ("nvfp4_fp16", 3.76, 23.81)]
)
def test_each_pair_has_a_line_of_its_own(pair: str, large: float, small: float) -> None:
    """Instructions for each MMA that the machine code of (128, 128) and (8, 128) has."""
    for tile, per_mma in ((LARGE, large), (Tile.from_mn((8, 128)), small)):
        proof = prove(tile, "120f", pair)
        line = cost_model._model_of(RTX_5090, proof).loop_instructions
        mmas = proof.mma_per_step * proof.steps_per_k_tile
        assert cost_model.on_line(line, proof) == pytest.approx(per_mma * mmas, rel=0.06)


def test_the_rule_is_kept_where_the_model_sees_no_difference() -> None:
    """On GB10 memory is so slow that with few tokens every small tile takes the same time."""
    assert cost_model.choose(1, LAYER, GB10, TILES) == select_tile(1, 4, 128, TILES)
    assert cost_model.choose(0, LAYER, GB10, TILES) == select_tile(0, 4, 128, TILES)


def test_causes_are_named() -> None:
    few = cost_model.gemm_time(prove(SMALL, "120f"), RTX_5090, LAYER, 64, 5760, 2880)
    many = cost_model.gemm_time(prove(LARGE, "120f"), RTX_5090, LAYER, 65536, 5760, 2880)
    assert (few.bound_by, many.bound_by) == ("memory", "mma")
    assert few.us > max(few.memory_us, few.latency_us)
    with pytest.raises(ValueError, match=r"expected one of \[12\]\.x, got 8\.9"):
        cost_model.arch_model((8, 9))


def test_instructions_come_from_the_build_report(monkeypatch: pytest.MonkeyPatch) -> None:
    archs = {"120f": {"mxfp4_mxfp8": {"main_loop": {"instructions_per_mma": 3.5}}}}
    report = {"tiles": {LARGE.name: {"archs": archs}, SMALL.name: {"archs": {}}, MIDDLE.name: None}}
    monkeypatch.setattr(wheel, "read_report", lambda path=None: report)
    choice.loop_instructions.cache_clear()
    proof = prove(LARGE, "120f")
    mmas = proof.warp_m // 16 * (proof.warp_n // 8) * 4
    assert choice.loop_instructions("120f") == {LARGE.name: 3.5 * mmas}
    choice.loop_instructions.cache_clear()
    modelled = cost_model.on_line(cost_model.ARCH_MODELS[12].loop_instructions, proof)
    assert modelled == pytest.approx(3.5 * mmas, rel=0.1), "the line through the figures is near them"
