"""GEMM1's epilogue of SM90 where activations are MXFP8, as PTX executed on the CPU: its rows hold codes times scales in
bfloat16, bit by bit what csrc/moe's activation kernel makes of the reference's sums.

That kernel quantizes by each block's largest magnitude (shared/mxfp8.cuh); the epilogue by the exponents of the scales,
and by magnitudes where one of a tile's blocks asks for it (tile/folded_mxfp8_epilogue.cuh). So rows are of many sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import ptx_moe_checks
import pytest
import torch
from fp4_cases import same_bf16
from moe_cases import MXFP8_IN_BF16
from ptx import gemm, mutants
from ptx.faults import Fault
from ptx.gemm import Epilogue, Gemm
from ptx.machine import Machine
from ptx.tile_cases import EXPERTS_ROWS, KINDS, epilogue, seed_of
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.problems import GemmProblem
from mxfp4_moe.tiles import MXFP4_BF16, Tile, load_manifest, prove

MANIFEST = load_manifest()
TILES = [tile for tile in MANIFEST.tiles if prove(tile, "90a", MXFP4_BF16).activates]
# Four, two and one warp to a block, and wgmma's four, alone and beside other blocks'.
USUAL = ("m8n64_swap", "m8n128_swap", "m8n256_swap", "m32n64_swap", "m32n128_swap")
SOURCE = "tile/folded_mxfp8_epilogue.cuh"


@functools.cache
def problem_of(n: int, special: bool) -> GemmProblem:
    """Usual sums; `special`: the last expert's rows are zero, tiny, huge, with a NaN and an infinity, and usual."""
    usual = gemm.usual_problem(160, n, EXPERTS_ROWS, pair=MXFP4_BF16)
    if not special:
        return usual
    rows = usual.rows.clone()
    rows[3] = 0
    rows[4] *= 2.0**-118
    rows[5] *= 2.0**-126
    rows[6] *= 2.0**60
    rows[7] *= 2.0**124
    rows[8, 1], rows[9, 1] = float("nan"), float("inf")
    problem = gemm.under_sm12x(dataclasses.replace(usual, rows=rows))
    assert problem.expected[8].isnan().all()
    assert problem.expected[7].isfinite().all()
    return problem


@functools.cache
def from_stored_sums(kind: str, n: int, special: bool) -> Tensor:
    """bfloat16 [valid rows, N / 2]."""
    problem, applied = problem_of(n, special), epilogue(kind, n)
    row_expert = torch.repeat_interleave(torch.arange(len(EXPERTS_ROWS)), problem.offsets.diff()).to(torch.int32)
    rounding = None if applied.rounding is torch.float32 else applied.rounding
    numbers = {"alpha": applied.alpha, "beta": applied.beta, "limit": applied.limit}
    weights = SimpleNamespace(
        num_experts=len(EXPERTS_ROWS), w13_bias=applied.bias, activation=applied.activation, **numbers
    )
    sums = problem.expected[: problem.valid].contiguous()
    return ptx_moe_checks.activated(sums, row_expert, weights, rounding, problem.valid, MXFP8_IN_BF16)[0]


def check(tile: Tile, kind: str, special: bool, changed: str | None = None, *, ready: bool | None = None) -> None:
    """Bit by bit, and nothing is written behind the valid rows, nor any scale."""
    n = 320 if tile.n == 256 else 192
    seed = seed_of(tile.name, kind, special)
    problem = problem_of(n, special)
    applied: Epilogue = dataclasses.replace(epilogue(kind, n), folded="mxfp8")
    run = Gemm(problem, tile, Machine(seed=seed), "90a")
    change = None if changed is None else lambda _: changed
    rows, scales = run.run_activated(
        applied, m_tiles_are_ready=bool(seed % 2) if ready is None else ready, change=change
    )
    found, valid = rows[: problem.valid].view(torch.bfloat16), problem.valid
    assert same_bf16(found, from_stored_sums(kind, n, special))
    assert (rows[valid:] == 0xAA).all()
    assert (scales == 0xAA).all()


@pytest.mark.parametrize(
    "tile",
    [pytest.param(tile, id=tile.name, marks=() if tile.name in USUAL else pytest.mark.ptx_full) for tile in TILES],
)
def test_activation_is_that_of_stored_sums_bitwise(tile: Tile) -> None:
    for kind in ("swiglu", KINDS[1 + seed_of(tile.name) % (len(KINDS) - 1)]):
        for special in (False, True):
            check(tile, kind, special)


def test_the_scale_is_an_exponent() -> None:
    """offset_scale, for every mantissa: the scale byte of formats.quantize_mxfp8 plus 8, where it is 1 to 246."""
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    for exponent in (9, 10, 100, 127, 253, 254):
        amax = mantissas | np.uint32(exponent << 23)
        offset = (amax + np.uint32(0x1FFFFF)) >> np.uint32(23)
        scaled = torch.from_numpy(amax.view(np.float32) * np.float32(1 / 448))
        expected = formats.encode_e8m0(scaled).numpy().astype(np.uint32)
        plain = (offset >= 9) & (offset <= 254)
        assert np.array_equal(offset[plain] - 8, expected[plain])
        assert plain.all() or exponent == 254


PASSED = "tile/bf16/passed_tiles.cuh"
PIPELINE = "tile/pipeline.cuh"
MISTAKES = {  # name -> tile, whether rows are special, source, old text, new text
    "a warp's part of a block alone": (
        *("m8n64_swap", False, SOURCE),
        *("max_of_two(max_of_two(all.x, all.y), max_of_two(all.z, all.w))", "all.x"),
    ),
    "one of two warps alone": ("m8n128_swap", False, SOURCE, "return max_of_two(all.x, all.y);", "return all.x;"),
    "half of the lanes": ("m8n64_swap", False, SOURCE, "b < 32; b *= 2", "b < 16; b *= 2"),
    "one row's scale for both": (
        "m8n64_swap",
        False,
        SOURCE,
        "both & 0xffff, both >> 16",
        "both & 0xffff, both & 0xffff",
    ),
    "another mantissa than that of 448": ("m8n64_swap", False, SOURCE, "(amax + 0x1fffffu)", "(amax + 0x0fffffu)"),
    "no meeting behind the parts": (
        *("m8n64_swap", False, SOURCE),
        *("  sync();\n  uint32_t least", "  uint32_t least"),
    ),
    "no meeting before the next tile's parts": (
        *("m8n64_swap", False, SOURCE),
        *("  sync();  // all have read the table of the output tile before\n", ""),
    ),
    "everything is plain": ("m8n64_swap", True, SOURCE, "__all_sync(~0u, is_plain)", "true"),
    "magnitudes over scales that others read": (
        *("m8n64_swap", True, SOURCE),
        *("  sync();  // all have read the scales\n", ""),
    ),
    "a block meets the warps of another": ("m32n128_swap", False, "tile/lane_exchange.cuh", "block == 0)", "true)"),
    "the next tile not passed": ("m8n64_swap", False, PIPELINE, "if (kt == 0) pass_tile(", "if (kt == 1) pass_tile("),
    "the first tile not passed": ("m8n64_swap", False, PIPELINE, "      pass_tile(smem, 0, m_tile, coord.n);\n", ""),
    "a tile of another place": ("m8n64_swap", False, PIPELINE, "m.row_end, n_tile);", "m.row_end, 0);"),
    "what another warp keeps": ("m8n64_swap", False, PASSED, "smem.kept_tile(warp)", "smem.kept_tile(warp ^ 1)"),
    "kept before others have read": ("m8n64_swap", False, PASSED, "if (lane_id() == 0)", "if (lane_id() == 8)"),
    "biases of another row": (
        "m8n64_swap",
        False,
        "tile/swiglu_epilogue.cuh",
        "of_row(q * 16 + 8, g)",
        "of_row(q * 16, g)",
    ),
    "biases of the first expert": (
        *("m8n64_swap", False, "tile/swiglu_epilogue.cuh"),
        *("static_cast<int64_t>(m_tile.expert) * n + row0 + lane", "row0 + lane"),
    ),
}
HARMLESS = "kept before others have read"  # any lane may write: a control
QUICK = (
    "a warp's part of a block alone",
    "no meeting behind the parts",
    "everything is plain",
    "the next tile not passed",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.ptx_full) for name in MISTAKES if name != HARMLESS],
)
def test_a_mistake_is_noticed(name: str) -> None:
    tile, special, *source = MISTAKES[name]
    file, old, new = source
    changed = mutants.compiled(MANIFEST.tile(tile), (file, old, new), MXFP4_BF16, "90a")
    with pytest.raises((Fault, AssertionError)) as caught:
        check(MANIFEST.tile(tile), "swiglu, bias, bfloat16", special, changed, ready=True)
    print(f"\n{name}: {caught.value.kind.value if isinstance(caught.value, Fault) else 'wrong result'}")


@pytest.mark.ptx_full
def test_what_changes_nothing_is_not_noticed() -> None:
    tile, special, *source = MISTAKES[HARMLESS]
    file, old, new = source
    changed = mutants.compiled(MANIFEST.tile(tile), (file, old, new), MXFP4_BF16, "90a")
    check(MANIFEST.tile(tile), "swiglu, bias, bfloat16", special, changed)
