"""Routers by their definition, in float64 and in words of Python alone, and routers to try it with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxfp4_moe import Router

# Of a weight: a score (2.3 ulp), a sum of up to 32, a division, a product; of a softmax the rounding of x - max, which
# the exp makes a relative error of |x - max| / 2^24.
TOLERANCE = {"rtol": 5e-6, "atol": 1e-30}
LEAST_MARGIN = 1e-5  # between two choices that float32 must tell apart as float64 does


@dataclass(frozen=True)
class Choice:
    """What one token gets, and by how much the closest decision was made; an exact tie goes to the lower number."""

    ids: list[int]
    weights: list[float]
    margin: float


def score(x: float, scoring_func: str) -> float:
    if scoring_func == "sigmoid":
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    return math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x))))


def scores_of(row: list[float], scoring_func: str) -> list[float]:
    if scoring_func != "softmax":
        return [score(x, scoring_func) for x in row]
    largest = max(row)
    numerators = [math.exp(x - largest) for x in row]
    return [value / math.fsum(numerators) for value in numerators]


def best(values: list[float], among: list[int], count: int) -> tuple[list[int], float]:
    """The numbers of the `count` largest, of equals the lower, and the least gap between two that had to be ordered."""
    ordered = sorted(among, key=lambda i: (-values[i], i))
    gaps = [values[a] - values[b] for a, b in pairwise(ordered[: count + 1])]
    return ordered[:count], min((gap for gap in gaps if gap > 0), default=math.inf)


def by_definition(row: list[float], router: Router, ids: list[int] | None = None) -> Choice:
    """One token: 1. scores; 2. the bias; 3. groups; 4. the k best; 5. weights without the bias."""
    scoring_func, experts = str(router.scoring_func.value), len(row)  # type: ignore[union-attr]
    scores = scores_of(row, scoring_func)
    bias = router.e_score_correction_bias
    choices = row if bias is None and router.num_expert_group == 1 else scores
    if bias is not None:
        choices = [value + b for value, b in zip(scores, bias.tolist(), strict=True)]
    margin = math.inf
    among = list(range(experts))
    if router.num_expert_group > 1:
        each = experts // router.num_expert_group
        count = 2 if router.group_score.value == "top2_sum" else 1  # type: ignore[union-attr]
        groups = [choices[g * each : (g + 1) * each] for g in range(router.num_expert_group)]
        of_group = [math.fsum(sorted(group, reverse=True)[:count]) for group in groups]
        kept, margin = best(of_group, list(range(len(groups))), router.topk_group)
        among = [e for e in among if e // each in kept]
    chosen, gap = best(choices, among, router.top_k)
    if ids is not None:
        chosen = ids
    weights = [scores[e] if 0 <= e < experts else 0.0 for e in chosen]
    if router.renormalize:
        total = math.fsum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    return Choice(chosen, [weight * router.routed_scaling_factor for weight in weights], min(margin, gap))


def bias_of(experts: int, seed: int = 0) -> Tensor:
    return torch.randn(experts, generator=torch.Generator().manual_seed(seed)) * 0.3


def router_of(experts: int, top_k: int, scoring_func: str, *, bias: bool = True, **options: Any) -> Router:
    """With a bias of its own."""
    correction = bias_of(experts, seed=experts + top_k) if bias else None
    return Router(top_k=top_k, scoring_func=scoring_func, e_score_correction_bias=correction, **options)


# Every rule that a published model has, and what else a router may be; experts, then what `router_of` takes.
ROUTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt-oss": (128, {"top_k": 4, "scoring_func": "softmax", "bias": False}),
    "Qwen3-MoE": (128, {"top_k": 8, "scoring_func": "softmax", "bias": False}),
    "softmax, scaled, not renormalized": (
        60,
        {"top_k": 6, "scoring_func": "softmax", "bias": False, "renormalize": False, "routed_scaling_factor": 16.0},
    ),
    "softmax with a bias": (64, {"top_k": 6, "scoring_func": "softmax"}),
    "softmax with a bias, not renormalized": (100, {"top_k": 6, "scoring_func": "softmax", "renormalize": False}),
    "DeepSeek-V2": (
        160,
        {
            **{"top_k": 6, "scoring_func": "softmax", "bias": False, "renormalize": False, "num_expert_group": 8},
            **{"topk_group": 3, "group_score": "max", "routed_scaling_factor": 16.0},
        },
    ),
    "DeepSeek-V3": (
        256,
        {"top_k": 8, "scoring_func": "sigmoid", "num_expert_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
    ),
    "DeepSeek-V4-Flash": (256, {"top_k": 6, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}),
    "DeepSeek-V4-Pro": (384, {"top_k": 6, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 2.5}),
    "MiniMax-M3": (128, {"top_k": 4, "scoring_func": "sigmoid", "routed_scaling_factor": 2.0}),
    "MiMo-V2": (256, {"top_k": 8, "scoring_func": "sigmoid"}),
    "Ling": (
        512,
        {"top_k": 8, "scoring_func": "sigmoid", "num_expert_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
    ),
    "Kimi-K3": (896, {"top_k": 16, "scoring_func": "sigmoid"}),
    "sigmoid alone": (33, {"top_k": 1, "scoring_func": "sigmoid", "bias": False, "renormalize": False}),
    "sqrtsoftplus in groups": (
        96,
        {
            **{"top_k": 12, "scoring_func": "sqrtsoftplus", "num_expert_group": 32, "topk_group": 9},
            **{"group_score": "max", "bias": False},
        },
    ),
    "32 of 1024": (1024, {"top_k": 32, "scoring_func": "sigmoid", "num_expert_group": 16, "topk_group": 8}),
    "groups of two": (64, {"top_k": 2, "scoring_func": "sigmoid", "num_expert_group": 32, "topk_group": 1}),
}


def router_named(name: str) -> tuple[int, Router]:
    experts, options = ROUTERS[name]
    return experts, router_of(experts, **options)


def logits_of(tokens: int, experts: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed + experts)
    return (torch.randn(tokens, experts, generator=g) * spread).to(dtype)


def special_logits(experts: int, dtype: torch.dtype) -> Tensor:
    """Tokens with ties, zeros of both signs, NaN, infinities, and scores that are 0, 1 and in between."""
    logits = logits_of(11, experts, torch.float32, seed=7, spread=4.0)
    logits[1] = torch.randint(-1, 2, (experts,), generator=torch.Generator().manual_seed(experts)).float()
    logits[2, ::2], logits[2, 1::2] = 0.0, -0.0
    logits[3, experts // 2], logits[4, experts // 3] = math.nan, math.inf
    logits[5], logits[6, 0] = -math.inf, -math.inf
    logits[7], logits[8] = logits[7] * 8, -40.0 + logits[8] * 8
    logits[9], logits[10] = 60.0, math.nan
    return logits.to(dtype)


def check_by_definition(logits: Tensor, router: Router, weights: Tensor, ids: Tensor) -> int:
    """Against float64; returns how many tokens had a decision too close for float32, which are left out."""
    close = 0
    for row, own_weights, own_ids in zip(logits.double().tolist(), weights, ids, strict=True):
        choice = by_definition(row, router)
        if choice.margin < LEAST_MARGIN:
            close += 1
            continue
        assert own_ids.tolist() == choice.ids
        torch.testing.assert_close(own_weights.double().cpu(), torch.tensor(choice.weights).double(), **TOLERANCE)
    return close
