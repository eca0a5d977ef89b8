"""Mistakes in the kernels of FP4 by FP4, as in mutations.py: what is theirs alone, not what they share with MXFP8's."""

from __future__ import annotations

from mxfp4_moe.tiles import MXFP4_MXFP4, NVFP4_NVFP4

from .mutants import Mutation, box, once

MMA = r"mma\.sync[^;]*?"
FRAGMENTS = "tile/fragments.cuh"
OPERANDS = "tile/sm12x/fp4_operands.cuh"
PIPELINE = "tile/pipeline.cuh"
FACTORS = "tile/factors.cuh"
NATIVE = "m64n32"  # weights as B

MUTATIONS = [
    # Both kinds have the same loads; each mistake is made in one.
    Mutation(
        "rows g and g + 8 exchanged",
        pair=MXFP4_MXFP4,
        ptx=once(rf"({MMA}\}}, \{{)(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}}", r"\g<1>\3,\2,\5,\4}"),
    ),
    Mutation(
        "halves of K of A exchanged",
        pair=NVFP4_NVFP4,
        ptx=once(rf"({MMA}\}}, \{{)(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}}", r"\g<1>\4,\5,\2,\3}"),
    ),
    Mutation(
        "halves of K of B exchanged",
        pair=MXFP4_MXFP4,
        ptx=once(rf"({MMA}\{{%r\d+,%r\d+,%r\d+,%r\d+\}}, \{{)(%r\d+),(%r\d+)\}}", r"\g<1>\3,\2}"),
    ),
    Mutation(
        "byte selector of A's scales",
        pair=MXFP4_MXFP4,
        ptx=once(rf"({MMA}%r\d+, )\{{2,0\}}(, %r\d+, \{{2,0\}};)", r"\g<1>{0,0}\2"),
    ),
    Mutation(
        "byte selector of B's scales",
        pair=MXFP4_MXFP4,
        ptx=once(rf"({MMA}%r\d+, \{{2,0\}}, %r\d+, )\{{2,0\}};", r"\g<1>{0,0};"),
    ),
    Mutation(
        "scale words of A and B exchanged",
        pair=NVFP4_NVFP4,
        ptx=once(rf"({MMA})(%r\d+), (\{{0,0\}}), (%r\d+), (\{{0,0\}};)", r"\g<1>\4, \3, \2, \5"),
    ),
    Mutation(
        "E4M3 scales read as E8M0",
        pair=NVFP4_NVFP4,
        ptx=once(
            r"kind::mxf4nvf4\.block_scale\.scale_vec::4X(\.m16n8k64\.row\.col\.f32\.e2m1\.e2m1\.f32)\.ue4m3",
            r"kind::mxf4.block_scale.scale_vec::2X\1.ue8m0",
        ),
    ),
    Mutation(
        "weights' scales of the other set",
        pair=NVFP4_NVFP4,
        source=(OPERANDS, "stage.weight_scales + s * kWeightScaleSetBytes", "stage.weight_scales"),
    ),
    Mutation(
        "rows' scales of the other set",
        pair=NVFP4_NVFP4,
        source=(OPERANDS, "stage.act_scales + s * Shape::kActScaleSetBytes", "stage.act_scales"),
    ),
    Mutation(
        "rows' scale sets without the rows that precede the tile's",
        pair=NVFP4_NVFP4,
        source=(OPERANDS, "s * Shape::kActScaleSetBytes", "s * Shape::M * 4"),
    ),
    Mutation(
        "K tile of the scales' copy",
        pair=NVFP4_NVFP4,
        source=(PIPELINE, "kt * Shape::kScaleWords, kEvictLast", "kt, kEvictLast"),
    ),
    Mutation("K of the rows' copy", pair=MXFP4_MXFP4, source=(PIPELINE, "kt * Shape::kRowBytes", "kt * kTileK")),
    Mutation("chunks not swizzled", pair=MXFP4_MXFP4, source=(FRAGMENTS, ": row >> 1 & 3)", ": 0)")),
    Mutation(
        "chunks swizzled as those of 128 bytes", pair=NVFP4_NVFP4, source=(FRAGMENTS, ": row >> 1 & 3)", ": row & 3)")
    ),
    Mutation("rows not swizzled by the tensor map", pair=MXFP4_MXFP4, launch=box(0, swizzle=0)),
    Mutation("scales of one set in the copy", pair=NVFP4_NVFP4, launch=box(1, rows=1)),
    Mutation(
        "steps of an MMA exchanged",
        pair=NVFP4_NVFP4,
        source=(OPERANDS, "(2 * mma + half) * kWeightStepBytes", "(2 * mma + 1 - half) * kWeightStepBytes"),
    ),
    Mutation(
        "weights of the neighbouring group", pair=NVFP4_NVFP4, tile="m16n128_swap", source=(OPERANDS, "g % 4 * 4", "0")
    ),
    Mutation(
        "weights of the neighbouring fragment, native",
        pair=MXFP4_MXFP4,
        tile=NATIVE,
        source=(OPERANDS, "return {weight[0][j], weight[1][j]};", "return {weight[0][j], weight[1][j ^ 1]};"),
    ),
    Mutation(
        "rows of A, native: g twice",
        pair=NVFP4_NVFP4,
        tile=NATIVE,
        source=(OPERANDS, "return {act[4 * i], act[4 * i + 1]", "return {act[4 * i], act[4 * i]"),
    ),
    Mutation(
        "the factor of the other eight weight rows",
        pair=NVFP4_NVFP4,
        source=(FACTORS, "const int eighth = Shape::kSwap ? o", "const int eighth = Shape::kSwap ? 1 - o"),
    ),
    Mutation(
        "the factor of the other eight weight rows, native",
        pair=NVFP4_NVFP4,
        tile=NATIVE,
        source=(FACTORS, "(tile_n0 + n0) / 8 + w", "(tile_n0 + n0) / 8"),
    ),
    Mutation(
        "the factor of the first expert's inputs",
        pair=NVFP4_NVFP4,
        source=(FACTORS, "__ldg(factors.of_inputs + m_tile.expert)", "__ldg(factors.of_inputs)"),
    ),
    Mutation(
        "the factor of the first expert's weights",
        pair=NVFP4_NVFP4,
        source=(FACTORS, "(factors.of_weights) + m_tile.expert)", "(factors.of_weights))"),
    ),
    Mutation(
        "sums multiplied by one factor after the other",
        pair=NVFP4_NVFP4,
        source=(
            FACTORS,
            "sum = __fmul_rn(sum, __fmul_rn(own, of_eighth(eighth)));",
            "sum = __fmul_rn(__fmul_rn(sum, own), of_eighth(eighth));",
        ),
    ),
    Mutation("nothing", pair=MXFP4_MXFP4, harmless=True, ptx=once(r"\Z", "\n")),
    Mutation(
        "thread selector of A's scales",
        pair=NVFP4_NVFP4,
        harmless=True,
        ptx=once(rf"({MMA}%r\d+, )\{{0,0\}}(, %r\d+, \{{0,0\}};)", r"\g<1>{0,1}\2"),
    ),
]
