"""Grouped GEMMs of float16 rows by MXFP4 or NVFP4 weights in plain order, with SM12x's sums as expectation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT, offsets_of
from mxfp4_moe.tiles import MXFP4_FP16

from .bf16_problems import SCALES as NVFP4_SCALES
from .fp4_problems import Fp4Problem

LARGEST = (120, 254, 2)
"""B of the experts of `any_problem`, in turn: the middle of E8M0, its largest number, and the least that a kernel is
given."""
FAR = 34
"""Binades that scales go below it. From 25 on weights are rounded, from 29 on they are zero."""


def problem_of(
    rows: Tensor, packed: Tensor, scales: Tensor, rows_per_expert: Sequence[int], pair: str, seed: int = 0
) -> Fp4Problem:
    """These operands. NVFP4's gates and ups have factors of their own in each expert, any floats around 2^7 / 100."""
    g = torch.Generator().manual_seed(seed)
    if pair == MXFP4_FP16:
        largest = torch.stack([formats.largest_scale(*of) for of in zip(packed, scales, strict=True)])
        factors = formats.fp16_factor(largest)[:, None].expand(-1, 2).contiguous()
    else:
        factors = formats.FP16_NVFP4_UNIT * 0.01 * (0.5 + torch.rand(len(packed), 2, generator=g))
        assert (factors[:, 0] != factors[:, 1]).all()
    return Fp4Problem(
        rows=rows,
        row_scales=None,
        packed=packed,
        scales=scales,
        offsets=offsets_of(rows_per_expert, torch.device("cpu")),
        expected=torch.empty(rows.shape[0], packed.shape[1]),
        pair=pair,
        of_weights=factors,
    ).under_sm12x()


def any_problem(k: int, n: int, rows_per_expert: Sequence[int], pair: str, *, seed: int = 0) -> Fp4Problem:
    """Any codes under any scales; rows of many magnitudes in each block of 16, subnormal numbers among them.

    MXFP4: an expert's scales lie up to FAR below its largest, and some blocks of zeros are above it.
    """
    g = torch.Generator().manual_seed(1000 * k + n + seed)
    rows, experts = sum(rows_per_expert) + ROWS_OF_NO_EXPERT, len(rows_per_expert)
    magnitudes = torch.randint(-20, 6, (rows, k // 16), generator=g).float().exp2()
    values = torch.randn(rows, k // 16, 16, generator=g) * magnitudes.unsqueeze(-1)
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=g).to(torch.uint8)
    if pair != MXFP4_FP16:
        count = experts * n * (k // 16)
        scales = (torch.randperm(count, generator=g) % NVFP4_SCALES).to(torch.uint8).view(experts, n, k // 16)
        assert count < NVFP4_SCALES or len(scales.unique()) == NVFP4_SCALES
        return problem_of(values.flatten(1).half(), packed, scales, rows_per_expert, pair, seed)
    largest = torch.tensor([LARGEST[(e + seed) % len(LARGEST)] for e in range(experts)])[:, None, None]
    below = torch.randint(0, FAR, (experts, n, k // 32), generator=g)
    below[:, 0, 0] = 0
    scales = (largest - below).clamp(min=0)
    zeros = torch.randint(0, 7, below.shape, generator=g) == 0
    zeros[:, 0, 0] = False
    zeros[:, -1, -1] = True
    above = torch.randint(0, 256, below.shape, generator=g)
    scales = torch.where(zeros, torch.where(below % 2 == 0, above, largest), scales).clamp(max=254).to(torch.uint8)
    signs = packed.view(experts, n, -1, 16) & 0x88  # zeros of both signs
    packed = torch.where(zeros.unsqueeze(-1), signs, packed.view(experts, n, -1, 16)).flatten(2)
    problem = problem_of(values.flatten(1).half(), packed, scales, rows_per_expert, pair, seed)
    assert problem.of_weights is not None
    assert torch.equal(formats.largest_of_factor(problem.of_weights[:, 0]), largest[:, 0, 0].int())
    return problem


def usual_problem(k: int, n: int, rows_per_expert: Sequence[int], pair: str, *, seed: int = 0) -> Fp4Problem:
    """Sums of a few units, as a layer has them: for activations."""
    g = torch.Generator().manual_seed(seed)
    rows, experts = sum(rows_per_expert) + ROWS_OF_NO_EXPERT, len(rows_per_expert)
    values = torch.randn(rows, k, generator=g).half()
    packed = torch.randint(0, 256, (experts, n, k // 2), generator=g).to(torch.uint8)
    low, high, block = (119, 124, 32) if pair == MXFP4_FP16 else (0x30, 0x48, 16)  # of NVFP4 0.5 to 3.75
    scales = torch.randint(low, high, (experts, n, k // block), generator=g).to(torch.uint8)
    return problem_of(values, packed, scales, rows_per_expert, pair, seed)
