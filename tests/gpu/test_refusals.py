"""Loading every tile, and what is refused before anything is launched. On a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import TILES, TOP_K, ops, run, small
from gpu_problems import bits, random_call

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe._install import loading
from mxfp4_moe.activations import Activation
from mxfp4_moe.tiles import Tile


def test_prewarm_loads_every_tile() -> None:
    assert mxfp4_moe.prewarm_moe_tiles() == [tile.name for tile in TILES]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_module_of_a_tile(tile: Tile) -> None:
    module = mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=tile.mn)
    assert module is mxfp4_moe.get_cutlass_fused_moe_module("120", tile.mn)
    call = random_call(16, 3, small())
    assert torch.equal(bits(module.fused_moe(*call.args(), small())), bits(run(call, small())))


def test_no_tokens() -> None:
    call = random_call(0, TOP_K, small())
    assert run(call, small()).shape == (0, 160)


def test_arguments_on_the_wrong_device_are_refused(device: torch.device) -> None:
    call = random_call(4, 2, small())
    x, w, ids = call.args()
    with pytest.raises(ValueError, match=rf"weights: expected MoEWeights on {device}, where hidden_states is, got cpu"):
        mxfp4_moe.fused_moe(x, w, ids, small().to("cpu"))
    with pytest.raises(ValueError, match=r"weights: expected MoEWeights on cpu, where hidden_states is, got cuda"):
        mxfp4_moe.fused_moe(x.cpu(), w.cpu(), ids.cpu(), small())
    with pytest.raises(ValueError, match=rf"topk_ids: expected .* on {device}, got int32 \[4, 2\] on cpu"):
        mxfp4_moe.fused_moe(x, w, ids.cpu(), small())
    with pytest.raises(ValueError, match=rf"topk_weights: expected .* on {device}, got float32 \[4, 2\] on cpu"):
        mxfp4_moe.fused_moe(x, w.cpu(), ids, small())
    with pytest.raises(ValueError, match=rf"output: expected .* on {device}, got bfloat16 \[4, 160\] on cpu"):
        mxfp4_moe.fused_moe(x, w, ids, small(), output=x.cpu())


def test_weights_in_another_word_order_are_refused(device: torch.device) -> None:
    x, w, ids = random_call(4, 2, small()).args()
    other = next(order for order in formats.WordOrder if order is not small().word_order)
    weights = replace(small(), word_order=other)
    message = rf"weights: expected word order '{small().word_order.value}' on {device}, got '{other.value}' of another"
    with pytest.raises(ValueError, match=message):
        mxfp4_moe.fused_moe(x, w, ids, weights)
    with pytest.raises(ValueError, match=message):
        mxfp4_moe.fused_moe_from_logits(x, torch.randn(4, 8, device=device), 2, weights)
    compiled = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        compiled(x, w, ids, weights)
    torch._dynamo.reset()


def test_data_off_a_16_byte_boundary_is_refused() -> None:
    x, w, ids = random_call(4, 2, small()).args()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x)
    with pytest.raises(RuntimeError, match=r"hidden_states: expected data aligned to 16 bytes, got 2 bytes past that"):
        mxfp4_moe.fused_moe(shifted, w, ids, small())
    with pytest.raises(RuntimeError, match=r"out: expected data aligned to 16 bytes, got 2 bytes past that"):
        mxfp4_moe.fused_moe(x, w, ids, small(), output=shifted)


def test_router_tensors_may_start_anywhere() -> None:
    """They are read element by element, so a view that starts at an odd place is fine."""
    call = random_call(9, 3, small())
    expected = run(call, small())
    shifted = []
    for x in (call.topk_weights, call.topk_ids):
        shifted.append(torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x))
    out = mxfp4_moe.fused_moe(call.hidden_states, shifted[0], shifted[1], small())
    assert torch.equal(bits(out), bits(expected))


def test_the_operator_checks_for_itself() -> None:
    """Callers may skip the Python layer; the operator then says what does not fit."""
    x, w, ids = random_call(4, 2, small()).args()
    layer = small()
    w13_bytes, w2_bytes = formats.weight_bytes(192, 160), formats.weight_bytes(160, 96)
    loading.load_tile(TILES[0])
    good: dict[str, Any] = {
        **{"hidden_states": x, "topk_weights": w, "topk_ids": ids, "w13": layer.w13, "w13_bias": None},
        **{"w2": layer.w2, "w2_bias": None, "intermediate_size": layer.intermediate_size, "activation": 1},
        **{"router_logits": None, "top_k": 0, "renormalize": True, "first_expert": 0},
        **{"alpha": 1.702, "beta": 1.0, "limit": 7.0, "alphas": None, "betas": None, "limits": None},
        **{"hidden_states_scale": None, "scale_is_swizzled": False, "tile_m": TILES[0].m, "tile_n": TILES[0].n},
        "out": torch.empty_like(x),
    }
    ops().fused_moe(**good)
    for change, message in (
        ({"tile_m": 7}, r"tile: expected one that is loaded, got \(7, "),
        ({"hidden_states": x.float()}, r"hidden_states: expected bfloat16 or float16 .*, got float32 \[4, 160\]"),
        ({"topk_weights": w.double()}, r"topk_weights: expected float32 \[4, 2\], got another dtype \[4, 2\]"),
        ({"topk_ids": ids.short()}, r"topk_ids: expected int32 or int64 \[tokens, top_k\]"),
        ({"w13": layer.w13[:, :-1]}, rf"w13: expected uint8 \[8, {w13_bytes}\], got uint8 \[8, {w13_bytes - 1}\]"),
        ({"w13": layer.w13[:, None]}, rf"w13: expected uint8 .*, got uint8 \[8, 1, {w13_bytes}\]"),
        ({"w2": layer.w2[:-1]}, rf"w2: expected uint8 \[8, {w2_bytes}\], got uint8 \[7, {w2_bytes}\]"),
        ({"intermediate_size": 64}, rf"w13: expected uint8 \[8, {formats.weight_bytes(128, 160)}\], got uint8 \[8, "),
        ({"intermediate_size": 100}, r"intermediate_size: expected a positive multiple of 32"),
        ({"router_logits": w, "top_k": 2}, r"router_logits: expected none beside topk_weights and topk_ids, got both"),
        ({"topk_ids": None}, r"topk_weights and topk_ids: expected both, or router_logits, got neither or one"),
        (
            {"w2_bias": torch.empty(8, 96, device=x.device)},
            r"w2_bias: expected float32 \[8, 160\], got float32 \[8, 96",
        ),
        ({"activation": len(Activation)}, rf"activation: expected 0 to {len(Activation) - 1}, got {len(Activation)}"),
        ({"limits": torch.ones(7, device=x.device)}, r"limit: expected float32 \[8\], got float32 \[7\]"),
        ({"hidden_states_scale": w}, r"hidden_states: expected uint8 \[tokens, hidden\] with hidden_states_scale, got"),
        ({"out": torch.empty_like(x).float()}, r"out: expected bfloat16 or float16 .*, got float32 \[4, 160\]"),
        ({"out": torch.empty(4, 320, device=x.device, dtype=x.dtype)[:, :160]}, r"out: expected a contiguous tensor"),
        ({"w2": layer.w2.cpu()}, r"w2: expected a tensor on cuda:\d+, got one on"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops().fused_moe(**{**good, **change})


def test_route_refuses_what_it_cannot_hold(device: torch.device) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for experts in (0, 1025):
        with pytest.raises(RuntimeError, match=rf"num_experts: expected 1 to 1024, got {experts}"):
            ops().route(ids, experts, 8)
    with pytest.raises(RuntimeError, match=r"tile_m: expected 1 to 1024, got 2000"):
        ops().route(ids, 4, 2000)
