"""A whole layer of SM12x with bf16 activations, from logits to output, kernel by kernel, as PTX on the CPU.

As test_ptx_layer.py for MXFP8: fused_moe's own launches into one workspace, each kernel's output compared with the
reference's. Everything is exact but the two places where an exp stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx import launch
from ptx.gemm import junk
from ptx.running import Run
from ptx.workspace import intermediates
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.problems import bits, random_weights, relative_error
from mxfp4_moe.tiles import MXFP4_BF16, Tile
from mxfp4_moe.weights import MoEWeights

CPU = torch.device("cpu")
RULE = of_arch("120f", MXFP4_BF16)
SOURCES = ("route", "route_few", "topk_softmax", "quantize_permute", "activation", "finalize")
EXPERTS, HIDDEN, INTER, TOP_K = 6, 160, 96, 2  # K of both GEMMs ends inside of a K tile, N inside of an output tile
BF16 = 1  # csrc/moe/kernels.h, ActivationFormat


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launch.Recorder]:
    """One of its own, whose layer knows no tiles of the wheel."""
    one = launch.Recorder(tmp_path, *launch.tools())
    monkeypatch.setattr(launch, "shared_recorder", lambda: one)
    for cached in (launch.ptx_of_tile, launch.ptx_of_moe):
        cached.cache_clear()
    yield one
    for cached in (launch.ptx_of_tile, launch.ptx_of_moe):
        cached.cache_clear()
    one.close()


def in_pairs(weights: MoEWeights) -> MoEWeights:
    """The same in the word order of bf16 activations."""
    old, new = weights.word_order, formats.WordOrder.PAIRS

    def reordered(matrix: Tensor, n: int, k: int) -> Tensor:
        return torch.stack([formats.reorder_words(one, n, k, old, new) for one in matrix])

    w13, w2 = reordered(weights.w13, weights.w13_rows, HIDDEN), reordered(weights.w2, HIDDEN, INTER)
    return replace(weights, w13=w13, w2=w2, word_order=new)


def plain(weight: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    packed, scales = zip(*(formats.restore_weights(one, n, k, formats.WordOrder.PAIRS) for one in weight), strict=True)
    return torch.stack(packed), torch.stack(scales)


@pytest.mark.parametrize(
    ("tile", "tokens", "dtype", "fuses"),
    [
        (Tile(m=8, n=64, swap_ab=True), 5, torch.bfloat16, True),
        (Tile(m=64, n=8, swap_ab=False), 40, torch.float16, False),
    ],
    ids=["GEMM1 activates", "activation apart, float16"],
)
def test_layer(tile: Tile, tokens: int, dtype: torch.dtype, fuses: bool, recorder: launch.Recorder) -> None:
    weights = in_pairs(random_weights(EXPERTS, HIDDEN, INTER, CPU, seed=tokens))
    g = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    logits = torch.randn(tokens, EXPERTS, generator=g)
    out = torch.empty(tokens, HIDDEN, dtype=dtype)
    ptx = [*map(launch.ptx_of_moe, SOURCES), launch.ptx_of_tile(tile, pair=MXFP4_BF16)]
    recorder.register_kernel(tile, MXFP4_BF16)
    (w13, w13_bias, w2, w2_bias, *numbers), _ = weights.operator_arguments
    arguments = (hidden_states, None, None, logits, TOP_K, w13, w13_bias, w2, w2_bias, *numbers, tile.m, tile.n, out)
    recording = recorder.operator("fused_moe", *arguments, activation_format=BF16)
    assert len(recording.launches) == 6 - fuses
    written = {"hidden_states": hidden_states, "logits": logits}
    constant = {"w13": w13, "w13_bias": w13_bias, "w2": w2, "w2_bias": w2_bias}
    run = Run(recording, ptx, written | constant, outputs={"out": out}, early=list(written), seed=TOP_K)
    sizes: dict[str, Any] = {"slots": tokens * TOP_K, "hidden": HIDDEN, "inter": INTER, "experts": EXPERTS}
    sizes |= {"tile_m": tile.m, "gemm1_width": 0 if fuses else weights.w13_rows, "from_logits": True}
    own = intermediates(run.recording, **sizes, dtype=reference.ROW_DTYPES[dtype], act_format="bf16")

    run.next("route")
    expected_weights, ids = reference.topk_softmax(logits, TOP_K)
    topk_weights = own["topk_weights"].clone().view(tokens, TOP_K)
    torch.testing.assert_close(topk_weights, expected_weights, rtol=3e-6, atol=1e-30)
    offsets, row_slot, slot_row = reference.route(ids, EXPERTS)
    valid = int(offsets[-1])
    row_expert = torch.arange(EXPERTS).repeat_interleave(offsets.diff())
    assert torch.equal(own["slot_row"], slot_row)

    run.next("quantize_permute")
    rows = hidden_states.bfloat16()[row_slot[:valid] // TOP_K]
    assert torch.equal(bits(own["rows1"][:valid]), bits(rows)), "values as they come, float16 rounded to bfloat16"

    run.allow_unwritten(own["rows1"])  # tensor copies fetch whole boxes
    run.next("grouped_gemm_mma_sync", junk(tile, HIDDEN, MXFP4_BF16))
    gemm1 = reference.grouped_gemm(rows, None, *plain(w13, weights.w13_rows, HIDDEN), offsets, arithmetic=RULE)
    if not fuses:
        assert torch.equal(bits(own["gemm1_out"][:valid]), bits(gemm1))
        run.next("activation")
    given = (weights.activation, weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, w13_bias, *given, rounding=None).bfloat16()
    rows2 = own["rows2"][:valid].clone()
    off = (rows2.view(torch.int16).int() - values.view(torch.int16).int()).abs()
    assert off.max() <= 1, "torch's exp has other last bits"
    assert off.count_nonzero() <= 5e-3 * off.numel() + 1

    run.allow_unwritten(own["rows2"])
    run.next("grouped_gemm_mma_sync", junk(tile, INTER, MXFP4_BF16))
    gemm2 = reference.grouped_gemm(rows2, None, *plain(w2, HIDDEN, INTER), offsets, arithmetic=RULE)
    gemm2 = gemm2.to(reference.ROW_DTYPES[dtype])
    assert torch.equal(bits(own["gemm2_out"][:valid]), bits(gemm2))

    run.next("finalize")
    run.finish()
    assert torch.equal(bits(out), bits(reference.finalize(gemm2, topk_weights, slot_row, row_expert, w2_bias)))
    close = reference.fused_moe(hidden_states, topk_weights, ids, weights, activation_format="bf16", output_dtype=dtype)
    assert relative_error(out, close) <= 5e-3
    quantized = reference.fused_moe(hidden_states, topk_weights, ids, weights, output_dtype=dtype)
    assert relative_error(out, quantized) > 1e-2, "MXFP8 activations are another result"
