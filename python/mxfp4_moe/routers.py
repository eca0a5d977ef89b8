"""How a router turns logits into experts and their weights: one description for every call, model and engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import require_contiguous, require_tensor
from ._router_rules import MAX_EXPERT_GROUPS, MAX_TOP_K, GroupScore, RouterRule, ScoringFunc

__all__ = ["MAX_EXPERT_GROUPS", "MAX_TOP_K", "GroupScore", "Router", "ScoringFunc"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Router(RouterRule):
    """A router: which k of E experts a token goes to, and with what weights, all in float32.

    1. score: `scoring_func` of the logits.
    2. choice: score + e_score_correction_bias; with neither bias nor groups the logit itself, with which every score
       rises.
    3. groups: E / num_expert_group experts in a row are a group; the topk_group groups with the highest `group_score`
       are kept, and only their experts can be chosen.
    4. the top_k experts with the highest choices, best first.
    5. weight: the score, without the bias; renormalized, over the sum of the chosen scores plus 1e-20; times
       routed_scaling_factor.

    Equal choices or groups: the lower number first, on every device (torch.topk leaves that open). Every operation is
    rounded on its own, in one order, so that the GPU's kernels, alone or inside of the layer, and plain torch on the
    CPU give the same ids and the same bits of the weights (`reference.routers`); the one exception is a softmax without
    bias, groups and scaling, `topk_softmax`, whose weights may differ in the last bits. Scores of logits below -87 are
    0. 1e-20 is DeepSeek's: it changes nothing where the chosen scores add up to 1e-12 or more, and makes 0 / 0 0.

    A NaN counts as the largest: an expert with one is chosen, and so is its group; its weight is NaN, renormalized all
    of its token's. +inf: a sigmoid's score is 1, sqrtsoftplus gives inf, renormalized NaN, and a softmax makes all of
    the token's weights NaN. -inf: the score is 0. In the bias -inf takes an expert out and +inf puts it first; the bias
    never reaches a weight. Other tokens are not touched.

    Args:
        top_k: k, from 1 to 32 and at most E.
        scoring_func: a `ScoringFunc` or its name.
        e_score_correction_bias: float32 [E], contiguous, on the logits' device; or None.
        renormalize: divide by the sum of the chosen scores (config.json: norm_topk_prob, moe_renormalize). Of a softmax
            that is a softmax over the chosen alone, so it does not matter whether it stands before or after the choice.
        num_expert_group: groups, from 1 (none) to 32, dividing E (config.json: n_group).
        topk_group: groups that are kept, together of k experts at least.
        group_score: a `GroupScore` or its name; top2_sum needs groups of two experts at least.
        routed_scaling_factor: a finite number that all weights are multiplied with.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a number outside its range. What depends on E is checked by the calls.

    Sources: transformers 5.24, DeepseekV2TopkRouter, DeepseekV3TopkRouter, DeepseekV4TopKRouter, MiniMaxM3VLTopKRouter;
    vLLM, fused_moe/router (fused_topk_bias, grouped_topk); SGLang, layers/moe/topk.py (TopKConfig).
    """

    e_score_correction_bias: Tensor | None = None

    def __post_init__(self) -> None:
        RouterRule.__post_init__(self)
        if (bias := self.e_score_correction_bias) is not None:
            require_tensor("e_score_correction_bias", bias, torch.float32, ("E",))
            require_contiguous("e_score_correction_bias", bias)

    @functools.cached_property
    def is_topk_softmax(self) -> bool:
        """Whether `topk_softmax` says the same."""
        return (
            self.scoring_func == ScoringFunc.SOFTMAX
            and self.e_score_correction_bias is None
            and self.num_expert_group == 1
            and self.routed_scaling_factor == 1.0
        )

    @functools.cached_property
    def operator_arguments(self) -> dict[str, Any]:
        """What the C++ operators take, by name, where it is not their default."""
        scoring_func, group_score = ScoringFunc(self.scoring_func), GroupScore(self.group_score)
        everything = {
            "renormalize": (self.renormalize, True),
            "e_score_correction_bias": (self.e_score_correction_bias, None),
            "scoring_func": (scoring_func.code, 0),
            "num_expert_group": (self.num_expert_group, 1),
            "topk_group": (self.topk_group, 1),
            "group_score": (group_score.code, 0),
            "routed_scaling_factor": (float(self.routed_scaling_factor), 1.0),
        }
        return {
            name: value
            for name, (value, default) in everything.items()
            if (value is not None if default is None else value != default)
        }
