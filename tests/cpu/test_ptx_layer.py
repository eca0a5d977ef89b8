"""A whole layer of SM12x, from logits or ids to output, kernel by kernel, as PTX on the CPU.

The wheel's own fused_moe makes the launches (csrc/moe/layer.cpp), into one workspace; the kernels run on it in their
order, each of those that start early before the one before it is known to be done. Everything is exact but the two
places where an exp stands, router weights and activation: what comes after them is exact given the kernels' own values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from moe_cases import ids_of, layer_of, ordinal, with_large_rows
from ptx import launch
from ptx.gemm import junk
from ptx.running import Run
from ptx.workspace import intermediates
from torch import Tensor

from mxfp4_moe import formats, reference, tiles
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.problems import bits, random_weights, relative_error
from mxfp4_moe.weights import MoEWeights

CPU = torch.device("cpu")
SM12X = of_arch("120f")
SOURCES = ("route", "route_few", "topk_softmax", "quantize_permute", "permute", "activation", "finalize")
ROUTER_TOLERANCE = {"rtol": 3e-6, "atol": 1e-30}  # as test_ptx_moe.py
LAYER_TOLERANCE = 5e-3  # as on a GPU: both sides quantize the same values twice; what is left is exp's last bits


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A call. Either logits, or ids and weights; hidden states with a scale, swizzled, are MXFP8."""

    tile: tiles.Tile
    fuses: bool  # GEMM1 and the activation
    weights: MoEWeights
    hidden_states: Tensor
    top_k: int
    dtype: torch.dtype
    hidden_scale: Tensor | None = None
    logits: Tensor | None = None
    ids: Tensor | None = None
    topk_weights: Tensor | None = None
    rounds: bool = False


def chosen_apart(layer: Layer) -> bool:
    """Whether a kernel of its own chooses experts: of more than 128 slots from logits."""
    return layer.logits is not None and len(layer.hidden_states) * layer.top_k > 128


def from_logits(tile: tiles.Tile, tokens: int, dtype: torch.dtype, *, fuses: bool) -> Layer:
    """K of both GEMMs ends inside of a K tile, N inside of an output tile."""
    experts, hidden, inter = 6, 160, 96
    g = torch.Generator().manual_seed(tokens)
    return Layer(
        tile=tile,
        fuses=fuses,
        weights=random_weights(experts, hidden, inter, CPU, seed=tokens),
        hidden_states=torch.randn(tokens, hidden, generator=g).to(dtype),
        logits=torch.randn(tokens, experts, generator=g),
        top_k=2,
        dtype=dtype,
    )


def from_ids_and_mxfp8(tile: tiles.Tile) -> Layer:
    """One of several ranks: half of the ids are of experts elsewhere. Numbers per expert, and all roundings."""
    tokens, top_k, experts = 9, 3, 5
    weights = layer_of(experts, 64, "swiglu_oai", "per expert", bias=True, device=CPU)
    weights = replace(weights, first_expert=3, num_global_experts=10)
    g = torch.Generator().manual_seed(tokens)
    codes, scales = formats.quantize_mxfp8(torch.randn(tokens, weights.hidden_size, generator=g))
    return Layer(
        tile=tile,
        fuses=True,
        weights=weights,
        hidden_states=codes,
        hidden_scale=formats.swizzle_scales(scales).flatten(),
        ids=ids_of(tokens, top_k, 10, torch.int64, CPU),
        topk_weights=torch.rand(tokens, top_k, generator=g),
        top_k=top_k,
        dtype=torch.bfloat16,
        rounds=True,
    )


def beyond_float16(tile: tiles.Tile) -> Layer:
    """float16, whose rows it cannot hold before they are weighted."""
    layer = from_logits(tile, 7, torch.float16, fuses=True)
    weights, ids = with_large_rows(layer.weights), ids_of(7, 2, 6, torch.int32, CPU)
    topk_weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) / 64
    return replace(layer, weights=weights, logits=None, ids=ids, topk_weights=topk_weights)


def start(layer: Layer, out: Tensor) -> Run:
    """The layer's launches, on a memory with what they were given. The kernel before the layer may still run."""
    recorder = launch.shared_recorder()
    ptx = [*map(launch.ptx_of_moe, SOURCES), launch.ptx_of_tile(layer.tile)]
    recorder.register_tile(layer.tile)
    (w13, w13_bias, w2, w2_bias, *numbers), rare = layer.weights.operator_arguments
    recording = recorder.operator(
        "fused_moe",
        *(layer.hidden_states, layer.topk_weights, layer.ids, layer.logits, 0 if layer.logits is None else layer.top_k),
        *(w13, w13_bias, w2, w2_bias, *numbers, layer.tile.m, layer.tile.n, out),
        **rare,
        hidden_states_scale=layer.hidden_scale,
        scale_is_swizzled=layer.hidden_scale is not None,
        intermediate_rounding=layer.rounds,
    )
    assert len(recording.launches) == 6 - layer.fuses + chosen_apart(layer)
    written = {"hidden_states": layer.hidden_states, "logits": layer.logits, "ids": layer.ids}
    written |= {"topk_weights": layer.topk_weights, "hidden_scale": layer.hidden_scale}
    written = {name: tensor for name, tensor in written.items() if tensor is not None}
    constant = {"w13": w13, "w13_bias": w13_bias, "w2": w2, "w2_bias": w2_bias}
    constant |= {name: value for name, value in rare.items() if isinstance(value, Tensor)}
    return Run(recording, ptx, written | constant, outputs={"out": out}, early=list(written), seed=layer.top_k)


CASES = {
    "few slots from logits": lambda: from_logits(tile_of(16, 128, swap=True), 5, torch.bfloat16, fuses=True),
    "many slots from logits, activation apart": lambda: from_logits(tile_of(64, 8), 66, torch.float16, fuses=False),
    "float16 rows that it cannot hold": lambda: beyond_float16(tile_of(16, 128, swap=True)),
    "ids of which some are elsewhere, MXFP8": lambda: from_ids_and_mxfp8(tile_of(32, 64, swap=True)),
}


def tile_of(m: int, n: int, *, swap: bool = False) -> tiles.Tile:
    return tiles.Tile(m=m, n=n, swap_ab=swap)


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    layer = CASES[case]()
    row_dtype = reference.ROW_DTYPES[layer.dtype]
    weights, top_k, tile, dtype = layer.weights, layer.top_k, layer.tile, layer.dtype
    tokens, (hidden, inter) = len(layer.hidden_states), (weights.hidden_size, weights.intermediate_size)
    out = torch.empty(tokens, hidden, dtype=dtype)
    run = start(layer, out)
    sizes: dict[str, Any] = {"slots": tokens * top_k, "hidden": hidden, "inter": inter, "experts": weights.num_experts}
    sizes |= {"tile_m": tile.m, "gemm1_width": 0 if layer.fuses else weights.w13_rows, "dtype": row_dtype}
    own = intermediates(run.recording, **sizes, from_logits=layer.logits is not None)

    if chosen_apart(layer):
        run.next("topk_softmax")
    run.next("route")
    if layer.logits is not None:
        expected_weights, ids = reference.topk_softmax(layer.logits, top_k)
        topk_weights = own["topk_weights"].clone().view(tokens, top_k)
        torch.testing.assert_close(topk_weights, expected_weights, **ROUTER_TOLERANCE)
    else:
        assert layer.ids is not None
        assert layer.topk_weights is not None
        ids, topk_weights = layer.ids, layer.topk_weights
    offsets, row_slot, slot_row = reference.route(ids - weights.first_expert, weights.num_experts)
    valid, expected_tiles = int(offsets[-1]), reference.m_tiles(offsets, tile.m)
    row_expert = torch.arange(weights.num_experts).repeat_interleave(offsets.diff())
    assert torch.equal(own["slot_row"], slot_row)
    assert torch.equal(own["row_expert"][:valid].long(), row_expert)
    assert own["num_m_tiles"].tolist() == [len(expected_tiles)]
    assert torch.equal(own["m_tiles"][: len(expected_tiles)], expected_tiles)

    run.next("quantize_permute" if layer.hidden_scale is None else "permute")
    if layer.hidden_scale is None:
        codes, scales = formats.quantize_mxfp8(layer.hidden_states)
    else:
        codes, scales = reference.mxfp8_rows(layer.hidden_states, layer.hidden_scale, "swizzled")
    token = row_slot[:valid] // top_k
    codes, scales = codes[token], scales[token]
    assert torch.equal(own["rows1"][:valid], formats.interleave_k(codes))
    assert torch.equal(own["scales1"][:, :valid], formats.pack_row_scales(scales)[:, :valid])

    # Tensor copies fetch whole boxes: rows of no expert too, which are multiplied and stored nowhere.
    run.allow_unwritten(own["rows1"])
    run.allow_unwritten(own["scales1"])
    run.next("grouped_gemm", junk(tile, hidden))
    packed, packed_scales = plain(weights.w13, weights.w13_rows, hidden)
    gemm1 = reference.grouped_gemm(codes, scales, packed, packed_scales, offsets, arithmetic=SM12X)
    if not layer.fuses:
        assert torch.equal(bits(own["gemm1_out"][:valid]), bits(gemm1))
        run.next("activation")
    numbers = (weights.activation, weights.alpha, weights.beta, weights.limit)
    rounding = dtype if layer.rounds else None
    values = reference.activate(gemm1, row_expert, weights.w13_bias, *numbers, rounding=rounding)
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    codes2 = formats.deinterleave_k(own["rows2"][:valid]).clone()
    scales2 = formats.unpack_row_scales(own["scales2"], tokens * top_k, inter)[:valid].clone()
    assert torch.equal(scales2, expected_scales)
    off = (ordinal(codes2) - ordinal(expected_codes)).abs()
    assert off.max() <= 1
    assert off.count_nonzero() <= 2e-3 * off.numel() + 1

    run.allow_unwritten(own["rows2"])
    run.allow_unwritten(own["scales2"])
    run.next("grouped_gemm", junk(tile, inter))
    packed, packed_scales = plain(weights.w2, hidden, inter)
    gemm2 = reference.grouped_gemm(codes2, scales2, packed, packed_scales, offsets, arithmetic=SM12X).to(row_dtype)
    assert torch.equal(bits(own["gemm2_out"][:valid]), bits(gemm2))

    run.next("finalize")
    run.finish()
    assert torch.equal(bits(out), bits(reference.finalize(gemm2, topk_weights, slot_row, row_expert, weights.w2_bias)))

    assert bool((gemm2.abs() > torch.finfo(torch.float16).max).any()) == ("cannot hold" in case)
    assert out.isfinite().all()

    # The same from the outside: the reference's layer, with the kernels' own activation, and with its own.
    inputs = (layer.hidden_states, topk_weights, ids, weights)
    options: dict[str, Any] = {"hidden_states_scale": layer.hidden_scale, "scale_layout": "swizzled"}
    options["output_dtype"] = dtype
    exact = reference.layer(*inputs, lambda *_: (codes2, scales2), arithmetic=SM12X, **options)
    assert torch.equal(bits(out), bits(exact))
    close = reference.fused_moe(*inputs, intermediate_rounding=layer.rounds, **options)
    assert relative_error(out, close) <= LAYER_TOLERANCE


def plain(weight: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Prepared weights of all experts in checkpoint order."""
    order = formats.word_order_of(CPU)
    packed, scales = zip(*(formats.restore_weights(one, n, k, order) for one in weight), strict=True)
    return torch.stack(packed), torch.stack(scales)
