"""activation_format "fp16": the layer against float64 and step by step, weights' factors and warnings, graphs."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from layers import INTER, E, H, T, make_call, make_weights
from nvfp4_cases import random_nvfp4, with_biases
from nvfp4_layers import exactly, float64_layer, gated_expert, in_bf16, inputs, off
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_moe
from mxfp4_moe import engines, formats, problems, reference
from mxfp4_moe._call import launch
from mxfp4_moe.arithmetic import SM90_FP16
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights, WordOrder

HALF = torch.float16


def call_of(**changes: Any) -> dict[str, Any]:
    return make_call(dtype=HALF) | changes


def in_fp16(x: np.ndarray, which: int, e: int) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, INTER)


def float64_mxfp4(call: dict[str, Any], checkpoint: dict[str, torch.Tensor], quantize: Any) -> torch.Tensor:
    """gpt-oss's layer in float64, token by token."""
    w13, w2 = (
        np.stack(
            [oracles.mxfp4_values(checkpoint[n][e].numpy(), checkpoint[f"{n}_scale"][e].numpy()) for e in range(E)]
        )
        for n in ("w13", "w2")
    )

    def expert(x: np.ndarray, e: int) -> np.ndarray:
        sums = w13[e] @ quantize(x, 0, e) + checkpoint["w13_bias"][e].double().numpy()
        gate, up = np.minimum(sums[0::2], 7.0), np.clip(sums[1::2], -7.0, 7.0)
        middle = quantize(gate / (1 + np.exp(-1.702 * gate)) * (up + 1.0), 1, e)
        return w2[e] @ middle + checkpoint["w2_bias"][e].double().numpy()

    return float64_layer(call, expert)


def test_mxfp4_against_float64(checkpoint: dict[str, torch.Tensor]) -> None:
    call = call_of(weights=MoEWeights.from_mxfp4(**checkpoint))
    out = mxfp4_moe.fused_moe(**call, activation_format="fp16")
    assert out.dtype is HALF
    # GEMM2's rows stay float32 for a float16 output, so what is left is the output's own rounding.
    assert off(out, float64_mxfp4(call, checkpoint, in_fp16)) < 3e-4
    exact = float64_mxfp4(call, checkpoint, exactly)
    in_bf16_too = mxfp4_moe.fused_moe(**call, activation_format="bf16")
    assert off(in_bf16_too, exact) > 4 * off(out, exact) > 0
    as_bf16 = mxfp4_moe.fused_moe(**call, activation_format="fp16", output_dtype=torch.bfloat16)
    assert as_bf16.dtype is torch.bfloat16
    assert off(as_bf16, exact) < 4e-3


@pytest.mark.parametrize("kind", ["multiply", "divide"])
def test_nvfp4_against_float64(kind: str) -> None:
    layer = with_biases(random_nvfp4(kind))
    weights, call = MoEWeights.from_nvfp4(**layer, gate_up_order="up_gate"), inputs(HALF)
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format="fp16")
    assert off(out, float64_layer(call, gated_expert(layer, "up_gate", in_fp16))) < 4e-4
    exact = float64_layer(call, gated_expert(layer, "up_gate", exactly))
    assert off(float64_layer(call, gated_expert(layer, "up_gate", in_bf16)), exact) > 4 * off(out, exact)


@pytest.mark.parametrize("rounding", [False, True])
def test_the_steps_one_by_one(rounding: bool) -> None:
    call = call_of()
    weights, ids = call["weights"], call["topk_ids"]
    prepared = [
        [formats.restore_weights(one, n, k, weights.word_order) for one in matrix]
        for matrix, n, k in ((weights.w13, 2 * INTER, H), (weights.w2, H, INTER))
    ]
    (w13, w13_scale), (w2, w2_scale) = ((torch.stack(part) for part in zip(*one, strict=True)) for one in prepared)
    offsets, row_slot, slot_row = reference.route(ids, E)
    row_slot = row_slot[: int(offsets[-1])]
    row_expert = torch.repeat_interleave(torch.arange(E), offsets.diff())
    rows = call["hidden_states"][row_slot // ids.shape[1]]
    sums = reference.grouped_gemm(rows, None, w13, w13_scale, offsets, arithmetic=SM90_FP16)
    assert torch.equal(sums, reference.grouped_gemm(rows, None, w13, w13_scale, offsets))
    middle = reference.activate(sums, row_expert, weights.w13_bias, "swiglu_oai", rounding=HALF if rounding else None)
    out = reference.grouped_gemm(middle.half(), None, w2, w2_scale, offsets, arithmetic=SM90_FP16)
    expected = reference.finalize(out, call["topk_weights"], slot_row, row_expert, weights.w2_bias)
    given = mxfp4_moe.fused_moe(**call, activation_format="fp16", intermediate_rounding=rounding)
    assert torch.equal(given, expected)
    with pytest.raises(ValueError, match="rows: expected bfloat16 for the arithmetic 'SM90 bf16', got float16"):
        reference.grouped_gemm(rows, None, w13, w13_scale, offsets, arithmetic=mxfp4_moe.arithmetic.SM90_BF16)


def test_every_way_to_the_layer_gives_the_same() -> None:
    call = call_of()
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(2))
    call["topk_weights"], call["topk_ids"] = mxfp4_moe.topk_softmax(logits, 2)
    expected = mxfp4_moe.fused_moe(**call, activation_format="fp16")
    for name in (None, "bf16"):
        assert not torch.equal(expected, mxfp4_moe.fused_moe(**call, activation_format=name))
    found = mxfp4_moe.fused_moe_from_logits(call["hidden_states"], logits, 2, call["weights"], activation_format="fp16")
    assert torch.equal(found, expected)
    module = mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=(8, 128))
    assert torch.equal(module.fused_moe(**call, activation_format="fp16"), expected)
    other = call["weights"].to("cpu", activation_format="fp16")
    assert other.word_order is call["weights"].word_order
    for t in range(T):
        alone = {name: call[name][t : t + 1] for name in ("hidden_states", "topk_weights", "topk_ids")}
        assert torch.equal(mxfp4_moe.fused_moe(**alone, weights=other, activation_format="fp16")[0], expected[t])


def test_infinities_stay_in_their_token_and_what_leaves_the_range_is_one() -> None:
    call = call_of()
    clean = mxfp4_moe.fused_moe(**call, activation_format="fp16")
    others = torch.arange(T) != 2
    for poison in (float("nan"), float("inf")):
        spoiled = call["hidden_states"].clone()
        spoiled[2, 5] = poison
        out = mxfp4_moe.fused_moe(**call | {"hidden_states": spoiled}, activation_format="fp16")
        assert torch.equal(out[others], clean[others])
        assert not out[2].isfinite().any()
    weights = make_weights(activation="swiglu", limit=None)
    large = call["hidden_states"].clone()
    large[2] *= 1e4
    out = mxfp4_moe.fused_moe(**call | {"hidden_states": large, "weights": weights}, activation_format="fp16")
    assert not out[2].isfinite().any(), "a product of gate and up beyond 65504"
    assert out[others].isfinite().all()


# ---- weights --------------------------------------------------------------------------------------------------------


def wide_weights(**changes: Any) -> tuple[MoEWeights, dict[str, torch.Tensor]]:
    """Two experts; the first one's w2 spans 40 binades, and nothing else more than 24."""
    g = torch.Generator().manual_seed(5)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=g).to(torch.uint8)

    made = {
        "w13": draw(0, 255, 2, 128, 48),
        "w13_scale": draw(100, 124, 2, 128, 3),
        "w2": draw(0, 255, 2, 96, 32),
        "w2_scale": draw(100, 124, 2, 96, 2),
    }
    made["w2_scale"][0, :40, 1] = 84
    made["w2"][0, :8, 16:] &= 0x88  # zeros are not rounded
    return MoEWeights.from_mxfp4(**made, **changes), made


def test_weights_that_are_rounded_are_counted_in_one_warning() -> None:
    weights, made = wide_weights()
    rounded = 0
    for name in ("w13", "w2"):
        for packed, scales in zip(made[name], made[f"{name}_scale"], strict=True):
            exact = oracles.mxfp4_values(packed.numpy(), scales.numpy())
            unit = 2.0 ** (int(formats.largest_scale(packed, scales)) - 128)
            rounded += int(((exact / unit).astype(np.float16).astype(np.float64) * unit != exact).sum())
    assert rounded > 500
    call = vars(problems.random_call(5, 2, weights, dtype=HALF))
    words = rf"^activation_format 'fp16': {rounded} of 36864 weights of MoEWeights\(num_experts=2, .*\) are rounded"
    with pytest.warns(RuntimeWarning, match=words) as found:
        out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format="fp16")
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mxfp4_moe.fused_moe(**call, weights=weights, activation_format="fp16"), out)
        mxfp4_moe.fused_moe(**call, weights=weights, activation_format="bf16")
        narrow = MoEWeights.from_mxfp4(**made | {"w2_scale": made["w2_scale"].clamp(min=100)})
        mxfp4_moe.fused_moe(**call, weights=narrow, activation_format="fp16")


@pytest.mark.filterwarnings("ignore:activation_format 'fp16'")
@pytest.mark.parametrize("order", WordOrder)
@pytest.mark.parametrize("activation", ["swiglu_oai", "relu2"])
def test_factors_are_of_each_experts_matrix(order: WordOrder, activation: str) -> None:
    weights, made = wide_weights() if activation == "swiglu_oai" else wide_weights_not_gated()
    reordered = [
        torch.stack([formats.reorder_words(one, n, k, weights.word_order, order) for one in matrix])
        for matrix, n, k in ((weights.w13, weights.w13_rows, 96), (weights.w2, 96, 64))
    ]
    weights = replace(weights, w13=reordered[0], w2=reordered[1], word_order=order)
    for name, factors in zip(("w13", "w2"), weights.fp16_factors(), strict=True):
        largest = [int(formats.largest_scale(*one)) for one in zip(made[name], made[f"{name}_scale"], strict=True)]
        assert factors.tolist() == [[2.0 ** (one - 128)] * 2 for one in largest]
        assert factors.is_contiguous()
        assert factors.dtype is torch.float32


def wide_weights_not_gated() -> tuple[MoEWeights, dict[str, torch.Tensor]]:
    _, made = wide_weights()
    made |= {"w13": made["w13"][:, :64].contiguous(), "w13_scale": made["w13_scale"][:, :64].contiguous()}
    return MoEWeights.from_mxfp4(**made, activation="relu2"), made


def test_factors_follow_a_write_into_the_same_tensors() -> None:
    weights = make_weights()
    first = weights.fp16_factors()
    before = [factors.clone() for factors in first]
    assert weights.fp16_factors()[0] is first[0], "made once"
    weights.w13[0] = make_weights(seed=3).w13[1]
    weights.w2.copy_(weights.w2.roll(1, 0))
    weights.w13[2].zero_()
    after = weights.fp16_factors()
    assert all(new is old for new, old in zip(after, first, strict=True))
    assert after[0][2].tolist() == [2.0**-126] * 2
    assert torch.equal(after[0][1], before[0][1])
    fresh = replace(weights).fp16_factors()
    assert all(torch.equal(new, old) for new, old in zip(fresh, after, strict=True))


def test_writes_that_torch_does_not_count_are_told() -> None:
    with torch.inference_mode():
        weights = make_weights()
        factors = weights.fp16_factors()
        weights.w13.zero_()
        assert float(weights.fp16_factors()[0][0, 0]) != 2.0**-126
        engines.update_fp16_factors(weights)
        assert weights.fp16_factors()[0] is factors[0]
    assert (factors[0] == 2.0**-126).all()


def test_factors_of_a_first_call_in_inference_mode_are_written_outside_of_it() -> None:
    weights = make_weights()
    call = call_of(weights=weights)
    with torch.inference_mode():
        mxfp4_moe.fused_moe(**call, activation_format="fp16")
    weights.w13[0] = make_weights(seed=3).w13[1]
    out = mxfp4_moe.fused_moe(**call, activation_format="fp16")
    assert torch.equal(out, mxfp4_moe.fused_moe(**call | {"weights": replace(weights)}, activation_format="fp16"))
    engines.update_fp16_factors(weights)
    with torch.inference_mode():
        weights.w2[0] = 0
        engines.update_fp16_factors(weights)
    assert weights.fp16_factors()[1][0].tolist() == [2.0**-126] * 2


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_factors_of_weights_without_values(kind: str, checkpoint: dict[str, torch.Tensor]) -> None:
    words = (
        r"^weights: expected ones with values for activation_format 'fp16', got MoEWeights\(.* of fake or meta tensors"
    )
    if kind == "meta":
        weights = MoEWeights.from_mxfp4(**{name: tensor.to("meta") for name, tensor in checkpoint.items()})
        with pytest.raises(ValueError, match=words):
            weights.fp16_factors()
        with pytest.raises(ValueError, match=words):
            weights.to("meta", activation_format="fp16")
        return
    with FakeTensorMode() as mode:
        weights = MoEWeights.from_mxfp4(**{name: mode.from_tensor(tensor) for name, tensor in checkpoint.items()})
        with pytest.raises(ValueError, match=words):
            weights.fp16_factors()


def test_factors_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make_weights()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(MoEWeights, "device", torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match=r"weights: expected ones that are ready for .* 'fp16' while .*; call once"):
        weights.fp16_factors()
    monkeypatch.undo()
    weights.fp16_factors()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weights.fp16_factors()


def test_who_prepares_weights_for_fp16_has_the_factors(checkpoint: dict[str, torch.Tensor]) -> None:
    ready = [
        make_weights().to("cpu", activation_format="fp16"),
        engines.prepare_layer(**checkpoint, activation_format="fp16"),
    ]
    assert all(weights._fp16 is not None for weights in ready)
    weights = make_weights()
    assert weights._fp16 is weights.to("cpu")._fp16 is weights.to("cpu", activation_format="bf16")._fp16 is None
    expected = weights.fp16_factors()
    for other in (pickle.loads(pickle.dumps(weights)), replace(weights)):
        assert other._fp16 is None, "made again, of its own tensors"
        assert all(torch.equal(one, two) for one, two in zip(other.fp16_factors(), expected, strict=True))
    halved = weights.tensor_parallel(1, 3)
    packed = halved.to_mxfp4()
    largest = [int(formats.largest_scale(*one)) for one in zip(packed.w2, packed.w2_scale, strict=True)]
    assert halved.fp16_factors()[1][:, 0].log2().add(128).tolist() == largest


def test_an_nvfp4_factor_that_float32_does_not_hold_is_refused() -> None:
    layer = random_nvfp4(inputs=False)
    layer["w2_scale_2"][1] = 2.0**121
    weights = MoEWeights.from_nvfp4(**layer)
    call = inputs(HALF)
    with pytest.raises(
        ValueError, match=r"^weights: expected NVFP4 scales per tensor below 2\^121 .* 'bf16' takes it$"
    ):
        mxfp4_moe.fused_moe(**call, weights=weights, activation_format="fp16")
    mxfp4_moe.fused_moe(**call, weights=weights, activation_format="bf16")


# ---- on their way to the operator, and in graphs --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp8", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_what_the_operator_is_given(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    tile = Tile(m=8, n=64, swap_ab=True)
    monkeypatch.setattr(launch, "layer_operator_for", lambda *_: (lambda *_, **rare: given.update(rare), tile))
    weights = make_weights() if kind == "mxfp4" else MoEWeights.from_nvfp4(**random_nvfp4(inputs=False))
    hidden = torch.zeros(3, weights.hidden_size, dtype=HALF)
    launch.run(tile, hidden, None, "linear", (None, None, None, 0), weights, hidden, False, None, name)
    if kind == "mxfp4":
        assert ("w13_factors" in given) == ("w2_factors" in given) == (name == "fp16")
        factors = weights.fp16_factors()
    else:
        assert weights.tensor_scales is not None
        own = weights.tensor_scales.operator_arguments()
        unit = formats.FP16_NVFP4_UNIT if name == "fp16" else 1.0
        factors = own["w13_factors"] * unit, own["w2_factors"] * unit
    if "w13_factors" in given:
        assert torch.equal(given["w13_factors"], factors[0])
        assert torch.equal(given["w2_factors"], factors[1])
    assert given.get("activation_format", 0) == {"mxfp8": 0, "bf16": 1, "fp16": 4}[name]
    assert given.get("weight_format", 0) == (kind == "nvfp4")


def test_a_graph_has_the_factors_of_weights_that_are_ready() -> None:
    call = call_of()
    weights, tensors = call["weights"], [call[name] for name in ("hidden_states", "topk_weights", "topk_ids")]

    def run(*given: torch.Tensor) -> torch.Tensor:
        return mxfp4_moe.fused_moe(*given, weights, activation_format="fp16")

    with pytest.raises(
        ValueError, match=r"^weights: expected ones that are ready .* take weights.to\('cpu', activation_f"
    ):
        make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    expected = run(*tensors)
    traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    (node,) = (node for node in traced.graph.nodes if "moe_layer" in str(node.target))
    assert node.args[-3] == "fp16"
    for argument, factors in zip(node.args[-2:], weights.fp16_factors(), strict=True):
        assert torch.equal(getattr(traced, argument.target), factors)
    assert torch.equal(traced(*tensors), expected)


def test_a_compiled_call() -> None:
    call = call_of()
    weights = call.pop("weights").to("cpu", activation_format="fp16")
    compiled = torch.compile(
        lambda given: mxfp4_moe.fused_moe(**given, weights=weights, activation_format="fp16"),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(call), mxfp4_moe.fused_moe(**call, weights=weights, activation_format="fp16"))
