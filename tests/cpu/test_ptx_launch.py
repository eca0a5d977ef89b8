"""The recorder of launches: what the fake CUDA runtime refuses, and what the wheel's own launchers ask of it.

Everything in tests/test_ptx_*.py stands on these launches, so their facts are compared with what tiles.py proves.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx import abi, launch

from mxfp4_moe import formats, problems, tiles

TILES = tiles.load_manifest().tiles
MOE = sorted(path.stem for path in (launch.ROOT / "csrc" / "moe").glob("*.cu"))
UINT8, INT32, INT64 = 0, 3, 5  # CUtensorMapDataType
SWIZZLE_128B = 3
CPU = torch.device("cpu")


def tensor_map(param: bytes, number: int = 0) -> dict[str, Any]:
    """The fields of one of the tensor maps in a parameter."""
    words = struct.unpack_from("<QIIQ5Q4Q5I4H", param, 128 * number)
    assert words[0] == 0x50414D524F534E54
    names = ("data_type", "rank", "address")
    places = {"extents": slice(4, 9), "strides": slice(9, 13), "box": slice(13, 18)}
    found: dict[str, Any] = dict(zip(names, words[1:4], strict=True))
    rank = found["rank"]
    found |= {name: words[place][: rank - (name == "strides")] for name, place in places.items()}
    found["swizzle"] = words[19]
    return found


def gemm_args(**changes: Any) -> abi.GemmArgs:
    """A legal call; the addresses are numbers."""
    legal = {"act": 0x10000, "act_scale": 0x20000, "weight": 0x30000, "out": 0x40000, "m_tiles": 0x50000}
    legal |= {"num_m_tiles": 0x60000, "max_m_tiles": 3, "rows": 10, "n": 80, "k": 160, "experts": 2}
    return abi.GemmArgs(**{**legal, **changes})


def test_the_c_structs_are_those_of_the_compiler() -> None:
    assert launch.shared_recorder().layout() == abi.layout()


def test_the_fakes_stay_in_their_process() -> None:
    launch.shared_recorder()
    assert "mxfp4-moe-recorder" not in Path("/proc/self/maps").read_text()


# ---- tensor maps -----------------------------------------------------------------------------------------------------

LEGAL = {
    "data_type": UINT8,
    "address": 0x1000,
    "extents": (96, 10),
    "strides": (96,),
    "box": (128, 64),
    "element_strides": (1, 1),
    "swizzle": SWIZZLE_128B,
}


def test_a_legal_tensor_map_says_what_it_was_made_of() -> None:
    made = launch.shared_recorder().encode(*LEGAL.values())
    assert isinstance(made, bytes)
    found = tensor_map(made)
    assert {name: found[name] for name in LEGAL if name in found} == {
        name: value for name, value in LEGAL.items() if name != "element_strides"
    }


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"address": 0x1008}, "globalAddress: expected a multiple of 16"),
        ({"address": 0}, "globalAddress"),
        ({"extents": (96, 0)}, r"globalDim\[1\]"),
        ({"extents": (96, 2**32 + 1)}, r"globalDim\[1\]"),
        ({"strides": (104,)}, r"globalStrides\[0\]: expected a multiple of 16"),
        ({"strides": (80,)}, r"globalStrides\[0\]: expected at least 96"),
        ({"strides": (2**40,)}, r"globalStrides\[0\]"),
        ({"box": (128, 257)}, r"boxDim\[1\]: expected 1 to 256"),
        ({"box": (128, 0)}, r"boxDim\[1\]"),
        ({"box": (144, 64)}, r"boxDim\[0\]: expected at most the swizzle's 128 bytes"),
        ({"box": (120, 64)}, r"boxDim\[0\]: expected a multiple of 16 bytes"),
        ({"element_strides": (1, 2)}, r"elementStrides\[1\]"),
        ({"data_type": INT64, "extents": (12, 10), "box": (32, 64)}, r"boxDim\[0\]: expected at most the swizzle's"),
        ({"data_type": 13}, "tensorDataType"),  # packed 4-bit types have rules of their own
        ({"swizzle": 7}, "swizzle"),
    ],
)
def test_an_illegal_tensor_map_is_refused(changes: dict[str, Any], why: str) -> None:
    refusal = launch.shared_recorder().encode(*{**LEGAL, **changes}.values())
    assert isinstance(refusal, str)
    assert re.match(why, refusal), refusal


# ---- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [TILES[0], TILES[-1]], ids=lambda tile: tile.name)
def test_a_tile_launches_what_was_proved_of_it(tile: tiles.Tile) -> None:
    """Grid: output tiles, or the blocks that the device holds at once where these are fewer."""
    ptx = launch.ptx_of_tile(tile)
    proof = tiles.prove(tile, "120f")
    recorder = launch.shared_recorder()
    n_tiles = -(-80 // tile.n)
    for sms in (1, 100):
        [one] = recorder.gemm(tile, gemm_args(max_m_tiles=50), sms=sms)
        assert one.kernel in launch.entries(ptx)
        assert (one.block, one.smem_bytes) == ((proof.threads, 1, 1), proof.smem_bytes)
        assert one.programmatic
        assert one.cluster == (1, 1, 1)
        per_sm = one.grid[0] if sms == 1 else recorder.gemm(tile, gemm_args(max_m_tiles=50))[0].grid[0] // 2
        assert one.grid == (min(50 * n_tiles, sms * per_sm), 1, 1)
        assert per_sm >= proof.blocks_per_sm
    assert recorder.gemm(tile, gemm_args(rows=0)) == []


def test_the_operands_are_described_as_they_lie() -> None:
    """Extents, strides and boxes of the four maps; execution shows the rest."""
    tile = tiles.Tile(m=64, n=64, swap_ab=False)
    launch.ptx_of_tile(tile)
    rows, n, k, experts = 10, 80, 160, 2
    [one] = launch.shared_recorder().gemm(tile, gemm_args())
    act, scale, weight, tail = (tensor_map(one.params[0], number) for number in range(4))
    assert act == {
        **{"data_type": UINT8, "rank": 2, "address": 0x10000, "extents": (k, rows), "strides": (k,)},
        **{"box": (128, tile.m), "swizzle": SWIZZLE_128B},
    }
    words = formats.pack_row_scales(torch.zeros(rows, k // 32, dtype=torch.uint8))
    assert (scale["data_type"], scale["address"], scale["swizzle"]) == (INT64, 0x20000, 0)
    assert scale["extents"] == (words.shape[1] // 2, words.shape[0])
    assert scale["strides"] == (words.shape[1] * 4,)
    for found in (weight, tail):
        assert (found["data_type"], found["address"], found["swizzle"]) == (INT32, 0x30000, 0)
        assert found["extents"] == (64, experts * formats.weight_bytes(n, k) // 256)
        assert found["strides"] == (256,)
    block = formats.weight_bytes(64, 128) // 256
    assert weight["box"] == (64, block)
    assert tail["box"] == (64, formats.weight_bytes(64, 32) // 256)
    assert len(one.params[1]) == launch.entries(launch.ptx_of_tile(tile))[one.kernel][0][1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"k": 33}, "k: expected a positive multiple of 32, got 33"),
        ({"n": 72}, "n: expected a positive multiple of 16, got 72"),
        ({"act": 0x10008}, "act: expected an address that is a multiple of 16"),
        (
            {"act_format": 9},
            "weight_format, act_format: expected those of mxfp4_mxfp8.*, which its kernels read .*, got 0 and 9",
        ),
    ],
)
def test_a_launcher_refuses_in_its_own_words(changes: dict[str, Any], why: str) -> None:
    launch.ptx_of_tile(TILES[0])
    with pytest.raises(launch.RefusedError, match=why):
        launch.shared_recorder().gemm(TILES[0], gemm_args(**changes))


# ---- operators -------------------------------------------------------------------------------------------------------


def test_a_kernel_without_ptx_is_refused(tmp_path: Path) -> None:
    """So that no launch is recorded with parameters of a guessed size."""
    shared = launch.shared_recorder()
    fresh = launch.Recorder(tmp_path, *launch.tools())
    with pytest.raises(launch.RefusedError, match="no PTX was learned for .*route_few_kernel"):
        fresh.operator("route", torch.zeros(4, 2, dtype=torch.int32), 3, 8)
    fresh.close()
    launch.ptx_of_moe("route_few")
    assert len(shared.operator("route", torch.zeros(4, 2, dtype=torch.int32), 3, 8).launches) == 1


def test_operators_check_the_tensors_that_they_are_given() -> None:
    with pytest.raises(launch.RefusedError, match=r"topk_ids: expected int32 or int64 \[tokens, top_k\], got"):
        launch.shared_recorder().operator("route", torch.zeros(4, 2), 3, 8)


@pytest.mark.parametrize(("tile_name", "between"), [("m16n128_swap", []), ("m64n8", ["activation_kernel"])])
def test_a_layer_is_these_kernels_in_this_order(tile_name: str, between: list[str]) -> None:
    """All but finalize start before the one before them is done."""
    tile = next(tile for tile in TILES if tile.name == tile_name)
    for source in MOE:
        launch.ptx_of_moe(source)
    launch.ptx_of_tile(tile)
    recorder = launch.shared_recorder()
    recorder.register_tile(tile)
    weights = problems.random_weights(8, 160, 96, CPU)
    call = problems.random_call(5, 2, weights)
    out = torch.empty(5, 160, dtype=torch.bfloat16)
    numbers = (weights.activation.code, weights.alpha, weights.beta, weights.limit)
    recording = recorder.operator(
        "fused_moe",
        *(call.hidden_states, call.topk_weights, call.topk_ids, None, 0, weights.w13, weights.w13_bias),
        *(weights.w2, weights.w2_bias, 96, *numbers, tile.m, tile.n, out),
    )
    names = ["route_few_kernel", "quantize_permute_kernel", "grouped_gemm", *between, "grouped_gemm", "finalize_kernel"]
    assert len(recording.launches) == len(names)
    for one, name in zip(recording.launches, names, strict=True):
        assert name in one.kernel
        assert one.programmatic, name  # finalize too, of so few tokens
        assert one.cluster == (1, 1, 1)
    assert len(recording.allocations) == 1, "one workspace"


def test_parameters_are_read_from_ptx() -> None:
    text = """
    .visible .entry first(
        .param .align 64 .b8 first_param_0[512],
        .param .u64 .ptr .global .align 4 first_param_1,
        .param .u32 first_param_2
    )
    .maxntid 128, 2, 1
    .minnctapersm 1
    { ret; }
    .entry second ( ) { ret; }
    """
    assert launch.entries(text) == {"first": ([512, 8, 4], 256), "second": ([], 1024)}
