"""Mistakes in finalize's sources, one at a time, and which test must notice: for test_ptx_moe_mutations.py."""

from __future__ import annotations

import ptx_moe_checks as cases
import torch

from .moe_mutations import Mutation


def _finalize() -> None:
    cases.check_finalize(9, 9, 1056, torch.bfloat16, True)


def _finalize_by_strips() -> None:
    cases.check_finalize(1030, 4, 96, torch.bfloat16, True)


def _finalize_to_float16() -> None:
    cases.check_finalize(9, 2, 96, torch.float16, True)


MUTATIONS = (
    Mutation(
        name="finalize: rows of a float16 output two bytes wide",
        unit="finalize",
        file="moe/finalize_token.cuh",
        old="static_cast<const float*>(gemm2) + at",
        new="static_cast<const uint16_t*>(gemm2) + at",
        case=_finalize_to_float16,
    ),
    Mutation(
        name="finalize: rows rounded to float16 before they are weighted",
        unit="finalize",
        file="moe/finalize_token.cuh",
        old="memcpy(x, &floats, sizeof(x));",
        new="memcpy(x, &floats, sizeof(x)); for (float& v : x) v = __half2float(__float2half_rn(v));",
        case=_finalize_to_float16,
    ),
    Mutation(
        name="finalize: one choice too many",
        unit="finalize",
        file="moe/finalize_token.cuh",
        old="rows[i] = j0 + i < args.top_k ?",
        new="rows[i] = j0 + i <= args.top_k ?",
        case=_finalize,
    ),
    Mutation(
        name="finalize: a column too many",
        unit="finalize",
        file="moe/finalize.cu",
        old="if (column >= args.hidden_size) {",
        new="if (column > args.hidden_size) {",
        case=_finalize,
    ),
    Mutation(
        name="finalize: bias of the slot's row number",
        unit="finalize",
        file="moe/finalize_token.cuh",
        old="bias[i].load(biases, args.row_expert + rows[i]);",
        new="bias[i].load(biases, args.row_expert + slot);",
        case=_finalize,
    ),
    Mutation(
        name="finalize by strips: a strip's columns in the order of memory",
        unit="finalize_strips",
        file="moe/finalize_strips.cu",
        old="return quad % kOfLane * kLanes + quad / kOfLane;",
        new="return quad;",
        case=_finalize_by_strips,
    ),
    Mutation(
        name="finalize by strips: biases of the strip before",
        unit="finalize_strips",
        file="moe/finalize_strips.cu",
        old="float4*>(args.bias + int64_t{i / kQuads} * args.hidden_size + column)",
        new="float4*>(args.bias + int64_t{i / kQuads} * args.hidden_size + 4 * quad)",
        case=_finalize_by_strips,
    ),
    Mutation(
        name="finalize by strips: a block's last token left to nobody",
        unit="finalize_strips",
        file="moe/finalize_strips.cu",
        old="pairs * (blockIdx.x + 1) / gridDim.x;",
        new="pairs * (blockIdx.x + 1) / gridDim.x - 1;",
        case=_finalize_by_strips,
    ),
    Mutation(
        name="finalize by strips: biases used before all are there",
        unit="finalize_strips",
        file="moe/finalize_strips.cu",
        old="    __syncthreads();\n    const int column",
        new="    const int column",
        case=_finalize_by_strips,
    ),
    Mutation(
        name="control, finalize: two rows in flight",
        unit="finalize",
        file="moe/finalize_token.cuh",
        old="constexpr int kLoadsAhead = 4;",
        new="constexpr int kLoadsAhead = 2;",
        case=_finalize,
        harmless=True,
    ),
)
