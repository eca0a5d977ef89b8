"""Grouped GEMMs of FP4 rows by FP4 weights in plain order, with what SM12x's tensor cores make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.arithmetic import gemm, of_arch
from mxfp4_moe.problems import ROWS_OF_NO_EXPERT, GemmProblem, offsets_of
from mxfp4_moe.tiles import MXFP4_MXFP4, NVFP4_NVFP4

E4M3_LARGEST = 0x7E


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp4Problem(GemmProblem):
    """Rows [R, K/2] and their scales as the weights'; of NVFP4 [R, K/16] and [E, N, K/16], and what sums are multiplied
    by: a factor of the weight row and one of the row, which it has itself or its expert has.

    Or bfloat16 rows [R, K] of NVFP4 weights (bf16_problems.py).
    """

    pair: str
    of_weights: Tensor | None = None  # float32 [E, 2]: of columns c with c % 16 < 8, and of the others
    of_rows: Tensor | None = None  # float32 [R]
    of_inputs: Tensor | None = None  # float32 [E]

    def factor(self, expert: int, rows: slice) -> Tensor | None:
        """What the sums [rows, N] of an expert are multiplied by: the product of both factors, rounded to float32."""
        if self.of_weights is None:
            return None
        columns = torch.arange(self.packed.shape[1]) % 16 // 8
        of_columns = self.of_weights[expert, columns]
        if self.of_rows is not None:
            return self.of_rows[rows, None] * of_columns
        return of_columns if self.of_inputs is None else self.of_inputs[expert] * of_columns

    def under_sm12x(self) -> Fp4Problem:
        """The problem with SM12x's sums as its expectation."""
        rule, expected = of_arch("120f", self.pair), torch.zeros_like(self.expected)
        for e, (begin, end) in enumerate(pairwise(self.offsets.tolist())):
            own = slice(begin, end)
            row_scales = None if self.row_scales is None else self.row_scales[own]
            operands = (self.packed[e], self.scales[e])
            gemm(rule, self.rows[own], row_scales, *operands, expected[own], pair=self.pair, factor=self.factor(e, own))
        return dataclasses.replace(self, expected=expected)


def _integers(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=g, dtype=torch.uint8)


def _factors(g: torch.Generator, experts: int, rows: int, each_row: bool) -> dict[str, Tensor]:
    def some(*shape: int) -> Tensor:
        return 0.01 * (0.5 + torch.rand(shape, generator=g))

    made = {"of_weights": some(experts, 2)}
    return made | ({"of_rows": some(rows)} if each_row else {"of_inputs": some(experts)})


def _problem(
    g: torch.Generator,
    pair: str,
    rows: Tensor,
    row_scales: Tensor,
    n: int,
    rows_per_expert: Sequence[int],
    each_row: bool,
    usual: bool = False,
) -> Fp4Problem:
    experts, k = len(rows_per_expert), 2 * rows.shape[1]
    nvfp4 = pair == NVFP4_NVFP4
    span = {(True, False): (0, E4M3_LARGEST), (True, True): (0x28, 0x40), (False, False): (97, 157)}
    scales = _integers(g, *span.get((nvfp4, usual), (119, 124)), experts, n, k // (16 if nvfp4 else 32))
    problem = Fp4Problem(
        rows=rows,
        row_scales=row_scales,
        packed=_integers(g, 0, 255, experts, n, k // 2),
        scales=scales,
        offsets=offsets_of(rows_per_expert, torch.device("cpu")),
        expected=torch.empty(rows.shape[0], n),
        pair=pair,
        **(_factors(g, experts, rows.shape[0], each_row) if nvfp4 else {}),
    )
    return problem.under_sm12x()


def any_problem(
    k: int, n: int, rows_per_expert: Sequence[int], pair: str, *, each_row: bool = False, seed: int = 0
) -> Fp4Problem:
    """Random bits in every operand.

    Args:
        each_row: NVFP4 rows have factors of their own; else their experts have.
    """
    g = torch.Generator().manual_seed(1000 * k + n + seed)
    count, nvfp4 = sum(rows_per_expert) + ROWS_OF_NO_EXPERT, pair == NVFP4_NVFP4
    assert nvfp4 or pair == MXFP4_MXFP4
    scales = _integers(g, *((0, E4M3_LARGEST) if nvfp4 else (97, 157)), count, k // (16 if nvfp4 else 32))
    return _problem(g, pair, _integers(g, 0, 255, count, k // 2), scales, n, rows_per_expert, each_row)


def usual_problem(
    k: int, n: int, rows_per_expert: Sequence[int], pair: str, *, each_row: bool = False, seed: int = 0
) -> Fp4Problem:
    """Sums of a few units, as a layer has them: for activations."""
    g = torch.Generator().manual_seed(seed)
    count = sum(rows_per_expert) + ROWS_OF_NO_EXPERT
    values = torch.randn(count, k, generator=g)
    if pair == MXFP4_MXFP4:
        rows, scales = formats.quantize_mxfp4_activations(values)
    else:
        rows, scales = formats.quantize_nvfp4(values, torch.tensor(256.0))
    return _problem(g, pair, rows, scales, n, rows_per_expert, each_row, usual=True)
