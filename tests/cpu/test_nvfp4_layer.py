"""`fused_moe` on CPU tensors with FP4 activations and with NVFP4 weights, against layers in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from nvfp4_cases import E, H, I, random_nvfp4, with_biases
from nvfp4_layers import K, Quantizer, T, exactly, float64_layer, gated_expert, in_bf16, in_mxfp4, in_nvfp4, inputs, off
from weight_cases import ORDERS

import mxfp4_moe
from mxfp4_moe import reference
from mxfp4_moe.weights import MoEWeights

# What is left between the layer and float64 with the same quantization: the second GEMM's rows and their sum are
# bfloat16, each 2^-9 at most and a third of that in the mean, and now and then a value whose float32 and float64 lie on
# two sides of the middle of two codes.
CLOSE = 4e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["multiply", "divide"])
@pytest.mark.parametrize("given", [True, False], ids=["input scales", "dynamic"])
def test_nvfp4_with_nvfp4_activations(order: str, kind: str, given: bool) -> None:
    layer = with_biases(random_nvfp4(kind, inputs=given))
    weights, call = MoEWeights.from_nvfp4(**layer, gate_up_order=order), inputs()
    out = mxfp4_moe.fused_moe(**call, weights=weights)
    assert out.dtype is torch.bfloat16
    assert off(out, float64_layer(call, gated_expert(layer, order, in_nvfp4(layer)))) < CLOSE
    exact = float64_layer(call, gated_expert(layer, order, exactly))
    assert 0.03 < off(out, exact) < 0.25, "E2M1 has one bit of mantissa"
    assert torch.equal(mxfp4_moe.fused_moe(**call, weights=weights, activation_format="nvfp4"), out), "the default"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["multiply", "divide"])
def test_nvfp4_with_bf16_activations(order: str, kind: str) -> None:
    layer = with_biases(random_nvfp4(kind))
    weights, call = MoEWeights.from_nvfp4(**layer, gate_up_order=order), inputs()
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format="bf16")
    assert off(out, float64_layer(call, gated_expert(layer, order, in_bf16))) < CLOSE
    assert off(out, float64_layer(call, gated_expert(layer, order, exactly))) < 6e-3


def test_every_scale_has_its_place() -> None:
    """The tolerance above tells: with gate and up exchanged, or another expert's scales, nothing fits."""
    layer = with_biases(random_nvfp4())
    call = inputs()
    expected = float64_layer(call, gated_expert(layer, "gate_up", in_nvfp4(layer)))
    weights = MoEWeights.from_nvfp4(**layer)
    scales = weights.tensor_scales
    assert scales is not None
    wrong = {
        "gate and up": replace(scales, w13=scales.w13.flip(1).contiguous()),
        "w13's experts": replace(scales, w13=scales.w13.roll(1, 0)),
        "w2's experts": replace(scales, w2=scales.w2.roll(1)),
        "w13's inputs": replace(scales, w13_input=scales.w13_input * 1.3),  # type: ignore[operator]
        "w2's inputs": replace(scales, w2_input=scales.w2_input.roll(1)),  # type: ignore[union-attr]
        "the kind": replace(scales, divide=True),
    }
    assert off(mxfp4_moe.fused_moe(**call, weights=weights), expected) < CLOSE
    for name, changed in wrong.items():
        assert (
            off(mxfp4_moe.fused_moe(**call, weights=replace(weights, tensor_scales=changed)), expected) > 5 * CLOSE
        ), name


@pytest.mark.parametrize("order", ["interleaved", "up_gate"])
def test_mxfp4_with_mxfp4_activations(order: str) -> None:
    checkpoint = oracles.random_checkpoint(E, H, 64)
    weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order, activation="swiglu", limit=None)
    w13, w2 = (
        oracles.mxfp4_values(checkpoint[name].numpy(), checkpoint[f"{name}_scale"].numpy()) for name in ("w13", "w2")
    )
    rows = oracles.gate_up_rows(order, 64)

    def expert(quantize: Quantizer) -> Callable[..., np.ndarray]:
        def of_token(x: np.ndarray, e: int) -> np.ndarray:
            sums = w13[e] @ quantize(x, 0, e) + checkpoint["w13_bias"][e].double().numpy()
            gates, ups = sums[rows[0]], sums[rows[1]]
            return (
                w2[e] @ quantize(gates / (1 + np.exp(-gates)) * ups, 1, e) + checkpoint["w2_bias"][e].double().numpy()
            )

        return of_token

    call = inputs()
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format="mxfp4")
    assert off(out, float64_layer(call, expert(in_mxfp4))) < CLOSE
    assert 0.03 < off(out, float64_layer(call, expert(exactly))) < 0.3


@pytest.mark.parametrize("pair", ["nvfp4", "nvfp4 dynamic", "mxfp4", "bf16"])
def test_bits_where_nothing_is_rounded(pair: str) -> None:
    """Small integers through a layer without a gate: every sum is exact, so its bits are known whatever adds it up."""
    rng = np.random.default_rng(4)
    codes = [rng.integers(0, 3, (E, n, k // 2), dtype=np.uint8) * 0x22 for n, k in ((I, H), (H, I))]  # 0, 1 and 2
    layer: dict[str, Any] = {"w13": torch.from_numpy(codes[0]), "w2": torch.from_numpy(codes[1])}
    x = rng.integers(-6, 7, (T, H)).astype(np.float32)
    x[:, 0] = 6  # so that a dynamic scale is 448, which is no power of two, and block scales are rounded
    inter = I if pair.startswith("nvfp4") or pair == "bf16" else 96
    if inter != I:
        layer = {"w13": torch.from_numpy(rng.integers(0, 3, (E, inter, H // 2), dtype=np.uint8) * 0x22),
                 "w2": torch.from_numpy(rng.integers(0, 3, (E, H, inter // 2), dtype=np.uint8) * 0x22)}  # fmt: skip
    if pair == "mxfp4":
        scales = {
            name: torch.full((*layer[name].shape[:2], layer[name].shape[2] // 16), 127, dtype=torch.uint8)
            for name in ("w13", "w2")
        }
        weights = MoEWeights.from_mxfp4(
            layer["w13"], scales["w13"], layer["w2"], scales["w2"], activation="identity", limit=None
        )
        quantize: Quantizer = in_mxfp4
    else:
        for name in ("w13", "w2"):
            layer[f"{name}_scale"] = torch.full(
                (*layer[name].shape[:2], layer[name].shape[2] // 8), 0x38, dtype=torch.uint8
            )
        layer |= {"w13_scale_2": torch.full((E, 1), 0.25), "w2_scale_2": torch.tensor([0.5, 2.0, 1.0])}
        if pair == "nvfp4":
            layer |= {"w13_input_scale": torch.full((E, 1), 0.5), "w2_input_scale": torch.tensor([2.0, 1.0, 0.5])}
        weights = MoEWeights.from_nvfp4(**layer, activation="identity")
        quantize = in_bf16 if pair == "bf16" else in_nvfp4(layer)
    call = {
        "hidden_states": torch.from_numpy(x).bfloat16(),
        "topk_weights": torch.ones(T, 1),
        "topk_ids": torch.arange(T).view(T, 1) % E,
    }
    format_ = pair.split()[0]
    values = {name: oracles.e2m1_values(layer[name].numpy()) for name in ("w13", "w2")}
    factor = {name: np.ones(E) for name in values}
    if pair != "mxfp4":
        factor = {"w13": np.full(E, 0.25), "w2": layer["w2_scale_2"].double().numpy()}
    expected = np.zeros((T, H))
    for t in range(T):
        e = t % E
        middle = (values["w13"][e] @ quantize(x[t].astype(np.float64), 0, e) * factor["w13"][e]).astype(np.float32)
        expected[t] = values["w2"][e] @ quantize(middle.astype(np.float64), 1, e) * factor["w2"][e]
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format=format_)
    rounded = torch.from_numpy(expected).float().bfloat16()
    if pair == "nvfp4 dynamic":  # its factors are rounded
        assert off(out, torch.from_numpy(expected)) < CLOSE
    else:
        assert torch.equal(out, rounded)


LAYERS: dict[str, tuple[Callable[[], MoEWeights], str]] = {
    "nvfp4": (lambda: MoEWeights.from_nvfp4(**with_biases(random_nvfp4())), "nvfp4"),
    "nvfp4 dynamic": (lambda: MoEWeights.from_nvfp4(**with_biases(random_nvfp4(inputs=False))), "nvfp4"),
    "nvfp4 bf16": (lambda: MoEWeights.from_nvfp4(**with_biases(random_nvfp4())), "bf16"),
    "mxfp4": (lambda: MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, 64)), "mxfp4"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_is_alone(name: str) -> None:
    """The same bits in every batch, and what is not finite reaches its own token only."""
    make, format_ = LAYERS[name]
    weights, call = make(), inputs()
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format=format_)
    for t in range(T):
        one = {key: value[t : t + 1] for key, value in call.items()}
        assert torch.equal(mxfp4_moe.fused_moe(**one, weights=weights, activation_format=format_)[0], out[t])
    for poison in (float("nan"), float("inf")):
        poisoned = call | {"hidden_states": call["hidden_states"].clone()}
        poisoned["hidden_states"][3, 17] = poison
        bad = mxfp4_moe.fused_moe(**poisoned, weights=weights, activation_format=format_)
        rest = torch.arange(T) != 3
        assert torch.equal(bad[rest], out[rest])
        assert bool(bad[3].isnan().all()) or (poison == float("inf") and not bool(bad[3].isfinite().all()))
    none = call | {"topk_ids": torch.full((T, K), -1)}
    assert not mxfp4_moe.fused_moe(**none, weights=weights, activation_format=format_).any()
    empty = {key: value[:0] for key, value in call.items()}
    assert mxfp4_moe.fused_moe(**empty, weights=weights, activation_format=format_).shape == (0, H)


@pytest.mark.parametrize("name", LAYERS)
def test_parts_add_up(name: str) -> None:
    make, format_ = LAYERS[name]
    weights, call = make(), inputs(torch.float16)
    whole = mxfp4_moe.fused_moe(**call, weights=weights, activation_format=format_)
    assert whole.dtype is torch.float16
    parts = {
        "ep": [weights.expert_parallel(r, 2) for r in range(2)],
        "tp": [weights.tensor_parallel(r, 2) for r in range(2)],
    }
    if name == "nvfp4 dynamic":
        del parts["tp"]  # each rank has scales of its own
    for kind, ranks in parts.items():
        total = sum(mxfp4_moe.fused_moe(**call, weights=one, activation_format=format_).double() for one in ranks)
        assert off(whole, torch.as_tensor(total)) < 1.5e-3, kind


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_dtypes_and_routing(name: str) -> None:
    make, format_ = LAYERS[name]
    weights, call = make(), inputs()
    out = torch.empty(T, H, dtype=torch.float16)
    given = mxfp4_moe.fused_moe(
        **call, weights=weights, activation_format=format_, output_dtype=torch.float16, output=out
    )
    assert given is out
    plain = mxfp4_moe.fused_moe(**call, weights=weights, activation_format=format_)
    assert off(out, plain.double()) < CLOSE
    rounded = mxfp4_moe.fused_moe(**call, weights=weights, activation_format=format_, intermediate_rounding=True)
    assert not torch.equal(rounded, plain)
    assert off(rounded, plain.double()) < 0.05
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(4))
    chosen = mxfp4_moe.topk_softmax(logits, K)
    assert torch.equal(
        mxfp4_moe.fused_moe_from_logits(call["hidden_states"], logits, K, weights, activation_format=format_),
        mxfp4_moe.fused_moe(call["hidden_states"], *chosen, weights, activation_format=format_),
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_formats_that_do_not_go_together() -> None:
    nvfp4, call = MoEWeights.from_nvfp4(**random_nvfp4()), inputs()
    for given in ("mxfp8", "mxfp4"):
        with pytest.raises(
            ValueError,
            match=f"activation_format: expected 'nvfp4' or 'bf16' or 'fp16' with nvfp4 weights, got '{given}'",
        ):
            mxfp4_moe.fused_moe(**call, weights=nvfp4, activation_format=given)
        with pytest.raises(
            ValueError, match="activation_format: expected 'nvfp4' or 'bf16' or 'fp16' with nvfp4 weights"
        ):
            reference.fused_moe(**call, weights=nvfp4, activation_format=given)
    codes = {**call, "hidden_states": torch.zeros(T, H, dtype=torch.uint8)}
    scales = torch.zeros(T, H // 32, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="activation_format: expected 'mxfp8' for hidden_states that are MXFP8 already, got 'nv"
    ):
        mxfp4_moe.fused_moe(**codes, weights=nvfp4, hidden_states_scale=scales)
    with pytest.raises(ValueError, match="hidden_states_scale: expected None with activation_format 'nvfp4'"):
        reference.fused_moe(**codes, weights=nvfp4, hidden_states_scale=scales)
