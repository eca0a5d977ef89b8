"""A whole layer of SM12x from logits to output, kernel by kernel, as PTX on the CPU.

The wheel's own fused_moe makes the launches (csrc/moe/ops.cpp), into one workspace; the kernels run on it in their
order, each of those that start early before the one before it is known to be done. Everything is exact but the two
places where an exp stands, router weights and activation: what comes after them is exact given the kernels' own values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import ordinal
from ptx import launch
from ptx.gemm import junk
from ptx.running import Run
from ptx.workspace import intermediates
from torch import Tensor

from mxfp4_moe import formats, reference, tiles
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.problems import bits, random_call, random_weights, relative_error

CPU = torch.device("cpu")
SM12X = of_arch("120f")
SOURCES = ("route", "route_few", "topk_softmax", "quantize", "activation", "finalize")
ROUTER_TOLERANCE = {"rtol": 3e-6, "atol": 1e-30}  # as test_ptx_moe.py
LAYER_TOLERANCE = (
    5e-3  # as on a GPU: the same values are quantized twice on both sides; what is left is exp's last bits
)


@pytest.mark.parametrize(
    ("name", "tokens", "top_k", "dtype"),
    [
        ("m16n128_swap", 5, 2, torch.bfloat16),  # GEMM1 applies the activation; few slots
        ("m64n8", 66, 2, torch.float16),  # a kernel of its own does; more slots than one pass of route takes
    ],
)
def test_layer_from_logits(name: str, tokens: int, top_k: int, dtype: torch.dtype) -> None:
    tile = next(tile for tile in tiles.load_manifest().tiles if tile.name == name)
    experts, hidden, inter = 6, 160, 96
    weights = random_weights(experts, hidden, inter, CPU, seed=tokens)
    x = random_call(tokens, top_k, weights, dtype=dtype).hidden_states
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    out = torch.empty(tokens, hidden, dtype=dtype)

    recorder = launch.shared_recorder()
    ptx = [*map(launch.ptx_of_moe, SOURCES), launch.ptx_of_tile(tile)]
    recorder.register_tile(tile)
    numbers = (weights.activation.code, weights.alpha, weights.beta, weights.limit)
    recording = recorder.operator(
        "fused_moe",
        *(x, None, None, logits, top_k, weights.w13, weights.w13_bias, weights.w2, weights.w2_bias, inter),
        *(*numbers, tile.m, tile.n, out),
    )
    fuses = len(recording.launches) == 5
    assert fuses == (name != "m64n8")
    inputs = {"x": x, "logits": logits, "w13": weights.w13, "w2": weights.w2}
    inputs |= {"w13 bias": weights.w13_bias, "w2 bias": weights.w2_bias}
    run = Run(recording, ptx, inputs, outputs={"out": out}, early=["x", "logits"])
    sizes: dict[str, Any] = {"slots": tokens * top_k, "hidden": hidden, "inter": inter, "experts": experts}
    width = 0 if fuses else weights.w13_rows
    own = intermediates(recording, **sizes, tile_m=tile.m, gemm1_width=width, from_logits=True, dtype=dtype)

    run.next("route")
    expected_weights, ids = reference.topk_softmax(logits, top_k)
    offsets, row_slot, slot_row = reference.route(ids, experts)
    row_expert = torch.arange(experts).repeat_interleave(offsets.diff())
    expected_tiles = reference.m_tiles(offsets, tile.m)
    assert torch.equal(own["slot_row"], slot_row)
    assert torch.equal(own["row_expert"].long(), row_expert)
    assert own["num_m_tiles"].tolist() == [len(expected_tiles)]
    assert torch.equal(own["m_tiles"][: len(expected_tiles)], expected_tiles)
    topk_weights = own["topk_weights"].clone().view(tokens, top_k)
    torch.testing.assert_close(topk_weights, expected_weights, **ROUTER_TOLERANCE)

    run.next("quantize_permute")
    codes, scales = formats.quantize_mxfp8(x)
    codes, scales = codes[row_slot // top_k], scales[row_slot // top_k]
    assert torch.equal(own["codes1"], formats.interleave_k(codes))
    assert torch.equal(own["scales1"][:, : len(codes)], formats.pack_row_scales(scales)[:, : len(codes)])

    # Rows come in fours to the tensor copies of scales; the missing ones are multiplied and stored nowhere.
    run.allow_unwritten(own["scales1"])
    run.next("grouped_gemm", junk(tile, hidden))
    packed, packed_scales = plain(weights.w13, weights.w13_rows, hidden)
    gemm1 = reference.grouped_gemm(codes, scales, packed, packed_scales, offsets, arithmetic=SM12X)
    if not fuses:
        assert torch.equal(bits(own["gemm1_out"]), bits(gemm1))
        run.next("activation")
    values = reference.activate(gemm1, row_expert, weights.w13_bias, weights.activation, *numbers[1:])
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    codes2 = formats.deinterleave_k(own["codes2"]).clone()
    scales2 = formats.unpack_row_scales(own["scales2"], len(codes2), inter)
    assert torch.equal(scales2, expected_scales)
    off = (ordinal(codes2) - ordinal(expected_codes)).abs()
    assert off.max() <= 1
    assert off.count_nonzero() <= 2e-3 * off.numel() + 1

    run.allow_unwritten(own["scales2"])
    run.next("grouped_gemm", junk(tile, inter))
    packed, packed_scales = plain(weights.w2, hidden, inter)
    gemm2 = reference.grouped_gemm(codes2, scales2, packed, packed_scales, offsets, arithmetic=SM12X).to(dtype)
    assert torch.equal(bits(own["gemm2_out"]), bits(gemm2))

    run.next("finalize")
    run.finish()
    assert torch.equal(bits(out), bits(reference.finalize(gemm2, topk_weights, slot_row, row_expert, weights.w2_bias)))

    # The same from the outside: the reference's layer, with the kernels' own activation and with its own.
    exact = reference.layer(x, topk_weights, ids, weights, lambda *_: (codes2, scales2), arithmetic=SM12X)
    assert torch.equal(bits(out), bits(exact))
    assert relative_error(out, reference.fused_moe(x, topk_weights, ids, weights)) <= LAYER_TOLERANCE


def plain(weight: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Prepared weights of all experts in checkpoint order."""
    order = formats.word_order_of(CPU)
    packed, scales = zip(*(formats.restore_weights(one, n, k, order) for one in weight), strict=True)
    return torch.stack(packed), torch.stack(scales)
