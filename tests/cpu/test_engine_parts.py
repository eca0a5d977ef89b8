"""`mxfp4_moe.engines`: a layer's parts one by one, equal to the whole."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from weight_cases import ORDERS, E, H, I, same

import mxfp4_moe
from mxfp4_moe import engines, formats
from mxfp4_moe.weights import MoEWeights

Checkpoint = dict[str, torch.Tensor]
TENSORS = ("w13", "w13_scale", "w2", "w2_scale")


@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_those_of_the_layer(checkpoint: Checkpoint, order: str) -> None:
    whole = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order)
    w13 = engines.prepare_matrix(checkpoint["w13"], checkpoint["w13_scale"], gate_up_order=order)
    blocks = checkpoint["w2"].view(E, H, I // 32, 16).view(torch.int8)
    w2 = engines.prepare_matrix(blocks, checkpoint["w2_scale"].view(torch.float8_e8m0fnu))
    assert torch.equal(w13, whole.w13)
    assert torch.equal(w2, whole.w2)


def test_a_matrix_goes_where_the_engine_wants_it(checkpoint: Checkpoint) -> None:
    own = torch.full((E + 1, formats.weight_bytes(H, I)), 0xEE, dtype=torch.uint8)
    out = engines.prepare_matrix(checkpoint["w2"], checkpoint["w2_scale"], out=own[:E])
    assert out.data_ptr() == own.data_ptr()
    assert torch.equal(own[:E], MoEWeights.from_mxfp4(**checkpoint).w2)
    assert bool((own[E] == 0xEE).all())


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_is_the_layer(checkpoint: Checkpoint, order: str, release: bool) -> None:
    given = {name: tensor.clone() for name, tensor in checkpoint.items()}
    made = engines.prepare_layer(**given, gate_up_order=order, release=release)
    assert same(made, MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order))
    assert [given[name].untyped_storage().nbytes() == 0 for name in TENSORS] == [release] * 4


def test_a_layer_is_prepared_for_its_activations(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on SM12x, whose kernels of bf16 activations read another word order."""

    def order_of(device: torch.device, activation_format: str) -> formats.WordOrder:
        return formats.WordOrder.PAIRS if activation_format == "bf16" else formats.WordOrder.CONTAINERS

    monkeypatch.setattr(engines, "word_order_of", order_of)
    whole = MoEWeights.from_mxfp4(**checkpoint)
    made = engines.prepare_layer(**checkpoint, activation_format="bf16")
    assert made.word_order is formats.WordOrder.PAIRS
    assert not torch.equal(made.w13, whole.w13)
    wrapped = engines.wrap_layer(made, made.w13, made.w2, made.w13_bias, made.w2_bias)
    for weights in (made, wrapped):
        assert same(weights.to("cpu"), whole)
    assert same(engines.prepare_layer(**checkpoint), whole)


def test_what_belongs_to_others_is_not_released(checkpoint: Checkpoint) -> None:
    larger = torch.cat((checkpoint["w13"], checkpoint["w13"]))
    engines.prepare_layer(**{**checkpoint, "w13": larger[:E], "w2": checkpoint["w2"].clone()}, release=False)
    given = {name: tensor.clone() for name, tensor in checkpoint.items()} | {"w13": larger[:E]}
    engines.prepare_layer(**given, release=True)
    assert torch.equal(larger[E:], checkpoint["w13"])
    assert given["w2"].untyped_storage().nbytes() == 0


def test_layers_that_are_not_gated() -> None:
    checkpoint = oracles.random_checkpoint(E, H, I, seed=3, gated=False)
    made = engines.prepare_layer(**checkpoint, activation="relu2")
    assert same(made, MoEWeights.from_mxfp4(**checkpoint, activation="relu2"))


def call(weights: MoEWeights, ids: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(ids.shape[0], H, generator=g).bfloat16()
    topk_weights = torch.rand(ids.shape, generator=g)
    return mxfp4_moe.fused_moe(hidden, topk_weights, ids, weights)


def test_wrapped_tensors_are_the_engines_own(checkpoint: Checkpoint) -> None:
    """An engine that exchanges two experts' bytes exchanges the experts."""
    weights = MoEWeights.from_mxfp4(**checkpoint)
    own = {name: getattr(weights, name).clone() for name in ("w13", "w2", "w13_bias", "w2_bias")}
    wrapped = engines.wrap_layer(weights, *own.values())
    assert wrapped.w13.data_ptr() == own["w13"].data_ptr()
    assert same(wrapped, weights)
    ids = torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32)
    before = call(wrapped, ids)
    assert torch.equal(before, call(weights, ids))
    for tensor in own.values():
        tensor[[0, 1]] = tensor[[1, 0]]
    exchanged = torch.tensor([[1, 2], [0, 1], [2, 0]], dtype=torch.int32)
    assert torch.equal(call(wrapped, exchanged), before)
    assert not torch.equal(call(wrapped, ids), before)


def test_an_engine_that_has_the_factors_moves_them_too(checkpoint: Checkpoint) -> None:
    """Of experts that are powers of two apart; nothing is made from values again, until that is asked for."""
    powers = torch.arange(E, dtype=torch.uint8)[:, None, None]
    scales = {name: checkpoint[name] - powers for name in ("w13_scale", "w2_scale")}
    weights = MoEWeights.from_mxfp4(**{**checkpoint, **scales})
    own = {name: getattr(weights, name).clone() for name in ("w13", "w2", "w13_bias", "w2_bias")}
    factors = tuple(tensor.clone() for tensor in weights.fp16_factors())
    assert len(factors[0].unique()) == E
    wrapped = engines.wrap_layer(weights, *own.values(), fp16_factors=factors)
    for tensor in own.values():
        tensor[[0, 1]] = tensor[[1, 0]]
    assert wrapped.fp16_factors()[0] is factors[0]
    assert torch.equal(factors[0], weights.fp16_factors()[0]), "they are the engine's"
    engines.update_fp16_factors(wrapped)
    for kept, made in zip(factors, weights.fp16_factors(), strict=True):
        assert torch.equal(kept, made[[1, 0, *range(2, E)]])
    assert wrapped.fp16_factors()[0] is factors[0]
    for wrong in (factors[0][:, :1].contiguous(), factors[0].double(), factors[0].mT.contiguous().mT):
        with pytest.raises((TypeError, ValueError), match="fp16_factors: expected"):
            engines.wrap_layer(weights, *own.values(), fp16_factors=(wrong, factors[1]))
    for none in (5, factors[:1], factors[0]):
        with pytest.raises(TypeError, match="fp16_factors: expected those of w13 and of w2, got"):
            engines.wrap_layer(weights, *own.values(), fp16_factors=none)  # type: ignore[arg-type]


MAPS: list[tuple[Any, Any]] = [
    (None, 0),
    ([0, 1, 2], 0),
    ([-1, -1, 0, 1], 2),
    ([0, -1, 1, -1], None),
    ([1, 0], None),
    ([-1, -1], None),
]


@pytest.mark.parametrize(("places", "first"), MAPS)
def test_a_map_that_is_a_shift(places: Any, first: Any) -> None:
    expert_map = None if places is None else torch.tensor(places, dtype=torch.int32)
    assert engines.linear_first_expert(expert_map) == first


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([0, 1], r"expert_map: expected int32 or int64 \[E\], got list"),
        (torch.tensor([0.0, 1.0]), r"expert_map: expected int32 or int64 \[E\], got float32 \[2\]"),
        (torch.tensor([[0, 1]]), r"expert_map: expected int32 or int64 \[E\], got int64 \[1, 2\]"),
        (torch.tensor([0, 1], device="meta"), "expert_map: expected .* on cpu, got .* on meta"),
        (torch.tensor([], dtype=torch.int64), "expert_map: expected a place for each of the layer's experts"),
    ],
)
def test_maps_that_are_none(given: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        engines.local_ids(torch.zeros(3, 2, dtype=torch.int32), given)
    if "float32" in words or "list" in words or "1, 2" in words:
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            engines.linear_first_expert(given)
    with pytest.raises((TypeError, ValueError), match=r"^topk_ids: expected int32 or int64 \[T, k\], got"):
        engines.local_ids(torch.zeros(3), torch.tensor([0, 1]))


def test_fewer_experts_in_all_than_here(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="^num_global_experts: expected 3 or more, which are here, or 0 .*, got 2$"):
        engines.prepare_layer(**checkpoint, num_global_experts=2)


def test_experts_that_are_not_consecutive(checkpoint: Checkpoint) -> None:
    """Ranks with every second expert add up to the layer; ids that are none contribute nothing."""
    checkpoint = oracles.random_checkpoint(4, H, I, seed=5)
    whole = MoEWeights.from_mxfp4(**checkpoint)
    ids = torch.tensor([[0, 3], [1, 2], [-1, 3], [7, 1], [-1, 99]], dtype=torch.int64)
    parts = []
    for rank in (0, 1):
        own = {name: tensor[rank::2].contiguous() for name, tensor in checkpoint.items()}
        expert_map = torch.tensor([e // 2 if e % 2 == rank else -1 for e in range(4)], dtype=torch.int32)
        local = engines.local_ids(ids, expert_map)
        assert local.dtype == torch.int32
        shifted = [[int(expert_map[i]) if 0 <= i < 4 else -1 for i in row] for row in ids.tolist()]
        assert local.tolist() == shifted
        parts.append(call(engines.prepare_layer(**own, num_global_experts=4), local).double())
    exact = call(whole, ids).double()
    assert bool((exact[4] == 0).all())
    assert float((parts[0] + parts[1] - exact).norm() / exact.norm()) < 4e-3  # each rank rounds to bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(2, 4, 8, dtype=torch.float32)}, "packed: expected uint8"),
        ({"packed": torch.zeros(2, 4, 8, dtype=torch.uint8)}, "packed: expected K .* a multiple of 32, got 16"),
        ({"scales": torch.zeros(2, 4, 2, dtype=torch.uint8)}, "scales: expected uint8 .2, 4, 1."),
        ({"scales": torch.full((2, 4, 1), 254, dtype=torch.uint8)}, "scales: expected E8M0 bytes 0..253"),
        ({"out": torch.zeros(2, 5, dtype=torch.uint8)}, "out: expected uint8 .2, 1280."),
        ({"gate_up_order": "ups first"}, "gate_up_order: expected one of"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = {"packed": torch.zeros(2, 4, 16, dtype=torch.uint8), "scales": torch.zeros(2, 4, 1, dtype=torch.uint8)}
    engines.prepare_matrix(**given)
    with pytest.raises((TypeError, ValueError), match=message):
        engines.prepare_matrix(**{**given, **change})


def test_a_layer_whose_matrices_do_not_fit_is_not_released(checkpoint: Checkpoint) -> None:
    given = {name: tensor.clone() for name, tensor in checkpoint.items()} | {"w2": checkpoint["w2"][:, :64].clone()}
    with pytest.raises(ValueError, match="w2: expected .3, 96, I/2. with I of w13's 320 rows"):
        engines.prepare_layer(**given, release=True)
    assert torch.equal(given["w13"], checkpoint["w13"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2_scale": torch.zeros(E, H, 2, dtype=torch.uint8)}, r"w2_scale: expected uint8 \[3, 96, 5\], got"),
        ({"w2_scale": torch.zeros(E, H, 5)}, r"w2_scale: expected uint8 \[3, 96, 5\], got float32"),
        ({"w13_scale": None}, "w13_scale: expected a tensor, got NoneType"),
        ({"w2": [1]}, "w2: expected a tensor, got list"),
        (
            {"w2_bias": torch.zeros(E, H, dtype=torch.int32)},
            "w2_bias: expected bfloat16 or float16 or float32 .* int32",
        ),
        ({"w2_bias": torch.zeros(E, H + 1)}, r"w2_bias: expected .*\[3, 96\], got float32 \[3, 97\]"),
        ({"activation_format": "nvfp4"}, "activation_format: expected 'mxfp8' or .* got 'nvfp4'"),
        ({"gate_up_order": "up"}, "gate_up_order: expected one of"),
    ],
)
def test_a_layer_that_is_refused_is_not_released(checkpoint: Checkpoint, change: dict[str, Any], message: str) -> None:
    given = {name: tensor.clone() for name, tensor in checkpoint.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        engines.prepare_layer(**{**given, **change}, release=True)
    assert all(given[name].untyped_storage().nbytes() for name in TENSORS)
    assert all(torch.equal(given[name], checkpoint[name]) for name in TENSORS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Engines load models with the model's dtype as the default."""
    ids = torch.tensor([[0, 2], [1, 0]], dtype=torch.int32)
    g = torch.Generator().manual_seed(1)
    hidden, topk_weights = torch.randn(2, H, generator=g).bfloat16(), torch.rand(2, 2, generator=g)
    expected = mxfp4_moe.fused_moe(hidden, topk_weights, ids, MoEWeights.from_mxfp4(**checkpoint))
    torch.set_default_dtype(dtype)
    try:
        made = engines.prepare_layer(**checkpoint)
        got = mxfp4_moe.fused_moe(hidden, topk_weights, ids, made)
        logits = torch.randn(2, E, generator=g, dtype=torch.float32)
        mxfp4_moe.fused_moe_from_logits(hidden, logits, 2, replace(made))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


PLACES = {  # a rank's experts of six: all, a part in a row, and every second one
    "all": None,
    "in a row": [-1, -1, 0, 1, 2, -1],
    "every second": [0, -1, 1, -1, 2, -1],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_documents_example_runs(places: list[int] | None) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(# An engine's layer.*?)```", page, re.DOTALL)
    assert block is not None
    assert len(block[1].splitlines()) <= 35
    names: dict[str, Any] = {}
    exec(compile(block[1], "docs/engines.md", "exec"), names)
    g = torch.Generator().manual_seed(0)
    whole = {name: tensor for name, tensor in oracles.random_checkpoint(6, 64, 96, seed=4).items() if name in TENSORS}
    here = [expert for expert in range(6) if places is None or places[expert] >= 0]
    expert_map = None if places is None else torch.tensor(places, dtype=torch.int32)
    layer = names["Experts"](num_experts=len(here), hidden=64, inter=96, expert_map=expert_map)
    for name, parameter in layer.raw.items():
        parameter.copy_(whole[name][here])
    layer.after_loading()
    assert [tensor.untyped_storage().nbytes() for tensor in layer.raw.values()] == [0] * 4
    hidden, logits = torch.randn(5, 64, generator=g).bfloat16(), torch.randn(5, 6, generator=g)
    weights = MoEWeights.from_mxfp4(**whole, gate_up_order="gate_up", activation="swiglu")
    topk_weights, ids = mxfp4_moe.topk_softmax(logits, 3)
    ids_here = torch.where(torch.isin(ids, torch.tensor(here)), ids, -1)
    assert (ids_here == -1).any() == (places is not None)
    expected = mxfp4_moe.fused_moe(hidden, topk_weights, ids_here, weights)
    output = torch.full_like(hidden, float("nan"))
    assert layer(hidden, topk_weights, ids, output=output).data_ptr() == output.data_ptr()
    assert torch.equal(output, expected)
    assert torch.equal(layer(hidden, topk_weights, ids), expected)
    if places is None:
        assert torch.equal(mxfp4_moe.fused_moe_from_logits(hidden, logits, 3, layer.weights), expected)
