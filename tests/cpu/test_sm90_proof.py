"""The proof of SM90's two kernels: by hand, and what it refuses. test_tile_proof.py compares it with their header."""

from __future__ import annotations

import re

import pytest
from tile_cases import CANDIDATES, LEGAL, ROOT, SMEM_PER_SM, registers_per_thread

from mxfp4_moe import tiles
from mxfp4_moe.tiles import Tile, stages

# By hand. A stage: activations m * 256 of bf16, weights 4,352 for each 64 rows of n or part of them, 32 for barriers
# and the output tile that begins there. Each warp that multiplies keeps 16 more. The table, of tiles with n of at least
# 64, has a word for each warp's weight rows and row of m.
# tile: stage bytes, table bytes, accumulators, threads, blocks, stages, bytes
BY_HAND = {
    # mma.sync, four warps and one that produces. Swapped, of 16 x 8 each: 2,048 + 4,352. Five blocks have 233,472 // 5
    # - 1,024 - 128 - 64 = 45,478 // 6,432 = 7 stages, and registers for 25 warps: 512 // 7 // 8 * 8 = 72, of which
    # 4 + 2 * 4 + 16 / 2 + 48 = 68 are wanted; six have only 64.
    "m8n64_swap": (6_400, 128, 4, 160, 5, 7, 45_216),
    # 4,096 + 17,408; 64 x 16: 32 + 2 * 8 + 64 + 48 = 160 wanted, which two blocks have: 115,392 // 21,536 = 5
    "m16n256_swap": (21_504, 256, 32, 160, 2, 5, 108_000),
    # native, 64 rows of activations to a warp: 65,536 + 4,352; too narrow to activate; one block: 232,384 // 69,920 = 3
    "m256n8": (69_888, 0, 16, 160, 1, 3, 209_824),
    # wgmma, 16 weight rows to a warp: 8,192 + 4,352; 16 + 48 = 64 wanted; four blocks: 56,768 // 12,576 = 4
    "m32n64_swap": (12_544, 512, 16, 160, 4, 4, 50_880),
    # two sets, four warps of 32 x 64: 16,384 + 8,704; 64 + 56 = 120 wanted; three blocks: 75,712 // 25,120 = 3
    "m64n128": (25_088, 1_024, 64, 160, 3, 3, 76_448),
    # the same, 8,192 + 17,408; 32 + 56 = 88 wanted, which two blocks of eight warps have: 114,560 // 25,632 = 4
    "m32n256_swap": (25_600, 1_024, 32, 288, 2, 4, 103_680),
    # sixteen of 16 x 64, since two sets would leave one block of eight warps: 227,072 // 33,824 = 6
    "m64n256": (33_792, 4_096, 32, 544, 1, 6, 207_296),
    # eight of 16 x 128: 64 + 48 = 112 wanted, which only one block has: 228,224 // 41,504 = 5
    "m128n128": (41_472, 4_096, 64, 288, 1, 5, 211_744),
    # sixteen of 16 x 128 and a warpgroup that gives registers away: one block, 224,000 // 50,208 = 4
    "m128n256": (50_176, 8_192, 64, 640, 1, 4, 209_280),
    # eight of 16 x 256 and a warpgroup: one block, 224,128 // 74,272 = 3
    "m256n128": (74_240, 8_192, 128, 384, 1, 3, 231_136),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_proof_of_sm90_against_numbers_worked_out_by_hand(name: str) -> None:
    (tile,) = [tile for tile in CANDIDATES if tile.name == name]
    proof = tiles.prove(tile, "90a")
    assert BY_HAND[name] == (
        *(proof.stage_bytes, proof.amax_bytes, proof.accumulator_registers, proof.threads),
        *(proof.blocks_per_sm, proof.stages, proof.smem_bytes),
    )
    assert (proof.legal, proof.reads_halves, proof.act_scale_bytes) == (True, True, 0)


def test_proof_with_nvfp4_weights_against_numbers_worked_out_by_hand() -> None:
    """256 bytes more for each 64 weight rows; a row's largest magnitude in each 32 of them that two warps share."""
    # 2,048 + 4,608; 2 x 8 x 4 once; five blocks, as above, have (45,670 - 128) // 6,688 = 6 stages.
    by_hand = {"m8n64_swap": (6_656, 64, 4, 160, 5, 6, 40_256)}
    # Two sets would leave two blocks of four warps, 160 bytes short of three: eight warps of 16 x 64.
    by_hand |= {"m64n128": (25_600, 1_024, 32, 288, 2, 4, 103_680)}
    # Warps of 32 rows have whole blocks: 2,048 + 9,216; four blocks have (58,368 - 1,024 - 64) // 11,296 = 5 stages.
    by_hand |= {"m8n128_swap": (11_264, 0, 8, 160, 4, 5, 56_544)}
    # 32,768 + 9,216: (232,448 - 2,176) // 42,016 = 5; 32,768 + 18,432: (232,448 - 4,352) // 51,232 = 4
    by_hand |= {
        "m128n128": (41_984, 2_048, 64, 288, 1, 5, 212_256),
        "m128n256": (51_200, 4_096, 64, 640, 1, 4, 209_280),
    }
    # 65,536 + 9,216: (232,448 - 4,224) // 74,784 = 3, which a place for each warp would not leave
    by_hand |= {"m256n128": (74_752, 4_096, 128, 384, 1, 3, 228_576)}
    for name, numbers in by_hand.items():
        (tile,) = [tile for tile in CANDIDATES if tile.name == name]
        proof = tiles.prove(tile, "90a", "nvfp4_bf16")
        assert numbers == (
            *(proof.stage_bytes, proof.amax_bytes, proof.accumulator_registers, proof.threads),
            *(proof.blocks_per_sm, proof.stages, proof.smem_bytes),
        )
        assert (proof.legal, proof.pair) == (True, "nvfp4_bf16")


def test_which_kernel_a_tile_has() -> None:
    """Fewer than 32 activation rows, or fewer than 64 weight rows, are the warp's MMA's."""
    names = {
        tile.mn: tiles.prove(tile, "90a").function.removeprefix("grouped_gemm_") for tile in CANDIDATES if tile in LEGAL
    }
    few_rows = {(m, n) for m in (8, 16) for n in (64, 128, 256)}
    narrow = {(m, n) for m in (64, 128, 256) for n in (8, 16, 32)}
    assert {mn for mn, name in names.items() if name == "mma_sync"} == few_rows | narrow
    assert {mn for mn, name in names.items() if name == "wgmma"} == names.keys() - few_rows - narrow
    sources = "".join(path.read_text() for path in (ROOT / "csrc/tile").glob("*/*_kernel.cuh"))
    for name in set(names.values()):
        assert sources.count(f"    grouped_gemm_{name}(") == 1
    opcodes = {"mma_sync": "HMMA", "wgmma": "HGMMA"}
    for tile in LEGAL:
        proof = tiles.prove(tile, "90a")
        assert proof.opcode == opcodes[names[tile.mn]]
        assert proof.weights_are_a == (tile.swap_ab or names[tile.mn] == "wgmma")


def test_a_tile_fits_a_multiprocessor() -> None:
    for tile in LEGAL:
        proof = tiles.prove(tile, "90a")
        assert proof.blocks_per_sm * (proof.smem_bytes + 1024) <= SMEM_PER_SM["90a"]
        stage = proof.stage_bytes + proof.barrier_bytes
        assert proof.smem_bytes == proof.stages * stage + proof.amax_bytes + proof.kept_bytes
        assert proof.stage_bytes == proof.act_bytes + proof.weight_bytes
        here = registers_per_thread(proof.blocks_per_sm, proof.threads)
        assert here > proof.accumulator_registers
        computing, spare = proof.warps_m * proof.warps_n, proof.threads // 32 - proof.warps_m * proof.warps_n
        assert spare in (1, 4)
        if spare == 4:  # a warpgroup, which gives registers to the others and keeps 24
            given = {8: 240, 16: 112}[computing]
            assert given >= proof.accumulator_registers + 48
            assert computing * given + spare * 24 <= (computing + spare) * here


def test_a_tile_is_refused_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "[[tile]]\nm = 128\nn = 256\nswap_ab = false\n"
    text = 'archs = ["90a"]\ndefault_profile = "a"\n[profile.a]\npairs = ["mxfp4_mxfp8"]\nout_dtypes = ["d"]\n' + row
    assert tiles.parse_manifest(text).tiles[0].mn == (128, 256)
    monkeypatch.setattr(stages, "SMEM_PER_SM", {9: 96 * 1024, 12: 100 * 1024})
    wide = Tile(m=128, n=256, swap_ab=False)
    (refusal,) = tiles.prove(wide, "90a").refusals
    assert refusal == (
        "shared memory: two pipeline stages need 2 x 50,208 = 100,416 bytes (per stage: activations 32,768, weights "
        "17,408, barriers 32), a block has 97,280"
    )
    with pytest.raises(tiles.ManifestError, match=f"impossible on sm_90a for mxfp4_mxfp8: {re.escape(refusal)}"):
        tiles.parse_manifest(text)
    monkeypatch.setattr(stages, "_REGISTERS_PER_SUBPARTITION", 256)
    assert "registers: warps take 1888 of a block's 960" in tiles.prove(wide, "90a").refusals
