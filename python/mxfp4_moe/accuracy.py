"""How far a GEMM under a rule of arithmetic.py can be from the exact sum: a bound for each output.

docs/arithmetic.md derives it. Step by step, with c the exact sum so far, b the bound so far and p the step's products:
the accumulator is at most |c| + b, so the largest exponent of the step is known, and with it the last bit kept, q. A
product loses less than q, and no more than itself, or nothing at all where q is not above its own last bit; the
accumulator loses less than q, or nothing where it reaches no lower than that; and cutting the sum to fp32 loses less
than 2^-23 of it, or of 2^-126. The bound grows by all of these as if they never had opposite signs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ._mma.groups import GroupSteps
from ._mma.numbers import ZERO_EXPONENT, pow2
from ._mma.pieces import accumulator_unit, pieces
from ._mma.steps import Steps
from ._torch_state import exact
from .arithmetic import Arithmetic, family
from .formats import largest_of_factor

_FLOAT64_ULP = 2.0**-52  # the exact sums are float64 sums of exact steps


@exact
def sums_and_bound(
    rows: Tensor,
    row_scales: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    expert_offsets: Tensor,
    *,
    arithmetic: Arithmetic,
    pair: str = "mxfp4_mxfp8",
    weight_factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of `reference.grouped_gemm` in float64, and how far from them a result under the rule can be.

    Two results under two rules differ by at most the sum of their bounds. Sums must be finite in fp32, and operands of
    a rule that takes bfloat16 exact in it.

    Args:
        rows, row_scales, packed, scales, expert_offsets: as for `reference.grouped_gemm`.
        arithmetic: the rule.
        pair: as for `arithmetic.gemm`; rows without scales are bfloat16 or float16. Its factor is left out.
        weight_factors: float32 [E, N], of MXFP4 in float16, for what weights are relative to.

    Returns:
        float64 [R, N] twice; rows of no expert are zero.
    """
    sums = torch.zeros(len(rows), packed.shape[1], dtype=torch.float64, device=rows.device)
    bound = torch.zeros_like(sums)
    if row_scales is None:
        pair = f"{pair.partition('_')[0]}_{'fp16' if rows.dtype is torch.float16 else 'bf16'}"
    unit = accumulator_unit(arithmetic, pair)
    for e, (begin, end) in enumerate(pairwise(expert_offsets.tolist())):
        own = slice(begin, end)
        own_scales = None if row_scales is None else row_scales[own]
        largest = None if weight_factors is None else largest_of_factor(weight_factors[e])
        for place, steps in pieces(arithmetic, pair, rows[own], own_scales, packed[e], scales[e], largest):
            total, worst = torch.zeros_like(sums[own][place]), torch.zeros_like(sums[own][place])
            for step in steps:
                total, worst = _after(step, total, worst)
            sums[own][place], bound[own][place] = unit * total, unit * worst
    return sums, bound


def coarsest(published: Arithmetic) -> tuple[Arithmetic, ...]:
    """Rules of the family whose bounds together cover those of all of it."""
    rules = [rule for rule in family(published) if rule.rounding == "cut"]
    fewest = min((rule for rule in rules if rule.bits), key=lambda rule: (rule.bits or 0, rule.group))
    return (fewest, *(rule for rule in rules if rule.bits is None))


def _after(step: Steps | GroupSteps, sums: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Exact sums and bound after one more step."""
    rule = step.arithmetic
    size = step.magnitude()[0]
    largest = sums.abs() + bound
    if rule.bits is None:
        assert isinstance(step, Steps)
        added = (step.total * pow2(step.scale))[0]
        bound = bound + 2.0**-23 * size + 2.0**-148  # the block to fp32, and its product with the scale
    else:
        added = step.total[0]
        last = torch.maximum(step.top[0], exponent(largest)) - rule.bits
        quantum = pow2(last)
        terms = rule.products // rule.group
        products = torch.minimum(terms * quantum, size).masked_fill_(last <= step.last_bit()[0], 0.0)
        smallest = (sums.abs() - bound).clamp_(min=0.0)
        accumulator = torch.minimum(quantum, largest).masked_fill_(last <= exponent(smallest) - 23, 0.0)
        bound = bound + products + accumulator
    sums = sums + added
    final = 2.0**-23 if rule.rounding == "cut" else 2.0**-24
    return sums, bound + final * (sums.abs() + bound) + 2.0**-149 + _FLOAT64_ULP * (sums.abs() + size)


def exponent(x: Tensor) -> Tensor:
    """int32 floor(log2(x)) of float64 numbers >= 0, -126 below 2^-126, ZERO_EXPONENT for zeros."""
    stored = ((x.view(torch.int64) >> 52) - 1023).clamp_(min=-126).to(torch.int32)
    return stored.masked_fill_(x == 0, ZERO_EXPONENT)
