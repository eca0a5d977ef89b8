"""Routing, the rows of an expert, and the whole layer as a chain of its steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._torch_state import exact
from ..arithmetic import Arithmetic
from ..formats import (
    BLOCK,
    E4M3_NAN,
    E8M0_ONE,
    quantize_mxfp8,
    restore_weights,
    unswizzle_scales,
)
from ..weights import MoEWeights
from .activation import activate
from .gemm import Rows, _grouped_gemm

_IDS = (torch.int32, torch.int64)
_HALVES = (torch.bfloat16, torch.float16)
ACTIVATION_FORMATS = ("mxfp8", "bf16", "fp16")  # of this chain; `fp4` has those of FP4
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE_LAYOUTS = ("linear", "swizzled")
# Of the second GEMM's rows, by output dtype: a row beyond float16 may have a weight with which the sum is not.
ROW_DTYPES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
MXFP8_INPUT_SCALE_MAX = 248  # the E8M0 byte of 2^121; csrc/moe/permute.cu says why
_MXFP8 = (torch.uint8, torch.float8_e4m3fn)


def route(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots by expert, stable in slot order; slots with an id < 0 or >= num_experts get no row.

    Args:
        topk_ids: int32 or int64 [T, k]. An expert may occur more than once in a token: each slot is a row of its own.
        num_experts: E.

    Returns:
        expert_offsets int32 [E+1]: expert e owns rows [expert_offsets[e], expert_offsets[e+1]);
        row_slot int32 [R]: the slot of each row, -1 past the last valid row;
        slot_row int32 [R]: the row of each slot, -1 for a dropped slot.
    """
    require_tensor("topk_ids", topk_ids, _IDS, ("T", "k"))
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    ids = topk_ids.flatten().to(torch.int64)
    key = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    order = key.argsort(stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    offsets[1:] = key.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0)
    row = torch.arange(ids.numel(), device=ids.device)
    row_slot = torch.where(row < offsets[-1], order, -1)
    slot_row = torch.empty_like(order)
    slot_row[order] = torch.where(row < offsets[-1], row, -1)
    return offsets.to(torch.int32), row_slot.to(torch.int32), slot_row.to(torch.int32)


def m_tiles(expert_offsets: Tensor, tile_m: int) -> Tensor:
    """The tiles of rows that a grouped GEMM works on: an expert's in equal parts, but for multiples of 8.

    A part has at most tile_m rows. There are at most ``(R + A*(tile_m-1)) // tile_m`` of them, A = min(R, E).

    Args:
        expert_offsets: int32 [E+1], ascending.
        tile_m: rows per tile, a multiple of 8.

    Returns:
        int32 [num, 4] = {expert, row_begin, row_end, 0}; experts ascending, rows ascending.
    """
    require_tensor("expert_offsets", expert_offsets, torch.int32, ("E+1",))
    if tile_m < 1:
        raise ValueError(f"tile_m: expected at least 1, got {tile_m}")
    offsets = expert_offsets.tolist()
    tiles: list[tuple[int, int, int, int]] = []
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if rows := end - begin:
            each = -(-rows // -(-rows // tile_m))
            each = -(-each // 8) * 8  # csrc/shared/schedule.cuh, rows_of_m_tile
            tiles += [(expert, row, min(row + each, end), 0) for row in range(begin, end, each)]
    return torch.tensor(tiles, dtype=torch.int32, device=expert_offsets.device).reshape(-1, 4)


@exact
def finalize(
    rows: Tensor, topk_weights: Tensor, slot_row: Tensor, row_expert: Tensor, w2_bias: Tensor | None
) -> Tensor:
    """Adds up the rows of each token: acc = +0; for j = 0..k-1, valid slots only, acc = fma(weight, row + bias, acc).

    row + bias and acc are float32. The fma is a float64 product (exact) and a float64 sum, rounded to float32; the
    second rounding differs from a true fma only when the float64 sum lands exactly between two float32 numbers.

    Args:
        rows: bfloat16, float16 or float32 [>= valid rows, H], the second GEMM's output.
        topk_weights: float32 [T, k].
        slot_row: int32 [T*k] from `route`.
        row_expert: int32 or int64 [valid rows].
        w2_bias: float32 [E, H] or None.

    Returns:
        [T, H], bfloat16 where the rows are, else float16; a token without a valid slot is zero.
    """
    require_tensor("rows", rows, _FLOATS, ("R", "H"))
    require_tensor("topk_weights", topk_weights, torch.float32, ("T", "k"), rows.device)
    tokens, k = topk_weights.shape
    require_tensor("slot_row", slot_row, torch.int32, (tokens * k,), rows.device)
    acc = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for j in range(k):
        row = slot_row.view(tokens, k)[:, j].to(torch.int64)
        token = (row >= 0).nonzero().squeeze(1)
        row = row[token]
        value = rows[row].to(torch.float32)
        if w2_bias is not None:
            value += w2_bias[row_expert[row]]
        acc[token] = (topk_weights[token, j, None].double() * value.double() + acc[token].double()).to(torch.float32)
    return acc.to(torch.bfloat16 if rows.dtype is torch.bfloat16 else torch.float16)


def mxfp8_rows(hidden_states: Tensor, hidden_states_scale: Tensor, scale_layout: str) -> tuple[Tensor, Tensor]:
    """Hidden states that are MXFP8 already, as `quantize_mxfp8` would give them.

    A scale byte above `MXFP8_INPUT_SCALE_MAX` (255 is E8M0's NaN; no finite bfloat16 needs the others) becomes what the
    quantizer makes of a NaN: byte 127 and 32 NaN codes.

    Args:
        hidden_states: uint8 or float8_e4m3fn [T, H], plain k order.
        hidden_states_scale: uint8, "linear" [T, H/32], or "swizzled": `formats.swizzle_scales` of it, flat.
        scale_layout: "linear" or "swizzled".

    Returns:
        codes uint8 [T, H], scales uint8 [T, H/32].
    """
    tokens, hidden = hidden_states.shape
    scales = hidden_states_scale
    if scale_layout == "swizzled":
        scales = unswizzle_scales(scales.view(-(-tokens // 128), -(-hidden // 128), 512), tokens, hidden)
    poison = scales > MXFP8_INPUT_SCALE_MAX
    codes = torch.unflatten(hidden_states.view(torch.uint8), -1, (-1, BLOCK))
    codes = codes.masked_fill(poison.unsqueeze(-1), E4M3_NAN).flatten(-2)
    return codes, scales.masked_fill(poison, E8M0_ONE)


def default_output_dtype(hidden_states: Tensor, hidden_states_scale: Tensor | None) -> torch.dtype:
    """The output dtype of a call that names none: the input's, bfloat16 where that is MXFP8."""
    return hidden_states.dtype if hidden_states_scale is None else torch.bfloat16


@exact
def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    intermediate_rounding: bool = False,
    activation_format: str = "mxfp8",
    arithmetic: Arithmetic | None = None,
) -> Tensor:
    """`reference.fused_moe` of MXFP4 weights with "mxfp8", "bf16" or "fp16" activations; arguments as there."""
    if output_dtype is None:
        output_dtype = default_output_dtype(hidden_states, hidden_states_scale)
    rounding = output_dtype if intermediate_rounding else None

    def between(gemm1: Tensor, row_expert: Tensor) -> Rows:
        numbers = (weights.alpha, weights.beta, weights.limit)
        values = activate(gemm1, row_expert, weights.w13_bias, weights.activation, *numbers, rounding=rounding)
        return as_rows(values, activation_format)

    return layer(
        hidden_states,
        topk_weights,
        topk_ids,
        weights,
        between,
        hidden_states_scale=hidden_states_scale,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        activation_format=activation_format,
        arithmetic=arithmetic,
    )


@exact
def as_rows(values: Tensor, activation_format: str) -> Rows:
    """Floats [R, K] as a GEMM reads them: `quantize_mxfp8`, or bfloat16 or float16 alone, beyond which is infinity."""
    if activation_format not in ACTIVATION_FORMATS:
        raise ValueError(f"activation_format: expected 'mxfp8', 'bf16' or 'fp16', got {activation_format!r}")
    if activation_format == "mxfp8":
        return quantize_mxfp8(values)
    return values.to(torch.float16 if activation_format == "fp16" else torch.bfloat16), None


@exact
def layer(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    between: Callable[[Tensor, Tensor], Rows],
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    activation_format: str = "mxfp8",
    arithmetic: Arithmetic | None = None,
) -> Tensor:
    """`fused_moe` with another step between the GEMMs; with the kernel's own, the whole is the kernels' bit for bit.

    Args:
        between: (GEMM1's output float32 [R, 2I] or [R, I], row_expert int64 [R]) -> MXFP8 codes uint8 [R, I] in plain
            k order and scales uint8 [R, I/32], or bfloat16 or float16 [R, I] and None. R counts the valid rows.
    """
    tokens, hidden = hidden_states.shape[0], weights.hidden_size
    shape = ("T", hidden)
    if hidden_states_scale is None:
        require_tensor("hidden_states", hidden_states, _HALVES, shape, weights.device)
    else:
        require_tensor("hidden_states", hidden_states, _MXFP8, shape, weights.device)
        require_tensor("hidden_states_scale", hidden_states_scale, torch.uint8, None, weights.device)
    require_tensor("topk_ids", topk_ids, _IDS, (tokens, "k"), weights.device)
    require_tensor("topk_weights", topk_weights, torch.float32, topk_ids.shape, weights.device)
    experts, inter, gemm1_width = weights.num_experts, weights.intermediate_size, weights.w13_rows
    if output_dtype is None:
        output_dtype = default_output_dtype(hidden_states, hidden_states_scale)

    def w13(e: int) -> tuple[Tensor, Tensor]:
        return restore_weights(weights.w13[e], gemm1_width, hidden, weights.word_order)

    def w2(e: int) -> tuple[Tensor, Tensor]:
        return restore_weights(weights.w2[e], hidden, inter, weights.word_order)

    local_ids = topk_ids - weights.first_expert if weights.first_expert else topk_ids
    offsets, row_slot, slot_row = route(local_ids, experts)
    row_slot = row_slot[: int(offsets[-1])]
    row_expert = torch.repeat_interleave(torch.arange(experts, device=offsets.device), offsets.diff())
    token = row_slot // max(topk_ids.shape[1], 1)

    if hidden_states_scale is None:
        rows, scales = as_rows(hidden_states, activation_format)
    elif activation_format == "mxfp8":
        rows, scales = mxfp8_rows(hidden_states, hidden_states_scale, scale_layout)
    else:
        raise ValueError(
            f"activation_format: expected 'mxfp8' for hidden_states that are MXFP8, got {activation_format!r}"
        )
    own = rows[token], None if scales is None else scales[token]
    gemm1 = _grouped_gemm(own, w13, gemm1_width, offsets, experts, arithmetic)
    gemm2 = _grouped_gemm(between(gemm1, row_expert), w2, hidden, offsets, experts, arithmetic)
    return finalize(gemm2.to(ROW_DTYPES[output_dtype]), topk_weights, slot_row, row_expert, weights.w2_bias)


@exact
def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """`mxfp4_moe.topk_softmax` in plain torch: a stable sort, then a softmax in float32.

    Args:
        router_logits: float32, bfloat16 or float16 [T, E].
        top_k: k, at most E.
        renormalize: softmax over the chosen, else over all E.

    Returns:
        topk_weights float32 [T, k], topk_ids int32 [T, k].
    """
    require_tensor("router_logits", router_logits, _FLOATS, ("T", "E"))
    logits = router_logits.to(torch.float32) + 0.0  # -0 becomes +0, for sorts that look at the bits
    ordered, experts = logits.sort(dim=-1, descending=True, stable=True)
    chosen, ids = ordered[:, :top_k], experts[:, :top_k]
    weights = chosen.softmax(-1) if renormalize else logits.softmax(-1).gather(1, ids)
    return weights, ids.to(torch.int32)
