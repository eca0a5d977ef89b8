"""Whole layers of SM12x with FP4 or fp16 activations or NVFP4 weights, from logits or ids to output, as PTX on the CPU.

As test_ptx_layer.py for MXFP8: fused_moe's own launches into one workspace, each kernel's output compared with the
reference's, bit by bit under SM12x's rules. Everything is exact but the two places where an exp stands: what comes
after them is exact given the kernels' own values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import ids_of
from nvfp4_cases import random_nvfp4, with_biases
from ptx import launch
from ptx.gemm import junk
from ptx.running import Run
from ptx.workspace import intermediates
from torch import Tensor

from mxfp4_moe import arithmetic, formats, reference
from mxfp4_moe.problems import bits, random_weights, relative_error
from mxfp4_moe.reference import fp4
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights, WeightFormat

CPU = torch.device("cpu")
SOURCES = ("route", "route_few", "topk_softmax", "quantize_permute", "nvfp4_permute")
SOURCES += ("activation", "fp4_activation", "finalize")
EXPERTS, HIDDEN, INTER, TOP_K = 6, 160, 96, 2  # K of both GEMMs ends inside of a K tile, N inside of an output tile
CODES = formats.weight_layout.ACTIVATION_NAMES
HALVES = ("bf16", "fp16")
ORDERS = dict.fromkeys(HALVES, formats.WordOrder.PAIRS) | dict.fromkeys(("mxfp4", "nvfp4"), formats.WordOrder.PLAIN)
CLOSE = {
    "mxfp4": 5e-2,
    "nvfp4": 5e-2,
    "bf16": 5e-3,
    "fp16": 1e-3,
}  # to the reference's own exp: a code of FP4 is far from the next


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[launch.Recorder]:
    """One of its own, whose layer knows no tiles of the wheel."""
    one = launch.Recorder(tmp_path, *launch.tools())
    monkeypatch.setattr(launch, "shared_recorder", lambda: one)
    for cached in (launch.ptx_of_tile, launch.ptx_of_moe):
        cached.cache_clear()
    yield one
    for cached in (launch.ptx_of_tile, launch.ptx_of_moe):
        cached.cache_clear()
    one.close()


@dataclass(frozen=True, kw_only=True)
class Case:
    tile: Tile
    pair: str
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    fuses: bool = True  # GEMM1 and the activation
    static: bool = True  # NVFP4 rows under the checkpoint's scales, else each under its own
    from_ids: bool = False  # of one of several ranks: half of them are elsewhere

    @property
    def act_format(self) -> str:
        return self.pair.split("_")[1]

    def weights(self) -> MoEWeights:
        """In the word order of the calls."""
        if self.pair.startswith("mxfp4"):
            made = random_weights(EXPERTS, HIDDEN, INTER, CPU, seed=self.tokens)
        else:
            layer = random_nvfp4(experts=EXPERTS, hidden=HIDDEN, inter=INTER, inputs=self.static, seed=self.tokens)
            made = MoEWeights.from_nvfp4(
                **with_biases(layer), activation="swiglu_oai", alpha=1.702, beta=1.0, limit=7.0
            )
        kind, old, new = made.weight_format, made.word_order, ORDERS[self.act_format]

        def reordered(matrix: Tensor, n: int, k: int) -> Tensor:
            return torch.stack([kind.reorder(one, n, k, old, new) for one in matrix])

        w13, w2 = reordered(made.w13, made.w13_rows, HIDDEN), reordered(made.w2, HIDDEN, INTER)
        made = replace(made, w13=w13, w2=w2, word_order=new)
        return replace(made, first_expert=3, num_global_experts=2 * EXPERTS) if self.from_ids else made


def grouped(
    case: Case, rows: fp4.Fp4Rows, weights: MoEWeights, name: str, offsets: Tensor, columns: Tensor | None
) -> Tensor:
    """A GEMM of the layer by the reference's rule: float32 [R, N]."""
    n, k = (weights.w13_rows, HIDDEN) if name == "w13" else (HIDDEN, INTER)
    out = torch.zeros(len(rows.values), n)
    rule = arithmetic.of_arch("120f", case.pair)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin == end:
            continue
        own = slice(begin, end)
        packed, scales = weights.weight_format.read_rows(
            getattr(weights, name)[e], n, k, slice(0, n), weights.word_order
        )
        factor = None if columns is None else columns[e].expand(end - begin, -1)
        if factor is not None and rows.factor is not None:
            factor = rows.factor[own].unsqueeze(1) * factor
        of_rows = None if rows.scales is None else rows.scales[own]
        arithmetic.gemm(rule, rows.values[own], of_rows, packed, scales, out[own], pair=case.pair, factor=factor)
    return out


def given_scales(case: Case, weights: MoEWeights, which: int, row_expert: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of NVFP4 rows under the checkpoint's scales: each row's, and what undoes it."""
    if case.act_format != "nvfp4" or not case.static:
        return None
    assert weights.tensor_scales is not None
    encode, decode = weights.tensor_scales.input_global_scales(), weights.tensor_scales.input_factors()
    assert encode is not None
    assert decode is not None
    return encode[which][row_expert], decode[which][row_expert]


def assert_rows(case: Case, own: dict[str, Tensor], which: int, rows: fp4.Fp4Rows) -> None:
    """Values, scales and factors as the next GEMM reads them."""
    valid = len(rows.values)
    assert torch.equal(own[f"rows{which}"][:valid].view(torch.uint8), rows.values.view(torch.uint8))
    if rows.scales is not None:
        words = 2 if case.act_format == "nvfp4" else 1
        whole = torch.nn.functional.pad(rows.scales, (0, -rows.scales.shape[1] % (4 * words)))
        assert torch.equal(own[f"scales{which}"][:, :valid], formats.pack_row_scales(whole)[:, :valid])
    if case.act_format == "nvfp4" and not case.static:
        assert rows.factor is not None
        assert torch.equal(bits(own[f"row_factors{which}"][:valid]), bits(rows.factor))


def kernels_rows(case: Case, own: dict[str, Tensor], weights: MoEWeights, row_expert: Tensor) -> fp4.Fp4Rows:
    """What the activation wrote."""
    valid = len(row_expert)
    values = own["rows2"][:valid].clone()
    if case.act_format in HALVES:
        return fp4.Fp4Rows(values, None, None)
    block = 16 if case.act_format == "nvfp4" else 32
    scales = own["scales2"][:, :valid].transpose(0, 1).flatten(1)[:, : INTER // block].contiguous()
    if case.act_format == "mxfp4":
        return fp4.Fp4Rows(values, scales, None)
    given = given_scales(case, weights, 1, row_expert)
    return fp4.Fp4Rows(values, scales, own["row_factors2"][:valid].clone() if given is None else given[1])


def values_of(case: Case, rows: fp4.Fp4Rows) -> Tensor:
    """What a GEMM multiplies with."""
    if case.act_format in HALVES:
        return rows.values.double()
    assert rows.scales is not None
    if case.act_format == "mxfp4":
        return formats.dequantize_mxfp4(rows.values, rows.scales).double()
    assert rows.factor is not None
    return formats.nvfp4_products(rows.values, rows.scales).double() * rows.factor.double().unsqueeze(1)


def column_factors(case: Case, weights: MoEWeights) -> tuple[Tensor | None, Tensor | None]:
    """What the weights' part of the sums' factors is: [E, W] or [E, 1], and [E, 1]."""
    if case.pair == "mxfp4_fp16":  # of codes and scales, and not of what the operator is given
        made = []
        for weight, n, k in ((weights.w13, weights.w13_rows, HIDDEN), (weights.w2, HIDDEN, INTER)):
            plain = [weights.weight_format.read_rows(one, n, k, slice(0, n), weights.word_order) for one in weight]
            made.append(torch.stack([formats.fp16_factor(formats.largest_scale(*one)) for one in plain]).unsqueeze(1))
        return made[0], made[1]
    return fp4._column_factors(weights, 128.0 if case.act_format == "fp16" else 1.0)


SMALL, WIDE, NARROW = Tile(m=8, n=64, swap_ab=True), Tile(m=32, n=128, swap_ab=True), Tile(m=64, n=8, swap_ab=False)
CASES = {
    "mxfp4_mxfp4": Case(tile=SMALL, pair="mxfp4_mxfp4", tokens=5),
    "mxfp4_mxfp4, activation apart, float16": Case(
        tile=NARROW, pair="mxfp4_mxfp4", tokens=40, dtype=torch.float16, fuses=False
    ),
    "mxfp4_mxfp4, ids of which some are elsewhere": Case(tile=WIDE, pair="mxfp4_mxfp4", tokens=9, from_ids=True),
    "nvfp4_nvfp4": Case(tile=SMALL, pair="nvfp4_nvfp4", tokens=5),
    "nvfp4_nvfp4, activation apart": Case(tile=NARROW, pair="nvfp4_nvfp4", tokens=20, fuses=False),
    "nvfp4_nvfp4, a scale for each row": Case(
        tile=WIDE, pair="nvfp4_nvfp4", tokens=7, dtype=torch.float16, fuses=False, static=False
    ),
    "nvfp4_nvfp4, ids of which some are elsewhere": Case(tile=SMALL, pair="nvfp4_nvfp4", tokens=9, from_ids=True),
    "nvfp4_bf16": Case(tile=SMALL, pair="nvfp4_bf16", tokens=5),
    "nvfp4_bf16, ids, activation apart, float16": Case(
        tile=NARROW, pair="nvfp4_bf16", tokens=20, dtype=torch.float16, fuses=False, static=False, from_ids=True
    ),
    "mxfp4_fp16": Case(tile=SMALL, pair="mxfp4_fp16", tokens=5, dtype=torch.float16),
    "mxfp4_fp16, ids, activation apart": Case(
        tile=NARROW, pair="mxfp4_fp16", tokens=20, dtype=torch.float16, fuses=False, from_ids=True
    ),
    "nvfp4_fp16": Case(tile=SMALL, pair="nvfp4_fp16", tokens=5, dtype=torch.float16),
    "nvfp4_fp16, ids, activation apart": Case(
        tile=NARROW, pair="nvfp4_fp16", tokens=20, dtype=torch.float16, fuses=False, static=False, from_ids=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer(name: str, recorder: launch.Recorder) -> None:
    case = CASES[name]
    weights, tile, tokens, dtype = case.weights(), case.tile, case.tokens, case.dtype
    g = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    logits = None if case.from_ids else torch.randn(tokens, EXPERTS, generator=g)
    ids = ids_of(tokens, TOP_K, 2 * EXPERTS, torch.int64, CPU) if case.from_ids else None
    topk_weights = torch.rand(tokens, TOP_K, generator=g) if case.from_ids else None
    out = torch.full((tokens, HIDDEN), float("nan"), dtype=dtype)
    ptx = [*map(launch.ptx_of_moe, SOURCES), launch.ptx_of_tile(tile, pair=case.pair)]
    recorder.register_kernel(tile, case.pair)
    (w13, w13_bias, w2, w2_bias, *numbers), rare = weights.operator_arguments
    if case.act_format == "fp16":
        rare = rare | dict(zip(("w13_factors", "w2_factors"), weights.fp16_factors(), strict=True))
    routing = (topk_weights, ids, logits, 0 if logits is None else TOP_K)
    arguments = (hidden_states, *routing, w13, w13_bias, w2, w2_bias, *numbers, tile.m, tile.n, out)
    code = CODES.index(case.act_format)
    recording = recorder.operator("fused_moe", *arguments, activation_format=code, **rare)
    assert len(recording.launches) == 6 - case.fuses
    written = {"hidden_states": hidden_states, "logits": logits, "ids": ids, "topk_weights": topk_weights}
    written = {key: tensor for key, tensor in written.items() if tensor is not None}
    constant = {"w13": w13, "w13_bias": w13_bias, "w2": w2, "w2_bias": w2_bias}
    constant |= {key: value for key, value in rare.items() if isinstance(value, Tensor)}
    run = Run(recording, ptx, written | constant, outputs={"out": out}, early=list(written), seed=TOP_K)
    sizes: dict[str, Any] = {"slots": tokens * TOP_K, "hidden": HIDDEN, "inter": INTER, "experts": EXPERTS}
    sizes |= {"tile_m": tile.m, "gemm1_width": 0 if case.fuses else weights.w13_rows, "from_logits": not case.from_ids}
    own_scales = case.act_format == "nvfp4" and not case.static
    row_dtype = reference.ROW_DTYPES[dtype]
    own = intermediates(run.recording, **sizes, dtype=row_dtype, act_format=case.act_format, row_factors=own_scales)

    run.next("route")
    if logits is not None:
        expected_weights, ids = reference.topk_softmax(logits, TOP_K)
        topk_weights = own["topk_weights"].clone().view(tokens, TOP_K)
        torch.testing.assert_close(topk_weights, expected_weights, rtol=3e-6, atol=1e-30)
    assert ids is not None
    assert topk_weights is not None
    offsets, row_slot, slot_row = reference.route(ids - weights.first_expert, EXPERTS)
    valid = int(offsets[-1])
    row_expert = torch.arange(EXPERTS).repeat_interleave(offsets.diff())
    assert torch.equal(own["slot_row"], slot_row)

    run.next("nvfp4_permute" if case.act_format == "nvfp4" else "quantize_permute")
    tokens_of_rows = hidden_states[row_slot[:valid] // TOP_K]
    rows = fp4.quantize_rows(tokens_of_rows, case.act_format, given_scales(case, weights, 0, row_expert))
    assert_rows(case, own, 1, rows)

    kernel = "grouped_gemm_mma_sync" if case.act_format in HALVES else "grouped_gemm"
    fetched = ["rows{}"] if case.act_format in HALVES else ["rows{}", "scales{}"]  # tensor copies fetch whole boxes
    for which in fetched:
        run.allow_unwritten(own[which.format(1)])
    run.next(kernel, junk(tile, HIDDEN, case.pair))
    w13_factors, w2_factors = column_factors(case, weights)
    gemm1 = grouped(case, rows, weights, "w13", offsets, w13_factors)
    if not case.fuses:
        assert torch.equal(bits(own["gemm1_out"][:valid]), bits(gemm1))
        run.next("activation" if case.act_format in HALVES else "fp4_activation")
    given = (weights.activation, weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, w13_bias, *given, rounding=None)
    expected = fp4.quantize_rows(values, case.act_format, given_scales(case, weights, 1, row_expert))
    rows2 = kernels_rows(case, own, weights, row_expert)
    found, wanted = values_of(case, rows2), values_of(case, expected)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2, "torch's exp has other last bits"
    assert (found != wanted).double().mean() <= 2e-2

    for which in fetched:
        run.allow_unwritten(own[which.format(2)])
    run.next(kernel, junk(tile, INTER, case.pair))
    gemm2 = grouped(case, rows2, weights, "w2", offsets, w2_factors).to(row_dtype)
    assert torch.equal(bits(own["gemm2_out"][:valid]), bits(gemm2))

    run.next("finalize")
    run.finish()
    assert torch.equal(bits(out), bits(reference.finalize(gemm2, topk_weights, slot_row, row_expert, w2_bias)))
    assert out.isfinite().all()

    # The same from the outside.
    call: dict[str, Any] = {"activation_format": case.act_format, "output_dtype": dtype}
    close = reference.fused_moe(
        hidden_states, topk_weights, ids, weights, **call, arithmetic=arithmetic.of_arch("120f", case.pair)
    )
    assert relative_error(out, close) <= CLOSE[case.act_format]
    other = "bf16" if case.act_format not in HALVES else weights.weight_format.value
    unlike = reference.fused_moe(hidden_states, topk_weights, ids, weights, output_dtype=dtype, activation_format=other)
    assert relative_error(out, unlike) > 5e-2, "other activations are another result"


def test_kinds() -> None:
    """The cases are what their names say: each pair, both kinds of scales, both ways of routing."""
    pairs = {"mxfp4_mxfp4", "nvfp4_nvfp4", "nvfp4_bf16", "mxfp4_fp16", "nvfp4_fp16"}
    assert {case.pair for case in CASES.values()} == pairs
    for pair in pairs:
        assert {case.from_ids for case in CASES.values() if case.pair == pair} == {True, False}
    assert {case.static for case in CASES.values() if case.pair == "nvfp4_nvfp4"} == {True, False}
    assert CASES["nvfp4_nvfp4"].weights().weight_format is WeightFormat.NVFP4
