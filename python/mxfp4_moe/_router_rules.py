"""A router's rule without its bias: names, ranges and defaults. Needs no torch, so that a checkpoint's can be shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

MAX_TOP_K = 32  # csrc/moe/kernels.h, kMaxTopK
MAX_EXPERT_GROUPS = 32  # csrc/moe/kernels.h, kMaxExpertGroups


class ScoringFunc(str, Enum):
    """What a logit x is worth; the names are vLLM's and config.json's.

    softmax        exp(x) / sum of exp over all experts
    sigmoid        1 / (1 + exp(-x))
    sqrtsoftplus   sqrt(log(1 + exp(x)))   (DeepSeek-V4)
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRTSOFTPLUS = "sqrtsoftplus"

    @property
    def code(self) -> int:
        """The number by which the kernels know it: enum ScoringFunc of csrc/moe/kernels.h, in this order."""
        return list(ScoringFunc).index(self)


class GroupScore(str, Enum):
    """What a group of experts is kept by: the sum of its two highest choices, or the highest."""

    TOP2_SUM = "top2_sum"  # DeepSeek-V3 (noaux_tc) and all that have a correction bias
    MAX = "max"  # DeepSeek-V2 (group_limited_greedy)

    @property
    def code(self) -> int:
        """The number by which the kernels know it: enum GroupScore of csrc/moe/kernels.h, in this order."""
        return list(GroupScore).index(self)


_EnumT = TypeVar("_EnumT", bound=Enum)


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterRule:
    """What `routers.Router` holds beside its bias; fields, meaning and errors are described there."""

    top_k: int
    scoring_func: ScoringFunc | str = ScoringFunc.SOFTMAX
    renormalize: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: GroupScore | str = GroupScore.TOP2_SUM
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scoring_func", _member("scoring_func", ScoringFunc, self.scoring_func))
        object.__setattr__(self, "group_score", _member("group_score", GroupScore, self.group_score))
        _check_int("top_k", self.top_k, 1, MAX_TOP_K)
        _check_int("num_expert_group", self.num_expert_group, 1, MAX_EXPERT_GROUPS)
        _check_int("topk_group", self.topk_group, 1, self.num_expert_group)
        if not isinstance(self.renormalize, bool):
            raise TypeError(f"renormalize: expected a bool, got {self.renormalize!r}")
        factor = self.routed_scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"routed_scaling_factor: expected a number, got {factor!r}")
        if not math.isfinite(factor):
            raise ValueError(f"routed_scaling_factor: expected a finite number, got {factor}")


def _member(name: str, kind: type[_EnumT], value: object) -> _EnumT:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}") from None


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
