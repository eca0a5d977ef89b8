"""The routers' kernels as the PTX that nvcc makes of them for SM12x, executed on the CPU: plain torch's bits."""

from __future__ import annotations

import pytest
import router_cases as cases
import torch
from ptx import launch
from ptx.running import EXECUTED
from ptx_router_checks import (
    ROUTER_SOURCES,
    check_few_named,
    check_named,
    check_route_of_router,
    check_scores,
    check_topk_experts,
)

from mxfp4_moe.routers import ScoringFunc

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = [scoring.value for scoring in ScoringFunc]
NAMES = [name for name in cases.ROUTERS if not cases.router_named(name)[1].is_topk_softmax]  # that one: test_ptx_moe.py


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_is_exact(name: str) -> None:
    check_named(name, LOGITS[NAMES.index(name) % 3])


@pytest.mark.parametrize("scoring_func", SCORINGS)
def test_scores_are_exact(scoring_func: str) -> None:
    check_scores(scoring_func)


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("experts", [1, 31, 129, 257, 515, 1000])
def test_every_size_is_exact(experts: int, scoring_func: str, dtype: torch.dtype) -> None:
    router = cases.router_of(experts, min(experts, 5), scoring_func)
    check_topk_experts(router, cases.special_logits(experts, dtype))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("experts", [40, 200, 300, 600])
def test_given_experts_are_weighed_exactly(experts: int, scoring_func: str, ids: torch.dtype) -> None:
    router = cases.router_of(experts, 6, scoring_func, renormalize=experts != 200, routed_scaling_factor=1.5)
    logits = cases.special_logits(experts, torch.float32)
    given = torch.randint(-2, experts + 2, (len(logits), 6), generator=torch.Generator().manual_seed(0)).to(ids)
    if ids is torch.int64:
        given[0, 0] = 2**32 + 1
    check_topk_experts(router, logits, given)


def test_no_tokens_and_one() -> None:
    router = cases.router_of(40, 3, "sigmoid")
    for tokens in (0, 1):
        check_topk_experts(router, torch.randn(tokens, 40))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [  # a block of 32 warps at most up to 256 experts, of 16 beyond; up to 128 slots
        *[("MiniMax-M3", 11), ("DeepSeek-V3", 11), ("DeepSeek-V4-Flash", 11), ("DeepSeek-V4-Pro", 11), ("Ling", 11)],
        *[("Kimi-K3", 8), ("32 of 1024", 4), ("softmax with a bias", 11), ("groups of two", 11), ("DeepSeek-V2", 1)],
    ],
)
def test_few_slots_are_chosen_and_routed_by_one_kernel(name: str, tokens: int) -> None:
    check_few_named(name, tokens)


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize("experts", [100, 200, 400, 700])
def test_few_slots_of_every_size(experts: int, scoring_func: str) -> None:
    logits = cases.special_logits(experts, torch.bfloat16)
    check_route_of_router(cases.router_of(experts, 2, scoring_func), logits)


def test_more_tokens_than_warps() -> None:
    """A warp takes the next token when it is done with one: 60 for 16 warps, and 120 for 32."""
    check_route_of_router(cases.router_of(300, 2, "sigmoid"), cases.logits_of(60, 300, torch.float32))
    check_route_of_router(cases.router_of(100, 1, "sigmoid"), cases.logits_of(120, 100, torch.float32))


@pytest.mark.parametrize("scoring_func", SCORINGS)
@pytest.mark.parametrize(("experts", "tokens", "top_k"), [(100, 40, 4), (200, 33, 8)])
def test_more_slots_are_chosen_and_routed_by_two_kernels(
    experts: int, tokens: int, top_k: int, scoring_func: str
) -> None:
    router = cases.router_of(experts, top_k, scoring_func, num_expert_group=4, topk_group=2)
    check_route_of_router(router, cases.logits_of(tokens, experts, torch.float32), kernels=2)


def test_more_slots_of_many_experts() -> None:
    check_route_of_router(cases.router_of(300, 8, "sigmoid"), cases.logits_of(20, 300, torch.float32), kernels=2)


def test_every_kernel_was_executed(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or any("::" in word for word in request.config.args):
        pytest.skip("says something only where all tests of this file ran before it")
    kernels = {kernel for source in ROUTER_SOURCES for kernel in launch.entries(launch.ptx_of_moe(source))}
    of_routers = {kernel for kernel in kernels if "topk_experts" in kernel}
    assert of_routers - EXECUTED == set()
    assert len(of_routers) == 8
