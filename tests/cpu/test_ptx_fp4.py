"""SM12x's kernels of FP4 by FP4 as the PTX that nvcc makes of them for sm_120f, executed on the CPU.

As test_ptx_tiles.py for those of MXFP8: bit by bit against the reference under SM12x's rules for kind::mxf4 and
kind::mxf4nvf4, in poisoned outputs, with launches by the launcher. The installed wheel need not have these kernels:
tests/helpers/ptx/host_code.py compiles each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from ptx import abi, fp4_problems, launch, mutants
from ptx.fp4_mutations import MUTATIONS
from ptx.fp4_problems import Fp4Problem
from ptx.gemm import Gemm
from ptx.machine import Machine
from ptx.mutants import Mutation
from ptx.tile_cases import COLUMNS, DTYPES, seed_of

from mxfp4_moe.tiles import FP4_PAIRS, MXFP4_MXFP4, NVFP4_NVFP4, Tile, load_manifest, prove

MANIFEST = load_manifest()
TILES = MANIFEST.tiles
# Each way that a kernel is made: weights as B, with one fragment and with several; weights as A, of a swapped tile and
# of a native one, whose warps share rows of both operands.
USUAL = {MXFP4_MXFP4: ("m8n64_swap", "m128n32", "m64n64"), NVFP4_NVFP4: ("m64n8", "m16n128_swap", "m64n64")}


def cases() -> list[object]:
    """Every kernel; those that are not usual where all of them are asked for."""
    return [
        pytest.param(
            pair,
            tile,
            id=f"{pair}-{tile.name}",
            marks=() if tile.name in USUAL[pair] else pytest.mark.ptx_full,
        )
        for pair, tile in itertools.product(FP4_PAIRS, TILES)
    ]


def check(problem: Fp4Problem, tile: Tile, dtype: torch.dtype, *, ready: bool, seed: int) -> None:
    out = Gemm(problem, tile, Machine(seed=seed)).run(dtype, m_tiles_are_ready=ready)
    mismatch = problem.mismatch(out)
    assert not mismatch, f"{problem.pair}, {tile.name}, seed {seed}: {mismatch}"


@functools.lru_cache(maxsize=2)
def problem_of(pair: str, tile: Tile, steps: int) -> Fp4Problem:
    """More K tiles than stages, the last of `steps` blocks of 32; a tail along N where the tile can have one."""
    k = prove(tile, "120f", pair).stages * 128 + steps * 32
    rows = (3, 0, tile.m // 2, tile.m + 1)
    return fp4_problems.any_problem(k, COLUMNS[tile.n], rows, pair, each_row=steps % 2 == 0)


@pytest.mark.parametrize(("pair", "tile"), cases())
def test_tile_equals_the_reference_bitwise(pair: str, tile: Tile) -> None:
    place = TILES.index(tile) + FP4_PAIRS.index(pair)
    dtype, steps = DTYPES[place % 3], 1 + place % 4
    seed = seed_of(pair, tile.name, dtype, steps)
    check(problem_of(pair, tile, steps), tile, dtype, ready=place % 2 == 1, seed=seed)


@pytest.mark.ptx_full
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_more_tails(pair: str, tile: Tile, dtype: torch.dtype) -> None:
    for steps in (1, 2, 3, 4):
        seed = seed_of(pair, tile.name, dtype, steps, "more")
        check(problem_of(pair, tile, steps), tile, dtype, ready=steps % 2 == 0, seed=seed)


SMALL = MANIFEST.tile("m8n64_swap")


@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_shared_memory_that_nobody_wrote_meets_zeros(pair: str) -> None:
    """One K tile of each length: of a short one most of a stage's weights are whatever was there."""
    for steps in (1, 2, 3, 4):
        problem = fp4_problems.any_problem(steps * 32, 80, (3, 0, 9), pair)
        check(problem, SMALL, torch.float32, ready=False, seed=steps)


@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_a_scale_that_is_nan_poisons_its_row_or_column(pair: str) -> None:
    nan = 0xFF if pair == MXFP4_MXFP4 else 0x7F
    problem = fp4_problems.any_problem(160, 80, (3, 0, 9), pair, each_row=True)
    row_scales, scales = problem.row_scales.clone(), problem.scales.clone()
    row_scales[1, 2], row_scales[7, -1], scales[2, 5, 0], scales[0, 70, -1] = nan, nan, nan, nan
    poisoned = dataclasses.replace(problem, row_scales=row_scales, scales=scales).under_sm12x()
    assert poisoned.expected[[1, 7]].isnan().all()
    assert poisoned.expected[3:12, 5].isnan().all()
    assert 0 < poisoned.expected[: problem.valid].isnan().sum() < 3 * 80 + 12
    check(poisoned, SMALL, torch.float32, ready=False, seed=1)


@pytest.mark.parametrize("each_row", [False, True])
def test_factors_are_rounded_once_before_they_meet_a_sum(each_row: bool) -> None:
    """Factors of a row and of a weight whose product is not a float32; gates' and ups' differ."""
    problem = fp4_problems.any_problem(96, 48, (3, 2), NVFP4_NVFP4, each_row=each_row)
    sums = dataclasses.replace(problem, of_weights=None).under_sm12x().expected
    for e, own in enumerate((slice(0, 3), slice(3, 5))):
        weights = problem.of_weights[e].double()[torch.arange(48) % 16 // 8]
        others = problem.of_rows[own, None] if each_row else problem.of_inputs[e]
        factor = (others.double() * weights).float()
        assert (factor.double() != others.double() * weights).any()
        assert torch.equal(problem.expected[own], (sums[own].double() * factor.double()).float())
    check(problem, MANIFEST.tile("m64n8"), torch.float32, ready=False, seed=2)


# ---- mistakes -------------------------------------------------------------------------


def mutations() -> list[object]:
    """Edits of PTX; those of sources, each of which is compiled, where all of them are asked for."""
    return [
        pytest.param(one, id=f"{one.pair}, {one.name}", marks=pytest.mark.ptx_full if one.source else ())
        for one in MUTATIONS
    ]


@pytest.mark.parametrize("mutation", mutations())
def test_mistakes_are_noticed_and_nothing_else_is(mutation: Mutation) -> None:
    found = mutants.notices(mutation)
    print(f"\n{mutants.table([(mutation, found)])}")
    assert bool(found) != mutation.harmless, found


# ---- the launcher ----------------------------------------------------------------------------------------------------


def args_of(pair: str, **changes: int) -> abi.GemmArgs:
    given = {"act": 1 << 20, "weight": 2 << 20, "out": 3 << 20, "m_tiles": 4 << 20, "num_m_tiles": 5 << 20}
    sizes = {"max_m_tiles": 3, "out_type": 0, "rows": 9, "n": 64, "k": 160, "experts": 2, "act_scale": 6 << 20}
    both = dict(zip(("weight_format", "act_format"), abi.formats_of(pair), strict=True))
    factors = {"factors": abi.Factors(of_weights=7 << 20)} if pair == NVFP4_NVFP4 else {}
    return abi.GemmArgs(**{**given, **sizes, **both, **factors, **changes})


@pytest.mark.parametrize("pair", FP4_PAIRS)
def test_the_launch_is_the_proofs(pair: str) -> None:
    for tile in (SMALL, MANIFEST.tile("m64n64")):
        launch.ptx_of_tile(tile, pair=pair)
        [one] = launch.shared_recorder().gemm_of(tile, pair, args_of(pair))
        proof = prove(tile, "120f", pair)
        assert (one.block[0], one.smem_bytes) == (proof.threads, proof.smem_bytes)
        assert proof.function in one.kernel
        assert pair in one.kernel


@pytest.mark.parametrize(
    ("pair", "changes", "message"),
    [
        (MXFP4_MXFP4, {"act_format": 0}, r"expected 2 and 0, what this kernel of tile \(8, 64\) reads, got 0 and 0"),
        (NVFP4_NVFP4, {"weight_format": 0}, r"expected 3 and 1, what this kernel of tile \(8, 64\) reads, got 3 and 0"),
        (MXFP4_MXFP4, {"act_scale": (6 << 20) + 8}, "act_scale: expected an address that is a multiple of 16"),
        (MXFP4_MXFP4, {"k": 80}, "k: expected a positive multiple of 32, got 80"),
        (NVFP4_NVFP4, {"k": 80}, "k: expected a positive multiple of 32, got 80"),
        (NVFP4_NVFP4, {"factors": abi.Factors()}, r"factors\.of_weights: expected an address that is a multiple of 8"),
    ],
)
def test_the_launcher_refuses(pair: str, changes: dict[str, object], message: str) -> None:
    launch.ptx_of_tile(SMALL, pair=pair)
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().gemm_of(SMALL, pair, args_of(pair, **changes))
