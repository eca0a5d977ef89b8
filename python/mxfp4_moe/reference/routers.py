"""Any router in plain torch, operation by operation what csrc/moe/score_experts.cuh does, with the same bits.

Each torch operation rounds on its own, as the kernels' intrinsics do, and nothing here calls an exp or a log, whose
last bits are every library's own. Constants and coefficients are those of csrc/moe/scores.cuh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._torch_state import exact
from ..routers import GroupScore, Router, ScoringFunc
from .chain import _FLOATS, _IDS, topk_softmax

_LOG2_E, _ROUNDER = 1.44269504, 12582912.0
_LN2_HIGH, _LN2_LOW = 0.693145752, 1.42860677e-6
_EXP = (1.98756915e-4, 1.39819995e-3, 8.33345205e-3, 4.16657962e-2, 1.66666657e-1, 5.00000119e-1)
_ATANH = (1.16155140e-1, 1.08480930e-1, 1.42969698e-1, 1.99998185e-1, 3.33333343e-1)
_ONE_BITS = 0x3F800000
_LEAST_SUM = 1e-20
_LANES = 32


@exact
def select_experts(router_logits: Tensor, router: Router, topk_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`mxfp4_moe.select_experts` in plain torch.

    Args:
        router_logits: float32, bfloat16 or float16 [T, E].
        router: as `mxfp4_moe.Router` says.
        topk_ids: int32 or int64 [T, k]: experts that are given, of which only the weights are asked for.

    Returns:
        topk_weights float32 [T, k], topk_ids int32 [T, k], best first; a given id of no expert is -1, with weight 0.
    """
    require_tensor("router_logits", router_logits, _FLOATS, ("T", "E"))
    if router.is_topk_softmax and topk_ids is None:
        return topk_softmax(router_logits, router.top_k, router.renormalize)
    logits = router_logits.to(torch.float32)
    is_softmax = router.scoring_func == ScoringFunc.SOFTMAX
    numerators = scores(logits, ScoringFunc(router.scoring_func))
    total = _sum_over_lanes(numerators) if is_softmax else None
    if topk_ids is None:
        ids = _choose(logits, numerators if total is None else numerators / total, router)
    else:
        require_tensor("topk_ids", topk_ids, _IDS, (logits.shape[0], router.top_k))
        ids = torch.where((topk_ids >= 0) & (topk_ids < logits.shape[1]), topk_ids, -1).to(torch.int64)
    weights = torch.where(ids >= 0, numerators.gather(1, ids.clamp(min=0)), 0.0)
    if total is not None:
        weights = weights / total
    if router.renormalize:
        of_all = torch.zeros_like(weights[:, :1])
        for j in range(router.top_k):
            of_all = of_all + weights[:, j : j + 1]
        weights = weights / (of_all + _LEAST_SUM)
    return weights * router.routed_scaling_factor, ids.to(torch.int32)


@exact
def scores(logits: Tensor, scoring_func: ScoringFunc) -> Tensor:
    """A score for each logit, float32; of a softmax the numerators, exp(x - the row's largest)."""
    if scoring_func == ScoringFunc.SOFTMAX:
        # A sort has NaN as the largest, and the kernels too.
        return exp_of_negative(logits - logits.sort(dim=-1, descending=True).values[:, :1])
    t = exp_of_negative(-logits.abs())
    if scoring_func == ScoringFunc.SIGMOID:
        return torch.where(logits < 0, t, 1.0) / (t + 1.0)
    softplus = torch.where(logits > 0, logits, 0.0) + log1p_of_fraction(t)
    # torch may take a square root that is not rounded to nearest (MKL's); a float64's, rounded again, always is.
    return softplus.double().sqrt().float()


@exact
def exp_of_negative(y: Tensor) -> Tensor:
    """e^y for y <= 0, within 1.2 ulp of float32; 0 below -87."""
    shifted = y * _LOG2_E + _ROUNDER
    n = shifted - _ROUNDER
    r = y - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = _polynomial(_EXP, r)
    of_r = p * (r * r) + r + 1.0
    power = ((shifted.view(torch.int32) << 23) + _ONE_BITS).view(torch.float32)
    return torch.where(y < -87.0, 0.0, of_r * power)


@exact
def log1p_of_fraction(t: Tensor) -> Tensor:
    """log(1 + t) for 0 <= t <= 1, within 2 ulp of float32."""
    s = t / (t + 2.0)
    z, twice = s * s, s + s
    return twice + twice * (z * _polynomial(_ATANH, z))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    p = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        p = p * x + coefficient
    return p


def _sum_over_lanes(values: Tensor) -> Tensor:
    """[T, 1]: expert e is lane e % 32's; a lane adds its own in order, then the lanes are added by halves."""
    tokens, experts = values.shape
    padded = torch.nn.functional.pad(values, (0, -experts % _LANES)).view(tokens, -(-experts // _LANES), _LANES)
    total = torch.zeros_like(padded[:, 0])
    for i in range(padded.shape[1]):
        total = total + padded[:, i]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total


def _choose(logits: Tensor, values: Tensor, router: Router) -> Tensor:
    """int64 [T, k], best first."""
    tokens, experts = logits.shape
    bias = router.e_score_correction_bias
    if bias is None and router.num_expert_group == 1:
        values = logits
    elif bias is not None:
        values = values + bias
    values = values + 0.0  # -0 becomes +0, for sorts that look at the bits
    order = values.sort(dim=-1, descending=True, stable=True).indices
    if router.num_expert_group > 1:
        each = experts // router.num_expert_group
        best = values.view(tokens, router.num_expert_group, each).sort(dim=-1, descending=True).values
        of_group = best[..., 0] if router.group_score == GroupScore.MAX else best[..., 0] + best[..., 1]
        kept_groups = (of_group + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, : router.topk_group]
        kept = torch.zeros_like(of_group, dtype=torch.int8).scatter_(1, kept_groups, 1)
        kept = kept.repeat_interleave(each, dim=1)
        order = order.gather(1, kept.gather(1, order).sort(dim=-1, descending=True, stable=True).indices)
    return order[:, : router.top_k]
