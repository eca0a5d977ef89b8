"""Rows of MXFP4 and NVFP4 from the layer's own kernels on a GPU: every byte. SM90 makes them without an instruction.

Packed as SM12x reads them, and in bfloat16 as SM90 does; every GPU's kernels make both.
"""

from __future__ import annotations

import math

import gpu_problems
import pytest
import torch
from fp4_cases import GLOBAL_SCALES, KINDS, hard_rows, hidden_of, in_bf16, in_words, quantized, row_format, same_bf16
from gpu_cases import ops
from moe_cases import ids_of, layer_of
from torch import Tensor

from mxfp4_moe import reference

EXPERTS = len(GLOBAL_SCALES)


def check(made: tuple[Tensor, Tensor], values: Tensor, kind: str, expert: Tensor, factors: Tensor | None) -> None:
    """The first rows are those of `values`."""
    rows, scales = (one.cpu() for one in made)
    valid, expected = len(values), quantized(values.cpu(), kind, expert.cpu())
    if rows.dtype is torch.bfloat16:
        assert same_bf16(rows[:valid], in_bf16(expected))
        assert scales.numel() == 0
    else:
        assert torch.equal(rows[:valid], expected.packed)
        assert torch.equal(in_words(scales, valid), in_words(expected.scales, valid, like=scales))
    if factors is not None:
        assert expected.factors is not None
        assert torch.equal(factors[:valid].cpu().view(torch.int32), expected.factors.view(torch.int32))


@pytest.mark.parametrize("folded", [False, True], ids=["packed", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 96, 160, 2880])
def test_quantize_permute_to_fp4_is_exact(width: int, dtype: torch.dtype, kind: str, folded: bool) -> None:
    device = gpu_problems.gpu()
    for tokens, top_k in ((9, 5), (1, 1), (700, 3)):
        x = hidden_of(width, dtype, tokens)
        offsets, row_slot, slot_row = reference.route(ids_of(tokens, top_k, EXPERTS, torch.int32, device), EXPERTS)
        valid = int(offsets[-1])
        expert = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=device)
        expert[:valid] = torch.arange(EXPERTS, dtype=torch.int32, device=device).repeat_interleave(offsets.diff())
        factors = torch.empty(tokens * top_k, device=device) if kind == "nvfp4 of rows" else None
        given = {} if kind == "mxfp4" else {"row_factors": factors}
        if kind == "nvfp4 of experts":
            given = {"global_scales": GLOBAL_SCALES.to(device), "row_expert": expert}
        made = ops().quantize_permute(x.to(device), slot_row, top_k, row_format(kind, folded=folded), **given)
        check(made, x[row_slot[:valid].cpu() // top_k], kind, expert[:valid], factors)


@pytest.mark.parametrize("folded", [False, True], ids=["packed", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 160, 2880])
def test_activation_to_fp4_is_exact(width: int, kind: str, folded: bool) -> None:
    """Of an activation without an exp, with biases."""
    device = gpu_problems.gpu()
    values = torch.from_numpy(hard_rows(width, 16, 20))
    weights = layer_of(EXPERTS, width, "relu", "one for all", bias=True, device=torch.device("cpu"))
    valid = len(values) - 3
    expert = torch.arange(len(values), dtype=torch.int32) % EXPERTS
    offsets = torch.full((EXPERTS + 1,), valid, dtype=torch.int32, device=device)
    factors = torch.empty(len(values), device=device) if kind == "nvfp4 of rows" else None
    given = {"global_scales": GLOBAL_SCALES.to(device)} if kind == "nvfp4 of experts" else {"row_factors": factors}
    assert weights.w13_bias is not None
    arguments = (values.to(device), expert.to(device), offsets, weights.w13_bias.to(device), weights.activation.code)
    arguments += (0.0, 0.0, math.inf, None, None, None, 0, row_format(kind, folded=folded))
    made = ops().activation(*arguments, **({} if kind == "mxfp4" else given))
    expected = reference.activate(values[:valid], expert[:valid], weights.w13_bias, "relu")
    check(made, expected, kind, expert[:valid], factors)
