"""Grouped-GEMM problems and MoE layers with what each must give: for the self-test, and for the GPU tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import formats, reference
from ._install import loading, wheel
from .activations import Activation
from .arithmetic import SM12X_MXF8F6F4, Arithmetic, of_arch
from .tiles import Tile
from .weights import MoEWeights

ROWS_PER_EXPERT = (0, 1, 7, 8, 9, 63, 64, 65, 129, 300, 0, 16)
ROWS_OF_NO_EXPERT = 5  # behind the sorted rows, as a layer has them for ids that are no expert
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(x: Tensor) -> Tensor:
    """A float tensor's bits as integers of its size: equality without NaN's and zero's exceptions."""
    return x.view(_BITS[x.dtype])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@dataclass(frozen=True, kw_only=True)
class GemmProblem:
    """Operands in plain order, and what must come out."""

    rows: Tensor  # uint8 [R, K] E4M3; or bfloat16
    row_scales: Tensor | None  # uint8 [R, K/32]; None of bfloat16 rows
    packed: Tensor  # uint8 [E, N, K/2]
    scales: Tensor  # uint8 [E, N, K/32]
    offsets: Tensor  # int32 [E+1]
    expected: Tensor  # float32 [R, N]; only rows of experts count

    @classmethod
    def with_oracle(
        cls,
        rows: Tensor,
        row_scales: Tensor | None,
        packed: Tensor,
        scales: Tensor,
        offsets: Tensor,
        arithmetic: Arithmetic | None = None,
    ) -> GemmProblem:
        """What must come out under a rule, by default that of the device's kernels."""
        rule = arithmetic or arithmetic_here(rows.device)
        expected = reference.grouped_gemm(rows, row_scales, packed, scales, offsets, arithmetic=rule)
        return cls(rows=rows, row_scales=row_scales, packed=packed, scales=scales, offsets=offsets, expected=expected)

    def in_bf16(self, arithmetic: Arithmetic | None) -> GemmProblem:
        """The same with bfloat16 rows that hold the values of its MXFP8 ones.

        Args:
            arithmetic: a rule that takes bfloat16, for other expected values; None: the sums are exact under any.
        """
        assert self.row_scales is not None
        rows = formats.mxfp8_to_bf16(self.rows, self.row_scales)
        if arithmetic is None:
            return replace(self, rows=rows, row_scales=None)
        return GemmProblem.with_oracle(rows, None, self.packed, self.scales, self.offsets, arithmetic)

    @property
    def operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """The arguments of `reference.grouped_gemm`."""
        return self.rows, self.row_scales, self.packed, self.scales, self.offsets

    @property
    def valid(self) -> int:
        """Rows of experts, which come first."""
        return int(self.offsets[-1])

    @functools.cached_property
    def weight(self) -> Tensor:
        """The weights as the kernels of their device read them: uint8 [E, weight_bytes(N, K)]."""
        order = formats.word_order_of(self.packed.device, "mxfp8" if self.row_scales is not None else "bf16")
        experts = zip(self.packed, self.scales, strict=True)
        return torch.stack([formats.arrange_weights(packed, scales, order) for packed, scales in experts])

    @functools.cached_property
    def act(self) -> tuple[Tensor, Tensor | None]:
        """The activations and their scales as the kernels of their device read them."""
        if self.row_scales is None:
            return self.rows, None
        if arithmetic_here(self.rows.device).operands == "bf16":
            return formats.mxfp8_to_bf16(self.rows, self.row_scales), None
        return formats.interleave_k(self.rows), formats.pack_row_scales(self.row_scales)

    @property
    def options(self) -> dict[str, Any]:
        """What the tile's operator has to be told of the formats; these two it finds by the rows."""
        return {}

    def sums(self, rule: Arithmetic, columns: int | None = None) -> Tensor:
        """What comes out under a rule: float32 [R, N], or of the first columns alone."""
        packed, scales = (x[:, :columns].contiguous() for x in (self.packed, self.scales))
        return reference.grouped_gemm(self.rows, self.row_scales, packed, scales, self.offsets, arithmetic=rule)

    def run(self, tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tile's result in an output poisoned with NaN.

        The m-tile list is as long as a caller who knows only the shapes must make it; behind its valid entries stand
        ones that would write to the rows of no expert.
        """
        rows, experts = self.rows.shape[0], self.packed.shape[0]
        tiles = reference.m_tiles(self.offsets, tile.m)
        bound = (rows + min(rows, experts) * (tile.m - 1)) // tile.m
        junk = torch.tensor([[0, int(self.offsets[-1]), rows, 0]], dtype=torch.int32, device=tiles.device)
        out = torch.full((rows, self.packed.shape[1]), float("nan"), dtype=dtype, device=tiles.device)
        loading.load_tile(tile)(
            *self.act,
            self.weight,
            torch.cat([tiles, junk.expand(bound - len(tiles), 4)]),
            torch.tensor([len(tiles)], dtype=torch.int32, device=tiles.device),
            out,
            **self.options,
        )
        return out

    def check(self, tile: Tile, dtype: torch.dtype = torch.float32) -> str:
        """`mismatch` of the tile's result."""
        return self.mismatch(self.run(tile, dtype))

    def mismatch(self, out: Tensor) -> str:
        """Empty when out has the expected bits, else where it differs and how."""
        wanted = torch.full_like(out, float("nan"))  # the very NaN of `run`: casts make others
        wanted[: self.valid] = self.expected[: self.valid].to(out.dtype)
        return places(bits(out) != bits(wanted), wanted, out)

    def wrong_sums(self, out: Tensor, expected: Tensor) -> str:
        """`mismatch` of the rows of experts alone, with other expected values, rounded to out's dtype."""
        rows, wanted = out[: self.valid], expected[: self.valid].to(out.dtype)
        return places(bits(rows) != bits(wanted), wanted, rows)

    def stray(self, out: Tensor) -> str:
        """Empty when the rows of no expert are as `run` poisoned them."""
        rows = out[self.valid :]
        poison = torch.full_like(rows, float("nan"))
        wrong = places(bits(rows) != bits(poison), poison, rows)
        return wrong and f"behind the last expert's row: {wrong}"


def places(wrong: Tensor, expected: Tensor, actual: Tensor) -> str:
    """Which values of matrices are wrong, in words; empty when none is."""
    at = wrong.nonzero()
    if not len(at):
        return ""
    row, column = at[0].tolist()
    return (
        f"{len(at)} of {actual.numel()} values differ, in {len(set(at[:, 0].tolist()))} rows and "
        f"{len(set(at[:, 1].tolist()))} columns; first at [{row}, {column}]: expected "
        f"{float(expected[row, column])!r}, got {float(actual[row, column])!r}"
    )


def arithmetic_here(device: torch.device) -> Arithmetic:
    """What the kernels of a device compute; of MXFP8 rows on a CPU, SM12x's."""
    arch = wheel.arch_for(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return SM12X_MXF8F6F4 if arch is None else of_arch(arch)


def offsets_of(rows_per_expert: Sequence[int], device: torch.device) -> Tensor:
    """int32 [E+1] for the given rows of each expert."""
    return torch.tensor([0, *rows_per_expert], dtype=torch.int64, device=device).cumsum(0).to(torch.int32)


def random_problem(
    k: int,
    n: int,
    device: torch.device,
    *,
    rows_per_expert: Sequence[int] = ROWS_PER_EXPERT,
    wide_scales: bool = False,
    arithmetic: Arithmetic | None = None,
) -> GemmProblem:
    """Random bits in every operand.

    Even rows are quantized normals of many magnitudes, odd ones any finite E4M3 codes under any of 61 scales; weights
    are any nibbles. With `wide_scales` the exponents of each k-block cover E8M0's range and cancel between the two
    operands, so that no partial result leaves fp32's normal range.
    """
    g = torch.Generator(device).manual_seed(1000 * k + n)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=device)

    order = torch.randperm(len(rows_per_expert), generator=torch.Generator().manual_seed(k + n), device="cpu").tolist()
    offsets = offsets_of([rows_per_expert[i] for i in order], device)
    experts, rows = len(order), int(offsets[-1]) + ROWS_OF_NO_EXPERT
    magnitude = integers(-20, 20, rows, k // 32, 1).float().exp2()
    values = torch.randn(rows, k // 32, 32, generator=g, dtype=torch.float32, device=device) * magnitude
    codes, row_scales = formats.quantize_mxfp8(values.flatten(1))
    any_codes = integers(0, 255, rows, k).to(torch.uint8)
    any_codes[(any_codes & 0x7F) == 0x7F] = 0x08  # no NaN
    odd = (torch.arange(rows, device=device) % 2 == 1)[:, None]
    codes = torch.where(odd, any_codes, codes)
    row_scales = torch.where(odd, integers(97, 157, rows, k // 32).to(torch.uint8), row_scales)
    packed = integers(0, 255, experts, n, k // 2).to(torch.uint8)
    scales = integers(97, 157, experts, n, k // 32).to(torch.uint8)
    if wide_scales:
        center = integers(20, 234, k // 32)
        row_scales = (center + integers(-10, 10, rows, k // 32)).to(torch.uint8)
        scales = (254 - center + integers(-10, 10, experts, n, k // 32)).to(torch.uint8)
    return GemmProblem.with_oracle(codes, row_scales, packed, scales, offsets, arithmetic)


def sparse_problem(k: int, n: int, device: torch.device) -> GemmProblem:
    """Five codes of +-1 in each row, every k in some row: no sum reaches beyond 8 bits, so any arithmetic is exact.

    Expected values come from float64, not from the oracle. Products are multiples of 1/2 up to 24 in magnitude: weights
    up to 6, and scales of 1 or 2 in either operand.
    """
    few = 5
    g = torch.Generator(device).manual_seed(1000 * k + n)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=device)

    offsets, rows, experts = _rows_and_experts(device)
    anywhere = torch.randperm(k, generator=g, device=device)
    hot = anywhere[torch.arange(rows * few, device=device) % k].view(rows, few)
    codes = torch.zeros(rows, k, dtype=torch.uint8, device=device)
    codes.scatter_(1, hot, (0x38 + 0x80 * integers(0, 1, rows, few)).to(torch.uint8))
    row_scales = integers(127, 128, rows, k // 32).to(torch.uint8)
    packed = integers(0, 255, experts, n, k // 2).to(torch.uint8)
    scales = integers(127, 128, experts, n, k // 32).to(torch.uint8)
    return _with_exact_sums(codes, row_scales, packed, scales, offsets)


def integer_problem(k: int, n: int, device: torch.device) -> GemmProblem:
    """Dense codes of integers up to 15 with scales that cancel: exact wherever 20 bits or more are kept, K <= 5824.

    Products are multiples of 1/2 up to 90, so that sums of their magnitudes stay below 2^20 halves.
    """
    assert k * 15 * 12 < 2**20
    g = torch.Generator(device).manual_seed(1000 * k + n)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=device)

    offsets, rows, experts = _rows_and_experts(device)
    shift = integers(-9, 9, k // 32)
    return _with_exact_sums(
        formats.encode_e4m3(integers(-15, 15, rows, k).float()),
        (127 + shift).to(torch.uint8).expand(rows, -1).contiguous(),
        integers(0, 255, experts, n, k // 2).to(torch.uint8),
        (127 - shift).to(torch.uint8).expand(experts, n, -1).contiguous(),
        offsets,
    )


def _rows_and_experts(device: torch.device) -> tuple[Tensor, int, int]:
    """Offsets for `ROWS_PER_EXPERT`, all rows, and experts."""
    offsets = offsets_of(ROWS_PER_EXPERT, device)
    return offsets, int(offsets[-1]) + ROWS_OF_NO_EXPERT, len(ROWS_PER_EXPERT)


def _with_exact_sums(codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, offsets: Tensor) -> GemmProblem:
    """A problem whose sums are exact in float64, in float32, and in the arithmetic of any kernel."""
    a = formats.decode_e4m3(codes).double() * formats.decode_e8m0(row_scales).double().repeat_interleave(32, 1)
    b = formats.decode_e2m1(packed).double() * formats.decode_e8m0(scales).double().repeat_interleave(32, 2)
    expected = torch.zeros(len(codes), packed.shape[1], dtype=torch.float32, device=codes.device)
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        expected[begin:end] = (a[begin:end] @ b[e].T).float() + 0.0
    return GemmProblem(
        rows=codes, row_scales=row_scales, packed=packed, scales=scales, offsets=offsets, expected=expected
    )


def layout_problem(device: torch.device) -> GemmProblem:
    """One-hot rows pick one weight each, so every output is one product whose place in all layouts is known.

    Expected values come from indexing, not from the oracle.
    """
    rows_per_expert, n, k = (3, 0, 70, 17), 144, 160
    offsets = offsets_of(rows_per_expert, device)
    experts, rows = len(rows_per_expert), int(offsets[-1]) + ROWS_OF_NO_EXPERT
    e, row, column, ks = (torch.arange(size, device=device) for size in (experts, rows, n, k))
    hot = (row * 37 + 11) % k
    codes = torch.zeros(rows, k, dtype=torch.uint8, device=device)
    codes[row, hot] = 0x38  # 1.0
    row_scales = (127 + (row[:, None] + torch.arange(k // 32, device=device)) % 5).to(torch.uint8)
    nibbles = ((e[:, None, None] * 5 + column[None, :, None] * 7 + ks * 3) % 16).to(torch.uint8)
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    block = torch.arange(k // 32, device=device)
    scales = (124 + (e[:, None, None] + column[None, :, None] * 3 + block) % 7).to(torch.uint8)

    expert = torch.repeat_interleave(e, offsets.diff())
    valid = row[: len(expert)]
    at = hot[valid]
    value = torch.tensor(formats.E2M1_VALUES, dtype=torch.float32, device=device)[nibbles[expert, :, at].long()]
    exponent = row_scales[valid, at // 32].int()[:, None] + scales[expert, :, at // 32].int() - 254
    expected = torch.zeros(rows, n, dtype=torch.float32, device=device)
    expected[valid] = value * exponent.float().exp2() + 0.0  # a sum that starts at +0 never ends at -0
    return GemmProblem(
        rows=codes, row_scales=row_scales, packed=packed, scales=scales, offsets=offsets, expected=expected
    )


def random_weights(
    experts: int, hidden: int, inter: int, device: torch.device, *, bias: bool = True, seed: int = 0, **options: Any
) -> MoEWeights:
    """A layer's weights with gpt-oss's magnitudes: outputs of the first GEMM are a few units, some get clamped."""
    g = torch.Generator(device).manual_seed(seed)
    rows = inter * (2 if Activation(options.get("activation", Activation.SWIGLU_OAI)).is_gated else 1)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=g, device=device)

    def biases(*shape: int) -> Tensor | None:
        return torch.randn(shape, generator=g, dtype=torch.float32, device=device).mul(0.2).bfloat16() if bias else None

    return MoEWeights.from_mxfp4(
        integers(0, 255, experts, rows, hidden // 2),
        integers(118, 123, experts, rows, hidden // 32),
        integers(0, 255, experts, hidden, inter // 2),
        integers(118, 123, experts, hidden, inter // 32),
        w13_bias=biases(experts, rows),
        w2_bias=biases(experts, hidden),
        **options,
    )


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one layer call beside the weights."""

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.hidden_states, self.topk_weights, self.topk_ids)

    def token(self, t: int) -> Call:
        rows = slice(t, t + 1)
        return Call(
            hidden_states=self.hidden_states[rows],
            topk_weights=self.topk_weights[rows],
            topk_ids=self.topk_ids[rows],
        )


def random_call(
    tokens: int,
    top_k: int,
    weights: MoEWeights,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    ids: torch.dtype = torch.int32,
) -> Call:
    """Normal hidden states; distinct experts per token with softmax weights, as a router gives them."""
    g = torch.Generator(weights.device).manual_seed(10_000 * seed + tokens)
    logits = torch.randn(tokens, weights.num_experts, generator=g, dtype=torch.float32, device=weights.device)
    values, choice = logits.topk(top_k, dim=-1)
    hidden = torch.randn(tokens, weights.hidden_size, generator=g, dtype=torch.float32, device=weights.device)
    return Call(hidden_states=hidden.to(dtype), topk_weights=values.softmax(-1), topk_ids=choice.to(ids))
