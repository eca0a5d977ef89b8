"""Shared experts joined to the routed ones, against float64: the sum of two layers that know nothing of each other."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import MoEWeights, fused_moe, join_shared_experts
from mxfp4_moe.shared_experts import JoinedExperts

E, K, H, INTER, TOKENS = 5, 2, 96, 64, 19
# Of the norm. bfloat16 rounds the rows and the sum, as test_reference.py has it; float16 the sum alone, and what is
# left is that a value between the GEMMs may fall on the other side of an MXFP8 tie.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-9}


def layer(seed: int, *, experts: int = E, inter: int = INTER, bias: bool = True, **numbers: Any) -> dict[str, Any]:
    """A layer's checkpoint, its prepared weights, and the numbers of its activation."""
    checkpoint = oracles.random_checkpoint(experts, H, inter, seed=seed)
    if not bias:
        checkpoint = {name: tensor for name, tensor in checkpoint.items() if not name.endswith("bias")}
    return {"checkpoint": checkpoint, "weights": MoEWeights.from_mxfp4(**checkpoint, **numbers), "numbers": numbers}


def call(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    chosen = torch.randn(TOKENS, E, generator=g).softmax(-1).topk(K)
    return torch.randn(TOKENS, H, generator=g).to(dtype), chosen.values, chosen.indices


def float64(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, routed: dict[str, Any], shared: dict[str, Any], gate: Any
) -> np.ndarray:
    every = torch.arange(shared["weights"].num_experts).expand(len(x), -1)
    apart = oracles.dense_moe(x, weights, ids, routed["checkpoint"], **routed["numbers"])
    return apart + oracles.dense_moe(x, gate.expand(every.shape), every, shared["checkpoint"], **shared["numbers"])


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected))


def run(joined: JoinedExperts, x: torch.Tensor, *choices: torch.Tensor) -> torch.Tensor:
    return fused_moe(x, *joined.choices(*choices), joined.weights)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("routed", "shared", "num_shared"),
    [
        ({}, {"experts": 1}, 1),
        ({}, {"experts": 2}, 2),
        ({}, {"experts": 1, "inter": 3 * INTER}, 3),  # as wide as three
        ({"bias": False}, {"experts": 1}, 1),
        ({}, {"experts": 1, "inter": 2 * INTER, "bias": False}, 2),
        ({"activation": "swiglu_step", "limit": 2.0}, {"experts": 1, "activation": "swiglu_step", "limit": None}, 1),
        ({"activation": "swiglu_oai", "alpha": 1.0, "beta": 0.0}, {"experts": 1, "activation": "swiglu_oai"}, 1),
        ({"activation": "situ", "beta": 4.0, "limit": 25.0},) * 2 + (E,),
    ],
)
def test_against_float64(routed: dict[str, Any], shared: dict[str, Any], num_shared: int, dtype: torch.dtype) -> None:
    one, two = layer(0, **routed), layer(1, **shared)
    joined = join_shared_experts(one["weights"], two["weights"])
    assert (joined.num_shared, joined.weights.num_experts) == (num_shared, E + num_shared)
    x, topk_weights, topk_ids = call(dtype)
    for ids in (topk_ids, topk_ids.int()):
        out = run(joined, x, topk_weights, ids)
        assert out.dtype == dtype
        assert error(out, float64(x, topk_weights, topk_ids, one, two, torch.ones(1))) <= TOLERANCE[dtype]
    # Without the shared experts, with another's, or twice as heavy: far away.
    other = layer(2, **shared)
    for wrong, gate in ((two, torch.zeros(1)), (other, torch.ones(1)), (two, torch.full((1,), 2.0))):
        assert error(out, float64(x, topk_weights, topk_ids, one, wrong, gate)) > 8 * TOLERANCE[dtype]


def test_a_gate_for_each_token() -> None:
    one, two = layer(0), layer(1, experts=1)
    joined = join_shared_experts(one["weights"], two["weights"])
    x, topk_weights, topk_ids = call()
    gate = torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(9))
    out = run(joined, x, topk_weights, topk_ids, gate)
    assert error(out, float64(x, topk_weights, topk_ids, one, two, gate)) <= TOLERANCE[torch.bfloat16]
    assert error(out, float64(x, topk_weights, topk_ids, one, two, gate.flip(0))) > 0.05


def test_a_factor_for_all() -> None:
    one, two = layer(0), layer(1, experts=1)
    joined = join_shared_experts(one["weights"], two["weights"], weight=0.4)
    x, topk_weights, topk_ids = call()
    expected = float64(x, topk_weights, topk_ids, one, two, torch.full((1,), 0.4))
    assert error(run(joined, x, topk_weights, topk_ids), expected) <= TOLERANCE[torch.bfloat16]


def test_no_limit_beside_a_limit() -> None:
    """float32's largest number, which clamps no number; an infinity is no limit of an expert."""
    one = layer(0, activation="swiglu_oai", limit=2.0)["weights"]
    two = layer(1, experts=1, activation="swiglu_oai", limit=None)["weights"]
    for joined in (join_shared_experts(one, two), join_shared_experts(two, one)):
        limit = joined.weights.limit
        assert isinstance(limit, torch.Tensor)
        assert sorted(limit.tolist()) == [2.0] * E + [torch.finfo(torch.float32).max]
    assert join_shared_experts(two, two).weights.limit is None


def test_a_soft_limit_has_no_number_for_none() -> None:
    numbers = {"activation": "situ", "beta": 4.0}
    with_limit, without = layer(0, **numbers, limit=25.0)["weights"], layer(1, **numbers, limit=None)["weights"]
    with pytest.raises(
        ValueError, match=r"^shared: expected limit to be a limit with situ, as routed's, got None; call"
    ):
        join_shared_experts(with_limit, without)
    with pytest.raises(ValueError, match=r"^shared: expected limit to be None with situ, as routed's, got one; call"):
        join_shared_experts(without, with_limit)


@pytest.mark.parametrize(("weight", "error"), [(math.nan, ValueError), (math.inf, ValueError), (True, TypeError)])
def test_a_factor_that_is_none(weight: float, error: type[Exception]) -> None:
    one = layer(0)["weights"]
    with pytest.raises(error, match=r"^weight: expected a (finite )?number, got "):
        join_shared_experts(one, one, weight)


def test_the_bytes_are_those_that_came() -> None:
    one, two = layer(0), layer(1, experts=2)
    stored = join_shared_experts(one["weights"], two["weights"]).weights.to_mxfp4()._asdict()
    for name, tensor in stored.items():
        assert torch.equal(tensor, torch.cat([one["checkpoint"][name], two["checkpoint"][name]]).to(tensor.dtype)), name


def test_ranks_add_up_to_the_layer() -> None:
    joined = join_shared_experts(layer(0)["weights"], layer(1, experts=1)["weights"])
    x, *choices = call(torch.float16)
    whole = run(joined, x, *choices)
    for split in ("expert_parallel", "tensor_parallel"):
        parts = [getattr(joined.weights, split)(rank, 2) for rank in range(2)]
        total = sum(run(dataclasses.replace(joined, weights=part), x, *choices).double() for part in parts)
        assert isinstance(total, torch.Tensor)
        assert error(total, whole.double().numpy()) <= TOLERANCE[torch.float16]


def test_in_a_compiled_graph() -> None:
    joined = join_shared_experts(layer(0)["weights"], layer(1, experts=1)["weights"])
    x, *choices = call()
    compiled = torch.compile(lambda *given: run(joined, *given), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *choices), run(joined, x, *choices))


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (
            {"inter": 96},
            "shared: expected intermediate_size to be a multiple of 64, which routed has, got 96; call it as",
        ),
        ({"inter": 32}, "shared: expected intermediate_size to be a multiple of 64, which routed has, got 32"),
        (
            {"activation": "geglu"},
            "shared: expected activation Activation.SWIGLU_OAI, as routed has, got Activation.GEGLU",
        ),
    ],
)
def test_what_cannot_be_joined(shared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_shared_experts(layer(0)["weights"], layer(1, **shared)["weights"])


def test_slices_and_other_things_are_refused() -> None:
    routed, shared = layer(0)["weights"], layer(1, experts=1)["weights"]
    with pytest.raises(ValueError, match=r"routed: expected all experts of a layer, got 3 of 5; join first"):
        join_shared_experts(routed.expert_parallel(0, 2), shared)
    with pytest.raises(TypeError, match="shared: expected MoEWeights, got dict"):
        join_shared_experts(routed, {})  # type: ignore[arg-type]
    narrow = MoEWeights.from_mxfp4(**oracles.random_checkpoint(1, 64, INTER))
    with pytest.raises(ValueError, match="shared: expected hidden_size 96, as routed has, got 64"):
        join_shared_experts(routed, narrow)
    joined = join_shared_experts(routed, shared)
    _, topk_weights, topk_ids = call()
    with pytest.raises(ValueError, match=r"shared_weights: expected float32 \[19, 1\], got float32 \[1, 19\]"):
        joined.choices(topk_weights, topk_ids, torch.ones(1, TOKENS))
    with pytest.raises(TypeError, match="topk_weights: expected float32"):
        joined.choices(topk_weights.double(), topk_ids)
