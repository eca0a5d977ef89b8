"""Mistakes in what csrc/moe does for rows of FP4, and which test must notice: for test_ptx_moe_mutations.py."""

from __future__ import annotations

from collections.abc import Callable

import ptx_fp4_checks as cases
import torch
from fp4_cases import KINDS
from ptx_quantize_checks import check_fp4_quantize

from .moe_mutations import Mutation

MXFP4, OF_EXPERTS, OF_ROWS = KINDS


def _permute(kind: str) -> Callable[[], None]:
    return lambda: cases.check_quantize_permute(160, torch.bfloat16, 33, kind)


def _activation(kind: str) -> Callable[[], None]:
    return lambda: cases.check_activation(160, kind, most=2)


def _in_bf16(kind: str) -> Callable[[], None]:
    return lambda: cases.check_quantize_permute(160, torch.bfloat16, 33, kind, folded=True)


MUTATIONS = (
    Mutation(
        name="mxfp4 in bf16: halves between codes away from zero",
        unit="quantize_permute",
        file="shared/folded_fp4.cuh",
        old="(size + 0x001fffffu + (size >> 22 & 1u))",
        new="(size + 0x00200000u)",
        case=_in_bf16(MXFP4),
    ),
    Mutation(
        name="mxfp4 in bf16: below 2 as above",
        unit="quantize_permute",
        file="shared/folded_fp4.cuh",
        old="size < kTwo ? __float_as_uint(small)",
        new="size < 0 ? __float_as_uint(small)",
        case=_in_bf16(MXFP4),
    ),
    Mutation(
        name="mxfp4 in bf16: poison is a number",
        unit="quantize_permute",
        file="shared/folded_fp4.cuh",
        old="return {mxfp4_multiplier(byte), amax >= kFloatInfBits ? __int_as_float(0x7fffffff) : e8m0_value(byte)};",
        new="return {mxfp4_multiplier(byte), e8m0_value(min(byte, 254u))};",
        case=_in_bf16(MXFP4),
    ),
    Mutation(
        name="nvfp4 in bf16: a code of a NaN has a sign",
        unit="nvfp4_permute",
        file="shared/folded_fp4.cuh",
        old="magnitude(x) > kFloatInfBits ? 0u : __float_as_uint(x) & 0x80000000u",
        new="0x80000000u & __float_as_uint(x)",
        case=_in_bf16(OF_EXPERTS),
        harmless=True,  # NaNs that 0 times infinity gives have none
    ),
    Mutation(
        name="nvfp4 in bf16: the sign is lost",
        unit="nvfp4_permute",
        file="shared/folded_fp4.cuh",
        old="__float_as_uint(x) & 0x80000000u",
        new="0u",
        case=_in_bf16(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4 in bf16: the scale is not E4M3's",
        unit="fp4_activation",
        file="shared/folded_fp4.cuh",
        old="e4m3_value(byte)}",
        new="__fmul_rn(global_scale, sixth(amax))}",
        case=lambda: cases.check_activation(160, OF_EXPERTS, most=2, folded=True),
    ),
    Mutation(
        name="nvfp4 in bf16: neighbours exchanged",
        unit="fp4_activation",
        file="shared/folded_fp4.cuh",
        old="bf16_pair(folded(x[i], block), folded(x[i + 1], block))",
        new="bf16_pair(folded(x[i + 1], block), folded(x[i], block))",
        case=lambda: cases.check_activation(160, OF_ROWS, most=2, folded=True),
    ),
    Mutation(
        name="fp4 in bf16: rows as long as packed ones",
        unit="nvfp4_permute",
        file="moe/mx_rows.cuh",
        old="(to.out + (row * to.k + column) * 2) = words",
        new="(to.out + row * to.k / 2 + column * 2) = words",
        case=_in_bf16(OF_ROWS),
    ),
    Mutation(
        name="mxfp4: the scale of MXFP8",
        unit="quantize_permute",
        file="shared/fp4.cuh",
        old="e8m0_round_up(sixth(amax))",
        new="mx_scale(amax)",
        case=_permute(MXFP4),
    ),
    Mutation(
        name="mxfp4: poison has the byte of 2^127",
        unit="quantize_permute",
        file="shared/fp4.cuh",
        old="constexpr uint32_t kE8m0Nan = 255;",
        new="constexpr uint32_t kE8m0Nan = 254;",
        case=_permute(MXFP4),
    ),
    Mutation(
        name="fp4: codes of a poisoned block stay",
        unit="fp4_activation",
        file="shared/fp4.cuh",
        old="return amax >= kFloatInfBits ? 0 : codes;",
        new="return codes;",
        case=_activation(MXFP4),
    ),
    Mutation(
        name="fp4: pairs of codes exchanged",
        unit="fp4_activation",
        file="shared/fp4.cuh",
        old="b1, %4, %3;",
        new="b1, %3, %4;",
        case=_activation(MXFP4),
    ),
    Mutation(
        name="mxfp4: rows as long as MXFP8's",
        unit="quantize_permute",
        file="moe/mx_rows.cuh",
        old="(to.out + (row * to.k + column) / 2) = tile.words.x",
        new="(to.out + row * to.k + column / 2) = tile.words.x",
        case=_permute(MXFP4),
    ),
    Mutation(
        name="nvfp4: a block of one lane",
        unit="nvfp4_permute",
        file="moe/nvfp4_rows.cuh",
        old="return max(amax, __shfl_xor_sync(kAllLanes, amax, 1));",
        new="return amax;",
        case=_permute(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: scale bytes of a word exchanged",
        unit="nvfp4_permute",
        file="moe/nvfp4_rows.cuh",
        old="threadIdx.x % kLanesPerNvfp4Word / kLanesPerNvfp4Block)",
        new="(threadIdx.x % kLanesPerNvfp4Word / kLanesPerNvfp4Block ^ 1))",
        case=_permute(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: the second word of a K tile is the first of the next",
        unit="fp4_activation",
        file="moe/nvfp4_rows.cuh",
        old="k_tile * kNvfp4WordsPerTile + lane",
        new="k_tile * kNvfp4WordsPerTile + 1 - lane",
        case=_activation(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: the scale is applied without its global scale",
        unit="fp4_activation",
        file="shared/fp4.cuh",
        old="__frcp_rn(__fmul_rn(e4m3_value(scale), inverse))",
        new="__frcp_rn(e4m3_value(scale))",
        case=_activation(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: zeros lose their signs",
        unit="fp4_activation",
        file="shared/fp4.cuh",
        old="return amax == 0 ? 0.0f : __frcp_rn",
        new="return amax == 0 ? -0.0f : __frcp_rn",
        case=_activation(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: zeros under 1 / 0",
        unit="nvfp4_permute",
        file="shared/fp4.cuh",
        old="return amax == 0 ? 0.0f : __frcp_rn",
        new="return __frcp_rn",
        case=_permute(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: all of a token's rows under its first expert's scale",
        unit="nvfp4_permute",
        file="moe/nvfp4_permute.cu",
        old="if (j == 0 || of_experts) {",
        new="if (j == 0) {",
        case=_permute(OF_EXPERTS),
    ),
    Mutation(
        name="nvfp4: experts are read before route is done",
        unit="nvfp4_permute",
        file="moe/nvfp4_permute.cu",
        old="  wait_for_previous_kernel();\n  let_next_kernel_start();\n",
        new="  let_next_kernel_start();\n",
        case=lambda: cases.check_quantize_permute(160, torch.bfloat16, 33, OF_EXPERTS, behind_route=True),
    ),
    Mutation(
        name="nvfp4: a row's scale of one warp's part",
        unit="nvfp4_permute",
        file="moe/nvfp4_rows.cuh",
        old="for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {",
        new="for (int warp = 0; warp < 1; ++warp) {",
        case=lambda: cases.check_quantize_permute(2208, torch.bfloat16, 7, OF_ROWS),
    ),
    Mutation(
        name="nvfp4: no barrier before the row's largest is read",
        unit="fp4_activation",
        file="moe/nvfp4_rows.cuh",
        old="    of_warps[threadIdx.x / kWarpSize] = x;\n  }\n  __syncthreads();\n",
        new="    of_warps[threadIdx.x / kWarpSize] = x;\n  }\n",
        case=_activation(OF_ROWS),
    ),
    Mutation(
        name="nvfp4: a row's factor is its scale",
        unit="fp4_activation",
        file="moe/fp4_activation.cu",
        old="given.row_factors[row] = global.inverse;",
        new="given.row_factors[row] = global.scale;",
        case=_activation(OF_ROWS),
    ),
    Mutation(
        name="nvfp4: a row of zeros has an infinite scale",
        unit="fp4_activation",
        file="shared/fp4.cuh",
        old="return amax == 0 || amax >= kFloatInfBits ? 1.0f",
        new="return amax >= kFloatInfBits ? 1.0f",
        case=_activation(OF_ROWS),
    ),
    Mutation(
        name="nvfp4: biases of another column",
        unit="fp4_activation",
        file="moe/fp4_activation.cu",
        old="outputs.expert_of_bias = -1;",
        new="",
        case=lambda: cases.check_activation(1184, OF_EXPERTS, activation="relu", bias=True, most=1),
    ),
    Mutation(
        name="fp4_quantize: the last word of an odd number of blocks",
        unit="fp4_quantize",
        file="moe/fp4_quantize.cu",
        old="(args.k / 16 + 3) / 4",
        new="(args.k / 16) / 4",
        case=lambda: check_fp4_quantize(9, 144, torch.bfloat16, 0, 3.5),
    ),
    Mutation(
        name="fp4_quantize: words of NVFP4 as MXFP4's",
        unit="fp4_quantize",
        file="moe/fp4_quantize.cu",
        old="number = column / (4 * Of::kValuesOf)",
        new="number = column / (4 * kScaleBlock)",
        case=lambda: check_fp4_quantize(9, 144, torch.bfloat16, 0, 3.5),
    ),
    Mutation(
        name="fp4_quantize: rows past the last are left unwritten",
        unit="fp4_quantize",
        file="moe/fp4_quantize.cu",
        old="  store_padding(args);\n",
        new="",
        case=lambda: check_fp4_quantize(9, 144, torch.bfloat16, 1, 3.5),
    ),
    Mutation(
        name="fp4_quantize: no reciprocal of the global scale",
        unit="fp4_quantize",
        file="moe/fp4_quantize.cu",
        old="const float inverse = __frcp_rn(global);",
        new="const float inverse = 1.0f;",
        case=lambda: check_fp4_quantize(9, 32, torch.float16, 2, 0.37),
    ),
    Mutation(
        name="control, nvfp4: rows' numbers two at a time",
        unit="nvfp4_permute",
        file="moe/nvfp4_permute.cu",
        old="constexpr int kChoicesAtOnce = 4;",
        new="constexpr int kChoicesAtOnce = 2;",
        case=_permute(OF_ROWS),
        harmless=True,
    ),
)
