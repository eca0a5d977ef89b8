"""Mistakes in the sources of csrc/moe, one at a time, and which test must notice: for test_ptx_moe_mutations.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ptx_moe_checks as cases
import torch
from moe_cases import BF16, FP16, MXFP8_IN_BF16
from ptx_quantize_checks import check_mxfp8_quantize

from wheelbuild.kernel_ptx import compile_source_to_ptx

from .launch import ROOT


@dataclass(frozen=True, kw_only=True)
class Mutation:
    name: str
    unit: str  # csrc/moe/<unit>.cu is compiled
    file: str  # the changed file, under csrc
    old: str
    new: str
    case: Callable[[], None]  # passes on the sources as they are
    harmless: bool = False  # a control: changes the code and no result

    def ptx(self, folder: Path) -> str:
        """The unit's PTX with the mistake in it; `folder` is an empty one."""
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        path = folder / "csrc" / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: {self.file} has {text.count(self.old)} of {self.old!r}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return compile_source_to_ptx(Path(f"csrc/moe/{self.unit}.cu"), "120f", (), self.name, root=folder)


def _few_route() -> None:
    cases.check_route_of(42, 3, 2, 16, torch.int32)


def _route() -> None:
    cases.check_route_of(300, 4, 7, 16, torch.int32)


def _quantize() -> None:
    cases.check_quantize_permute(160, torch.bfloat16, 9)


def _quantize_in_bf16() -> None:
    cases.check_quantize_permute(160, torch.bfloat16, 9, MXFP8_IN_BF16)


def _plain_rows() -> None:
    check_mxfp8_quantize(9, 96, 256, torch.bfloat16, 0)


def _short_tiles() -> None:
    check_mxfp8_quantize(9, 160, 160, torch.float32, 1)


def _activation(name: str, numbers: str) -> Callable[[], None]:
    return lambda: cases.check_activation(name, True, None, numbers)


MUTATIONS = (
    Mutation(
        name="route_few: no barrier before the m-tiles are counted",
        unit="route_few",
        file="moe/route_few.cu",
        old="  __syncthreads();\n\n  if (my_tiles > 0 || slot == 0) {",
        new="  if (my_tiles > 0 || slot == 0) {",
        case=_few_route,
    ),
    Mutation(
        name="route_few: a slot counts itself",
        unit="route_few",
        file="moe/route_few.cu",
        old="row += other < key;",
        new="row += other <= key;",
        case=_few_route,
    ),
    Mutation(
        name="route: no barrier between the histograms and their scan",
        unit="route",
        file="moe/route.cu",
        old="    __syncwarp();\n  });\n  __syncthreads();\n\n  // Per expert",
        new="    __syncwarp();\n  });\n  // Per expert",
        case=_route,
    ),
    Mutation(
        name="route: lanes of a warp do not meet between two batches of slots",
        unit="route",
        file="moe/route.cu",
        old="      mine[expert] += __popc(peers);\n    }\n    __syncwarp();\n  });\n  __syncthreads();",
        new="      mine[expert] += __popc(peers);\n    }\n  });\n  __syncthreads();",
        case=_route,
    ),
    Mutation(
        name="route: peers before a lane are counted with it",
        unit="route",
        file="moe/route.cu",
        old="__popc(peers & ((1u << lane) - 1))",
        new="__popc(peers & ((2u << lane) - 1))",
        case=_route,
    ),
    Mutation(
        name="route: ids are read before the kernel that writes them is done",
        unit="route",
        file="moe/route.cu",
        old="route_kernel(const RouteArgs args) {\n  wait_for_previous_kernel();",
        new="route_kernel(const RouteArgs args) {",
        case=_route,
    ),
    Mutation(
        name="top-k: of equal logits the higher expert",
        unit="topk_softmax",
        file="moe/choose_experts.cuh",
        old="for (int i = kPerLane - 1; i >= 0; --i) {",
        new="for (int i = 0; i < kPerLane; ++i) {",
        case=lambda: cases.check_topk_softmax(128, torch.bfloat16, True),
    ),
    Mutation(
        name="top-k: sum over the chosen starts at the second",
        unit="topk_softmax",
        file="moe/choose_experts.cuh",
        old="for (int j = 0; j < args.top_k; ++j) {  // in this order",
        new="for (int j = 1; j < args.top_k; ++j) {  // in this order",
        case=lambda: cases.check_topk_softmax(128, torch.bfloat16, True),
    ),
    Mutation(
        name="quantize: scale bytes of a word exchanged",
        unit="quantize_permute",
        file="moe/mx_rows.cuh",
        old="(8 * (threadIdx.x % kLanesPerWord / kLanesPerBlock))",
        new="(8 * (threadIdx.x % kLanesPerWord / kLanesPerBlock ^ 1))",
        case=_quantize,
    ),
    Mutation(
        name="quantize: scale rounded down",
        unit="quantize_permute",
        file="shared/mxfp8.cuh",
        old="(mantissa > exact ? 1u : 0u)",
        new="0u",
        case=_quantize,
    ),
    Mutation(
        name="quantize: largest value of half a block",
        unit="quantize_permute",
        file="moe/mx_rows.cuh",
        old="  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 2));\n",
        new="",
        case=_quantize,
    ),
    Mutation(
        name="quantize: rows are written before route is done",
        unit="quantize_permute",
        file="moe/quantize_permute.cu",
        old="    if (token == blockIdx.y) {\n      wait_for_previous_kernel();\n",
        new="    if (token == blockIdx.y) {\n",
        case=cases.check_quantize_permute_behind_route,
    ),
    Mutation(
        name="quantize: row numbers through the read-only path",
        unit="quantize_permute",
        file="moe/permuted_rows.cuh",
        old="__ldcg(args.slot_row + of * args.top_k + j0 + j)",
        new="__ldg(args.slot_row + of * args.top_k + j0 + j)",
        case=_quantize,
    ),
    Mutation(
        name="quantize: scale words one row apart",
        unit="quantize_permute",
        file="moe/mx_rows.cuh",
        old="act_scale_offset(row, k_tile * kBlocksPerWord, to.rows)",
        new="act_scale_offset(row + 1, k_tile * kBlocksPerWord, to.rows)",
        case=_quantize,
    ),
    Mutation(
        name="quantize to bf16: odd k before even k",
        unit="quantize_permute",
        file="moe/mx_rows.cuh",
        old="from_even | (4 + from_odd) << 4",
        new="(4 + from_odd) | from_even << 4",
        case=_quantize_in_bf16,
    ),
    Mutation(
        name="quantize to bf16: cut, not rounded",
        unit="quantize_permute",
        file="shared/bf16_rows.cuh",
        old='"cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high)',
        new='"cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(__uint_as_float(__float_as_uint(high) & 0xFFFF0000u))',
        case=lambda: cases.check_quantize_permute(160, torch.float16, 9, BF16),
    ),
    Mutation(
        name="quantize to fp16: rows of bf16",
        unit="quantize_permute",
        file="shared/bf16_rows.cuh",
        old="cvt.rn.f16x2.f32",
        new="cvt.rn.bf16x2.f32",
        case=lambda: cases.check_quantize_permute(160, torch.bfloat16, 9, FP16),
    ),
    Mutation(
        name="activation to fp16: neighbours exchanged",
        unit="activation",
        file="moe/mx_rows.cuh",
        old="make_uint4(fp16_pair(x[0], x[1])",
        new="make_uint4(fp16_pair(x[1], x[0])",
        case=lambda: cases.check_activation_in_halves(FP16, None),
    ),
    Mutation(
        name="quantize to bf16: the lowest scale is a zero",
        unit="permute",
        file="shared/bf16_rows.cuh",
        old="byte == 0 ? 0x00400000u : byte << 23",
        new="byte << 23",
        case=lambda: cases.check_permute(160, True, 7, MXFP8_IN_BF16),
    ),
    Mutation(
        name="activation to bf16: lanes of a quad exchanged",
        unit="activation",
        file="moe/mx_rows.cuh",
        old="(to.out + first * 2)[part] = tile.words",
        new="(to.out + first * 2)[part ^ 1] = tile.words",
        case=lambda: cases.check_activation_in_halves(BF16, None),
    ),
    Mutation(
        name="mxfp8_quantize: rows past the last are left unwritten",
        unit="mxfp8_quantize",
        file="moe/mxfp8_quantize.cu",
        old="  store_padding(args);\n",
        new="",
        case=_plain_rows,
    ),
    Mutation(
        name="mxfp8_quantize: rows are read before the kernel that writes them is done",
        unit="mxfp8_quantize",
        file="moe/mxfp8_quantize.cu",
        old="  wait_for_previous_kernel();\n",
        new="",
        case=_plain_rows,
    ),
    Mutation(
        name="mxfp8_quantize: no codes past K",
        unit="mxfp8_quantize",
        file="moe/mxfp8_quantize.cu",
        old="if (column < args.padded_k) {",
        new="if (column < args.k) {",
        case=_plain_rows,
    ),
    Mutation(
        name="mxfp8_quantize: infinities saturate",
        unit="mxfp8_quantize",
        file="moe/mxfp8_quantize.cu",
        old="amax >= kFloatInfBits;",
        new="amax > kFloatInfBits;",
        case=_plain_rows,
    ),
    Mutation(
        name="mxfp8_quantize: rows of a short tile eight bytes apart",
        unit="mxfp8_quantize",
        file="moe/plain_rows.cuh",
        old="row % kShortRows * 4;",
        new="row % kShortRows * 8;",
        case=_short_tiles,
    ),
    Mutation(
        name="mxfp8_quantize: half of a float32 lane",
        unit="mxfp8_quantize",
        file="moe/plain_rows.cuh",
        old="packed[i] = __ldcg(vectors + i);",
        new="packed[i] = __ldcg(vectors);",
        case=_short_tiles,
    ),
    Mutation(
        name="permute: NaN scales pass",
        unit="permute",
        file="moe/permute.cu",
        old="quad = scale > kMaxInputScale",
        new="quad = scale > kMaxInputScale + 7",
        case=lambda: cases.check_permute(160, True, 7),
    ),
    Mutation(
        name="activation: bias of the block's first expert",
        unit="activation",
        file="moe/activation.cuh",
        old="expert != expert_of_bias) {",
        new="expert_of_bias < 0) {",
        case=cases.check_activation_of_many_rows,
    ),
    Mutation(
        name="activation: rounded after the bias",
        unit="activation",
        file="moe/activation.cuh",
        old="sums.for_each([&](float& x, int, int, int) { change(x); });",
        new="",
        case=lambda: cases.check_activation_rounding(torch.bfloat16),
    ),
    Mutation(
        name="activation: neighbours exchange what they keep",
        unit="activation",
        file="moe/activation.cuh",
        old="__shfl_xor_sync(kAllLanes, odd ? y[0][i] : y[1][i], 1)",
        new="__shfl_xor_sync(kAllLanes, odd ? y[1][i] : y[0][i], 1)",
        case=lambda: cases.check_activation_rounding(torch.bfloat16),
    ),
    Mutation(
        name="activation: numbers of the first expert",
        unit="activation",
        file="moe/activation.cuh",
        old="of_expert(args.beta, expert)",
        new="of_expert(args.beta, 0)",
        case=_activation("situ", "per expert"),
    ),
    Mutation(
        name="situ: the up's clamp is its gate's",
        unit="activation",
        file="shared/nonlinearities.cuh",
        old="soft_clamp(up, numbers.limit)",
        new="soft_clamp(up, numbers.beta)",
        case=_activation("situ", "per expert"),
    ),
    Mutation(
        name="soft clamp: not scaled back",
        unit="activation",
        file="shared/nonlinearities.cuh",
        old="limit * tanhf(x * inverse)",
        new="tanhf(x * inverse)",
        case=_activation("clamped_relu2", "one for all"),
    ),
    Mutation(
        name="soft clamp: no limit is a NaN",
        unit="activation",
        file="shared/nonlinearities.cuh",
        old="inverse == 0.0f ? x : limit",
        new="limit",
        case=_activation("clamped_relu2", "no limit"),
    ),
    Mutation(
        name="clamped ReLU^2: clamped below too",
        unit="activation",
        file="shared/nonlinearities.cuh",
        old="soft_clamp(clamp_below(x, 0.0f), numbers.limit)",
        new="soft_clamp(x, numbers.limit)",
        case=_activation("clamped_relu2", "one for all"),
    ),
    Mutation(
        name="control, route_few: the same comparison, the other way round",
        unit="route_few",
        file="moe/route_few.cu",
        old="row += other < key;",
        new="row += key > other;",
        case=_few_route,
        harmless=True,
    ),
)
