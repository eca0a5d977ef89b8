"""SM90's kernels where activations are FP4, as PTX executed on the CPU: GEMMs of rows that hold codes times scales in
bfloat16, and GEMM1's epilogue that writes such rows. The rows' kernels: test_ptx_fp4_rows.py; layers:
test_ptx_fp4_layer.py.

Expected rows are the packed codes and scales that csrc/moe's activation kernel makes of the reference's sums,
multiplied in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import ptx_fp4_checks
import pytest
import torch
from fp4_cases import Rows, in_bf16, same_bf16
from ptx import fp4_problems, mutants
from ptx.faults import Fault
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Epilogue, Gemm
from ptx.machine import Machine
from ptx.tile_cases import EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import arithmetic, reference
from mxfp4_moe.problems import bits
from mxfp4_moe.tiles import FP4_PAIRS, MXFP4_BF16, MXFP4_MXFP4, NVFP4_BF16, NVFP4_NVFP4, Tile, load_manifest, prove

MANIFEST = load_manifest()
GLOBAL_SCALES = torch.tensor([700.0, 1.0, 2.5])
KERNELS = {MXFP4_MXFP4: MXFP4_BF16, NVFP4_NVFP4: NVFP4_BF16}
ROWS = (3, 0, 9, 20)
CASES = [(tile, pair) for pair in FP4_PAIRS for tile in MANIFEST.tiles if prove(tile, "90a", pair).activates]
# Of MXFP4 four warps share a block, two, one has it, and wgmma's four; of NVFP4 two, one has one or two, wgmma's two.
USUAL = ("m8n64_swap", "m8n128_swap", "m8n256_swap", "m32n64_swap")


def folded(problem: Fp4Problem) -> Fp4Problem:
    """The problem as SM90's kernel reads it; its sums are those of the rule for the pair."""
    assert problem.row_scales is not None
    rows = in_bf16(Rows(problem.rows, problem.row_scales, None))
    made = dataclasses.replace(problem, rows=rows, row_scales=None, pair=KERNELS[problem.pair]).under_sm12x()
    rule = arithmetic.of_arch("90a", problem.pair)
    for e in range(len(problem.packed)):
        own = slice(*problem.offsets[e : e + 2].tolist())
        sums, operands = torch.empty_like(made.expected[own]), (problem.packed[e], problem.scales[e])
        given = {"pair": problem.pair, "factor": problem.factor(e, own)}
        arithmetic.gemm(rule, problem.rows[own], problem.row_scales[own], *operands, sums, **given)
        assert torch.equal(bits(sums), bits(made.expected[own]))
    return made


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each_row", [False, True], ids=["experts' factors", "rows' factors"])
@pytest.mark.parametrize("name", ["m8n64_swap", "m64n8", "m32n64_swap"])
def test_sums_of_nvfp4_rows_have_both_factors(name: str, each_row: bool) -> None:
    tile = MANIFEST.tile(name)
    k = prove(tile, "90a", NVFP4_NVFP4).stages * 128 + 32
    problem = folded(fp4_problems.any_problem(k, 80, ROWS, NVFP4_NVFP4, each_row=each_row))
    run = Gemm(problem, tile, Machine(seed=seed_of(name, each_row)), "90a")
    assert not problem.mismatch(run.run(torch.float32, m_tiles_are_ready=each_row))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("__ldcg(of_rows + row)", "1.f"),
        ("of_rows + m_tile.row_begin", "of_rows"),
        ("Shape::kFolds || Shape::kActFormat", "Shape::kActFormat"),
    ],
)
def test_a_row_without_its_factor_is_noticed(old: str, new: str) -> None:
    tile = MANIFEST.tile("m8n64_swap")
    changed = mutants.compiled(tile, ("tile/factors.cuh", old, new), NVFP4_BF16, "90a")
    problem = folded(fp4_problems.any_problem(160, 80, ROWS, NVFP4_NVFP4, each_row=True))
    out = Gemm(problem, tile, Machine(seed=1), "90a").run(torch.float32, change=lambda _: changed)
    assert problem.mismatch(out)


# ---- GEMM1's activation ----------------------------------------------------------------------------------------------


@functools.cache
def problem_of(n: int, pair: str) -> Fp4Problem:
    """Usual sums, and of the last expert a row of zeros, one of very small sums, and one of NaN."""
    usual = fp4_problems.usual_problem(160, n, EXPERTS_ROWS, pair)
    assert usual.row_scales is not None
    nan, small = (0x7F, 1) if pair == NVFP4_NVFP4 else (0xFF, 40)
    rows, row_scales = usual.rows.clone(), usual.row_scales.clone()
    rows[4] = 0
    row_scales[5], row_scales[6, 1] = small, nan
    problem = folded(dataclasses.replace(usual, rows=rows, row_scales=row_scales))
    sums = problem.expected[3:12]
    assert sums.isnan().sum() == n
    assert 0 < sums[2].abs().max() < 1e-3
    return problem


def epilogue_of(kind: str, n: int, pair: str) -> Epilogue:
    scales = GLOBAL_SCALES if pair == NVFP4_NVFP4 else None
    return dataclasses.replace(epilogue(kind, n), global_scales=scales, folded=pair.split("_")[1])


@functools.cache
def from_stored_sums(kind: str, n: int, pair: str) -> Tensor:
    """bfloat16 [valid rows, N / 2]."""
    problem = problem_of(n, pair)
    finite = dataclasses.replace(problem, expected=problem.expected.clone())
    codes, scales = ptx_fp4_checks.activated(finite, epilogue_of(kind, n, pair), EXPERTS_ROWS)
    words = scales.transpose(0, 1)[: len(codes)].flatten(1)
    return in_bf16(Rows(codes, words[:, : n // 2 // (16 if pair == NVFP4_NVFP4 else 32)].contiguous(), None))


def check(tile: Tile, pair: str, kind: str, change: Callable[[str], str] | None = None) -> None:
    """Bit by bit, and nothing is written behind the valid rows, nor any scale. `change` makes another kernel."""
    n = 320 if tile.n == 256 else 192
    seed = seed_of(tile.name, pair, kind)
    problem = problem_of(n, pair)
    run = Gemm(problem, tile, Machine(seed=seed), "90a")
    rows, scales = run.run_activated(epilogue_of(kind, n, pair), m_tiles_are_ready=bool(seed % 2), change=change)
    valid = int(problem.offsets[-1])
    assert same_bf16(rows[:valid].view(torch.bfloat16), from_stored_sums(kind, n, pair))
    assert (rows[valid:] == 0xAA).all()
    assert (scales == 0xAA).all()


@pytest.mark.parametrize(
    ("tile", "pair"),
    [
        pytest.param(*case, id=f"{case[0].name}-{case[1]}", marks=() if usual else pytest.mark.ptx_full)
        for case in CASES
        for usual in [case[0].name in USUAL]
    ],
)
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile, pair: str) -> None:
    check(tile, pair, "swiglu")
    check(tile, pair, KINDS[1 + seed_of(tile.name, pair) % (len(KINDS) - 1)])


@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_values_as_they_come_are_another_result(pair: str) -> None:
    """The same kernel, not asked to quantize."""
    tile, n = MANIFEST.tile("m8n64_swap"), 192
    applied = dataclasses.replace(epilogue_of("swiglu", n, pair), folded=None)
    rows, _ = Gemm(problem_of(n, pair), tile, Machine(seed=3), "90a").run_activated(applied)
    plain = reference.activate(
        problem_of(n, pair).expected[:12].contiguous(), torch.zeros(12, dtype=torch.int32), None, "swiglu"
    ).bfloat16()
    found = rows[:12].view(torch.bfloat16)
    assert (found.float() - plain.float()).nan_to_num().abs().max() < 2e-2 * plain.float().nan_to_num().abs().max()
    assert not same_bf16(found, from_stored_sums("swiglu", n, pair))


# ---- mistakes --------------------------------------------------------------------------------------------------------

SOURCE = "tile/folded_fp4_epilogue.cuh"
MISTAKES = {  # name -> tile, pair, source, old text, new text
    "a warp's part of a block alone": (
        *("m8n64_swap", MXFP4_MXFP4, SOURCE),
        *("for (int i = 1; i < kPlaces; ++i)", "for (int i = 1; i < 1; ++i)"),
    ),
    "the second of two warps alone": ("m8n64_swap", NVFP4_NVFP4, SOURCE, "max(there, largest)", "largest"),
    "two warps at once": (
        *("m32n64_swap", NVFP4_NVFP4, SOURCE),
        *("      sync();\n      if (part % 2 == 1)", "      if (part % 2 == 1)"),
    ),
    "no meeting behind the parts": ("m8n64_swap", MXFP4_MXFP4, SOURCE, "    }\n    sync();\n  }\n", "    }\n  }\n"),
    "no meeting before the next tile's parts": (
        *("m8n64_swap", MXFP4_MXFP4, SOURCE),
        *("    sync();  // all have read the table of the output tile before\n", ""),
    ),
    "blocks of a warp mixed": (
        *("m8n256_swap", NVFP4_NVFP4, SOURCE),
        *("largest_of_block(f, r, first)", "largest_of_block(f, r, 0)"),
    ),
    "both rows under one block's scale": (
        *("m8n128_swap", MXFP4_MXFP4, SOURCE),
        *("folded(value(q, f, 1), block[1])", "folded(value(q, f, 1), block[0])"),
    ),
    "another expert's global scale": (
        *("m8n64_swap", NVFP4_NVFP4, SOURCE),
        *("global_scales + m_tile.expert", "global_scales"),
    ),
    "its own reciprocal": ("m8n128_swap", NVFP4_NVFP4, SOURCE, "__frcp_rn(global)", "global"),
    "not quantized": ("m8n64_swap", MXFP4_MXFP4, SOURCE, "a.format == MXFP4_MOE_ACT_MXFP4", "false"),
    "poison is a number": (
        *("m8n128_swap", MXFP4_MXFP4, "shared/folded_fp4.cuh"),
        *("__int_as_float(0x7fffffff) : e8m0_value(byte)", "0.f : e8m0_value(byte)"),
    ),
}


def mistakes() -> list[object]:
    quick = ("the second of two warps alone", "blocks of a warp mixed", "not quantized")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.ptx_full) for name in MISTAKES]


@pytest.mark.parametrize("name", mistakes())
def test_a_mistake_is_noticed(name: str) -> None:
    tile, pair, *source = MISTAKES[name]
    file, old, new = source
    changed = mutants.compiled(MANIFEST.tile(tile), (file, old, new), KERNELS[pair], "90a")
    with pytest.raises((Fault, AssertionError)) as caught:
        check(MANIFEST.tile(tile), pair, "swiglu", change=lambda _: changed)
    print(f"\n{name}: {caught.value.kind.value if isinstance(caught.value, Fault) else 'wrong result'}")
