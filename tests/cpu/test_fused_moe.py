"""The public call on CPU tensors: what it refuses and in which words, and what it means. GPU: tests/gpu/test_moe.py."""

from __future__ import annotations

import copy
import importlib
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call import checks, launch, operators
from mxfp4_moe._call.checks import MAX_SLOTS, check_limits, check_word_order
from mxfp4_moe._call.launch import check_capability
from mxfp4_moe._call.selection import manifest_tile, select
from mxfp4_moe._install import errors, loading
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

E, T, K, H, INTER = 4, 6, 2, 64, 96


def make_weights(*, bias: bool = True, seed: int = 0, **options: Any) -> MoEWeights:
    g = torch.Generator().manual_seed(seed)
    w13, w13_scale = formats.quantize_mxfp4(torch.randn(E, 2 * INTER, H, generator=g) / H**0.5)
    w2, w2_scale = formats.quantize_mxfp4(torch.randn(E, H, INTER, generator=g) / INTER**0.5)
    return MoEWeights.from_mxfp4(
        w13,
        w13_scale,
        w2,
        w2_scale,
        w13_bias=torch.randn(E, 2 * INTER, generator=g) if bias else None,
        w2_bias=torch.randn(E, H, generator=g) if bias else None,
        **options,
    )


def per_expert_weights() -> MoEWeights:
    """A slice, with numbers for each expert and without a limit."""
    alpha, beta = torch.linspace(1, 2, E), torch.linspace(0, 1, E)
    weights = make_weights(bias=False, alpha=alpha, beta=beta, limit=None)
    return replace(weights, first_expert=E, num_global_experts=3 * E)


def make_call(*, dtype: torch.dtype = torch.bfloat16, tokens: int = T, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(tokens, H, generator=g).to(dtype),
        "topk_weights": torch.rand(tokens, K, generator=g),
        "topk_ids": torch.randint(0, E, (tokens, K), generator=g),
        "weights": make_weights(),
    }


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def mxfp8(call: dict[str, Any], scale_layout: str = "linear") -> dict[str, Any]:
    """The hidden states of a call as the layer would quantize them."""
    codes, scales = formats.quantize_mxfp8(call["hidden_states"])
    if scale_layout == "swizzled":
        scales = formats.swizzle_scales(scales).flatten()
    return {"hidden_states": codes, "hidden_states_scale": scales, "scale_layout": scale_layout}


def too_many_experts() -> MoEWeights:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1025, *shape, dtype=torch.uint8)

    return MoEWeights(
        w13=zeros(formats.weight_bytes(64, 64)),
        w2=zeros(formats.weight_bytes(64, 32)),
        hidden_size=64,
        intermediate_size=32,
    )


# ---- what is refused -----------------------------------------------------------------------------------------------

BAD: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    (
        "weights type",
        lambda c: {"weights": {"w13": c["weights"].w13}},
        TypeError,
        r"weights: expected MoEWeights, got dict",
    ),
    (
        "hidden_states type",
        lambda c: {"hidden_states": c["hidden_states"].tolist()},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, H\], got list",
    ),
    (
        "hidden_states float32",
        lambda c: {"hidden_states": c["hidden_states"].float()},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float32 \[6, 64\]",
    ),
    (
        "hidden_states float8 without its scales",
        lambda c: {"hidden_states": c["hidden_states"].to(torch.float8_e4m3fn)},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float8_e4m3fn \[6, 64\]",
    ),
    (
        "hidden_states width",
        lambda c: {"hidden_states": c["hidden_states"][:, :33].contiguous()},
        ValueError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got bfloat16 \[6, 33\]",
    ),
    (
        "hidden_states dimensions",
        lambda c: {"hidden_states": c["hidden_states"][None]},
        ValueError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got bfloat16 \[1, 6, 64\]",
    ),
    (
        "hidden_states stride",
        lambda c: {"hidden_states": c["hidden_states"].t().contiguous().t()},
        ValueError,
        r"hidden_states: expected a contiguous tensor, got strides \[1, 6\] for shape \[6, 64\]",
    ),
    (
        "hidden_states device",
        lambda c: {"hidden_states": c["hidden_states"].to("meta")},
        ValueError,
        r"hidden_states: expected a CUDA or CPU tensor, got one on meta",
    ),
    (
        "weights device",
        lambda c: {"weights": c["weights"].to("meta")},
        ValueError,
        r"weights: expected MoEWeights on cpu, where hidden_states is, got meta; weights.to\('cpu'\)",
    ),
    (
        "topk_ids dtype",
        lambda c: {"topk_ids": c["topk_ids"].to(torch.int16)},
        TypeError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int16 \[6, 2\]",
    ),
    (
        "topk_ids tokens",
        lambda c: {"topk_ids": c["topk_ids"][:5]},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int64 \[5, 2\]",
    ),
    (
        "topk_ids flat",
        lambda c: {"topk_ids": c["topk_ids"].flatten()},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int64 \[12\]",
    ),
    (
        "topk_ids empty",
        lambda c: {"topk_ids": c["topk_ids"][:, :0], "topk_weights": c["topk_weights"][:, :0]},
        ValueError,
        r"topk_ids: expected \[6, k\] with k at least 1, got k = 0",
    ),
    (
        "topk_ids stride",
        lambda c: {"topk_ids": torch.cat([c["topk_ids"]] * 2, 1)[:, ::2]},
        ValueError,
        r"topk_ids: expected a contiguous tensor, got strides \[4, 2\] for shape \[6, 2\]",
    ),
    (
        "topk_ids device",
        lambda c: {"topk_ids": c["topk_ids"].to("meta")},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\] on cpu, got int64 \[6, 2\] on meta",
    ),
    (
        "topk_ids type",
        lambda c: {"topk_ids": c["topk_ids"].tolist()},
        TypeError,
        r"topk_ids: expected int32 or int64 \[6, k\], got list",
    ),
    (
        "topk_weights dtype",
        lambda c: {"topk_weights": c["topk_weights"].bfloat16()},
        TypeError,
        r"topk_weights: expected float32 \[6, 2\], got bfloat16 \[6, 2\]",
    ),
    (
        "topk_weights shape",
        lambda c: {"topk_weights": c["topk_weights"][:, :1].contiguous()},
        ValueError,
        r"topk_weights: expected float32 \[6, 2\], got float32 \[6, 1\]",
    ),
    (
        "topk_weights device",
        lambda c: {"topk_weights": c["topk_weights"].to("meta")},
        ValueError,
        r"topk_weights: expected float32 \[6, 2\] on cpu, got float32 \[6, 2\] on meta",
    ),
    (
        "output dtype",
        lambda c: {"output": torch.empty(T, H, dtype=torch.float16)},
        TypeError,
        r"output: expected bfloat16 \[6, 64\], got float16 \[6, 64\]",
    ),
    (
        "output shape",
        lambda c: {"output": torch.empty(T + 1, H, dtype=torch.bfloat16)},
        ValueError,
        r"output: expected bfloat16 \[6, 64\], got bfloat16 \[7, 64\]",
    ),
    (
        "output stride",
        lambda c: {"output": torch.empty(T, 2 * H, dtype=torch.bfloat16)[:, :H]},
        ValueError,
        r"output: expected a contiguous tensor, got strides \[128, 1\] for shape \[6, 64\]",
    ),
    (
        "output device",
        lambda c: {"output": c["hidden_states"].to("meta")},
        ValueError,
        r"output: expected bfloat16 \[6, 64\] on cpu, got bfloat16 \[6, 64\] on meta",
    ),
    (
        "output of the input's dtype where another was asked for",
        lambda c: {"output": c["hidden_states"], "output_dtype": torch.float16},
        TypeError,
        r"output: expected float16 \[6, 64\], got bfloat16 \[6, 64\]",
    ),
    (
        "output_dtype",
        lambda c: {"output_dtype": torch.float32},
        TypeError,
        r"output_dtype: expected torch.bfloat16 or torch.float16, got torch.float32",
    ),
    (
        "bfloat16 with scales",
        lambda c: mxfp8(c) | {"hidden_states": c["hidden_states"]},
        TypeError,
        r"hidden_states: expected uint8 or float8_e4m3fn \[T, 64\], got bfloat16 \[6, 64\]",
    ),
    (
        "scale layout",
        lambda c: mxfp8(c) | {"scale_layout": "128x4"},
        ValueError,
        r"scale_layout: expected 'linear' or 'swizzled', got '128x4'",
    ),
    (
        "scales of the other layout",
        lambda c: mxfp8(c) | {"scale_layout": "swizzled"},
        ValueError,
        r"hidden_states_scale: expected uint8 \[512\], got uint8 \[6, 2\]",
    ),
    (
        "scales' shape",
        lambda c: mxfp8(c, "swizzled") | {"scale_layout": "linear"},
        ValueError,
        r"hidden_states_scale: expected uint8 \[6, 2\], got uint8 \[512\]",
    ),
    (
        "scales' dtype",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(6, 2)},
        TypeError,
        r"hidden_states_scale: expected uint8 \[6, 2\], got float32 \[6, 2\]",
    ),
    (
        "scales' device",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(6, 2, dtype=torch.uint8, device="meta")},
        ValueError,
        r"hidden_states_scale: expected uint8 \[6, 2\] on cpu, got uint8 \[6, 2\] on meta",
    ),
    (
        "scales' stride",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(2, 6, dtype=torch.uint8).t()},
        ValueError,
        r"hidden_states_scale: expected a contiguous tensor, got strides \[1, 6\] for shape \[6, 2\]",
    ),
    (
        "too many experts",
        lambda c: {"weights": too_many_experts()},
        ValueError,
        r"weights: expected at most 1024 experts, got 1025",
    ),
    (
        "tile not in the manifest",
        lambda c: {"tile_mn": (192, 128)},
        ValueError,
        r"tile_mn: expected a tile of the manifest \(.*\(128, 128\).*\), got \(192, 128\)",
    ),
    (
        "tile no pair",
        lambda c: {"tile_mn": 128},
        TypeError,
        r"tile_mn: expected a pair of integers \(M, N\), got 128",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(reference, "fused_moe", lambda *_, **__: pytest.fail("computed before the last check"))
    call = make_call()
    call |= change(call)
    with pytest.raises(error, match=message) as caught:
        mxfp4_moe.fused_moe(**call)
    assert "\n" not in str(caught.value)


def test_k_that_is_no_multiple_of_32_is_refused_with_the_weights() -> None:
    hidden, inter = 48, 64
    with pytest.raises(ValueError, match=r"w13: expected H .* a multiple of 32, got 48"):
        MoEWeights.from_mxfp4(
            torch.zeros(2, 2 * inter, hidden // 2, dtype=torch.uint8),
            torch.zeros(2, 2 * inter, 2, dtype=torch.uint8),
            torch.zeros(2, hidden, inter // 2, dtype=torch.uint8),
            torch.zeros(2, hidden, inter // 32, dtype=torch.uint8),
        )


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (12, 1)])
def test_supported_gpus(capability: tuple[int, int]) -> None:
    check_capability(capability, "a GPU")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (10, 3), (11, 0)])
def test_unsupported_gpu_is_named_with_archs_and_versions(capability: tuple[int, int]) -> None:
    arch = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(RuntimeError, match=rf"\(sm_90a, sm_120f\), got one on Old GPU, which is {arch}; ") as caught:
        check_capability(capability, "Old GPU")
    assert f"torch {torch.__version__}" in str(caught.value)
    assert "the wheel was built for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_refuses_another_word_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are the only thing in which devices differ, so nothing else would tell."""
    orders = {0: formats.WordOrder.HALVES, 1: formats.WordOrder.CONTAINERS}
    monkeypatch.setattr(checks, "word_order_of", lambda d: orders[d.index])
    for index, order in orders.items():
        check_word_order(order, torch.device("cuda", index))
        with pytest.raises(ValueError, match=rf"^weights: expected word order '{order.value}' on cuda:{index}, got .*"):
            check_word_order(orders[1 - index], torch.device("cuda", index))


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu"])
def test_cpu_reads_either_word_order(activation: str) -> None:
    gated = activation != "relu"
    checkpoint = oracles.random_checkpoint(E, H, INTER, gated=gated)
    weights = MoEWeights.from_mxfp4(**checkpoint, activation=activation)
    sizes = {"w13": (weights.w13_rows, H), "w2": (H, INTER)}
    old, new = formats.WordOrder.CONTAINERS, formats.WordOrder.HALVES
    halves = {
        name: torch.stack([formats.reorder_words(expert, *size, old, new) for expert in getattr(weights, name)])
        for name, size in sizes.items()
    }
    call = make_call() | {"weights": weights}
    expected = mxfp4_moe.fused_moe(**call)
    assert torch.equal(mxfp4_moe.fused_moe(**call | {"weights": replace(weights, **halves, word_order=new)}), expected)
    assert not torch.equal(mxfp4_moe.fused_moe(**call | {"weights": replace(weights, **halves)}), expected)


# ---- what it means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu"])
def test_layer_is_close_to_float64_without_activation_quantization(dtype: torch.dtype, activation: str) -> None:
    """Two MXFP8 quantizations stand between the two: relative error 2^-4 per value at worst, a few percent overall."""
    call = make_call(dtype=dtype, tokens=32)
    call["weights"] = weights = make_weights(activation=activation)
    plain = weights.to_mxfp4()
    w13 = formats.dequantize_mxfp4(plain.w13, plain.w13_scale).double()
    w2 = formats.dequantize_mxfp4(plain.w2, plain.w2_scale).double()
    assert plain.w13_bias is not None
    assert plain.w2_bias is not None
    expected = torch.zeros(32, H, dtype=torch.float64)
    for t in range(32):
        for j in range(K):
            e = int(call["topk_ids"][t, j])
            row = w13[e] @ call["hidden_states"][t].double() + plain.w13_bias[e].double()
            gate, up = row[0::2], row[1::2]
            if activation == "swiglu_oai":
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            else:
                act = gate * torch.sigmoid(gate) * up
            expected[t] += call["topk_weights"][t, j].double() * (w2[e] @ act + plain.w2_bias[e].double())
    out = mxfp4_moe.fused_moe(**call)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < 0.06


def test_ids_that_are_no_expert_contribute_nothing() -> None:
    call = make_call()
    ids = call["topk_ids"]
    ids[0, 1], ids[1, 0], ids[2] = -1, E, torch.tensor([-(2**40), 2**32 + 1])
    out = mxfp4_moe.fused_moe(**call)
    for t, j in ((0, 0), (1, 1)):  # the slot that is left
        one = mxfp4_moe.fused_moe(
            call["hidden_states"][t : t + 1],
            call["topk_weights"][t : t + 1, j : j + 1].contiguous(),
            ids[t : t + 1, j : j + 1].contiguous(),
            call["weights"],
        )
        assert torch.equal(bits(out[t : t + 1]), bits(one))
    assert torch.equal(bits(out[2]), torch.zeros(H, dtype=torch.int16))


def test_expert_may_repeat_within_a_token() -> None:
    call = make_call(tokens=1)
    call["topk_ids"] = torch.tensor([[2, 2]])
    call["topk_weights"] = torch.tensor([[0.25, 0.5]])
    twice = mxfp4_moe.fused_moe(**call)
    call["topk_ids"], call["topk_weights"] = torch.tensor([[2]]), torch.tensor([[0.75]])
    torch.testing.assert_close(twice, mxfp4_moe.fused_moe(**call), rtol=2**-7, atol=0)  # one bfloat16 rounding


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_no_tokens(dtype: torch.dtype) -> None:
    call = make_call(tokens=0)
    call["topk_ids"] = call["topk_ids"].to(dtype)
    out = mxfp4_moe.fused_moe(**call)
    assert out.shape == (0, H)
    assert out.dtype == torch.bfloat16


def test_int32_and_int64_ids_are_the_same() -> None:
    call = make_call()
    out = mxfp4_moe.fused_moe(**call)
    call["topk_ids"] = call["topk_ids"].int()
    assert torch.equal(bits(out), bits(mxfp4_moe.fused_moe(**call)))


def test_output_is_written_and_returned() -> None:
    call = make_call()
    expected = mxfp4_moe.fused_moe(**call)
    output = torch.full_like(expected, float("nan"))
    assert mxfp4_moe.fused_moe(**call, output=output) is output
    assert torch.equal(bits(output), bits(expected))
    in_place = call["hidden_states"]
    assert mxfp4_moe.fused_moe(**call, output=in_place) is in_place
    assert torch.equal(bits(in_place), bits(expected))


def test_token_alone_equals_token_in_a_batch() -> None:
    call = make_call(tokens=9)
    out = mxfp4_moe.fused_moe(**call)
    for t in range(9):
        alone: dict[str, Any] = {name: x[t : t + 1] if isinstance(x, Tensor) else x for name, x in call.items()}
        assert torch.equal(bits(out[t : t + 1]), bits(mxfp4_moe.fused_moe(**alone)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_token(poison: float) -> None:
    call = make_call()
    clean = mxfp4_moe.fused_moe(**call)
    call["hidden_states"][3, 40] = poison
    out = mxfp4_moe.fused_moe(**call)
    assert out[3].isnan().all()
    others = torch.arange(T) != 3
    assert torch.equal(bits(out[others]), bits(clean[others]))


def test_tile_choice_changes_nothing_on_the_cpu() -> None:
    call = make_call()
    out = mxfp4_moe.fused_moe(**call)
    for options in ({"tile_mn": (8, 128)}, {"tile_mn": (256, 64)}, {"auto_tile_select": False}):
        assert torch.equal(bits(out), bits(mxfp4_moe.fused_moe(**call, **options)))


def test_without_limit_nothing_is_clamped() -> None:
    call = make_call()
    call["hidden_states"] *= 30
    clamped = mxfp4_moe.fused_moe(**call)
    call["weights"] = replace(call["weights"], limit=None)
    free = mxfp4_moe.fused_moe(**call)
    call["weights"] = replace(call["weights"], limit=1e30)
    assert torch.equal(bits(free), bits(mxfp4_moe.fused_moe(**call)))
    assert not torch.equal(bits(free), bits(clamped))


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale_layout", ["linear", "swizzled"])
def test_mxfp8_input_is_what_the_layer_quantizes_to(
    scale_layout: str, view: torch.dtype, output_dtype: torch.dtype
) -> None:
    call = make_call(tokens=131)
    expected = mxfp4_moe.fused_moe(**call, output_dtype=output_dtype)
    assert expected.dtype == output_dtype
    call |= mxfp8(call, scale_layout)
    call["hidden_states"] = call["hidden_states"].view(view)
    out = mxfp4_moe.fused_moe(**call, output_dtype=output_dtype)
    assert out.dtype == output_dtype
    assert torch.equal(bits(out), bits(expected))
    assert mxfp4_moe.fused_moe(**call).dtype == torch.bfloat16


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16])
def test_intermediate_rounding_is_an_option(output_dtype: torch.dtype) -> None:
    call = make_call() | {"output_dtype": output_dtype}
    out, default = mxfp4_moe.fused_moe(**call, intermediate_rounding=True), mxfp4_moe.fused_moe(**call)
    assert torch.equal(bits(out), bits(reference.fused_moe(**call, intermediate_rounding=True)))
    assert torch.equal(bits(default), bits(mxfp4_moe.fused_moe(**call, intermediate_rounding=False)))
    assert not torch.equal(bits(out), bits(default))
    assert (out.float() - default.float()).norm() < 0.05 * default.float().norm()


def test_output_dtype_is_chosen_apart_from_the_input() -> None:
    for given in (torch.bfloat16, torch.float16):
        call = make_call(dtype=given)
        results = {d: mxfp4_moe.fused_moe(**call, output_dtype=d) for d in (torch.bfloat16, torch.float16)}
        for dtype, out in results.items():
            assert out.dtype == dtype
            output = torch.empty_like(out)
            assert mxfp4_moe.fused_moe(**call, output_dtype=dtype, output=output) is output
            assert torch.equal(bits(output), bits(out))
        # Rounding rows and sums to bfloat16 or to float16: half a bfloat16 step each, of values up to their norm.
        difference = results[torch.bfloat16].double() - results[torch.float16].double()
        assert difference.norm() <= 2**-8 * results[torch.float16].double().norm()


@pytest.mark.parametrize("scale_layout", ["linear", "swizzled"])
def test_mxfp8_scales_and_codes_that_are_no_number(scale_layout: str) -> None:
    """Bytes up to 248 count as they are; above that, and with a NaN code, the token is NaN, and no other is touched."""
    plain = make_call()
    codes, scales = formats.quantize_mxfp8(plain["hidden_states"])
    call = plain | mxfp8(plain, scale_layout)
    clean = mxfp4_moe.fused_moe(**call)
    scales[1, 1], scales[2, 0], scales[3, 1] = 249, 254, 255
    codes[4, 17] = 0x7F
    scales[5], codes[5] = 248, 0  # nothing times 2^121
    scales_given = formats.swizzle_scales(scales).flatten() if scale_layout == "swizzled" else scales
    out = mxfp4_moe.fused_moe(**{**call, "hidden_states": codes, "hidden_states_scale": scales_given})
    assert out[1:5].isnan().all()
    assert torch.equal(bits(out[0]), bits(clean[0]))
    zero = plain["hidden_states"].clone()
    zero[5] = 0
    assert torch.equal(bits(out[5]), bits(mxfp4_moe.fused_moe(**{**plain, "hidden_states": zero})[5]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_router_weight_that_is_no_number_stays_in_its_token(poison: float) -> None:
    call = make_call()
    clean = mxfp4_moe.fused_moe(**call)
    call["topk_weights"][2, 1] = poison
    out = mxfp4_moe.fused_moe(**call)
    assert not out[2].isfinite().any()
    others = torch.arange(T) != 2
    assert torch.equal(bits(out[others]), bits(clean[others]))


def test_limits_are_stated_before_anything_is_allocated() -> None:
    check_limits(1024, MAX_SLOTS, 1)
    with pytest.raises(ValueError, match=r"weights: expected at most 1024 experts, got 1025"):
        check_limits(1025, 1, 1)
    with pytest.raises(ValueError, match=r"topk_ids: expected at most 2147482623 slots .*, got 1073741312 \* 2"):
        check_limits(1, (MAX_SLOTS + 1) // 2, 2)


# ---- modules and loading -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No extension counts as loaded, before and after."""
    for cached in (loading.load_tile, loading.moe_ops):
        monkeypatch.setattr(loading, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(loading, "library_fault", lambda module: None)  # the source tree has no libraries
    return monkeypatch


def test_import_loads_no_extension() -> None:
    code = (
        "import sys, mxfp4_moe\n"
        "assert not [m for m in sys.modules if m.startswith('mxfp4_moe._ext')], sys.modules\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert 'mxfp4_moe' not in maps, maps\n"
        "print(sorted(mxfp4_moe.__all__))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    for name in eval(result.stdout):
        assert hasattr(mxfp4_moe, name)


def test_module_is_cached_and_bound_to_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    module = mxfp4_moe.get_cutlass_fused_moe_module(backend="120", tile_mn=(8, 128))
    assert module is mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=(8, 128))
    assert module is not mxfp4_moe.get_cutlass_fused_moe_module()
    assert module.tile == Tile(m=8, n=128, swap_ab=True)
    assert mxfp4_moe.get_cutlass_fused_moe_module().tile == Tile(m=128, n=128, swap_ab=False)
    call = make_call()
    output = torch.empty_like(call["hidden_states"])
    assert module.fused_moe(**call, output=output) is output
    assert torch.equal(bits(output), bits(mxfp4_moe.fused_moe(**call)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "100"}, ValueError, r"backend: expected '120' .*SM90.*got '100'"),
        ({"backend": 120}, ValueError, r"backend: expected '120' .*got 120"),
        ({"tile_mn": (96, 128)}, ValueError, r"tile_mn: expected M a multiple of 64, or 8, 16 or 32 .*got \(96, 128\)"),
        ({"tile_mn": (24, 128)}, ValueError, r"tile_mn: expected M a multiple of 64, or 8, 16 or 32 .*got \(24, 128\)"),
        ({"tile_mn": (16, 32)}, ValueError, r"tile_mn: expected N of at least 64 for a swapped tile \(M = 16\), got"),
        ({"tile_mn": (128, 4)}, ValueError, r"tile_mn: expected N from 8 to 256, got \(128, 4\)"),
        ({"tile_mn": (128, 512)}, ValueError, r"tile_mn: expected N from 8 to 256, got \(128, 512\)"),
        ({"tile_mn": (448, 8)}, ValueError, r"tile_mn: expected a tile of the manifest \(.*\), got \(448, 8\)"),
        ({"tile_mn": (0, 128)}, ValueError, r"tile_mn: expected a tile of the manifest \(.*\), got \(0, 128\)"),
        ({"tile_mn": (128,)}, TypeError, r"tile_mn: expected a pair of integers \(M, N\), got \(128,\)"),
        ({"tile_mn": (128.0, 128)}, TypeError, r"tile_mn: expected a pair of integers \(M, N\), got \(128.0, 128\)"),
    ],
)
def test_module_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mxfp4_moe.get_cutlass_fused_moe_module(**arguments)


def test_tile_choice_names_are_exported() -> None:
    assert [mxfp4_moe.select_tile_mn_for_sm120(n) for n in (1, 63, 64, 255, 256)] == [
        (64, 128),
        (64, 128),
        (128, 128),
        (128, 128),
        (256, 64),
    ]
    assert manifest_tile((16, 128)).swap_ab


def test_loading_without_cuda_torch_is_one_sentence(fresh_loader: pytest.MonkeyPatch) -> None:
    fresh_loader.setattr(torch.version, "cuda", None)
    module = mxfp4_moe.get_cutlass_fused_moe_module()
    for load in (lambda: module.grouped_gemm, mxfp4_moe.prewarm_moe_tiles):
        with pytest.raises(
            RuntimeError, match=r"mxfp4_moe\._ext\.moe needs a CUDA build of torch: .*no CUDA"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_extension_that_does_not_load_quotes_what_it_was_built_for(
    fresh_loader: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    report = tmp_path / "build_report.json"
    report.write_text('{"built_with": {"cuda": "13.0", "torch": "2.13.0"}}')

    def refuse(name: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    fresh_loader.setattr(errors, "_REPORT", report)
    fresh_loader.setattr(torch.version, "cuda", "12.6")
    fresh_loader.setattr(importlib, "import_module", refuse)
    with pytest.raises(RuntimeError, match=r"mxfp4_moe\._ext\.moe cannot be loaded \(libcudart") as caught:
        mxfp4_moe.prewarm_moe_tiles()
    message = str(caught.value)
    assert "built for CUDA 13.0 with torch 2.13.0" in message
    assert f"you have torch {torch.__version__} with CUDA 12.6" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, ImportError)
    report.unlink()
    with pytest.raises(RuntimeError, match="an unknown CUDA"):
        mxfp4_moe.prewarm_moe_tiles()


# ---- what reaches the operator ---------------------------------------------------------------------------------------

OPERATORS = Path(__file__).parents[2] / "csrc" / "moe" / "ops.cpp"


def layer_schema() -> torch._C.FunctionSchema:
    """The operator's schema as ops.cpp has it; the extension itself does not load without CUDA."""
    (text,) = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)*"fused_moe\((?:[^"]*"\s*")*[^"]*")\)', OPERATORS.read_text())
    return torch._C.parse_schema("mxfp4_moe::" + "".join(re.findall(r'"([^"]*)"', text)))


class Recorder:
    """Stands for the operator, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        operator = lambda *args, **named: self.calls.append((args, named))  # noqa: E731
        monkeypatch.setattr(launch, "layer_operator", lambda index, tile: (operator, tile))

    def arguments(self) -> dict[str, Any]:
        """Of the one call, by the schema's names and with its defaults."""
        ((args, named),) = self.calls
        schema = layer_schema().arguments
        rest = {a.name: a.has_default_value() for a in schema[len(args) :]}
        assert named.keys() <= rest.keys()
        assert all(rest[name] for name in rest.keys() - named.keys()), "nothing else may be left out"
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        return defaults | dict(zip((a.name for a in schema), args, strict=False)) | named


def same(given: object, expected: object) -> bool:
    return given is expected or (not isinstance(given, Tensor) and given == expected)


@pytest.mark.parametrize("scale_layout", [None, "linear", "swizzled"])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("weights", [make_weights(), per_expert_weights()], ids=["plain", "rare"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_every_argument_reaches_the_operator_under_its_name(
    monkeypatch: pytest.MonkeyPatch, from_logits: bool, weights: MoEWeights, rounding: bool, scale_layout: str | None
) -> None:
    """The call is by position, and an argument that has its default is left out."""
    hidden_states = torch.zeros(T, H, dtype=torch.bfloat16 if scale_layout is None else torch.uint8)
    scale = None if scale_layout is None else torch.zeros(T, H // 32, dtype=torch.uint8)
    topk_weights, topk_ids, logits, output = torch.zeros(4, 1).unbind()
    routing = (None, None, logits, 3) if from_logits else (topk_weights, topk_ids, None, 0)
    recorder = Recorder(monkeypatch)
    launch.run(
        tile=Tile(m=8, n=128, swap_ab=True),
        hidden_states=hidden_states,
        hidden_states_scale=scale,
        scale_layout=scale_layout or "linear",
        routing=routing,
        weights=weights,
        output=output,
        intermediate_rounding=rounding,
        renormalize=not from_logits,
    )
    got = recorder.arguments()
    assert got.pop("hidden_states").data_ptr() == hidden_states.data_ptr()
    rare = weights.first_expert > 0
    expected = {
        "hidden_states_scale": scale,
        "scale_is_swizzled": scale_layout == "swizzled",
        **dict(zip(("topk_weights", "topk_ids", "router_logits", "top_k"), routing, strict=True)),
        "renormalize": not from_logits,
        "first_expert": weights.first_expert,
        "intermediate_size": INTER,
        **{name: getattr(weights, name) for name in ("w13", "w13_bias", "w2", "w2_bias")},
        "activation": weights.activation.code,
        **({"alpha": 0.0, "beta": 0.0, "limit": math.inf} if rare else {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
        **({"alphas": weights.alpha, "betas": weights.beta} if rare else {"alphas": None, "betas": None}),
        "limits": None,
        **{"tile_m": 8, "tile_n": 128, "out": output, "intermediate_rounding": rounding, "fold": True},
    }
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(got[name], value)] == []


@pytest.mark.parametrize("per_expert", [False, True])
def test_a_compiled_call_hands_the_operator_the_same(monkeypatch: pytest.MonkeyPatch, per_expert: bool) -> None:
    recorder, weights, call = Recorder(monkeypatch), make_weights(), make_call()
    numbers = {"alpha": 1.5, "beta": 0.5, "limit": None if per_expert else 7.0}
    each = {f"{name}s": torch.full((E,), 2.0) if per_expert else None for name in numbers}
    own = {name: getattr(weights, name) for name in ("w13", "w13_bias", "w2", "w2_bias", "intermediate_size")}
    arguments = operators.LayerCall(
        *(call[name] for name in ("hidden_states", "topk_weights", "topk_ids")),
        **own,
        **numbers,
        **each,
        hidden_size=H,
        word_order=weights.word_order.value,
        activation="swiglu_oai",
        hidden_states_scale=None,
        scale_layout="linear",
        output_dtype=torch.float16,
        intermediate_rounding=True,
    )
    operators._moe_layer_cuda(*arguments)
    got = recorder.arguments()
    out = got.pop("out")
    assert (out.dtype, out.shape) == (torch.float16, (T, H))
    tile = select(T, K, E, H, INTER, None)
    expected = {
        **{name: call[name] for name in ("hidden_states", "topk_weights", "topk_ids")},
        **{"router_logits": None, "top_k": 0, "renormalize": True, "first_expert": 0},
        **{"activation": weights.activation.code, "tile_m": tile.m, "tile_n": tile.n},
        **own,
        **numbers,
        **({"limit": math.inf} if per_expert else {}),
        **each,
        **{"hidden_states_scale": None, "scale_is_swizzled": False, "intermediate_rounding": True, "fold": True},
    }
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(got[name], value)] == []


def test_copies_of_weights_gather_their_own_arguments() -> None:
    """A copy that kept the original's would compute with the original's tensors."""
    weights = per_expert_weights()
    before = weights.operator_arguments
    assert weights.operator_arguments is before
    for copied in (
        copy.deepcopy(weights),
        pickle.loads(pickle.dumps(weights)),
        replace(weights, w2=weights.w2.clone()),
    ):
        arguments, rare = copied.operator_arguments
        assert arguments[0] is copied.w13
        assert arguments[2] is copied.w2
        assert rare["alphas"] is copied.alpha
        assert torch.equal(copied.w2, weights.w2)
        assert copied.w2 is not weights.w2
