"""What each kernel of csrc/moe must do, executed as SM12x's PTX: the checks of test_ptx_moe.py, one call each.

The wheel's own operators make the launches (ptx/launch.py), ptx/machine.py executes them. What precedes a kernel in a
layer, and what it therefore may not read before griddepcontrol.wait, is not there until then. Results are exact, but
for what an exp reaches: PTX leaves its last bits open. The same checks tell whether a mistake in the sources is noticed
(ptx/moe_mutations.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from moe_cases import (
    BF16,
    FP16,
    MXFP8,
    MXFP8_IN_BF16,
    NUMBERS,
    ids_of,
    layer_of,
    ordinal,
    rows_of,
    same_halves,
    special_rows,
)
from ptx import launch
from ptx.running import Run, execute
from ptx.workspace import intermediates
from torch import Tensor

from mxfp4_moe import formats, reference, tiles
from mxfp4_moe.activations import Activation
from mxfp4_moe.problems import bits

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
ROUTES = ("route", "route_few", "topk_softmax")
FINALIZES = ("finalize", "finalize_strips")
TOPK_TOLERANCE = {"rtol": 3e-6, "atol": 1e-30}  # an exp, a sum in another order, a division; as on a GPU
TILE = tiles.Tile(m=16, n=128, swap_ab=True)  # its GEMM1 applies the activation; not run here


def operator(
    sources: Sequence[str], name: str, *args: Any, early: Sequence[str] = (), arch: str = "120f", **inputs: Any
) -> Run:
    """Runs torch.ops.mxfp4_moe.<name>; `inputs` are the tensors among its arguments, by name.

    arch: of the GPU for which the operator launches; the PTX is that of SM12x in any case.
    """
    for source in sources:
        launch.ptx_of_moe(source)
    recording = launch.shared_recorder().operator(name, *args, arch=arch)
    return execute(recording, [launch.ptx_of_moe(source) for source in sources], inputs, early=early)


def check_route(ids: Tensor, experts: int, tile_m: int, *, arch: str = "120f", blocks: int = 1) -> None:
    done = operator(ROUTES, "route", ids, experts, tile_m, ids=ids, early=["ids"], arch=arch)
    [one] = done.recording.launches
    assert one.cluster == one.grid == (blocks, 1, 1)
    offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles = done.results
    expected_offsets, expected_row_slot, expected_slot_row = reference.route(ids, experts)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(row_slot, expected_row_slot)
    assert torch.equal(slot_row, expected_slot_row)
    valid = int(offsets[-1])
    assert torch.equal(row_expert[:valid].long(), torch.arange(experts).repeat_interleave(offsets.diff()))
    assert (row_expert[valid:] == -1).all()
    expected_tiles = reference.m_tiles(expected_offsets, tile_m)
    assert num_m_tiles.tolist() == [len(expected_tiles)]
    assert torch.equal(m_tiles[: len(expected_tiles)], expected_tiles)
    assert not done.written(m_tiles)[len(expected_tiles) :].any(), "m-tiles past their number are nobody's"


def check_route_of(tokens: int, top_k: int, experts: int, tile_m: int, dtype: torch.dtype) -> None:
    check_route(ids_of(tokens, top_k, experts, dtype, CPU), experts, tile_m)


def logits_of(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Among the tokens are ties, zeros of both signs, NaN and infinities."""
    g = torch.Generator().manual_seed(experts)
    logits = (torch.randn(tokens, experts, generator=g) * 3).to(dtype)
    if tokens > 7:
        logits[1] = torch.randint(-1, 2, (experts,), generator=g)
        logits[2, ::2], logits[2, 1::2] = 0.0, -0.0
        logits[3, experts // 2], logits[4, experts // 3] = torch.nan, torch.inf
        logits[5], logits[6, 0] = -torch.inf, -torch.inf
    return logits


def check_topk_softmax(experts: int, dtype: torch.dtype, renormalize: bool) -> None:
    logits, top_k = logits_of(8, experts, dtype), min(5, experts)
    done = operator(ROUTES, "route_topk", logits, top_k, renormalize, logits=logits, early=["logits"])
    weights, ids = done.results
    expected_weights, expected_ids = reference.topk_softmax(logits, top_k, renormalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, equal_nan=True, **TOPK_TOLERANCE)


def first_of_layer(
    kernels: int, hidden: Tensor, logits: Tensor, top_k: int, experts: int, first_expert: int = 0
) -> Run:
    """Of a whole layer's launches, the first `kernels`. What it reads was written by the kernel just before it."""
    recorder = launch.shared_recorder()
    ptx = [launch.ptx_of_moe(source) for source in (*ROUTES, "quantize_permute", "permute", *FINALIZES, "activation")]
    launch.ptx_of_tile(TILE)
    recorder.register_tile(TILE)
    w13, w2 = (torch.empty(experts, formats.weight_bytes(*shape), dtype=torch.uint8) for shape in layer_shapes(hidden))
    numbers = (Activation.SWIGLU.code, 0.0, 0.0, math.inf, TILE.m, TILE.n)
    recording = recorder.operator(
        "fused_moe",
        *(hidden, None, None, logits, top_k, w13, None, w2, None, 32, *numbers, torch.empty_like(hidden)),
        first_expert=first_expert,
    )
    del recording.launches[kernels:]
    return execute(recording, ptx, {"logits": logits, "hidden": hidden}, early=["logits", "hidden"])


def layer_shapes(hidden: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """N and K of the two GEMMs with intermediate size 32."""
    width = hidden.shape[1]
    return (64, width), (width, 32)


def check_quantize_permute(width: int, dtype: torch.dtype, tokens: int, row_format: int = MXFP8) -> None:
    x = special_rows(width, dtype).repeat(-(-tokens // 9), 1)[:tokens].contiguous()
    top_k, experts = (5, 5) if tokens < 100 else (1, 3)
    ids = ids_of(tokens, top_k, experts, torch.int32, CPU)
    offsets, row_slot, slot_row = reference.route(ids, experts)
    inputs = {"hidden_states": x, "slot_row": slot_row}
    arguments = (x, slot_row, top_k, row_format)
    done = operator(["quantize_permute"], "quantize_permute", *arguments, **inputs, early=["slot_row"])
    check_rows(done, *rows_of(x, row_format), row_slot[: int(offsets[-1])] // top_k)


def check_quantize_permute_behind_route() -> None:
    """Nothing but the rows' numbers comes from route, so the rest is done before that has finished."""
    top_k, experts = 3, 5
    x, logits = special_rows(160, torch.bfloat16), logits_of(9, experts, torch.float32)
    done = first_of_layer(2, x, logits, top_k, experts)
    sizes = {"slots": 27, "hidden": 160, "inter": 32, "experts": experts, "tile_m": TILE.m}
    own = intermediates(done.recording, **sizes, gemm1_width=0, from_logits=True)
    _, row_slot, _ = reference.route(reference.topk_softmax(logits, top_k)[1], experts)
    codes, scales = formats.quantize_mxfp8(x)
    assert torch.equal(own["rows1"], formats.interleave_k(codes[row_slot // top_k]))
    assert torch.equal(own["scales1"][:, :27], formats.pack_row_scales(scales[row_slot // top_k])[:, :27])


def check_rows(done: Run, expected: Tensor, expected_scales: Tensor | None, token: Tensor) -> None:
    """Rows of these tokens, and nothing behind them."""
    rows, scales = done.results
    valid = len(token)
    assert not done.written(rows)[valid:].any()
    if expected_scales is None:
        assert scales.numel() == 0
        assert same_halves(rows[:valid], expected[token])
        return
    assert torch.equal(rows[:valid], formats.interleave_k(expected[token]))
    assert torch.equal(scales[:, :valid], formats.pack_row_scales(expected_scales[token])[:, :valid])
    assert not done.written(scales)[:, valid:].any()


def check_permute(width: int, swizzled: bool, tokens: int, row_format: int = MXFP8) -> None:
    """Every code, and scale bytes of all sizes: those above 248 become NaN blocks."""
    g = torch.Generator().manual_seed(width)
    top_k, experts = (3, 5) if tokens < 100 else (1, 2)
    codes = torch.randint(0, 256, (tokens, width), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, 256, (tokens, width // 32), generator=g, dtype=torch.uint8)
    scales[1], scales[2], scales[3], scales[4] = 248, 249, 255, 0
    given = formats.swizzle_scales(scales).flatten() if swizzled else scales
    ids = ids_of(tokens, top_k, experts, torch.int32, CPU)
    offsets, row_slot, slot_row = reference.route(ids, experts)
    inputs = {"hidden_states": codes, "scale": given, "slot_row": slot_row}
    arguments = (codes, given, swizzled, slot_row, top_k, row_format)
    done = operator(["permute"], "permute", *arguments, **inputs, early=["slot_row"])
    plain = reference.mxfp8_rows(codes, given, "swizzled" if swizzled else "linear")
    expected = plain if row_format == MXFP8 else (formats.mxfp8_to_bf16(*plain), None)
    if row_format == MXFP8_IN_BF16:
        assert expected[0].isinf().any(), "2^121 times 448"
    check_rows(done, *expected, row_slot[: int(offsets[-1])] // top_k)


def activated(
    gemm1: Tensor,
    row_expert: Tensor,
    weights: Any,
    rounding: torch.dtype | None,
    valid: int,
    row_format: int = MXFP8,
) -> tuple[Tensor, Tensor]:
    """The kernel's codes in plain order and its scales, of the valid rows; or its rows of 16-bit floats and nothing."""
    rows = len(gemm1)
    offsets = torch.full((weights.num_experts + 1,), valid, dtype=torch.int32)
    numbers = (weights.alpha, weights.beta, weights.limit)
    each = [n if isinstance(n, Tensor) else None for n in numbers]
    alpha, beta, limit = (0.0 if isinstance(n, Tensor) else n for n in numbers)
    inputs = {"gemm1": gemm1, "row_expert": row_expert, "offsets": offsets}
    biases = {} if weights.w13_bias is None else {"bias": weights.w13_bias}
    own = {f"number {i}": n for i, n in enumerate(each) if n is not None}
    arguments = (gemm1, row_expert, offsets, weights.w13_bias, weights.activation.code)
    arguments += (alpha, beta, math.inf if limit is None else limit, *each, (None, *HALVES).index(rounding), row_format)
    done = operator(["activation"], "activation", *arguments, **inputs, **biases, **own, early=list(inputs))
    made, scales = done.results
    inter = made.shape[1]
    assert not done.written(made)[valid:].any()
    if row_format != MXFP8:
        assert scales.numel() == 0
        return made[:valid], scales
    assert not done.written(scales)[:, valid:].any()
    padding = scales.transpose(0, 1)[:valid].flatten(1)[:, inter // 32 :]
    assert not padding.any(), "scale bytes past the row must be zero"
    return formats.deinterleave_k(made[:valid]), formats.unpack_row_scales(scales, rows, inter)[:valid]


def check_activation_in_halves(row_format: int, rounding: torch.dtype | None) -> None:
    """Without an exp every bit is known: magnitudes from bfloat16's denormals to its largest, ties, NaN, infinities."""
    rows, inter = 7, 160
    g = torch.Generator().manual_seed(11)
    gemm1 = torch.randn(rows, inter, generator=g)
    gemm1 *= (
        torch.randint(-130, 126, (rows, inter // 32, 1), generator=g)
        .float()
        .exp2()
        .repeat_interleave(32, -1)
        .view(rows, inter)
    )
    gemm1[0] = 1 + torch.arange(inter) * 2.0**-8  # every second one is a tie
    gemm1[1] = torch.arange(inter) * 2.0**-134
    gemm1[2, :4] = torch.tensor([torch.nan, torch.inf, torch.finfo(torch.float32).max, -0.0])
    gemm1[3] = 1 + torch.arange(inter) * 2.0**-11  # the same of float16
    gemm1[4] = torch.arange(inter) * 2.0**-25  # its denormals
    gemm1[5] = -65504.0 - torch.arange(inter) * 0.25  # beyond its largest from 65520 on
    weights = layer_of(5, inter, "identity", "one for all", bias=False, device=CPU)
    row_expert = torch.arange(rows, dtype=torch.int32) % 5
    made, _ = activated(gemm1, row_expert, weights, rounding, rows, row_format)
    values = gemm1 if rounding is None else gemm1.to(rounding).float()
    expected, _ = rows_of(values, row_format)
    assert same_halves(made, expected)


def check_activation(
    activation: str,
    with_bias: bool,
    rounding: torch.dtype | None,
    numbers: str | None = None,
    row_format: int = MXFP8,
) -> None:
    """An exp's last bits move a code to its neighbour when the value lies near a tie, and nothing else; so in float16.

    Args:
        row_format: MXFP8, or FP16, whose infinities and NaNs stand where the reference's do.
    """
    which = list(Activation).index(Activation(activation))
    experts, rows, inter = 5, 6, (32, 160, 96)[which % 3]
    numbers = numbers or list(NUMBERS)[(which + with_bias + (rounding is None)) % 3]
    weights = layer_of(experts, inter, activation, numbers, bias=with_bias, device=CPU)
    g = torch.Generator().manual_seed(inter)
    gemm1 = torch.randn(rows, weights.w13_rows, generator=g) * 4
    gemm1[0, 0], gemm1[1, 8], gemm1[2, 0] = torch.nan, torch.nan, torch.inf
    gemm1[3, 0], gemm1[3, 1], gemm1[3, 9] = -200.0, 200.0, 1e30
    row_expert = torch.arange(rows, dtype=torch.int32) % experts
    made, scales = activated(gemm1, row_expert, weights, rounding, rows - 1, row_format)
    each = (weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, weights.w13_bias, activation, *each, rounding=rounding)[:-1]
    expected, expected_scales = rows_of(values, row_format)
    if row_format == FP16:
        nan = made.isnan()
        assert torch.equal(nan, expected.isnan())
        stored = [rows.masked_fill(nan, 0).view(torch.int16).int() for rows in (made, expected)]
        numbered = [torch.where(one < 0, -(one & 0x7FFF), one) for one in stored]  # neighbours differ by one
        off = (numbered[0] - numbered[1]).abs()
    else:
        assert expected_scales is not None
        assert torch.equal(scales, expected_scales)
        off = (ordinal(made) - ordinal(expected)).abs()
    assert off.max() <= 1
    assert off.sum() <= 2
    if activation in ("relu", "relu2", "identity"):
        assert not off.any()


def check_activation_of_many_rows() -> None:
    """From 4096 rows on a block has eight, whose expert changes among them. Most here are not valid."""
    rows, valid, inter = 4099, 19, 160
    weights = layer_of(5, inter, "relu", "one for all", bias=True, device=CPU)
    g = torch.Generator().manual_seed(3)
    gemm1 = torch.randn(rows, inter, generator=g) * 4
    row_expert = torch.randint(0, 5, (rows,), generator=g, dtype=torch.int32)
    codes, scales = activated(gemm1, row_expert, weights, None, valid)
    values = reference.activate(gemm1[:valid], row_expert[:valid], weights.w13_bias, "relu")
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)


def check_activation_rounding(rounding: torch.dtype) -> None:
    """Ties, denormals, float16's overflow, and what is rounded before the bias."""
    rows, inter = 5, 160
    g = torch.Generator().manual_seed(7)
    gemm1 = torch.randn(rows, inter, generator=g)
    gemm1 *= torch.randint(-40, 18, (rows, 1), generator=g).float().exp2()
    step = 2.0 ** (-8 if rounding is torch.bfloat16 else -11)
    gemm1[0] = 1 + torch.arange(inter) * step  # every second one is a tie
    gemm1[1] = 65504 + torch.arange(inter) / 8  # past 65520 float16 is infinity
    gemm1[2] = torch.arange(inter) * 2.0**-25  # ties of float16's denormals
    weights = layer_of(5, inter, "identity", "one for all", bias=True, device=CPU)
    row_expert = torch.arange(rows, dtype=torch.int32)
    codes, scales = activated(gemm1, row_expert, weights, rounding, rows)
    assert weights.w13_bias is not None
    values = (gemm1.to(rounding).float() + weights.w13_bias[row_expert]).to(rounding).float()
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    assert bool((codes[1] == formats.E4M3_NAN).any()) == (rounding is torch.float16)


def check_finalize(tokens: int, top_k: int, width: int, dtype: torch.dtype, with_bias: bool) -> None:
    experts = 6
    g = torch.Generator().manual_seed(width + top_k)
    ids = ids_of(tokens, top_k, experts, torch.int32, CPU)
    ids[3] = -1
    _, row_slot, slot_row = reference.route(ids, experts)
    row_expert = torch.where(row_slot >= 0, ids.flatten()[row_slot.long()], -1).to(torch.int32)
    rows = torch.randn(tokens * top_k, width, generator=g).to(reference.ROW_DTYPES[dtype])
    topk_weights = torch.rand(tokens, top_k, generator=g)
    bias = torch.randn(experts, width, generator=g) if with_bias else None
    inputs = {"gemm2": rows, "slot_row": slot_row, "row_expert": row_expert, "topk_weights": topk_weights}
    biases = {} if bias is None else {"bias": bias}
    done = operator(FINALIZES, "finalize", rows, slot_row, row_expert, topk_weights, bias, **inputs, **biases)
    (launched,) = done.recording.launches
    assert ("finalize_strips" in launched.kernel) == (with_bias and tokens * top_k >= 4096)
    expected = reference.finalize(rows, topk_weights, slot_row, row_expert, bias)
    assert torch.equal(bits(done.results), bits(expected))
    assert not bits(done.results[3]).any()


def halves_of_stored_sums(problem: Any, applied: Any, experts: int, row_format: int = BF16) -> Tensor:
    """What csrc/moe's activation kernel makes of a problem's expected sums, bf16 or fp16 rows. Its exp is the tiles'.

    Args:
        problem: a GEMM's, with `valid`, `offsets` and `expected`.
        applied: the activation as a tile's epilogue is told it (ptx/tile_cases.py).
        row_format: BF16 or FP16 of moe_cases.py.
    """
    valid = problem.valid
    row_expert = torch.repeat_interleave(torch.arange(experts), problem.offsets.diff()).to(torch.int32)
    rounding = None if applied.rounding is torch.float32 else applied.rounding
    numbers = {"alpha": applied.alpha, "beta": applied.beta, "limit": applied.limit}
    weights = SimpleNamespace(num_experts=experts, w13_bias=applied.bias, activation=applied.activation, **numbers)
    sums = problem.expected[:valid].contiguous()
    made, _ = activated(sums, row_expert, weights, rounding, valid, row_format)
    if isinstance(applied.limit, float) and math.isinf(applied.limit):
        numbers["limit"] = None
    values = reference.activate(sums, row_expert, applied.bias, applied.activation, **numbers, rounding=rounding)
    off = (made.view(torch.int16).int() - values.to(made.dtype).view(torch.int16).int()).abs()
    assert off.max() <= 1, "torch's exp has other last bits"
    assert (off != 0).float().mean() < 5e-3
    return made
