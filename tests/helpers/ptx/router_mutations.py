"""Mistakes in the routers' sources, one at a time, and which test must notice: for test_ptx_moe_mutations.py."""

from __future__ import annotations

import ptx_router_checks as routers
import router_cases
import torch

from .moe_mutations import Mutation


def _groups() -> None:
    routers.check_named("DeepSeek-V3", torch.float32)


def _one_group() -> None:
    routers.check_named("DeepSeek-V4-Flash", torch.float32)


def _given() -> None:
    router = router_cases.router_of(200, 4, "sigmoid")
    ids = torch.tensor([[5, 200, -1, 199]], dtype=torch.int32)
    routers.check_topk_experts(router, router_cases.logits_of(1, 200, torch.float32), ids)


def _given_int64() -> None:
    router = router_cases.router_of(200, 4, "sigmoid")
    routers.check_topk_experts(router, router_cases.logits_of(1, 200, torch.float32), torch.tensor([[5, 7, 11, 199]]))


def _route_of_router() -> None:
    routers.check_few_named("DeepSeek-V3", 11)


MUTATIONS = (
    Mutation(
        name="routers: of equal choices the higher expert",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="for (int i = kPerLane - 1; i >= 0; --i) {",
        new="for (int i = 0; i < kPerLane; ++i) {",
        case=_one_group,
    ),
    Mutation(
        name="routers: an exp with a fused multiply-add",
        unit="topk_experts",
        file="moe/scores.cuh",
        old="__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r)",
        new="fmaf(p, __fmul_rn(r, r), r)",
        case=lambda: routers.check_scores("sigmoid"),
    ),
    Mutation(
        name="routers: a coefficient's last digit",
        unit="topk_experts",
        file="moe/scores.cuh",
        old="3.33333343e-1f",
        new="3.33333403e-1f",
        case=lambda: routers.check_scores("sqrtsoftplus"),
    ),
    Mutation(
        name="routers: nothing is added to a sum of 0",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="__fadd_rn(of_all, kLeastSum)",
        new="of_all",
        case=_groups,
    ),
    Mutation(
        name="routers: the bias reaches the weight",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="keys[i] = i * kWarpSize + lane < choice.experts ? key_of(__fadd_rn(chosen_by[i], bias)) : kNoKey;",
        new="scores[i] = __fadd_rn(chosen_by[i], bias);\n"
        "        keys[i] = i * kWarpSize + lane < choice.experts ? key_of(scores[i]) : kNoKey;",
        case=_one_group,
    ),
    Mutation(
        name="routers: a group's second is its first again",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="has_it ? second : first",
        new="first",
        case=_groups,
    ),
    Mutation(
        name="routers: a lane's second is any after its first",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="second = max(second, min(first, key));",
        new="second = first;",
        case=_groups,
    ),
    Mutation(
        name="routers: the groups that are kept are dropped",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="if ((kept >> group & 1) == 0) {",
        new="if ((kept >> group & 1) != 0) {",
        case=_groups,
    ),
    Mutation(
        name="routers: a score of the lane before",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="expert & (kWarpSize - 1)",
        new="(expert - 1) & (kWarpSize - 1)",
        case=_one_group,
    ),
    Mutation(
        name="routers: the id after the last is an expert",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="id >= 0 && id < choice.experts",
        new="id >= 0 && id <= choice.experts",
        case=_given,
    ),
    Mutation(
        name="routers: logits are read before the kernel that writes them is done",
        unit="topk_experts",
        file="moe/topk_experts.cu",
        old="topk_experts_kernel(const TopkExpertsArgs args) {\n  wait_for_previous_kernel();",
        new="topk_experts_kernel(const TopkExpertsArgs args) {",
        case=_one_group,
    ),
    Mutation(
        name="routers: bfloat16 logits read as float16",
        unit="topk_experts",
        file="moe/choose_experts.cuh",
        old="args.type == LogitsType::kBFloat16",
        new="args.type == LogitsType::kFloat16",
        case=lambda: routers.check_named("DeepSeek-V4-Flash", torch.bfloat16),
    ),
    Mutation(
        name="routers: a score is not moved back to its place",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="turn < kPerLane / kTurn",
        new="turn + 1 < kPerLane / kTurn",
        case=_one_group,
    ),
    Mutation(
        name="routers: given ids are read as int32 alone",
        unit="topk_experts",
        file="moe/topk_ids.cuh",
        old="return are_int64 ?",
        new="return false ?",
        case=_given_int64,
    ),
    Mutation(
        name="routers: a given id of no expert has a score",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="!by_scores && expert >= 0",
        new="!by_scores",
        case=_given,
    ),
    Mutation(
        name="routers: a score that is taken after the choice is a sigmoid",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="weight = is_sigmoid ?",
        new="weight = true ?",
        case=lambda: routers.check_scores("sqrtsoftplus"),
    ),
    Mutation(
        name="routers: no barrier between the choice and the route",
        unit="route_few",
        file="moe/route_few.cu",
        old="    score_experts<kPerLane>(mine, token, threadIdx.x % kWarpSize);\n  }\n  __syncthreads();",
        new="    score_experts<kPerLane>(mine, token, threadIdx.x % kWarpSize);\n  }",
        case=_route_of_router,
    ),
    Mutation(
        name="control, routers: choices are not one loop",
        unit="topk_experts",
        file="moe/score_experts.cuh",
        old="#pragma unroll 1\n  for (int j = 0; j < top_k; ++j) {",
        new="#pragma unroll 2\n  for (int j = 0; j < top_k; ++j) {",
        case=_groups,
        harmless=True,
    ),
)
