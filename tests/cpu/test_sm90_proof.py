"""The proof of SM90's kernels beside the plain one: by hand, and what it refuses. test_tile_proof.py compares it with
their headers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tile_cases import CANDIDATES, LEGAL, ROOT, SMEM_PER_SM, registers_per_thread

from mxfp4_moe import tiles
from mxfp4_moe.tiles import Tile, stages

PARALLEL_K = r"""
#include <cstdio>
#include "tile/sm90/parallel_k_shape.cuh"
using namespace mxfp4_moe;
using S = ParallelKShape<TileShape<8, 64, true, Sm90>>;
int main() {
  std::printf("%d %d %d %d %d ", S::kThreads, S::kBlocksPerSm, S::kStages, S::kSmemBytes, S::kFragments);
  std::printf("%d", S::kParts);
  for (int lane = 0; lane < 32; ++lane) std::printf(" %d", sum_slot(lane / 4, lane % 4));
}
"""


def test_the_parallel_k_kernel_by_hand(tmp_path: Path) -> None:
    """Beside a stage's 5,504 bytes stand 4 steps of 64 x 8 sums, 8,192, and three barriers; beside the table of amax,
    128 bytes, a column of 64 sums: (116,736 - 1,024 - 128 - 256) // 13,720 = 8 stages. 4 + 8 + 1 warps.
    """
    compiler = shutil.which("g++")
    assert compiler is not None, "this test compiles a header of csrc: install g++"
    source = tmp_path / "parallel_k.cpp"
    source.write_text(PARALLEL_K, encoding="utf-8")
    subprocess.run([compiler, "-std=c++17", "-I", ROOT / "csrc", source, "-o", tmp_path / "parallel_k"], check=True)
    output = subprocess.run([tmp_path / "parallel_k"], capture_output=True, text=True, check=True).stdout
    threads, blocks, stages, smem, fragments, parts, *slots = map(int, output.split())
    assert (threads, blocks, stages, smem, fragments, parts) == (416, 2, 8, 8 * 13_720 + 384, 2, 4)
    proof = tiles.prove(Tile(m=8, n=64, swap_ab=True), "90a", tiles.Kernel.PARALLEL_K)
    assert (proof.threads, proof.blocks_per_sm, proof.stages, proof.smem_bytes) == (threads, blocks, stages, smem)
    assert (proof.stage_bytes, proof.sum_bytes, proof.barrier_bytes) == (5_504, 8_192, 24)
    assert (proof.amax_bytes, proof.column_bytes, proof.legal) == (128, 256, True)
    assert 16 * fragments == tiles.PARALLEL_K_WARP_ROWS
    assert sorted(slots) == list(range(32))
    for first in range(0, 32, 8):  # lanes whose 16 bytes are accessed at once: each in its own eighth of the banks
        assert {slot % 8 for slot in slots[first : first + 8]} == set(range(8))
    assert [slots[4 * g] for g in range(8)] == list(range(8)), "a lone row's sums stand side by side"


# By hand. A stage: activations m * 256 of bf16, weights as ever, 16 for barriers. The table has a word for each warp's
# weight rows and row of m. Up to 16 rows four warps multiply; of the others a warp has 16 weight rows, or 32 where m is
# at most 64 and n at least 128, and a ninth produces, or from m = 128 with eight warps a warpgroup.
# tile: stage bytes, table bytes, accumulators, threads, blocks, stages, bytes
FOLDED_BY_HAND = {
    # 2,048 + 4,352; 4 warps of 16 x 8; five blocks have 233,472 // 5 - 1,024 - 128 = 45,542 // 6,416 = 7, and registers
    # for 25 warps: 512 // 7 // 8 * 8 = 72, of which 4 + 8 + 4 + 2 + 48 = 66 are wanted; six have only 64
    "m8n64_swap": (6_400, 128, 4, 160, 5, 7, 45_040),
    # 4,096 + 17,408; 4 warps of 64 x 16: 32 + 16 + 16 + 8 + 48 = 120 wanted; three blocks: 76,544 // 21,520 = 3
    "m16n256_swap": (21_504, 256, 32, 160, 3, 3, 64_816),
    # 16,384 + 8,704; 4 warps of 32 x 64: 64 + 52 + 16 = 132 wanted, three blocks have 128, two 168: 114,688 // 25,104
    "m64n128": (25_088, 1_024, 64, 160, 2, 4, 101_440),
    # 32,768 + 8,704; 8 warps of 16 x 128 and a warpgroup: one block, 228,352 // 41,488 = 5
    "m128n128": (41_472, 4_096, 64, 384, 1, 5, 211_536),
}


@pytest.mark.parametrize("name", FOLDED_BY_HAND)
def test_kernels_for_folded_activations_by_hand(name: str) -> None:
    (tile,) = [tile for tile in CANDIDATES if tile.name == name]
    proof = tiles.prove(tile, "90a", tiles.Kernel.FOLDED)
    assert FOLDED_BY_HAND[name] == (
        *(proof.stage_bytes, proof.amax_bytes, proof.accumulator_registers, proof.threads),
        *(proof.blocks_per_sm, proof.stages, proof.smem_bytes),
    )
    assert (proof.legal, proof.act_scale_bytes, proof.sum_bytes, proof.column_bytes) == (True, 0, 0, 0)
    assert proof.function == ("grouped_gemm_mma_sync" if tile.m <= 16 else "grouped_gemm_wgmma")
    assert f"    {proof.function}(" in "".join(
        path.read_text() for path in (ROOT / "csrc/tile/sm90").glob("*_kernel.cuh")
    )


def test_other_kernels_fit_a_multiprocessor() -> None:
    for tile in LEGAL:
        for kernel in tiles.kernels_of(tile, "90a"):
            proof = tiles.prove(tile, "90a", kernel)
            assert proof.legal
            assert proof.blocks_per_sm * (proof.smem_bytes + 1024) <= SMEM_PER_SM["90a"]
            stage = proof.stage_bytes + proof.sum_bytes + proof.barrier_bytes
            assert proof.smem_bytes == proof.stages * stage + proof.amax_bytes + proof.column_bytes
            assert proof.stage_bytes == proof.act_bytes + proof.weight_bytes + proof.act_scale_bytes
            wanted = proof.accumulator_registers
            assert registers_per_thread(proof.blocks_per_sm, proof.threads) > wanted


def test_other_kernels_are_refused_for_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a multiprocessor had less, the manifest would be refused for a kernel that its plain one would not be."""
    row = "[[tile]]\nm = 8\nn = 64\nswap_ab = true\n"
    text = 'archs = ["90a"]\ndefault_profile = "a"\n[profile.a]\nquantization = ["q"]\nout_dtypes = ["d"]\n' + row
    assert tiles.parse_manifest(text).tiles[0].mn == (8, 64)
    monkeypatch.setattr(stages, "SMEM_PER_SM", {9: 48 * 1024, 12: 100 * 1024})
    tile = Tile(m=8, n=64, swap_ab=True)
    assert tiles.prove(tile, "90a").legal
    (refusal,) = tiles.prove(tile, "90a", tiles.Kernel.PARALLEL_K).refusals
    assert refusal == (
        "shared memory: four pipeline stages need 4 x 13,720 = 54,880 bytes (per stage: activations 1,024, weights "
        "4,352, activation scales 128, sums 8,192, barriers 24), a block has 48,128"
    )
    with pytest.raises(tiles.ManifestError, match=f"impossible on sm_90a: {re.escape(refusal)}"):
        tiles.parse_manifest(text)
    wide = Tile(m=128, n=128, swap_ab=False)
    (refusal,) = tiles.prove(wide, "90a", tiles.Kernel.FOLDED).refusals
    assert refusal.startswith("shared memory: two pipeline stages need 2 x 41,488 = 82,976 bytes")
    monkeypatch.setattr(stages, "_REGISTERS_PER_SUBPARTITION", 256)
    assert "registers: warps take 2016 of a block's 960" in tiles.prove(wide, "90a", tiles.Kernel.FOLDED).refusals


def test_a_kernel_that_a_tile_does_not_have_has_no_proof() -> None:
    tile = Tile(m=64, n=128, swap_ab=False)
    for arch, kernel, has in (
        ("120f", tiles.Kernel.FOLDED, "PLAIN"),
        ("90a", tiles.Kernel.PARALLEL_K, "PLAIN, FOLDED"),
        ("90a", tiles.Kernel.BY_SIZE, "PLAIN, FOLDED"),
    ):
        sentence = f"kernel: expected one that m64n128 has on sm_{arch} ({has}), got {kernel.name}"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            tiles.prove(tile, arch, kernel)
