"""The proof that a tile fits an arch: of SM12x by hand, of both against the headers, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tile_cases import ARCHS, CANDIDATES, IMPOSSIBLE, LEGAL, ROOT, SMEM_PER_SM, registers_per_thread

from mxfp4_moe import tiles
from mxfp4_moe.archs import ARCHS as ALL_ARCHS
from mxfp4_moe.archs import ArchError
from mxfp4_moe.tiles import Tile

# By hand. A stage: activations m * 128, weights 4,352 (64 rows of 64 bytes of codes and 4 of scales) per 64 rows of n
# or part of them, activation scales 4 * (m + 4) in whole 128 bytes; plus 16 for barriers. A tile with n of at least 64
# and at most 64 accumulators has besides, for each warp along n and row of m, a word of the activation's table.
# A block of b has 102,400 // b, less 1,024 and the table; b is the largest, up to 4, with
# which each block has three stages and each thread enough registers: of 512 in a quarter of the multiprocessor, 96 for
# up to 8 accumulators, 112 for 16, 168 for 32, 176 for more. Threads of two, three and four blocks of five warps (160
# threads) get 168, 128 and 96, of four blocks of three warps 168, of two blocks of nine 96 and of two of twelve 80.
# tile: stage bytes, accumulators, table bytes, threads, blocks, stages, bytes
BY_HAND = {
    # 16,384 + 8,704 + 640 = 25,728; 8 warps in 2 x 4, each 64 x 32 = 16 fragments of 4; table 4 * 128 * 4 = 2,048
    "m128n128": (25_728, 64, 2_048, 384, 1, 3, 79_280),  # (101,376 - 2,048) // 25,744 = 3
    # 8,192 + 8,704 + 384 = 17,280; 4 warps in 1 x 4, each 64 x 32; table 4 * 64 * 4; two blocks have 168 registers
    "m64n128": (17_280, 64, 1_024, 160, 1, 5, 87_504),  # (101,376 - 1,024) // 17,296 = 5
    # 32,768 + 4,352 + 1,152 = 38,272; 8 warps in 4 x 2, each 64 x 32; table 2 * 256 * 4
    "m256n64": (38_272, 64, 2_048, 384, 1, 2, 78_624),  # (101,376 - 2,048) // 38,288 = 2
    # 8,192 + 4,352 + 384 = 12,928; 4 warps in 4 x 1, each 16 x 8; too narrow to activate
    "m64n8": (12_928, 4, 0, 160, 2, 3, 38_832),  # three: (34,133 - 1,024) // 12,944 = 2; two: 50,176 // 12,944 = 3
    # 1,024 + 8,704 + 128 = 9,856; 2 warps, each 64 x 8; table 2 * 8 * 4
    "m8n128_swap": (9_856, 16, 64, 96, 3, 3, 29_680),  # four: (25,600 - 1,088) // 9,872 = 2; three: 33,045 // 9,872 = 3
    # 2,048 + 8,704 + 128 = 10,880; 4 warps, each 32 x 16, so at most three blocks; table 4 * 16 * 4
    "m16n128_swap": (10_880, 16, 256, 160, 3, 3, 32_944),  # (34,133 - 1,280) // 10,896 = 3
    # 4,096 + 8,704 + 256 = 13,056; 4 warps, each 32 x 32, so at most two blocks; table 4 * 32 * 4
    "m32n128_swap": (13_056, 32, 512, 160, 2, 3, 39_728),  # (51,200 - 1,536) // 13,072 = 3
    # 16,384 + 17,408 + 640 = 34,432; 8 warps in 1 x 8, each 128 x 32: too many accumulators to activate
    "m128n256": (34_432, 128, 0, 384, 1, 2, 68_896),  # 101,376 // 34,448 = 2
    # 1,024 + 4,352 + 128 = 5,504; 4 warps, each 16 x 8; table 4 * 8 * 4
    "m8n64_swap": (5_504, 4, 128, 160, 4, 4, 22_208),  # (25,600 - 1,152) // 5,520 = 4
    # 1,024 + 17,408 + 128 = 18,560; 4 warps, each 64 x 8, so at most three blocks; table 4 * 8 * 4
    "m8n256_swap": (
        18_560,
        16,
        128,
        160,
        1,
        5,
        93_008,
    ),  # two: (51,200 - 1,152) // 18,576 = 2; one: 101,248 // 18,576 = 5
    # 2,048 + 17,408 + 128 = 19,584; 4 warps, each 64 x 16, so at most two blocks; table 4 * 16 * 4
    "m16n256_swap": (
        19_584,
        32,
        256,
        160,
        1,
        5,
        98_256,
    ),  # two: (51,200 - 1,280) // 19,600 = 2; one: 101,120 // 19,600 = 5
    # 4,096 + 17,408 + 256 = 21,760; 8 warps, each 32 x 32, too small to move registers; table 8 * 32 * 4
    "m32n256_swap": (21_760, 32, 1_024, 288, 1, 4, 88_128),  # (101,376 - 1,024) // 21,776 = 4
}


@pytest.mark.parametrize("name", BY_HAND)
def test_proof_of_sm12x_against_numbers_worked_out_by_hand(name: str) -> None:
    (tile,) = [tile for tile in CANDIDATES if tile.name == name]
    proof = tiles.prove(tile, "120f")
    assert BY_HAND[name] == (
        *(proof.stage_bytes, proof.accumulator_registers, proof.amax_bytes, proof.threads),
        *(proof.blocks_per_sm, proof.stages, proof.smem_bytes),
    )
    assert proof.legal
    assert (proof.function, proof.reads_halves) == ("grouped_gemm", False)


LEGAL_IN_BF16 = [tile for tile in LEGAL if tile.m < 256]  # two stages of 256 rows of bf16 are 139,776 bytes
# Blocks of NVFP4 weights have 256 bytes more, and two stages of (128, 256) 102,432, where a block of SM12x has 101,376.
LEGAL_IN_NVFP4_BF16 = [tile for tile in LEGAL_IN_BF16 if tile.mn != (128, 256)]
SM12X_HALVES = {"mxfp4_bf16": LEGAL_IN_BF16, "nvfp4_bf16": LEGAL_IN_NVFP4_BF16}
SM12X_HALVES |= {"mxfp4_fp16": LEGAL_IN_BF16, "nvfp4_fp16": LEGAL_IN_NVFP4_BF16}
SM90_PAIRS = ("mxfp4_mxfp8", "nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16")
KERNELS = [*(("90a", p) for p in SM90_PAIRS), ("120f", "mxfp4_mxfp8"), *(("120f", p) for p in SM12X_HALVES)]


@pytest.mark.parametrize(("arch", "pair"), KERNELS)
@pytest.mark.parametrize("tile", CANDIDATES, ids=lambda tile: tile.name)
def test_every_candidate_is_legal_or_refused_with_numbers(tile: Tile, arch: str, pair: str) -> None:
    proof = tiles.prove(tile, arch, pair)
    assert proof.legal == (tile in (SM12X_HALVES.get(pair, LEGAL) if arch == "120f" else LEGAL))
    assert proof.stage_bytes == proof.act_bytes + proof.weight_bytes + proof.act_scale_bytes
    stage = proof.stage_bytes + proof.barrier_bytes
    assert proof.smem_bytes == proof.stages * stage + proof.amax_bytes + proof.kept_bytes
    if not proof.legal:
        return
    smem = SMEM_PER_SM[arch]
    assert 2 <= proof.stages <= 8
    most_blocks = 6 if proof.function == "grouped_gemm_mma_sync" and arch == "90a" else 4
    assert 1 <= proof.blocks_per_sm <= most_blocks
    assert proof.blocks_per_sm * (proof.smem_bytes + 1024) <= smem
    assert proof.smem_bytes <= tiles.max_smem_per_block(arch) == smem - 1024
    # One more stage would not fit (or is not wanted): the pipeline is as deep as shared memory allows.
    assert proof.stages == 8 or proof.blocks_per_sm * (proof.smem_bytes + stage + 1024) > smem
    moves_registers = proof.threads // 32 - proof.warps_m * proof.warps_n == 4
    wanted = registers_wanted(proof)
    for blocks in range(2, 1 if proof.reads_halves and moves_registers else most_blocks + 1):
        enough_memory = blocks * (3 * stage + proof.amax_bytes + proof.kept_bytes + 1024) <= smem
        enough_registers = registers_per_thread(blocks, proof.threads) >= wanted
        if blocks == proof.blocks_per_sm:
            assert enough_memory
            assert enough_registers
        elif blocks > proof.blocks_per_sm:
            assert not (enough_memory and enough_registers), "more blocks could run"
    assert proof.accumulator_registers * proof.warps_m * proof.warps_n * 32 == tile.m * tile.n
    assert proof.accumulator_registers <= 128
    flops = 2 * (tile.m * tile.n * 32) // (proof.warps_m * proof.warps_n)  # of a warp in a step
    columns = proof.warp_n if proof.opcode == "HGMMA" else 8  # and a quarter of its 64 rows
    assert proof.mma_per_step * 2 * 16 * columns * (32 if proof.opcode == "QMMA.SF" else 16) == flops
    assert (proof.warps_m * proof.warp_m, proof.warps_n * proof.warp_n) == (proof.physical_m, proof.physical_n)
    assert (proof.physical_m, proof.physical_n) == (tile.mn[::-1] if proof.weights_are_a else tile.mn)
    assert proof.weights_are_a or not tile.swap_ab
    # A weight block has 64 rows, of which a warp holds all, or two or four share them with whole groups of 16.
    assert proof.activates == (tile.n >= 64 and (proof.reads_halves or proof.accumulator_registers <= 64))
    rows_of_warps = proof.warps_m if proof.weights_are_a else proof.warps_n
    # SM12x's kernels of bf16 write values as they come, and so do all of fp16. SM90's of NVFP4 weights have a block of
    # 32 weight rows in a warp, or in two, which share a place.
    places = rows_of_warps if arch == "120f" or pair == "mxfp4_mxfp8" else (tile.n // 32 if proof.warp_m < 32 else 0)
    quantizes = (arch == "90a" and "fp16" not in pair) or not proof.reads_halves
    assert proof.amax_bytes == (places * tile.m * 4 if proof.activates and quantizes else 0)
    assert not proof.activates or (proof.warp_m if proof.weights_are_a else proof.warp_n) in (16, 32, 64)


def registers_wanted(proof: tiles.TileProof) -> int:
    """Per thread, of a block that shares its multiprocessor."""
    accumulators = proof.accumulator_registers
    if not proof.reads_halves:
        return {4: 96, 8: 96, 16: 112, 32: 168}.get(accumulators, 176)
    if proof.function == "grouped_gemm_wgmma":
        return accumulators + 48
    weights, acts = (proof.warp_m, proof.warp_n) if proof.weights_are_a else (proof.warp_n, proof.warp_m)
    rows = 64 if weights >= 64 else weights // 2
    if proof.arch == "120f" and proof.weights_are_a and acts > 32:  # one K block's weights, 32 rows of activations
        return accumulators + 16 + weights // 2 + rows + 48
    return accumulators + 2 * (acts // 8 * 4) + rows + 48  # two K blocks of activations, words and operands of the rows


def test_the_impossible_candidate_is_refused_for_memory_and_for_registers() -> None:
    memory, registers = tiles.prove(IMPOSSIBLE, "120f").refusals
    assert memory == (
        "shared memory: two pipeline stages need 2 x 51,344 = 102,688 bytes (per stage: activations 32,768, weights "
        "17,408, activation scales 1,152, barriers 16), a block has 101,376"
    )
    assert registers == (
        "registers: 256 accumulators per thread (256 x 32 per warp), at most 128 leave room for the rest"
    )
    assert tiles.prove(IMPOSSIBLE, "90a").refusals == (
        "registers: 128 accumulators per thread (16 x 256 per warp) want 176 with the rest, a block of 640 threads has "
        "112 for each",
    ), "SM90 has the memory"


@example(m=600, n=600, swap_ab=False, arch="90a")
@given(m=st.integers(-10, 600), n=st.integers(-10, 600), swap_ab=st.booleans(), arch=st.sampled_from(ARCHS))
def test_any_numbers_have_a_proof(m: int, n: int, swap_ab: bool, arch: str) -> None:
    proof = tiles.prove(Tile(m=m, n=n, swap_ab=swap_ab), arch)
    for refusal in proof.refusals:
        assert any(character.isdigit() for character in refusal)
    if proof.legal:
        assert proof.warps_m * proof.warp_m == proof.physical_m
        assert proof.warps_n * proof.warp_n == proof.physical_n
        assert swap_ab == (m < 64)


def test_proof_refuses_an_arch_it_does_not_know() -> None:
    with pytest.raises(ArchError, match="arch '100a'"):
        tiles.prove(LEGAL[0], "100a")


MEMBERS = {
    "threads": "kThreads",
    "stages": "kStages",
    "stage_bytes": "kStageBytes",
    "smem_bytes": "kSmemBytes",
    "blocks_per_sm": "kBlocksPerSm",
    "accumulator_registers": "kAccumulators",
    "reads_halves": "kReadsHalves",
    "activates": "kActivates",
    "weights_are_a": "kSwap",
    "warp_m": "kWarpM",
    "warp_n": "kWarpN",
    "act_bytes": "kActBytes",
    "weight_bytes": "kWeightBytes",
    "act_scale_bytes": "kActScaleBytes",
    "amax_bytes": "kAmaxBytes",
}


def compile_shapes(
    folder: Path, shapes: list[Tile], kernels: Sequence[tuple[str, str]]
) -> subprocess.CompletedProcess[str]:
    """Builds a program that prints what csrc/tile makes of these tiles, of kernels by arch and pair, as JSON lines."""
    prints = "\n".join(
        f"  show<ShapeOf<{t.m}, {t.n}, {str(t.swap_ab).lower()}, Arch_{arch}, Pair_{pair}>>();"
        for arch, pair in kernels
        for t in shapes
    )
    names = ", ".join(f'\\"{name}\\": %d' for name in MEMBERS)
    values = ", ".join(f"S::{member}" for member in MEMBERS.values())
    source = folder / "shapes.cpp"
    source.write_text(
        f"""#include <cstdio>
#include "tile/sm12x/bf16_tile_shape.cuh"
#include "tile/sm90/tile_shape.cuh"
using namespace mxfp4_moe;
template <int M, int N, bool kSwap, class P>
const char* name(TileShape<M, N, kSwap, Sm12x, P>*) {{ return "grouped_gemm"; }}
template <class A, class P, int M, int N, bool kSwap, int kWarps, bool kMoves, int kMost, bool kAhead>
const char* name(MmaSyncShape<A, P, M, N, kSwap, kWarps, kMoves, kMost, kAhead>*) {{
  return "grouped_gemm_mma_sync";
}}
template <class P, int M, int N>
const char* name(WgmmaShape<P, M, N>*) {{ return "grouped_gemm_wgmma"; }}
template <class Of> void show() {{
  [[maybe_unused]] const Of checks_the_tile{{}};
  using S = typename Of::Type;
  std::printf("{{\\"function\\": \\"%s\\", {names}}}\\n", name((S*)nullptr), {values});
}}
int main() {{
{prints}
}}
""",
        encoding="utf-8",
    )
    compiler = shutil.which("g++")
    assert compiler is not None, "this test compiles a header of csrc: install g++"
    command = [compiler, "-std=c++17", "-I", str(ROOT / "csrc"), str(source), "-o", str(folder / "shapes")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_proof_is_what_the_headers_compute(tmp_path: Path) -> None:
    """For every arch that a manifest may name, not only those of ours."""
    every = [
        (arch, pair) for arch in ALL_ARCHS for pair in tiles.kernel_pairs(arch, (tiles.MXFP4_MXFP8, *tiles.FP4_PAIRS))
    ]
    groups = [([*every, *(("90a", pair) for pair in SM90_PAIRS[1:])], LEGAL)]
    groups += [([(arch, pair) for arch in ALL_ARCHS if arch != "90a"], some) for pair, some in SM12X_HALVES.items()]
    shapes = [(kernel, tile) for kernels, some in groups for kernel in kernels for tile in some]
    lines = []
    for kernels, some in groups:
        result = compile_shapes(tmp_path, some, kernels)
        assert result.returncode == 0, result.stderr
        lines += subprocess.run([tmp_path / "shapes"], capture_output=True, text=True, check=True).stdout.splitlines()
    for ((arch, pair), tile), line in zip(shapes, lines, strict=True):
        proof = tiles.prove(tile, arch, pair)
        assert proof.pair == pair
        expected = {name: getattr(proof, name) for name in ("function", *MEMBERS)}
        assert json.loads(line) == expected, (tile.name, arch)


def test_facts_are_what_the_extension_tells() -> None:
    """facts() of csrc/tile/tile_op.cpp, by its own words."""
    told = (ROOT / "csrc" / "tile" / "tile_op.cpp").read_text(encoding="utf-8").split("Py_BuildValue(", 1)[1]
    names = re.findall(r'"([a-z_]+)"', told.split(";", 1)[0])
    for arch, tile in product(ARCHS, LEGAL):
        facts, proof = tiles.facts(tile, arch), tiles.prove(tile, arch)
        assert [*facts] == names
        assert facts == proof.facts()
        assert (facts.pop("tile_m"), facts.pop("tile_n"), facts.pop("swap_ab")) == (*tile.mn, int(tile.swap_ab))
        assert facts == {name: getattr(proof, name) for name in facts}
    with pytest.raises(ArchError, match="arch '100a'"):
        tiles.facts(LEGAL[0], "100a")


@pytest.mark.parametrize(
    ("tile", "kernel", "sentence"),
    [
        (IMPOSSIBLE, "120f", "too many accumulator registers per thread"),
        (IMPOSSIBLE, "90a", "a block's threads have too few registers"),
        *(
            (Tile(m=256, n=n, swap_ab=False), "120f mxfp4_bf16", "shared memory does not hold two pipeline stages")
            for n in (8, 64, 128)
        ),
        (
            *(Tile(m=128, n=256, swap_ab=False), "120f nvfp4_bf16"),
            "shared memory does not hold two pipeline stages",
        ),
        *((Tile(m=100, n=128, swap_ab=False), arch, "native tiles need M % 64 == 0") for arch in ARCHS),
        *((Tile(m=64, n=128, swap_ab=True), arch, "native tiles need M % 64 == 0, swapped ones") for arch in ARCHS),
        (Tile(m=128, n=192, swap_ab=False), "120f", "the warp grid covers the tile"),
        *((Tile(m=64, n=48, swap_ab=False), arch, "a tile has whole weight blocks, or shares one") for arch in ARCHS),
    ],
    ids=lambda value: value.name if isinstance(value, Tile) else "",
)
def test_what_the_proof_refuses_does_not_compile(tile: Tile, kernel: str, sentence: str, tmp_path: Path) -> None:
    arch, _, pair = kernel.partition(" ")
    pair = tiles.kernel_pair(arch, pair or "mxfp4_mxfp8")
    assert not tiles.prove(tile, arch, pair).legal
    result = compile_shapes(tmp_path, [tile], [(arch, pair)])
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr
    assert sentence in result.stderr
