"""Routed and shared experts as one layer on a GPU: its bits, in a graph too, and the sum of both layers apart."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import exact_layer, same
from gpu_problems import Call, random_call, random_weights, relative_error

from mxfp4_moe import fused_moe, join_shared_experts

# The sum of two layers rounds two sums to bfloat16, the joined layer one.
TOLERANCE = 5e-3


@pytest.mark.parametrize("tokens", [1, 7, 64, 513])
@pytest.mark.parametrize(("activation", "width"), [("swiglu_oai", 1), ("situ", 2), ("swiglu_step", 1)])
def test_joined_is_both(tokens: int, activation: str, width: int, device: torch.device) -> None:
    routed = random_weights(16, 320, 192, device, activation=activation, beta=4.0)
    shared = random_weights(1, 320, 192 * width, device, activation=activation, beta=4.0, seed=1)
    joined = join_shared_experts(routed, shared)
    call = random_call(tokens, 4, routed)
    hidden_states, topk_weights, topk_ids = call.args()
    choices = joined.choices(topk_weights, topk_ids)
    out = fused_moe(hidden_states, *choices, joined.weights)
    whole = Call(hidden_states=hidden_states, topk_weights=choices[0], topk_ids=choices[1])
    assert same(out, exact_layer(whole, joined.weights))
    one = torch.ones(tokens, 1, device=device)
    apart = fused_moe(*call.args(), routed).float() + fused_moe(hidden_states, one, (one - 1).int(), shared).float()
    assert relative_error(out, apart) <= TOLERANCE
    assert relative_error(fused_moe(*call.args(), routed), apart) > 0.05


def test_in_a_graph(device: torch.device) -> None:
    joined = join_shared_experts(random_weights(8, 160, 96, device), random_weights(1, 160, 96, device, seed=1))
    call = random_call(5, 2, joined.weights)
    hidden_states, topk_weights, topk_ids = (tensor.clone() for tensor in call.args())

    def layer() -> torch.Tensor:
        return fused_moe(hidden_states, *joined.choices(topk_weights, topk_ids % 8), joined.weights)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    topk_weights.copy_(topk_weights.flip(0))
    graph.replay()
    assert same(out, layer())
