"""Grouped GEMMs of bfloat16 rows by NVFP4 weights in plain order, with what SM12x's tensor cores make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_moe.problems import ROWS_OF_NO_EXPERT, offsets_of
from mxfp4_moe.tiles import NVFP4_BF16

from .fp4_problems import E4M3_LARGEST, Fp4Problem

SCALES = E4M3_LARGEST + 1
"""Bytes that a weight's scale may be, from 0: all numbers of E4M3 without a sign."""


def problem_of(rows: Tensor, packed: Tensor, scales: Tensor, rows_per_expert: Sequence[int], seed: int) -> Fp4Problem:
    """These operands, whose gates and ups have factors of their own in each expert: any floats around 0.01."""
    g = torch.Generator().manual_seed(seed)
    problem = Fp4Problem(
        rows=rows,
        row_scales=None,
        packed=packed,
        scales=scales,
        offsets=offsets_of(rows_per_expert, torch.device("cpu")),
        expected=torch.empty(rows.shape[0], packed.shape[1]),
        pair=NVFP4_BF16,
        of_weights=0.01 * (0.5 + torch.rand(len(packed), 2, generator=g)),
    )
    assert problem.of_weights is not None
    assert (problem.of_weights[:, 0] != problem.of_weights[:, 1]).all()
    return problem.under_sm12x()


def any_problem(k: int, n: int, rows_per_expert: Sequence[int], *, seed: int = 0) -> Fp4Problem:
    """Any codes under any scales; rows of many magnitudes in each block of 16."""
    g = torch.Generator().manual_seed(1000 * k + n + seed)
    rows, experts = sum(rows_per_expert) + ROWS_OF_NO_EXPERT, len(rows_per_expert)
    magnitudes = torch.randint(-20, 21, (rows, k // 16), generator=g).float().exp2()
    values = torch.randn(rows, k // 16, 16, generator=g) * magnitudes.unsqueeze(-1)
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=g).to(torch.uint8)
    # All bytes in turn, from a place of each row's own on, shuffled.
    count = experts * n * (k // 16)
    scales = (torch.randperm(count, generator=g) % SCALES).to(torch.uint8).view(experts, n, k // 16)
    assert count < SCALES or len(scales.unique()) == SCALES
    return problem_of(values.flatten(1).bfloat16(), packed, scales, rows_per_expert, seed)


def usual_problem(k: int, n: int, rows_per_expert: Sequence[int], *, seed: int = 0) -> Fp4Problem:
    """Sums of a few units, as a layer has them: for activations."""
    g = torch.Generator().manual_seed(seed)
    rows, experts = sum(rows_per_expert) + ROWS_OF_NO_EXPERT, len(rows_per_expert)
    values = torch.randn(rows, k, generator=g).bfloat16()
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=g).to(torch.uint8)
    scales = torch.randint(0x30, 0x48, (experts, n, k // 16), generator=g).to(torch.uint8)  # 0.5 to 3.75
    return problem_of(values, packed, scales, rows_per_expert, seed)
