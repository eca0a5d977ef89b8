"""The mistakes. Harmful ones change a result or an order; the controls at the end change neither.

PTX is edited where an instruction is the thing itself (a mask, a selector, a wait); the sources, compiled anew, where
it is an expression (a bound, an offset).
"""

from __future__ import annotations

import torch

from mxfp4_moe.activations import Activation

from .mutants import Mutation, box, once

MMA = r"mma\.sync[^;]*?"
WAIT = r"\{ \.reg \.pred done; again: mbarrier\.try_wait[^}]*\}"
KERNEL = "tile/sm12x/plain_kernel.cuh"
OPERANDS_OF_STAGE = "tile/sm12x/operands.cuh"
ACTIVATE = "tile/swiglu_epilogue.cuh"
IN_TURNS = "tile/in_turns.cuh"
EXCHANGE = "tile/lane_exchange.cuh"
FORMULAS = "shared/nonlinearities.cuh"
PIPELINE = "tile/pipeline.cuh"
EPILOGUE = "tile/epilogue.cuh"
FRAGMENTS = "tile/fragments.cuh"
MAPS = "tile/lane_maps.cuh"

OPERANDS = [
    Mutation("E2M1 mask a bit too wide", ptx=once(r"1010580540;", "1010580541;")),
    Mutation("E2M1 mask a bit too narrow", ptx=once(r"1010580540;", "1010580536;")),
    Mutation(
        "rotation of packed words by 3 instead of 4",
        ptx=once(
            r"(mov\.b32\s+(%r\d+), )4;(?=(?:(?!mov\.b32).)*?shf\.r\.wrap\.b32 %r\d+, %r\d+, %r\d+, \2;)", r"\g<1>3;"
        ),
    ),
    Mutation("byte selector of A's scale", ptx=once(rf"({MMA}%r\d+, )\{{1,0\}}(, %r\d+, \{{1,0\}};)", r"\g<1>{2,0}\2")),
    Mutation("byte selector of B's scale", ptx=once(rf"({MMA}%r\d+, \{{1,0\}}, %r\d+, )\{{1,0\}};", r"\g<1>{0,0};")),
    Mutation(
        "scale words of A and B exchanged",
        ptx=once(rf"({MMA})(%r\d+), (\{{0,0\}}), (%r\d+), (\{{0,0\}};)", r"\g<1>\4, \3, \2, \5"),
    ),
    Mutation(
        "rows g and g + 8 of A exchanged",
        ptx=once(rf"({MMA}\}}, \{{)(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}}", r"\g<1>\3,\2,\5,\4}"),
    ),
    Mutation(
        "middle registers of A exchanged",
        ptx=once(rf"({MMA}\}}, \{{)(%r\d+),(%r\d+),(%r\d+),(%r\d+)\}}", r"\g<1>\2,\4,\3,\5}"),
    ),
    Mutation(
        "registers of B exchanged",
        ptx=once(rf"({MMA}\{{%r\d+,%r\d+,%r\d+,%r\d+\}}, \{{)(%r\d+),(%r\d+)\}}", r"\g<1>\3,\2}"),
    ),
    Mutation(
        "accumulators start at zero again in the second step",
        ptx=once(
            rf"({MMA}\}}, \{{%r\d+,%r\d+\}}, )\{{[^}}]*\}}",
            r"\g<1>{0f00000000,0f00000000,0f00000000,0f00000000}",
            number=1,
        ),
    ),
    Mutation(
        "registers of ldmatrix in another order",
        tile="m64n64",
        ptx=once(r"(ldmatrix\S+ \{)(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}", r"\g<1>\2, \4, \3, \5}"),
    ),
    Mutation(
        "rows that ldmatrix reads",
        source=(OPERANDS_OF_STAGE, "row0 + group * 8 + lane % 8,", "row0 + group * 8 + (lane ^ 1) % 8,"),
    ),
    Mutation("activations' chunks not swizzled", source=(FRAGMENTS, "128 ? row & 7 :", "128 ? 0 :")),
    Mutation(
        "swizzle over four rows instead of eight",
        source=(FRAGMENTS, "128 ? row & 7 :", "128 ? row & 3 :"),
    ),
    Mutation("half a step in the activations", source=(OPERANDS_OF_STAGE, "act_at ^ mma << 5;", "act_at ^ mma << 4;")),
    Mutation(
        "weights of the neighbouring step",
        source=(
            OPERANDS_OF_STAGE,
            "step * kWeightStepBytes + g / 4 * 512",
            "(step ^ 1) * kWeightStepBytes + g / 4 * 512",
        ),
    ),
    Mutation("row of A's scale", source=(MAPS, "return lane / 4 + 8 * (lane % 2);", "return lane / 4;")),
    Mutation(
        "column of B's scale",
        source=(MAPS, "scale_b_col(int lane) { return lane / 4; }", "scale_b_col(int lane) { return lane % 8; }"),
    ),
    Mutation(
        "fragments of A, native: rows g twice",
        tile="m64n64",
        source=(
            OPERANDS_OF_STAGE,
            "hi = expand_act(act[4 * i + 1], act[4 * i + 3]);",
            "hi = expand_act(act[4 * i], act[4 * i + 2]);",
        ),
    ),
    Mutation(
        "columns of a native tile's second fragment",
        tile="m64n64",
        source=(OPERANDS_OF_STAGE, "return expand_weight(weight[j]);", "return expand_weight(weight[j ^ 1]);"),
    ),
]

COORDINATES = [
    Mutation(
        "shift of the scales' first row", source=(KERNEL, "load_m_tile(p.m_tiles + coord.m).row_begin % 4;", "0;")
    ),
    Mutation(
        "row of the scales' copy", source=(PIPELINE, "full, m.row_begin / 4 * 2, kt *", "full, m.row_begin / 4, kt *")
    ),
    Mutation(
        "K tile of the scales' copy",
        source=(PIPELINE, "m.row_begin / 4 * 2, kt * Shape::kScaleWords,", "m.row_begin / 4 * 2, 0,"),
    ),
    Mutation(
        "K of the activations' copy",
        source=(PIPELINE, "full, kt * Shape::kRowBytes, m.row_begin,", "full, kt * kBlockK, m.row_begin,"),
    ),
    Mutation(
        "weights of the first row block",
        source=(PIPELINE, "k_tile_unit + row_block * kBlockUnits, hint", "k_tile_unit, hint"),
    ),
    Mutation("weights of the first expert", source=(PIPELINE, "m.expert * expert_units + kt", "0 * expert_units + kt")),
    Mutation(
        "units of the tail without its scales",
        source=(
            PIPELINE,
            "(weight_block_scale_bytes(Shape::kScaleWords) + tail_steps * kWeightStepBytes)",
            "(tail_steps * kWeightStepBytes)",
        ),
    ),
    Mutation(
        "one K tile too few in the producer",
        source=(PIPELINE, "num_k_tiles(ceil_div(p.k, kTileK))", "num_k_tiles(p.k / kTileK)"),
    ),
    Mutation(
        "K tail not multiplied",
        source=(KERNEL, "if (k + s * kTileK < p.k) k_tile(s);", "if (k + s * kTileK + kTileK <= p.k) k_tile(s);"),
    ),
    Mutation("bound along N", source=(EPILOGUE, "if (col >= p.n) continue;\n", "\n")),
    Mutation(
        "bound of the rows", source=(EPILOGUE, "if (row + 1 < rows) static_cast", "if (row + 1 <= rows) static_cast")
    ),
    Mutation(
        "m-tile of the output", source=(EPILOGUE, "load_m_tile(p.m_tiles + done.m)", "load_m_tile(p.m_tiles + done.n)")
    ),
    Mutation(
        "one m-tile too many",
        source=(
            EPILOGUE,
            "uniform(load_num_m_tiles(p)) * num_n_tiles();\n    const auto",
            "(uniform(load_num_m_tiles(p)) + 1) * num_n_tiles();\n    const auto",
        ),
    ),
    Mutation(
        "persistent blocks step by one",
        source=(EPILOGUE, "is_tile(tile); tile += gridDim.x)", "is_tile(tile); tile += 1)"),
    ),
    Mutation(
        "output pair exchanged",
        dtype=torch.bfloat16,
        ptx=once(r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%f\d+), (%f\d+);", r"\g<1>\3, \2;"),
    ),
    Mutation("bfloat16 instead of float16", dtype=torch.float16, ptx=once(r"cvt\.rn\.f16x2\.f32", "cvt.rn.bf16x2.f32")),
    Mutation(
        "output pair exchanged, native",
        tile="m64n64",
        ptx=once(r"(st\.global\.v2\.f32\s+\[%rd\d+\], \{)(%f\d+), (%f\d+)\}", r"\g<1>\3, \2}"),
    ),
    Mutation("box of the activations without its last row", launch=box(0, rows=7)),
    Mutation("activations not swizzled by the tensor map", launch=box(0, swizzle=0)),
    Mutation("box of the scales two rows short", launch=box(1, columns=5)),
]

ORDER = [
    Mutation("bytes expected of a whole K tile", ptx=once(r"(mov\.b32\s+%r\d+, )5424;", r"\g<1>5408;", number=1)),
    Mutation("more bytes expected than come", ptx=once(r"(mov\.b32\s+%r\d+, )5424;", r"\g<1>5440;", number=1)),
    Mutation("bytes of the tail", ptx=once(r"(add\.s32\s+%r\d+, %r\d+, )1328;", r"\g<1>1072;", number=1)),
    Mutation(
        "no arrival on an empty stage", ptx=once(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", number=1)
    ),
    Mutation(
        "no arrival for stages without a K tile", ptx=once(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "")
    ),
    Mutation(
        "empty barrier expects a warp less", ptx=once(r"(mov\.b32\s+%r\d+, )4;(?=.*?fence\.mbarrier_init)", r"\g<1>3;")
    ),
    Mutation(
        "full barrier expects two arrivals", ptx=once(r"(mov\.b32\s+%r\d+, )1;(?=.*?fence\.mbarrier_init)", r"\g<1>2;")
    ),
    Mutation("producer does not wait for an empty stage", ptx=once(WAIT, "")),
    Mutation("producer does not wait where a tile ends within the stages", ptx=once(WAIT, "", number=1)),
    Mutation("consumer does not wait for stage 0", ptx=once(WAIT, "", number=6)),
    Mutation("consumer does not wait for stage 3", ptx=once(WAIT, "", number=9)),
    Mutation("wait that does not look at its result", ptx=once(r"@!done bra again;", "", number=6)),
    Mutation("block reads the m-tiles before they are there", ptx=once(r"griddepcontrol\.wait;", "")),
    Mutation(
        "producer copies activations before they are there",
        ready=True,
        ptx=once(r"griddepcontrol\.wait;", "", number=1),
    ),
    Mutation(
        "consumer writes before the kernel before is done", ready=True, ptx=once(r"griddepcontrol\.wait;", "", number=2)
    ),
    Mutation(
        "m-tiles by the read-only path", ptx=once(r"ld\.relaxed\.gpu\.global\.v4\.s32", "ld.global.nc.v4.s32", number=2)
    ),
    Mutation("no __syncwarp before the arrival", ptx=once(r"bar\.warp\.sync\s+-1;", "", number=1)),
    Mutation("no __syncthreads behind the barriers' init", ptx=once(r"bar\.sync\s+0;", "")),
    Mutation("no fence behind the barriers' init", ptx=once(r"fence\.mbarrier_init\.release\.cluster;", "")),
    Mutation(
        "consumer's parity never flips",
        source=(KERNEL, "        ring.phase ^= 1;\n      }\n    } else", "      }\n    } else"),
    ),
    Mutation(
        "producer waits for the other parity",
        source=(
            PIPELINE,
            "wait_for(smem.empty(ring.stage), ring.phase ^ 1);\n        if (kt",
            "wait_for(smem.empty(ring.stage), ring.phase);\n        if (kt",
        ),
    ),
    Mutation(
        "stage released before it is read",
        source=(
            KERNEL,
            "if (k + s * kTileK < p.k) k_tile(s);\n          release(s);",
            "release(s);\n          if (k + s * kTileK < p.k) k_tile(s);",
        ),
    ),
    Mutation(
        "another stage released",
        source=(KERNEL, "if (lane == 0) smem.empty(s)->arrive();", "if (lane == 0) smem.empty(0)->arrive();"),
    ),
    Mutation(
        "activations into another stage",
        source=(
            PIPELINE,
            "ActLoads::load(maps, smem, ring.stage, kt, m_tile);",
            "ActLoads::load(maps, smem, ring.stage ^ 1, kt, m_tile);",
        ),
    ),
    Mutation("all lanes produce", source=(PIPELINE, "if (!issues) return;", "")),
    Mutation(
        "weights that were fetched are fetched again",
        ready=True,
        source=(PIPELINE, "if (kt >= fetched) {", "if (kt + 1 >= fetched) {"),
    ),
    Mutation("next tile's weights taken for fetched", ready=True, source=(PIPELINE, "    fetched = 0;\n", "")),
    Mutation("stage 0 instead of the ring's", tile="m128n128", source=(KERNEL, "k_tile(ring.stage);", "k_tile(0);")),
    Mutation(
        "more registers than a block has",
        tile="m128n128",
        ptx=once(r"setmaxnreg\.inc\.sync\.aligned\.u32 232;", "setmaxnreg.inc.sync.aligned.u32 240;"),
    ),
]

ACTIVATION = [
    Mutation(
        "bias of the first expert",
        activates=True,
        source=(ACTIVATE, ": a.bias + static_cast<int64_t>(m_tile.expert) * n;", ": a.bias;"),
    ),
    Mutation(
        "no bias for the gate",
        activates=True,
        source=(ACTIVATE, "swiglu_oai(gate + gate_bias", "swiglu_oai(gate"),
    ),
    Mutation(
        "alpha of the first expert",
        activates=True,
        source=(ACTIVATE, "of_expert(a.alpha, m_tile.expert)", "of_expert(a.alpha, 0)"),
    ),
    Mutation(
        "sums not rounded",
        activates=True,
        source=(ACTIVATE, "round_all();\n\n  // The activation of", ";\n\n  // The activation of"),
    ),
    Mutation(
        "amax of one warp only",
        activates=True,
        source=(ACTIVATE, "kPartsPerBlock * kPartsPerBlock + i) *", "kPartsPerBlock * kPartsPerBlock) *"),
    ),
    Mutation(
        "amax over half of the lanes", activates=True, source=(ACTIVATE, "max_over_lanes<4, 3>", "max_over_lanes<4, 2>")
    ),
    Mutation("no barrier before the table of amax", activates=True, ptx=once(r"bar\.sync 1, 128;", "")),
    Mutation("no barrier behind the table of amax", activates=True, ptx=once(r"bar\.sync 1, 128;", "", number=1)),
    Mutation("barrier of three of the four warps", activates=True, ptx=once(r"bar\.sync 1, 128;", "bar.sync 1, 96;")),
    Mutation(
        "scale not rounded up",
        activates=True,
        source=("shared/mxfp8.cuh", "mantissa > exact ? 1u : 0u", "mantissa > exact ? 0u : 0u"),
    ),
    Mutation(
        "a padding scale byte left as it was",
        activates=True,
        source=(ACTIVATE, "block % 4 + 1; pad < 4; ++pad", "block % 4 + 1; pad < 3; ++pad"),
    ),
    Mutation(
        "bytes exchanged among the wrong lanes",
        activates=True,
        source=(EXCHANGE, "part & 1 ? 0x3715 : 0x6240", "part & 1 ? 0x6240 : 0x3715"),
    ),
    Mutation(
        "odd outputs where the even ones belong",
        activates=True,
        source=(ACTIVATE, "parity * 16 + (out_in_block", "(1 - parity) * 16 + (out_in_block"),
    ),
    Mutation(
        "amax of another warp, native",
        tile="m64n64",
        activates=True,
        source=(ACTIVATE, "kPartsPerBlock * kPartsPerBlock + i) *", "kPartsPerBlock * kPartsPerBlock) *"),
    ),
]

IN_TURNS_MISTAKES = [
    Mutation(name, tile=tile, activates=True, activation=activation, source=source)
    for activation in (Activation.SITU, Activation.SWIGLU_STEP)
    for name, tile, source in (
        (
            f"{activation.value}: one turn too few",
            "m64n64",
            (IN_TURNS, "turn < kAll / kTurn", "turn + 1 < kAll / kTurn"),
        ),
        (f"{activation.value}: moved by half a turn", "m64n64", (IN_TURNS, "at(i + kTurn);", "at(i + kTurn / 2);")),
        (f"{activation.value}: gate for up", "m16n128_swap", (IN_TURNS, "at(min(i + kToUp, kTurn - 1))", "at(i)")),
        (f"{activation.value}: the other activation", "m8n64_swap", (IN_TURNS, "if (is_situ)", "if (!is_situ)")),
        (f"{activation.value}: no bias for the up", "m8n64_swap", (ACTIVATE, "up += up_bias;", "")),
    )
]

SOFT = [
    Mutation(name, activates=True, activation=activation, source=(FORMULAS, old, new))
    for name, activation, old, new in (
        (
            "situ: sigmoid of the clamped gate",
            Activation.SITU,
            "* sigmoid(gate) * soft",
            "* sigmoid(soft_clamp(gate, numbers.beta)) * soft",
        ),
        ("situ: up not clamped", Activation.SITU, "* soft_clamp(up, numbers.limit)", "* up"),
        (
            "situ: gate's clamp for the up",
            Activation.SITU,
            "soft_clamp(up, numbers.limit)",
            "soft_clamp(up, numbers.beta)",
        ),
        (
            "swiglu_step: clamped before silu",
            Activation.SWIGLU_STEP,
            "clamp_above(silu(gate), numbers.limit)",
            "silu(clamp_above(gate, numbers.limit))",
        ),
    )
]

CONTROLS = [
    Mutation("nothing", harmless=True, ptx=once(r"\Z", "\n")),
    Mutation(
        "nothing, native, with the activation", tile="m64n64", activates=True, harmless=True, ptx=once(r"\Z", "\n")
    ),
    Mutation(
        "registers renamed",
        harmless=True,
        ptx=lambda text: text.replace("%r", "%renamed").replace("%renamedd", "%other").replace("%renameds", "%short"),
    ),
    Mutation(
        "two independent loads exchanged",
        harmless=True,
        ptx=once(r"(ld\.shared\.u32 [^;]*;)(\s*)(ld\.shared\.u32 [^;]*;)", r"\3\2\1"),
    ),
    Mutation("one __syncwarp more", harmless=True, ptx=once(r"(bar\.warp\.sync\s+-1;)", r"\1 \1", number=1)),
    Mutation(
        "a second wait for a kernel that was waited for",
        harmless=True,
        ptx=once(r"griddepcontrol\.wait;", "", number=2),
    ),
    # Consumers wait for every copy, and the block's memory stays until they are done.
    Mutation(
        "producer leaves without waiting for its last stages",
        harmless=True,
        ptx=once(rf"({WAIT}.*?{WAIT}.*?){WAIT}(.*?){WAIT}(.*?){WAIT}(.*?){WAIT}", r"\1\2\3\4"),
    ),
    # Lanes that the instruction does not read hold the same words (sm12x/mma.cuh).
    Mutation(
        "thread selector of A's scale",
        harmless=True,
        ptx=once(rf"({MMA}%r\d+, )\{{0,0\}}(, %r\d+, \{{0,0\}};)", r"\g<1>{0,1}\2"),
    ),
    Mutation(
        "thread selector of B's scale",
        harmless=True,
        ptx=once(rf"({MMA}%r\d+, \{{3,0\}}, %r\d+, )\{{3,0\}};", r"\g<1>{3,1};"),
    ),
    Mutation(
        "weights' priority in L2",
        harmless=True,
        source=("tile/tma.cuh", "kEvictFirst = 0x12F0000000000000ull", "kEvictFirst = 0x1000000000000000ull"),
    ),
]

MUTATIONS = [*OPERANDS, *COORDINATES, *ORDER, *ACTIVATION, *IN_TURNS_MISTAKES, *SOFT, *CONTROLS]
