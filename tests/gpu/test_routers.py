"""Any router's kernel against plain torch on the CPU, bit by bit; and the layer with it inside. On a GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import gpu_problems
import pytest
import router_cases as cases
import torch
from gpu_layers import poison_memory
from gpu_problems import bits, random_call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import Router, select_experts
from mxfp4_moe._install import loading
from mxfp4_moe.bench.timing import Timer
from mxfp4_moe.reference import routers as reference
from mxfp4_moe.routers import ScoringFunc
from mxfp4_moe.weights import MoEWeights

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = [scoring.value for scoring in ScoringFunc]
NAMES = [name for name in cases.ROUTERS if not cases.router_named(name)[1].is_topk_softmax]  # that one: test_routing.py


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return gpu_problems.gpu()


def moved(router: Router, device: torch.device) -> Router:
    bias = router.e_score_correction_bias
    return replace(router, e_score_correction_bias=None if bias is None else bias.to(device))


def check(logits: Tensor, router: Router, device: torch.device, given: Tensor | None = None) -> None:
    """Both on the CPU; the GPU must give the same ids and the same bits of the weights, NaN where they are NaN."""
    expected_weights, expected_ids = reference.select_experts(logits, router, given)
    poison_memory(device, 0xFF)
    own_given = None if given is None else given.to(device)
    weights, ids = select_experts(logits.to(device), moved(router, device), own_given)
    assert torch.equal(ids.cpu(), expected_ids)
    nans = expected_weights.isnan()
    assert torch.equal(weights.cpu().isnan(), nans)
    assert torch.equal(bits(weights.cpu()[~nans]), bits(expected_weights[~nans]))


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_exact(name: str, dtype: torch.dtype, device: torch.device) -> None:
    experts, router = cases.router_named(name)
    check(cases.special_logits(experts, dtype), router, device)
    for tokens in (1, 5, 999):
        check(cases.logits_of(tokens, experts, dtype, seed=tokens), router, device)


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("experts", [1, 2, 31, 33, 64, 128, 129, 200, 256, 257, 384, 512, 513, 896, 1000, 1024])
def test_every_size_is_exact(experts: int, scoring_func: str, device: torch.device) -> None:
    for top_k in sorted({1, min(7, experts), min(32, experts)}):
        router = cases.router_of(experts, top_k, scoring_func, renormalize=top_k != 7, routed_scaling_factor=2.5)
        check(cases.special_logits(experts, torch.float32), router, device)
        check(cases.logits_of(130, experts, torch.bfloat16), router, device)


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize(
    ("experts", "groups", "kept"), [(4, 2, 1), (60, 4, 2), (64, 32, 7), (256, 8, 4), (384, 3, 2), (1024, 16, 5)]
)
@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_groups_are_exact(
    experts: int, groups: int, kept: int, scoring_func: str, group_score: str, device: torch.device
) -> None:
    options = {"num_expert_group": groups, "topk_group": kept, "group_score": group_score}
    router = cases.router_of(experts, min(8, experts // groups * kept), scoring_func, bias=groups != 3, **options)
    check(cases.special_logits(experts, torch.float32), router, device)
    ties = torch.randint(-1, 2, (200, experts), generator=torch.Generator().manual_seed(0)).float()
    check(ties, router, device)
    check(ties, replace(router, e_score_correction_bias=None), device)


@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_a_million_scores_are_exact(scoring_func: str, device: torch.device) -> None:
    """Given experts, all of them: what every logit is worth, from -100 to 100 and close to 0."""
    logits = torch.cat([torch.linspace(-100, 100, 2**19), torch.randn(2**19)]).view(-1, 32)
    given = torch.arange(32, dtype=torch.int32).repeat(len(logits), 1)
    check(logits, Router(top_k=32, scoring_func=scoring_func, renormalize=False), device, given)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "Kimi-K3", "gpt-oss"])
def test_given_experts_are_weighed(name: str, ids: torch.dtype, device: torch.device) -> None:
    experts, router = cases.router_named(name)
    g = torch.Generator().manual_seed(5)
    given = torch.randint(-3, experts + 3, (77, router.top_k), generator=g).to(ids)
    if ids is torch.int64:
        given[0, 0] = 2**32 + 1
    check(cases.logits_of(77, experts, torch.float32), router, device, given)


@pytest.mark.parametrize("tokens", [0, 1, 131_072])
def test_token_counts(tokens: int, device: torch.device) -> None:
    check(cases.logits_of(tokens, 128, torch.float32), cases.router_of(128, 4, "sigmoid"), device)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V4-Pro"])
def test_in_a_graph_and_a_view_that_starts_anywhere(name: str, device: torch.device) -> None:
    experts, router = cases.router_named(name)
    own = moved(router, device)
    static = torch.zeros(1 + 33 * experts, device=device)[1:].view(33, experts)
    select_experts(static, own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = select_experts(static, own)
    for _ in range(3):
        static.normal_()
        graph.replay()
        expected_weights, expected_ids = reference.select_experts(static.cpu(), router)
        assert torch.equal(ids.cpu(), expected_ids)
        assert torch.equal(bits(weights.cpu()), bits(expected_weights))


def test_the_operator_checks_for_itself(device: torch.device) -> None:
    kernel = loading.moe_ops().route_experts
    logits = torch.zeros(2, 40, device=device)
    bias = torch.zeros(41, device=device)
    for options, message in (
        ({"top_k": 33}, r"top_k: expected 1 to 32, got 33"),
        ({"e_score_correction_bias": bias}, r"e_score_correction_bias: expected float32 \[40\], got float32 \[41\]"),
        ({"e_score_correction_bias": bias[:40].cpu()}, r"."),
        ({"scoring_func": 3}, r"scoring_func: expected 0 to 2, got 3"),
        ({"num_expert_group": 33}, r"num_expert_group: expected 1 to 32, got 33"),
        ({"num_expert_group": 3}, r"num_expert_group: expected a divisor of 40 experts, got 3"),
        ({"num_expert_group": 2, "topk_group": 3}, r"topk_group: expected 1 to 2, got 3"),
        ({"num_expert_group": 20, "topk_group": 1, "top_k": 3}, r"topk_group: expected groups with 3 experts"),
        ({"group_score": 2}, r"group_score: expected 0 to 1, got 2"),
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int32, device=device)}, r"topk_ids: expected \[2, 2\], got int32"),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            kernel(logits, **{"top_k": 2, **options})


# ---- the layer -------------------------------------------------------------------------------------------------------


@functools.cache
def layer_of_experts(experts: int) -> MoEWeights:
    return random_weights(experts, 160, 96, gpu_problems.gpu(), seed=experts)


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 4), (256, 8), (384, 6), (512, 8), (896, 16)])
# Up to 128 slots one kernel; with up to 256 experts another up to 512 tokens, on SM90 1024.
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 16, 17, 33, 64, 65, 300, 512, 513, 1025])
def test_from_logits_is_select_experts_and_fused_moe(
    tokens: int, experts: int, top_k: int, scoring_func: str, device: torch.device
) -> None:
    weights = layer_of_experts(experts)
    router = moved(
        cases.router_of(experts, top_k, scoring_func, num_expert_group=4, topk_group=2, routed_scaling_factor=1.5),
        device,
    )
    logits = cases.logits_of(tokens, experts, torch.float32).to(device)
    logits[::7] = logits[::7].round()  # ties
    x = random_call(tokens, 1, weights).hidden_states
    for part in (weights, weights.expert_parallel(1, 3)):
        expected = mxfp4_moe.fused_moe(x, *select_experts(logits, router), part)
        poison_memory(device, 0xFF)
        out = mxfp4_moe.fused_moe_from_logits(x, logits, router, part)
        assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("tokens", [1, 16, 512, 1024])
@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (896, 16), (128, 32)])
def test_how_many_kernels_a_layer_is(tokens: int, experts: int, top_k: int, device: torch.device) -> None:
    weights = layer_of_experts(experts)
    router = moved(cases.router_of(experts, top_k, "sigmoid"), device)
    logits = cases.logits_of(tokens, experts, torch.float32).to(device)
    x = random_call(tokens, 1, weights).hidden_states
    kernels = Timer(device).kernels(
        lambda: mxfp4_moe.fused_moe_from_logits(x, logits, router, weights, tile_mn=(32, 128))
    )
    assert len(kernels) == 5 + (tokens * top_k > 128), [kernel.name for kernel in kernels]


def test_k_of_32_of_the_softmax_rule(device: torch.device) -> None:
    """Chosen ids of a whole launch must fit the block's shared memory."""
    weights = layer_of_experts(256)
    for tokens in (256, 257, 512, 513, 1024):
        logits = cases.logits_of(tokens, 256, torch.float32).to(device)
        x = random_call(tokens, 1, weights).hidden_states
        expected = mxfp4_moe.fused_moe(x, *mxfp4_moe.topk_softmax(logits, 32), weights)
        assert torch.equal(bits(mxfp4_moe.fused_moe_from_logits(x, logits, 32, weights)), bits(expected))


def test_compiled_and_captured(device: torch.device) -> None:
    weights = layer_of_experts(256)
    router = moved(cases.router_of(256, 8, "sigmoid", num_expert_group=8, topk_group=4), device)
    compiled = torch.compile(mxfp4_moe.fused_moe_from_logits, fullgraph=True, backend="aot_eager")
    for tokens in (4, 48):
        static_x = torch.zeros(tokens, 160, dtype=torch.bfloat16, device=device)
        static_logits = torch.zeros(tokens, 256, device=device)
        output = torch.empty_like(static_x)
        mxfp4_moe.fused_moe_from_logits(static_x, static_logits, router, weights, output=output)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mxfp4_moe.fused_moe_from_logits(static_x, static_logits, router, weights, output=output)
        for seed in range(3):
            static_x.copy_(random_call(tokens, 1, weights, seed=seed).hidden_states)
            static_logits.normal_()
            output.fill_(math.nan)
            graph.replay()
            expected = mxfp4_moe.fused_moe(static_x, *select_experts(static_logits, router), weights)
            assert torch.equal(bits(output), bits(expected))
            assert torch.equal(bits(compiled(static_x, static_logits, router, weights)), bits(expected))
    torch._dynamo.reset()
