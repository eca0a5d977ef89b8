"""What the public call means, on CPU tensors. What it refuses: test_fused_moe_refusals.py; GPU: tests/gpu."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import E, H, K, T, bits, make_call, make_weights, mxfp8
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, reference


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
