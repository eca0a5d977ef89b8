"""Every kernel of csrc/moe as the PTX that nvcc makes of it for SM12x, executed on the CPU.

The wheel's own operators make the launches (ptx/launch.py), ptx/machine.py executes them. What precedes a kernel in a
layer, and what it therefore may not read before griddepcontrol.wait, is not there until then. Results are exact, but
for what an exp reaches: PTX leaves its last bits open.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from moe_cases import BF16, FP16, MXFP8_IN_BF16, ids_of
from ptx import launch
from ptx.faults import Fault, Kind
from ptx.running import EXECUTED, execute
from ptx.workspace import intermediates
from ptx_moe_checks import (
    CPU,
    HALVES,
    TILE,
    TOPK_TOLERANCE,
    check_activation,
    check_activation_in_halves,
    check_activation_of_many_rows,
    check_activation_rounding,
    check_finalize,
    check_permute,
    check_quantize_permute,
    check_quantize_permute_behind_route,
    check_route,
    check_route_of,
    check_topk_softmax,
    first_of_layer,
    logits_of,
)
from ptx_quantize_checks import check_mxfp8_quantize
from quantize_cases import LAYOUTS

from mxfp4_moe import reference
from mxfp4_moe.activations import Activation

LOGITS = (torch.float32, torch.bfloat16, torch.float16)


# ---- route ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "tile_m"),
    [
        # Up to 128 slots, one thread each sees all of them.
        *[(1, 1, 1, 8), (5, 4, 128, 8), (42, 3, 2, 16), (3, 1, 300, 64), (16, 8, 40, 8)],
        # More: warps with histograms, which have up to 32 slots, up to 128, and more.
        *[(43, 3, 6, 8), (75, 3, 5, 256), (257, 1, 64, 8), (40, 4, 300, 16), (300, 4, 7, 16), (1030, 4, 3, 64)],
    ],
)
def test_route_is_exact(tokens: int, top_k: int, experts: int, tile_m: int, dtype: torch.dtype) -> None:
    check_route_of(tokens, top_k, experts, tile_m, dtype)


@pytest.mark.parametrize("tokens", [8, 33])
@pytest.mark.parametrize("expert", [0, 7, -1])
def test_route_when_all_go_the_same_way(expert: int, tokens: int) -> None:
    check_route(torch.full((tokens, 4), expert, dtype=torch.int32), 8, 16)


def test_route_reads_all_64_bits() -> None:
    check_route(torch.tensor([[2**32 + 1, -(2**63), 2**63 - 1, 1, 2**31, -(2**31)]]), 4, 8)


@pytest.mark.parametrize(("tokens", "top_k", "experts", "blocks"), [(65, 4, 40, 4), (1025, 1, 300, 8), (515, 1, 2, 8)])
def test_route_of_a_cluster(tokens: int, top_k: int, experts: int, blocks: int) -> None:
    """As it is launched on SM90, where clusters have run; SM12x routes with one block. The last may have no slots."""
    ids = ids_of(tokens, top_k, experts, torch.int32, CPU)
    check_route(ids, experts, 16, arch="90a", blocks=blocks)


# ---- the router, alone and in one kernel with route ------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize("experts", [1, 31, 33, 128, 200, 500, 1000])
def test_topk_softmax(experts: int, dtype: torch.dtype, renormalize: bool) -> None:
    check_topk_softmax(experts, dtype, renormalize)


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kernels"),
    [
        # A warp per token; one pass over all slots.
        *[(8, 2, 20, 1), (8, 4, 40, 1), (9, 3, 100, 1), (8, 5, 200, 1)],
        # More slots than that, which are routed by histograms.
        *[(20, 8, 64, 2), (70, 2, 20, 2), (33, 4, 100, 2), (33, 4, 200, 2)],
        (8, 4, 300, 2),  # too many experts for one kernel
    ],
)
def test_topk_and_route(tokens: int, top_k: int, experts: int, kernels: int, dtype: torch.dtype) -> None:
    """The first kernels of a layer whose experts are some of all: those from number 3 on."""
    first_expert, tile_m = 3, TILE.m
    here = experts - 5
    logits = logits_of(tokens, experts, dtype)
    hidden = torch.empty(tokens, 32, dtype=torch.bfloat16)
    done = first_of_layer(kernels, hidden, logits, top_k, here, first_expert)
    expected_weights, ids = reference.topk_softmax(logits, top_k)
    offsets, _, slot_row = reference.route(ids - first_expert, here)
    valid, expected_tiles = int(offsets[-1]), reference.m_tiles(offsets, tile_m)
    sizes = {"slots": tokens * top_k, "hidden": 32, "inter": 32, "experts": here, "tile_m": tile_m}
    found = intermediates(done.recording, **sizes, gemm1_width=0, from_logits=True)
    assert torch.equal(found["slot_row"], slot_row)
    assert torch.equal(found["row_expert"][:valid].long(), torch.arange(here).repeat_interleave(offsets.diff()))
    assert (found["row_expert"][valid:] == -1).all()
    assert found["valid_rows"].tolist() == [valid]
    assert found["num_m_tiles"].tolist() == [len(expected_tiles)]
    assert torch.equal(found["m_tiles"][: len(expected_tiles)], expected_tiles)
    weights = found["topk_weights"].view(tokens, top_k)
    torch.testing.assert_close(weights, expected_weights, equal_nan=True, **TOPK_TOLERANCE)


# ---- quantize-permute and permute ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "dtype", "tokens"),
    [
        *[(32, torch.bfloat16, 9), (96, torch.float16, 9), (160, torch.bfloat16, 9), (1056, torch.float16, 9)],
        *[(32, torch.bfloat16, 513), (64, torch.float16, 514)],  # a thread has four tokens
    ],
)
def test_quantize_permute_is_exact(width: int, dtype: torch.dtype, tokens: int) -> None:
    check_quantize_permute(width, dtype, tokens)


@pytest.mark.parametrize("row_format", [MXFP8_IN_BF16, BF16, FP16])
@pytest.mark.parametrize(
    ("width", "dtype", "tokens"),
    [(160, torch.bfloat16, 9), (96, torch.float16, 9), (64, torch.bfloat16, 514), (32, torch.float16, 514)],
)
def test_quantize_permute_to_halves_is_exact(width: int, dtype: torch.dtype, tokens: int, row_format: int) -> None:
    """As SM90's tiles read rows, and all of fp16; the PTX is SM12x's, of the same source."""
    check_quantize_permute(width, dtype, tokens, row_format)


def test_quantize_permute_reads_hidden_states_while_route_runs() -> None:
    """Nothing but the rows' numbers comes from route, so the rest is done before that has finished."""
    check_quantize_permute_behind_route()


@pytest.mark.parametrize(
    ("width", "swizzled", "tokens"), [(32, False, 7), (160, False, 7), (160, True, 7), (288, True, 7), (96, True, 130)]
)
def test_permute_is_exact(width: int, swizzled: bool, tokens: int) -> None:
    """Every code, and scale bytes of all sizes: those above 248 become NaN blocks."""
    check_permute(width, swizzled, tokens)


@pytest.mark.parametrize(("width", "swizzled", "tokens"), [(160, False, 7), (288, True, 7), (96, True, 130)])
def test_permute_to_bf16_is_exact(width: int, swizzled: bool, tokens: int) -> None:
    """Products beyond bfloat16's range are infinite, small ones multiples of 2^-133."""
    check_permute(width, swizzled, tokens, MXFP8_IN_BF16)


# ---- the drop-in's quantizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize(
    ("rows", "width", "padded"),
    [(1, 32, 32), (9, 160, 160), (9, 96, 256), (130, 64, 64), (515, 32, 32)],  # from 513 on, several rows a lane
)
def test_mxfp8_quantize_is_exact(rows: int, width: int, padded: int, dtype: torch.dtype, layout: int) -> None:
    check_mxfp8_quantize(rows, width, padded, dtype, layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(2, 32, dtype=torch.int32)},
            r"input: expected float32, bfloat16 or float16 \[rows, k\], got int32",
        ),
        ({0: torch.zeros(64)}, r"input: expected float32, bfloat16 or float16 \[rows, k\], got float32 \[64\]"),
        ({0: torch.zeros(2, 48)}, "k: expected a positive multiple of 32, got 48"),
        ({0: torch.zeros(65)[1:].view(2, 32)}, "input: expected data aligned to 16 bytes, got 4 bytes past that"),
        ({1: 48}, "padded_k: expected a positive multiple of 32, got 48"),
        ({0: torch.zeros(2, 64)}, "padded_k: expected at least k = 64, got 32"),
        ({2: 3}, "layout: expected 0 to 2, got 3"),
    ],
)
def test_mxfp8_quantize_checks_for_itself(change: dict[int, object], message: str) -> None:
    launch.ptx_of_moe("mxfp8_quantize")
    arguments: dict[int, object] = {0: torch.zeros(2, 32), 1: 32, 2: 0}
    assert len(launch.shared_recorder().operator("mxfp8_quantize", *arguments.values()).launches) == 1
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().operator("mxfp8_quantize", *(arguments | change).values())


def test_mxfp8_quantize_of_no_rows_launches_nothing() -> None:
    recording = launch.shared_recorder().operator("mxfp8_quantize", torch.zeros(0, 32), 64, 0)
    codes, scales = recording.results
    assert not recording.launches
    assert codes.shape == (0, 64)
    assert scales.shape == (0,)


# ---- activation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [None, *HALVES], ids=str)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
@pytest.mark.parametrize("with_bias", [False, True])
def test_activation_is_close(with_bias: bool, activation: str, rounding: torch.dtype | None) -> None:
    """An exp's last bits move a code to its neighbour when the value lies near a tie, and nothing else."""
    check_activation(activation, with_bias, rounding)


@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_activation_to_fp16_is_close(activation: str) -> None:
    """Each has a kernel of its own for fp16 rows."""
    check_activation(activation, True, None, row_format=FP16)


def test_activation_of_many_rows() -> None:
    """From 4096 rows on a block has eight, whose expert changes among them. Most here are not valid."""
    check_activation_of_many_rows()


@pytest.mark.parametrize("rounding", HALVES)
def test_activation_rounds_exactly(rounding: torch.dtype) -> None:
    """Ties, denormals, float16's overflow, and what is rounded before the bias."""
    check_activation_rounding(rounding)


@pytest.mark.parametrize("rounding", [None, *HALVES], ids=str)
@pytest.mark.parametrize("row_format", [MXFP8_IN_BF16, BF16, FP16])
def test_activation_to_halves_is_exact(row_format: int, rounding: torch.dtype | None) -> None:
    """Magnitudes from bfloat16's denormals to its largest, ties, NaN, infinities."""
    check_activation_in_halves(row_format, rounding)


# ---- finalize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "top_k", "width", "dtype"),
    [  # A thread has two columns up to 8 tokens, then eight; four loads are in flight.
        *[(4, 1, 32, torch.bfloat16), (4, 5, 288, torch.float16), (8, 4, 96, torch.bfloat16)],
        *[(9, 2, 96, torch.float16), (9, 9, 1056, torch.bfloat16), (9, 4, 32, torch.bfloat16)],
        # Biases by strips of 64 columns, whole and not, where there are 4096 slots.
        *[(1030, 4, 96, torch.bfloat16), (4097, 1, 64, torch.float16), (1024, 5, 32, torch.bfloat16)],
    ],
)
def test_finalize_is_exact(tokens: int, top_k: int, width: int, dtype: torch.dtype, with_bias: bool) -> None:
    check_finalize(tokens, top_k, width, dtype, with_bias)


def test_finalize_of_many_tokens_must_not_start_early() -> None:
    """It does not wait for GEMM2 (docs/decisions.md): launched as the others are, it would read what is not there."""
    rows, slot_row = torch.randn(9, 32).bfloat16(), torch.arange(9, dtype=torch.int32)
    row_expert, weights = torch.zeros(9, dtype=torch.int32), torch.ones(9, 1)
    arguments = (rows, slot_row, row_expert, weights, None)
    launch.ptx_of_moe("finalize")
    recording = launch.shared_recorder().operator("finalize", *arguments)
    recording.launches[:] = [replace(one, programmatic=True) for one in recording.launches]
    inputs = dict(zip(("gemm2", "slot_row", "row_expert", "topk_weights"), arguments, strict=False))
    with pytest.raises(Fault, match="gemm2") as caught:
        execute(recording, [launch.ptx_of_moe("finalize")], inputs, early=["gemm2"])
    assert caught.value.kind is Kind.EARLY


def test_every_kernel_was_executed(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or any("::" in word for word in request.config.args):
        pytest.skip("says something only where all tests of this file ran before it")
    sources = sorted(path.stem for path in (launch.ROOT / "csrc" / "moe").glob("*.cu"))
    kernels = {kernel for source in sources for kernel in launch.entries(launch.ptx_of_moe(source))}
    # Those of test_ptx_routers.py, and of test_ptx_fp4_rows.py and test_ptx_fp4_quantize.py.
    elsewhere = re.compile("topk_experts|fp4_[a-z]+_kernel|quantize_permute_kernel.*RowKindE1E")
    kernels = {kernel for kernel in kernels if not elsewhere.search(kernel)}
    assert kernels - EXECUTED == set()
    assert len(kernels) > 40
