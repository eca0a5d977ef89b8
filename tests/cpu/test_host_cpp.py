"""The C++ arithmetic that kernel, launcher and layer share, run on the host: against CuTe, formats and tiles.

The bindings (tests/cpu/host/bindings.cpp, fixture `host`) include the kernel's own headers, so what is tested here is
what the GPU runs.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mxfp4_moe import formats, tiles
from wheelbuild import toolchain

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(16, 32), (32, 96), (80, 128), (128, 128), (129, 64), (256, 1024), (300, 2880), (2880, 160)]
MXFP4, NVFP4 = 1, 2  # words of scales that a row of weights has in a K tile


# --- the MMA's operand, scale and selector mapping -------------------------------------------------------------------


@pytest.mark.parametrize("operand", ["a", "b", "c", "sfa", "sfb"])
@pytest.mark.parametrize("atom", ["cute_tables", "cute_tables_swapped"])
def test_lane_map_is_that_of_cute(host: ModuleType, operand: str, atom: str) -> None:
    """Element by element: 32 lanes x every register byte of SM120_16x8x32_TN_VS (E4M3 x E2M1, and exchanged)."""
    assert host.our_tables()[operand] == getattr(host, atom)()[operand]


@pytest.mark.parametrize("operand", ["a", "b", "c", "sfa", "sfb"])
def test_lane_map_of_fp4_is_that_of_cute(host: ModuleType, operand: str) -> None:
    """The same of every nibble, for SM120_16x8x64_TN_VS."""
    assert host.our_tables_fp4()[operand] == host.cute_tables_fp4()[operand]


@pytest.mark.parametrize(("operand", "elements"), [("a", 16 * 32), ("b", 8 * 32), ("c", 16 * 8)])
def test_lane_map_covers_every_element_once(host: ModuleType, operand: str, elements: int) -> None:
    flat = [index for lane in host.our_tables()[operand] for index in lane]
    assert sorted(flat) == list(range(elements))


def test_scale_words_come_from_the_lanes_that_thread_selector_0_names(host: ModuleType) -> None:
    """PTX ISA, scale_vec::1X: A's row g from lane 4g and row g + 8 from lane 4g + 1, B's column g from lane 4g."""
    tables = host.our_tables()
    for g in range(8):
        assert tables["sfa"][4 * g][0] == g
        assert tables["sfa"][4 * g + 1][0] == g + 8
        assert tables["sfb"][4 * g][0] == g


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_byte_selector_is_the_k_step(host: ModuleType, n: int, k: int) -> None:
    """A row's scales of one K tile are the bytes of one aligned word, in the order of the K steps, of both operands."""
    for offsets in (host.arranged_scale_offsets(n, k, MXFP4), host.act_scale_offsets(n, k)):
        for row, row_offsets in enumerate(offsets):
            for block, offset in enumerate(row_offsets):
                assert offset % 4 == block % 4, (row, block)
                assert offset - block % 4 == row_offsets[block - block % 4], (row, block)


# --- scale layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_swizzled_scale_layout_is_that_of_cute(host: ModuleType, n: int, k: int) -> None:
    """The 128x4 layout, in which hidden states and FlashInfer's weights may come."""
    ours = host.swizzled_scale_offsets(n, k)
    assert ours == host.cute_scale_offsets_a(n, k)
    assert ours == host.cute_scale_offsets_b(n, k)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_swizzled_scale_allocation_is_padded_as_cute_pads(host: ModuleType, n: int, k: int) -> None:
    size = host.swizzled_scale_bytes(n, k)
    assert size == host.cute_scale_bytes(n, k)
    assert size == -(-n // 128) * -(-k // 128) * 512
    assert max(max(row) for row in host.swizzled_scale_offsets(n, k)) < size


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_swizzled_scale_layout_is_that_of_formats(host: ModuleType, n: int, k: int) -> None:
    scales = torch.randint(1, 255, (n, k // 32), dtype=torch.uint8)
    swizzled = formats.swizzle_scales(scales).reshape(-1)
    assert swizzled.numel() == host.swizzled_scale_bytes(n, k)
    offsets = torch.tensor(host.swizzled_scale_offsets(n, k))
    assert torch.equal(swizzled[offsets], scales)
    padding = torch.ones_like(swizzled, dtype=torch.bool)
    padding[offsets.reshape(-1)] = False
    assert not swizzled[padding].any()


@pytest.mark.parametrize(("rows", "k"), [(1, 32), (3, 96), (4, 128), (7, 160), (130, 2880)])
def test_act_scale_layout_is_that_of_formats(host: ModuleType, rows: int, k: int) -> None:
    scales = torch.randint(1, 255, (rows, k // 32), dtype=torch.uint8)
    packed = formats.pack_row_scales(scales).reshape(-1)
    assert packed.numel() == host.act_scale_bytes(rows, k)
    assert torch.equal(packed[torch.tensor(host.act_scale_offsets(rows, k))], scales)
    assert int(packed.to(torch.int64).sum()) == int(scales.to(torch.int64).sum())  # padding is zero


# --- prepared weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_words", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize("order", formats.WordOrder)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_weight_layout_is_that_of_formats(
    host: ModuleType, n: int, k: int, order: formats.WordOrder, scale_words: int
) -> None:
    """Element by element: every word and every scale, and zeros wherever the header puts nothing."""
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.randint(1, 254, (n, k // 32 * scale_words), dtype=torch.uint8)
    weight = formats.arrange_weights(packed, scales, order, scale_words)
    assert weight.numel() == host.weight_bytes(n, k, scale_words)
    scale_offsets = torch.tensor(host.arranged_scale_offsets(n, k, scale_words))
    assert torch.equal(weight[scale_offsets], scales)
    word_offsets = torch.tensor(host.arranged_word_offsets(n, k, scale_words))
    bytes_of_words = (word_offsets[..., None] + torch.arange(4)).flatten(1)
    assert torch.equal(weight[bytes_of_words], formats.pack_words(packed, order))
    used = torch.cat((scale_offsets.flatten(), bytes_of_words.flatten()))
    assert len(used.unique()) == used.numel(), "no byte has two meanings"
    padding = torch.ones_like(weight, dtype=torch.bool)
    padding[used] = False
    assert not weight[padding].any()


@pytest.mark.parametrize("scale_words", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_weights_are_copied_in_whole_units(host: ModuleType, n: int, k: int, scale_words: int) -> None:
    unit = host.weight_unit()
    assert host.weight_bytes(n, k, scale_words) % unit == 0
    for row in range(0, n, 64):
        for words in host.arranged_word_offsets(n, k, scale_words)[row][::16]:  # row 0 of a block, step 0, t = 0
            assert (words - 256 * scale_words) % unit == 0


@pytest.mark.parametrize("scale_words", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
def test_one_load_brings_a_lane_its_words_of_neighbouring_fragments(host: ModuleType, scale_words: int) -> None:
    """The kernel adds a fragment's constant to a lane's first word, and loads several at once (plain_kernel.cuh)."""
    word, scale, position = host.weight_word_in_block, host.weight_scale_word_in_block, host.weight_scale_position
    for step in range(4):
        lanes = [word(lane // 4, step, lane % 4, scale_words) for lane in range(32)]
        begin = 256 * scale_words + 1024 * step
        assert lanes == [begin + 16 * lane for lane in range(32)], "a warp reads 512 bytes in a row"
        for row in range(64):
            for t in range(4):
                first = word(row % 8, step, t, scale_words)
                assert word(row, step, t, scale_words) == first + row // 8 // 4 * 512 + row // 8 % 4 * 4
    for row in range(64):
        group = row // 8
        assert scale(row) == scale(row % 8) + group // 4 * 128 + position(group % 4) * 4
    # As A, a lane has rows g or g + 8 of fragments of 16 rows: two fragments stand side by side, for either.
    for first in (*range(16), *range(32, 48)):
        assert scale(first + 16) == scale(first) + 4
        assert scale(first) % 8 == 0, "both in one load of 8 bytes"
    # As B, a lane has row g of four fragments of 8 rows: the four words of one load of 16 bytes.
    assert sorted(position(j) for j in range(4)) == [0, 1, 2, 3]
    assert all(scale(first) % 16 == 0 for first in (*range(8), *range(32, 40)))


@pytest.mark.parametrize(
    ("order", "made"),
    [
        (formats.WordOrder.CONTAINERS, torch.uint8),
        (formats.WordOrder.PAIRS, torch.bfloat16),
        (formats.WordOrder.PAIRS, torch.float16),
    ],
    ids=["containers", "pairs in bf16", "pairs in fp16"],
)
def test_the_kernel_expands_what_formats_packs(order: formats.WordOrder, made: torch.dtype, tmp_path: Path) -> None:
    """The very functions that the kernels call: every code in every place of a block, whatever stands beside it.

    SM90 does not execute SM12x's, so this test is all that does.
    """
    program = tmp_path / "expand"
    source = str(ROOT / "tests" / "cpu" / "host" / "expand.cpp")
    chosen = ["-DMXFP4_MOE_ORDER_CONTAINERS"] if order is formats.WordOrder.CONTAINERS else []
    kind = "fp16" if made is torch.float16 else "bf16"
    header = (ROOT / "csrc" / "tile" / "bf16" / f"{kind}_weights.cuh").read_text()
    (body,) = re.findall(rf"^__device__ __forceinline__ void expand_{kind}\(.*?^}}\n", header, re.MULTILINE | re.DOTALL)
    body, joins = re.subn(r"asm\(\"lop3\.b32.*// signs \? w : codes", "d = (signs & w) | (~signs & codes);", body)
    assert joins == (made is torch.float16)
    (tmp_path / "expand_pairs.inc").write_text(body.replace(f"expand_{kind}(", "expand("))
    includes = [f"-I{ROOT / 'csrc'}", f"-I{tmp_path}"]
    command = [str(toolchain.find_cxx(os.environ)), "-std=c++17", "-O1", *includes]
    built = subprocess.run([*command, *chosen, source, "-o", str(program)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    random = torch.randint(0, 256, (4096, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, all_ = torch.zeros(32, 16, 32, dtype=torch.uint8), torch.full((32, 16, 32), 15, dtype=torch.uint8)
    for k in range(32):
        one[k, :, k] = torch.arange(16)
        all_[k, :, k] = torch.arange(16)
    codes = torch.cat((one.view(-1, 32), all_.view(-1, 32)))
    packed = torch.cat((codes[:, 0::2] | codes[:, 1::2] << 4, random))
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    words = formats.pack_words(packed, order).numpy().tobytes()
    expanded = subprocess.run([program], input=words, capture_output=True, check=True).stdout
    registers = torch.frombuffer(bytearray(expanded), dtype=torch.uint8).reshape(len(packed), 4, -1)
    for t in range(4):
        if order is formats.WordOrder.CONTAINERS:  # two registers: even k and odd k, codes in bits 5 .. 2 of bytes
            ks = [8 * t + i for i in (0, 2, 4, 6, 1, 3, 5, 7)]
            expected = codes[:, ks] << 2
        else:  # four pairs of halves, each the code's value times the least normal number
            ks = [k for pair in range(4) for k in (8 * pair + 2 * t, 8 * pair + 2 * t + 1)]
            values = torch.tensor(formats.E2M1_VALUES, dtype=torch.float64)[codes[:, ks].long()]
            values *= torch.finfo(made).tiny
            expected = values.to(made).view(torch.uint8)
            assert torch.equal(expected.view(made).double(), values)
        assert torch.equal(registers[:, t], expected), f"word {t}"


# --- schedule --------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, 200), min_size=1, max_size=40),
    tile_m=st.sampled_from([8, 16, 32, 64, 128, 256]),
)
def test_max_m_tiles_bounds_every_distribution(host: ModuleType, rows: list[int], tile_m: int) -> None:
    tiles_used = sum(host.m_tiles_of(r, tile_m) for r in rows)
    assert tiles_used == sum(-(-r // tile_m) for r in rows)
    assert tiles_used <= host.max_m_tiles(sum(rows), len(rows), tile_m)


@pytest.mark.parametrize("tile_m", [8, 64, 128])
@pytest.mark.parametrize(("rows", "experts"), [(1, 128), (5, 128), (1000, 4), (4096, 128), (131072 * 4, 128)])
def test_max_m_tiles_is_reached(host: ModuleType, rows: int, experts: int, tile_m: int) -> None:
    """As many experts as possible hold one row past a full tile, so the grid is never larger than it can need be."""
    active = min(rows, experts)
    full, rest = divmod(rows - active, tile_m)
    counts = [1 + full * tile_m] + [1] * (active - 1)
    counts[-1] += rest
    assert sum(counts) == rows
    assert sum(-(-c // tile_m) for c in counts) == host.max_m_tiles(rows, experts, tile_m)


@pytest.mark.parametrize("num_n_tiles", [1, 3, 23, 45])
def test_tile_coord_visits_every_tile_once_with_n_fastest(host: ModuleType, num_n_tiles: int) -> None:
    coords = [host.tile_coord(i, num_n_tiles) for i in range(7 * num_n_tiles)]
    assert coords == [(m, n) for m in range(7) for n in range(num_n_tiles)]


# --- the proof -------------------------------------------------------------------------------------------------------


def test_proof_is_what_the_compiler_sees(host: ModuleType) -> None:
    """prove() against the headers themselves, for every candidate tile that compiles, on both archs."""
    shapes = host.tile_shapes()
    assert len(shapes) == 4 * 26 + 21
    for shape in shapes:
        arch, pair, barrier_offset = (shape.pop(name) for name in ("arch", "pair", "barrier_offset"))
        tile = tiles.Tile(m=shape.pop("m"), n=shape.pop("n"), swap_ab=shape.pop("swap_ab"))
        proof = tiles.prove(tile, arch, pair)
        assert proof.legal, (tile.name, arch, proof.refusals)
        assert {key: proof.facts()[key] for key in shape} == shape, (tile.name, arch)
        assert barrier_offset == proof.stages * proof.stage_bytes
