"""Grouped-GEMM problems and layers of the pairs with FP4 or fp16 rows or NVFP4 weights, with what each must give.

For the self-test, as `problems` for MXFP4 weights with MXFP8 and bf16 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import formats, problems
from ._mma.operands import fp4_to_bf16
from .arithmetic import Arithmetic, gemm
from .formats import WeightFormat
from .formats.weight_layout import ACTIVATION_NAMES
from .problems import GemmProblem
from .weights import MoEWeights

_WEIGHTS = tuple(WeightFormat)  # csrc/tile_abi.h, Mxfp4MoeWeightFormat
_E4M3_LARGEST = 0x7E  # as a byte; the next is NaN


@dataclass(frozen=True, kw_only=True)
class PairProblem(GemmProblem):
    """Rows as the pair's activations: 16-bit floats [R, K], or packed E2M1 [R, K/2] with scales [R, K/32] or [R, K/16].

    Scales of NVFP4 weights are [E, N, K/16]. Sums of NVFP4 weights are multiplied by a factor of the weight row, times
    one of the row where that is NVFP4 too: its own, or its expert's. Under float16 rows all weights have such a factor,
    in which what they are divided by is (`formats.fp16_factor`, `formats.FP16_NVFP4_UNIT`).
    """

    pair: str
    of_weights: Tensor | None = None  # float32 [E, 2]: of columns c with c % 16 < 8, and of the others
    of_rows: Tensor | None = None  # float32 [R]
    of_inputs: Tensor | None = None  # float32 [E]

    @property
    def weight_format(self) -> WeightFormat:
        return WeightFormat(self.pair.split("_")[0])

    @property
    def activation_format(self) -> str:
        return self.pair.split("_")[1]

    @property
    def is_folded(self) -> bool:
        """Whether the kernels of the problem's device read the values of FP4 rows in bfloat16."""
        return self.row_scales is not None and problems.arithmetic_here(self.rows.device).operands == "bf16"

    @functools.cached_property
    def weight(self) -> Tensor:
        """As `GemmProblem.weight`."""
        order = formats.word_order_of(self.packed.device, self.activation_format)
        words = self.weight_format.scale_words
        experts = zip(self.packed, self.scales, strict=True)
        return torch.stack([formats.arrange_weights(packed, scales, order, words) for packed, scales in experts])

    @functools.cached_property
    def act(self) -> tuple[Tensor, Tensor | None]:
        """As `GemmProblem.act`."""
        if self.row_scales is None:
            return self.rows, None
        if self.is_folded:
            codes = torch.stack((self.rows & 15, self.rows >> 4), -1).flatten(-2)
            return fp4_to_bf16(codes, self.row_scales, formats.BLOCK // self.weight_format.scale_words), None
        words = 2 if self.activation_format == "nvfp4" else 1
        whole = torch.nn.functional.pad(self.row_scales, (0, -self.row_scales.shape[1] % (4 * words)))
        return self.rows, formats.pack_row_scales(whole)

    @property
    def options(self) -> dict[str, Any]:
        """As `GemmProblem.options`."""
        read = "bf16" if self.is_folded else self.activation_format
        codes = _WEIGHTS.index(self.weight_format), ACTIVATION_NAMES.index(read)
        factors = {
            "weight_factors": self.of_weights,
            "row_factors": self.of_rows,
            "input_factors": self.of_inputs,
        }
        return {"weight_format": codes[0], "act_format": codes[1], **factors}

    def factors(self) -> Tensor | None:
        """What the sums [R, N] are multiplied by, float32 as the kernels have it; 1 for rows of no expert."""
        if self.of_weights is None:
            return None
        made = torch.ones(len(self.rows), self.packed.shape[1], dtype=torch.float32, device=self.rows.device)
        of_columns = self.column_factors()
        assert of_columns is not None
        for e, (begin, end) in enumerate(pairwise(self.offsets.tolist())):
            of_rows = 1.0 if self.of_rows is None else self.of_rows[begin:end, None]
            of_input = 1.0 if self.of_inputs is None else self.of_inputs[e]
            made[begin:end] = of_columns[e] * of_rows * of_input
        return made

    def column_factors(self) -> Tensor | None:
        """The weights' part of them, float32 [E, N]."""
        column = torch.arange(self.packed.shape[1], device=self.rows.device) % 16 // 8
        return None if self.of_weights is None else self.of_weights[:, column]

    def sums(self, rule: Arithmetic, columns: int | None = None) -> Tensor:
        """As `GemmProblem.sums`."""
        factors = self.factors()
        packed, scales = self.packed[:, :columns], self.scales[:, :columns]
        out = torch.zeros(len(self.rows), packed.shape[1], dtype=torch.float32, device=self.rows.device)
        for e, (begin, end) in enumerate(pairwise(self.offsets.tolist())):
            if begin == end:
                continue
            own = slice(begin, end)
            of_rows = None if self.row_scales is None else self.row_scales[own]
            operands = (self.rows[own], of_rows, packed[e].contiguous(), scales[e].contiguous())
            factor = None if factors is None else factors[own, :columns]
            gemm(rule, *operands, out[own], pair=self.pair, factor=factor)
        return out


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """Random numbers of a problem, and the sizes of its operands."""

    pair: str
    k: int
    n: int
    device: torch.device
    g: torch.Generator
    offsets: Tensor
    rows: int
    experts: int

    @classmethod
    def make(cls, pair: str, k: int, n: int, device: torch.device) -> _Draw:
        offsets = problems.offsets_of(problems.ROWS_PER_EXPERT, device)
        rows, experts = int(offsets[-1]) + problems.ROWS_OF_NO_EXPERT, len(problems.ROWS_PER_EXPERT)
        g = torch.Generator(device).manual_seed(1000 * k + n)
        return cls(pair=pair, k=k, n=n, device=device, g=g, offsets=offsets, rows=rows, experts=experts)

    @property
    def block(self) -> int:
        """Values under one scale, of weights and of rows alike."""
        return 16 if self.pair.startswith("nvfp4") else 32

    @property
    def acts(self) -> str:
        return self.pair.split("_")[1]

    @property
    def float_rows(self) -> torch.dtype | None:
        """Of rows that are not quantized."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.acts)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.g, device=self.device)

    def bytes(self, low: int, high: int, *shape: int) -> Tensor:
        return self.integers(low, high, *shape).to(torch.uint8)

    def scale_of(self, exponents: Tensor) -> Tensor:
        """The scale 2^exponent, in the bytes of the weights' format."""
        if self.block == 32:
            return (127 + exponents).to(torch.uint8)
        return formats.encode_e4m3(exponents.float().exp2())

    def factors(self, some: Callable[..., Tensor], each_row: bool, packed: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """Those that the pair has, of a function (shape) -> float32, and of the weights in float16."""
        if self.block == 32:
            if self.acts != "fp16":
                return {}
            largest = [formats.largest_scale(*expert) for expert in zip(packed, scales, strict=True)]
            return {"of_weights": formats.fp16_factor(torch.stack(largest)).unsqueeze(1).expand(-1, 2).contiguous()}
        made = {"of_weights": some(self.experts, 2) * (formats.FP16_NVFP4_UNIT if self.acts == "fp16" else 1.0)}
        if self.acts == "nvfp4":
            made |= {"of_rows": some(self.rows)} if each_row else {"of_inputs": some(self.experts)}
        return made


def exact_problem(pair: str, what: str, k: int, n: int, device: torch.device) -> PairProblem:
    """A problem whose sums are exact in float64, in float32, and in any arithmetic with 20 bits or more.

    Expected values come from float64, not from the oracle. Scales and factors are powers of two.

    Args:
        what: "one-hot", rows that pick one weight each; "sparse", five of +-1 in each row; "integers", dense rows with
            scales that cancel, K at most 2912.
    """
    draw = _Draw.make(pair, k, n, device)
    rows, experts, blocks = draw.rows, draw.experts, k // draw.block
    row, block = torch.arange(rows, device=device), torch.arange(blocks, device=device)
    of_weights = torch.zeros(experts, n, blocks, dtype=torch.int64, device=device)
    values = torch.zeros(rows, k, dtype=torch.float64, device=device)
    if what == "one-hot":
        values[row, (row * 37 + 11) % k] = 1.0
        of_rows = (row[:, None] + block) % 5
        e, column = torch.arange(experts, device=device), torch.arange(n, device=device)
        of_weights = (e[:, None, None] + column[None, :, None] * 3 + block) % 7 - 3
    elif what == "sparse":
        anywhere = torch.randperm(k, generator=draw.g, device=device)
        hot = anywhere[torch.arange(rows * 5, device=device) % k].view(rows, 5)
        values.scatter_(1, hot, 1.0 - 2.0 * draw.integers(0, 1, rows, 5).double())
        of_rows, of_weights = draw.integers(0, 1, rows, blocks), draw.integers(0, 1, experts, n, blocks)
    else:
        assert k * 6 * 6 * 4 < 2**20 or draw.float_rows
        if draw.float_rows:
            values = draw.integers(-15, 15, rows, k).double()
        else:
            values = _e2m1(draw.bytes(0, 15, rows, k), device)
        shift = draw.integers(-6, 6, blocks)
        of_rows, of_weights = shift.expand(rows, -1), (-shift).expand(experts, n, -1)
    packed = draw.bytes(0, 255, experts, n, k // 2)
    a = values * of_rows.double().exp2().repeat_interleave(draw.block, 1)
    b = formats.decode_e2m1(packed).double() * of_weights.double().exp2().repeat_interleave(draw.block, 2)
    if draw.float_rows:
        held: tuple[Tensor, Tensor | None] = a.to(draw.float_rows), None
    else:
        held = formats.encode_e2m1(values.float()), draw.scale_of(of_rows).contiguous()

    def power(*shape: int) -> Tensor:
        return draw.integers(-3, 3, *shape).float().exp2()

    expected = torch.zeros(rows, n, dtype=torch.float32, device=device)
    scales = draw.scale_of(of_weights).contiguous()
    problem = PairProblem(
        pair=pair,
        rows=held[0],
        row_scales=held[1],
        packed=packed,
        scales=scales,
        offsets=draw.offsets,
        expected=expected,
        **draw.factors(power, what != "sparse", packed, scales),
    )
    factors = problem.factors()
    if pair == "mxfp4_fp16":  # nothing but what undoes that weights are relative to a scale
        factors = None
    elif pair == "nvfp4_fp16" and factors is not None:
        factors = factors / formats.FP16_NVFP4_UNIT
    for expert, (begin, end) in enumerate(pairwise(draw.offsets.tolist())):
        sums = a[begin:end] @ b[expert].T
        expected[begin:end] = (sums if factors is None else sums * factors[begin:end]).float() + 0.0
    return problem


def _e2m1(codes: Tensor, device: torch.device) -> Tensor:
    return torch.tensor(formats.E2M1_VALUES, dtype=torch.float64, device=device)[codes.long()]


def random_problem(
    pair: str, k: int, n: int, device: torch.device, rule: Arithmetic, *, wide_scales: bool = False
) -> PairProblem:
    """Random bits in every operand, and what must come out under a rule.

    E8M0 scales cover 61 binades; with `wide_scales` E8M0's range, as in `problems.random_problem`. E4M3 scales are any
    that weights may have. bfloat16 rows are normals of many magnitudes, and so are float16 rows, within its range; with
    them, and without `wide_scales`, E8M0 scales cover 31 binades, so that of weights some are exact, some rounded, and
    a few 0.
    """
    draw = _Draw.make(pair, k, n, device)
    rows, experts, blocks = draw.rows, draw.experts, k // draw.block
    if draw.block == 16:
        row_scales = draw.bytes(0, _E4M3_LARGEST, rows, blocks)
        scales = draw.bytes(0, _E4M3_LARGEST, experts, n, blocks)
    elif wide_scales:
        center = draw.integers(20, 234, blocks)
        row_scales = (center + draw.integers(-10, 10, rows, blocks)).to(torch.uint8)
        scales = (254 - center + draw.integers(-10, 10, experts, n, blocks)).to(torch.uint8)
    elif draw.acts == "fp16":
        row_scales, scales = draw.bytes(0, 0, rows, blocks), draw.bytes(112, 142, experts, n, blocks)
    else:
        row_scales, scales = draw.bytes(97, 157, rows, blocks), draw.bytes(97, 157, experts, n, blocks)
    if draw.float_rows:
        ends = (-20, 20) if draw.acts == "bf16" else (-18, 12)  # 2^12 times 8, which no normal number is, is in range
        magnitude = draw.integers(*ends, rows, k // 32, 1).float().exp2()
        values = torch.randn(rows, k // 32, 32, generator=draw.g, dtype=torch.float32, device=device) * magnitude
        held: tuple[Tensor, Tensor | None] = values.flatten(1).to(draw.float_rows), None
    else:
        held = draw.bytes(0, 255, rows, k // 2), row_scales
    packed = draw.bytes(0, 255, experts, n, k // 2)
    if pair == "mxfp4_fp16":  # zeros under larger scales than any weight has
        packed[:, 3:5, :16] &= 0x88
        scales[:, 3, 0], scales[:, 4, 0] = scales.amax() + 1, 253

    def some(*shape: int) -> Tensor:
        return 0.01 * (0.5 + torch.rand(shape, generator=draw.g, dtype=torch.float32, device=device))

    problem = PairProblem(
        pair=pair,
        rows=held[0],
        row_scales=held[1],
        packed=packed,
        scales=scales,
        offsets=draw.offsets,
        expected=torch.zeros(rows, n, dtype=torch.float32, device=device),
        **draw.factors(some, k % 128 == 0, packed, scales),
    )
    return replace(problem, expected=problem.sums(rule))


def random_nvfp4_weights(
    experts: int, hidden: int, inter: int, device: torch.device, *, inputs: bool, seed: int = 0
) -> MoEWeights:
    """As `problems.random_weights`, in NVFP4; `inputs`: with scales of the GEMMs' inputs, else each row has its own."""
    g = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=g, device=device)

    def scales(around: float, *shape: int) -> Tensor:
        return around * (0.5 + torch.rand(shape, generator=g, dtype=torch.float32, device=device))

    return MoEWeights.from_nvfp4(
        integers(0, 255, experts, 2 * inter, hidden // 2),
        integers(0x28, 0x50, experts, 2 * inter, hidden // 16),
        integers(0, 255, experts, hidden, inter // 2),
        integers(0x28, 0x50, experts, hidden, inter // 16),
        w13_scale_2=scales(0.1 / hidden**0.5, experts, 2),
        w2_scale_2=scales(0.1 / inter**0.5, experts),
        w13_input_scale=scales(6 / 2688, experts, 2) if inputs else None,
        w2_input_scale=scales(16 / 2688, experts) if inputs else None,
    )
