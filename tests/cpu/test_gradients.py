"""No gradient flows through the layer: whoever asks for one is told so, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch

from mxfp4_moe import MoEWeights, fused_moe, fused_moe_from_logits, topk_softmax

E, H, INTER, T, K = 4, 64, 96, 5, 2
MESSAGE = "no gradient can be computed through it, since FP4 weights are for inference"


@pytest.fixture(scope="module")
def weights() -> MoEWeights:
    return MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER))


def call(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g)
    topk_weights, topk_ids = logits.softmax(-1).topk(K)
    return torch.randn(T, H, generator=g).bfloat16(), topk_weights, topk_ids


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return function if backend == "none" else torch.compile(function, fullgraph=True, backend=backend)


BACKENDS = pytest.mark.parametrize("backend", ["none", "eager", "aot_eager"])


@BACKENDS
@pytest.mark.parametrize("asks", ["hidden_states", "topk_weights", "both"])
def test_the_backward_pass_says_so(weights: MoEWeights, backend: str, asks: str) -> None:
    x, topk_weights, topk_ids = call()
    expected = fused_moe(x, topk_weights, topk_ids, weights)
    x.requires_grad_(asks != "topk_weights")
    topk_weights.requires_grad_(asks != "hidden_states")
    # As in a model: the layer's inputs are no leaves.
    result = compiled(lambda x, w, ids: fused_moe(x * 1, w * 1, ids, weights), backend)(x, topk_weights, topk_ids)
    assert torch.equal(result, expected), "the forward pass is the same"
    with pytest.raises(RuntimeError, match=f"^fused_moe: {MESSAGE}"):
        result.float().sum().backward()


@BACKENDS
def test_the_router_says_so(backend: str) -> None:
    logits = torch.randn(T, E, requires_grad=True)
    topk_weights, topk_ids = compiled(lambda x: topk_softmax(x, K), backend)(logits)
    assert not topk_ids.requires_grad
    with pytest.raises(RuntimeError, match=f"^topk_softmax: {MESSAGE}"):
        topk_weights.sum().backward()


@BACKENDS
def test_the_layer_behind_its_router_says_so(weights: MoEWeights, backend: str) -> None:
    x, _, _ = call()
    logits = torch.randn(T, E, requires_grad=True)
    result = compiled(lambda x, logits: fused_moe_from_logits(x, logits, K, weights), backend)(x, logits)
    with pytest.raises(RuntimeError, match=f"^fused_moe: {MESSAGE}"):
        result.float().sum().backward()


@BACKENDS
def test_nothing_is_refused_where_no_gradient_is_asked_for(weights: MoEWeights, backend: str) -> None:
    x, topk_weights, topk_ids = call()
    run = compiled(lambda *args: fused_moe(*args, weights), backend)
    assert not run(x, topk_weights, topk_ids).requires_grad
    leaf = topk_weights.clone().requires_grad_()
    with torch.no_grad():
        assert not run(x, leaf, topk_ids).requires_grad
    with torch.inference_mode():
        assert not run(x, leaf, topk_ids).requires_grad


@pytest.mark.parametrize("asks", [False, True])
def test_the_output_that_was_given_comes_back(weights: MoEWeights, asks: bool) -> None:
    x, topk_weights, topk_ids = call()
    expected = fused_moe(x, topk_weights, topk_ids, weights)
    topk_weights = topk_weights.requires_grad_(asks) * 1
    out = torch.full_like(x, float("nan"))
    result = fused_moe(x, topk_weights, topk_ids, weights, output=out)
    assert result is out
    assert torch.equal(out, expected)
    assert out.requires_grad is asks
    in_place = x.clone()
    assert torch.equal(fused_moe(in_place, topk_weights, topk_ids, weights, output=in_place), expected)


def test_gradients_elsewhere_are_not_touched(weights: MoEWeights) -> None:
    """A part of the graph that does not pass through the layer has its gradient; as where it is skipped."""
    x, topk_weights, topk_ids = call()
    scale = torch.ones((), requires_grad=True)
    (fused_moe(x, topk_weights, topk_ids, weights).float() * scale).sum().backward()
    assert scale.grad is not None
