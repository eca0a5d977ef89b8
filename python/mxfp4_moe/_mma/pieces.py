"""A GEMM as the steps of an MMA, in pieces that memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import (
    BLOCK,
    NVFP4_BLOCK,
    largest_scale,
    mxfp4_in_fp16,
    mxfp8_to_bf16,
    nvfp4_in_fp16,
)
from .groups import Groups, GroupSteps, ScaleFormat, groups
from .operands import WEIGHT_UNITS, Format, Operand, float_operand, fp4_to_bf16, operand, unit_weights
from .steps import Steps

if TYPE_CHECKING:
    from ..arithmetic import Arithmetic

_STEP_BYTES_CPU = 1 << 20  # what stays in a core's cache


def accumulator_unit(arithmetic: Arithmetic, pair: str) -> float:
    """What sums of the steps of `pieces` are multiplied by in the end."""
    return WEIGHT_UNITS[pair.partition("_")[0]] if arithmetic.operands == "bf16" else 1.0


def pieces(
    arithmetic: Arithmetic,
    pair: str,
    rows: Tensor,
    row_scales: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    largest: Tensor | None = None,
) -> Iterator[tuple[tuple[slice, slice], Iterator[Steps | GroupSteps]]]:
    """A GEMM's output in pieces, each with its steps in k order, one at a time. Arguments as those of `gemm`.

    The steps of a rule that takes bfloat16 have a part of each weight (`unit_weights`): see `accumulator_unit`. Those
    of a rule of float16 have `formats.mxfp4_in_fp16` or `formats.nvfp4_in_fp16`.

    Args:
        largest: int32 [N], of MXFP4 weights in float16 to which of the scales each row is relative; None: to the
            largest of these weights.
    """
    if largest is None and arithmetic.operands == "fp16" and pair.startswith("mxfp4"):
        largest = largest_scale(packed, scales).expand(len(packed))
    (n, m), k = (len(packed), len(rows)), 2 * packed.shape[1]
    weight_bytes, step_bytes = (512 << 20, 64 << 20) if rows.is_cuda else (128 << 20, _STEP_BYTES_CPU)
    columns = max(1, min(n, max(64, weight_bytes // (40 * max(k, 1)))))
    count = max(1, min(m, step_bytes // (32 * columns)))
    per_step = 16 if arithmetic.group == 1 else 32 * (arithmetic.products // arithmetic.group)
    many = max(1, step_bytes // (per_step * count * columns))  # steps whose sums are made at once
    a = _rows(arithmetic, pair, rows, row_scales)
    for c in range(0, n, columns):
        some = slice(c, c + columns)
        b = _weights(arithmetic, pair, packed[some], scales[some], None if largest is None else largest[some])
        for r in range(0, m, count):
            place = slice(r, r + count), some
            starts = range(0, -(-k // arithmetic.products), many)
            parts = ((a.rows(s, place[0]), b.rows(s)) for s in (slice(i, i + many) for i in starts))
            yield place, (step for part in parts for step in _steps(arithmetic, *part))


def _steps(arithmetic: Arithmetic, a: Operand | Groups, b: Operand | Groups) -> Steps | GroupSteps:
    if isinstance(a, Groups):
        assert isinstance(b, Groups)
        return GroupSteps(arithmetic, a, b)
    assert isinstance(b, Operand)
    return Steps(arithmetic, a, b)


def _rows(arithmetic: Arithmetic, pair: str, rows: Tensor, row_scales: Tensor | None) -> Operand | Groups:
    activations = pair.partition("_")[2]
    if activations in ("bf16", "fp16"):
        return _floats(arithmetic, rows)
    assert row_scales is not None
    if arithmetic.operands == "bf16":
        if activations == "mxfp8":
            return _floats(arithmetic, mxfp8_to_bf16(rows, row_scales))
        block = NVFP4_BLOCK if activations == "nvfp4" else BLOCK
        return _floats(arithmetic, fp4_to_bf16(_nibbles(rows), row_scales, block))
    if activations == "mxfp8":
        return _codes(arithmetic, rows, row_scales, "e4m3")
    return groups(arithmetic, _nibbles(rows), row_scales, _scale_format(activations))


def _weights(
    arithmetic: Arithmetic, pair: str, packed: Tensor, scales: Tensor, largest: Tensor | None
) -> Operand | Groups:
    weights, nibbles = pair.partition("_")[0], _nibbles(packed)
    if arithmetic.operands == "fp16":
        if weights == "nvfp4":
            return _floats(arithmetic, nvfp4_in_fp16(nibbles, scales))
        assert largest is not None
        return _floats(arithmetic, mxfp4_in_fp16(nibbles, scales, largest))
    if arithmetic.operands == "bf16":
        return _floats(arithmetic, unit_weights(nibbles, scales, weights))
    if arithmetic.group == 1:
        return _codes(arithmetic, nibbles, scales, "e2m1")
    return groups(arithmetic, nibbles, scales, _scale_format(weights))


def _scale_format(name: str) -> ScaleFormat:
    return "e4m3" if name == "nvfp4" else "e8m0"


def _codes(arithmetic: Arithmetic, codes: Tensor, scales: Tensor, kind: Format) -> Operand:
    count, products = codes.shape[1] // arithmetic.products, arithmetic.products
    split = codes.view(len(codes), count, products)
    return operand(split, scales.repeat_interleave(BLOCK // products, -1), kind).by_step()


def _floats(arithmetic: Arithmetic, x: Tensor) -> Operand:
    return float_operand(x.view(len(x), x.shape[1] // arithmetic.products, arithmetic.products)).by_step()


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
