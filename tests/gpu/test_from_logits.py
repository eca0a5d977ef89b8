"""The layer with the router inside, against the two calls that it stands for. On a GPU."""

from __future__ import annotations

import functools
from typing import Any

import gpu_problems
import pytest
import torch
from gpu_cases import TILES, TOP_K
from gpu_layers import poison_memory
from gpu_problems import bits, random_call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe.bench.timing import Timer
from mxfp4_moe.weights import MoEWeights


@functools.cache
def layer_of_experts(experts: int) -> MoEWeights:
    return random_weights(experts, 160, 96, gpu_problems.gpu(), seed=experts)


def check_from_logits(
    hidden_states: Tensor, logits: Tensor, top_k: int, weights: MoEWeights, renormalize: bool = True, **options: Any
) -> None:
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize)
    expected = mxfp4_moe.fused_moe(hidden_states, topk_weights, topk_ids, weights, **options)
    poison_memory(logits.device, 0xFF)
    out = mxfp4_moe.fused_moe_from_logits(hidden_states, logits, top_k, weights, renormalize=renormalize, **options)
    assert out.dtype == expected.dtype
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [8, 32, 128, 300])
# One kernel up to 512 tokens, on SM90 1024; up to 128 slots another.
@pytest.mark.parametrize("tokens", [0, 1, 5, 32, 33, 64, 65, 128, 300, 512, 513, 1024, 1025])
def test_from_logits_is_topk_softmax_and_fused_moe(
    tokens: int, experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights = layer_of_experts(experts)
    g = torch.Generator(device).manual_seed(tokens + experts)
    logits = (torch.randn(tokens, experts, generator=g, device=device) * 3).to(dtype)
    logits[::7] = logits[::7].round()  # ties
    x = random_call(tokens, 1, weights).hidden_states
    for top_k in (1, 4, 8):
        for renormalize in (True, False):
            check_from_logits(x, logits, top_k, weights, renormalize)


@pytest.mark.parametrize("top_k", [3, 16, 32])
@pytest.mark.parametrize("tokens", [1, 512, 1025])
def test_from_logits_with_everything_else(tokens: int, top_k: int, device: torch.device) -> None:
    weights = layer_of_experts(32)
    logits = torch.randn(tokens, 32, device=device)
    logits[0, 5] = float("nan")
    call = random_call(tokens, 1, weights)
    codes, scale = formats.quantize_mxfp8(call.hidden_states)
    swizzled = formats.swizzle_scales(scale).flatten()
    check_from_logits(codes, logits, top_k, weights, hidden_states_scale=scale)
    check_from_logits(codes, logits, top_k, weights, hidden_states_scale=swizzled, scale_layout="swizzled")
    check_from_logits(call.hidden_states.half(), logits, top_k, weights, output_dtype=torch.bfloat16)
    check_from_logits(call.hidden_states, logits, top_k, weights, intermediate_rounding=True)
    for tile in TILES:
        check_from_logits(call.hidden_states, logits, top_k, weights, tile_mn=tile.mn)
    output = torch.empty_like(call.hidden_states)
    out = mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, top_k, weights, output=output)
    assert out is output
    assert torch.equal(bits(out), bits(mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, top_k, weights)))


@pytest.mark.parametrize("tokens", [1, 64, 513, 1025])
def test_from_logits_of_a_slice(tokens: int, device: torch.device) -> None:
    """The logits are the whole layer's; experts of other ranks contribute nothing."""
    whole = layer_of_experts(128)
    logits = torch.randn(tokens, 128, device=device)
    x = random_call(tokens, 1, whole).hidden_states
    for rank in range(4):
        check_from_logits(x, logits, TOP_K, whole.expert_parallel(rank, 4))
    with pytest.raises(ValueError, match=r"router_logits: expected one for each of the layer's 128 experts, got"):
        mxfp4_moe.fused_moe_from_logits(x, logits[:, :32].contiguous(), TOP_K, whole.expert_parallel(0, 4))


@pytest.mark.parametrize("tokens", [1, 64, 512, 1024])
def test_a_layer_from_logits_is_five_kernels_or_six(tokens: int, device: torch.device) -> None:
    """Beyond 128 slots experts are chosen by a kernel of its own."""
    weights = layer_of_experts(128)
    logits, x = torch.randn(tokens, 128, device=device), random_call(tokens, 1, weights).hidden_states
    kernels = Timer(device).kernels(
        lambda: mxfp4_moe.fused_moe_from_logits(x, logits, TOP_K, weights, tile_mn=(32, 128))
    )
    assert len(kernels) == 5 + (tokens * TOP_K > 128), [kernel.name for kernel in kernels]


@pytest.mark.parametrize("tokens", [48, 600])
def test_from_logits_in_a_graph_and_compiled(tokens: int, device: torch.device) -> None:
    weights = layer_of_experts(128)
    static_x = torch.zeros(tokens, 160, dtype=torch.bfloat16, device=device)
    static_logits = torch.zeros(tokens, 128, device=device)
    output = torch.empty_like(static_x)
    mxfp4_moe.fused_moe_from_logits(static_x, static_logits, TOP_K, weights, output=output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mxfp4_moe.fused_moe_from_logits(static_x, static_logits, TOP_K, weights, output=output)
    compiled = torch.compile(mxfp4_moe.fused_moe_from_logits, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        static_x.copy_(random_call(tokens, 1, weights, seed=seed).hidden_states)
        static_logits.normal_()
        output.fill_(float("nan"))
        graph.replay()
        topk_weights, topk_ids = mxfp4_moe.topk_softmax(static_logits, TOP_K)
        expected = mxfp4_moe.fused_moe(static_x, topk_weights, topk_ids, weights)
        assert torch.equal(bits(output), bits(expected))
        assert torch.equal(bits(compiled(static_x, static_logits, TOP_K, weights)), bits(expected))
    torch._dynamo.reset()
