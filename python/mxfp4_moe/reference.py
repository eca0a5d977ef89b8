"""The library's mathematics in plain torch: the CPU implementation, and the oracle that the kernels are compared with.

One call flows through `route` -> `quantize_mxfp8` -> `grouped_gemm` -> `activate` -> `quantize_mxfp8` ->
`grouped_gemm` -> `finalize`; `fused_moe` is that chain. All of it runs on CPU and CUDA tensors.

Routing, quantization and the two GEMMs are what the kernels do bit for bit. `activate` evaluates the same float32
formula with torch's exp instead of the kernel's, so it agrees closely, not bitwise.

Words: T tokens, k experts per token, E experts, H hidden size, I intermediate size. A slot is one (token, choice)
pair, number t*k+j; a row is one slot's place in the activations sorted by expert; R = T*k.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .formats import (
    BLOCK,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    quantize_mxfp8,
    require_tensor,
    unrotate_words,
    unswizzle_scales,
)
from .weights import MoEWeights

_IDS = (torch.int32, torch.int64)
_HALVES = (torch.bfloat16, torch.float16)
_MIB = 1 << 20


def grouped_gemm(codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, expert_offsets: Tensor) -> Tensor:
    """MXFP8 rows times the MXFP4 weight of their expert, in the kernels' own fp32 chain.

    Per output: acc = +0; for each block of 32 in k order, block = the exact sum of the 32 products, rounded to fp32;
    s = 2^(sa-127) * 2^(sb-127) in fp32; acc = fma(block, s, acc). Here block * s and the sum are two fp32 operations:
    s is a power of two, so the product is exact and the pair equals the fma, except where block * s falls into the
    subnormals (below 2^-126) and loses bits, or overflows. Float64 sums of 32 products are exact in any order: an
    E4M3 x E2M1 product is an integer below 2^22 in units of 2^-10.

    Args:
        codes: uint8 [R, K] E4M3, rows sorted by expert, plain k order; K a multiple of 32.
        row_scales: uint8 [R, K/32] E8M0.
        packed: uint8 [E, N, K/2] E2M1, low nibble = even k (checkpoint order, not rotated).
        scales: uint8 [E, N, K/32] E8M0.
        expert_offsets: int32 [E+1]; expert e owns rows [expert_offsets[e], expert_offsets[e+1]).

    Returns:
        float32 [R, N]; rows of no expert are zero.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device; offsets that descend or pass R.
    """
    require_tensor("codes", codes, torch.uint8, ("R", "K"))
    k = codes.shape[1]
    if k % BLOCK:
        raise ValueError(f"codes: expected K a multiple of {BLOCK}, got uint8 {list(codes.shape)}")
    require_tensor("packed", packed, torch.uint8, ("E", "N", k // 2), codes.device)
    experts, n, _ = packed.shape
    require_tensor("scales", scales, torch.uint8, (experts, n, k // BLOCK), codes.device)
    return _grouped_gemm(codes, row_scales, lambda e: (packed[e], scales[e]), n, expert_offsets, experts)


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
    """The tiles of rows that a grouped GEMM works on: at most tile_m rows of one expert each.

    There are at most ``(R + A*(tile_m-1)) // tile_m`` of them, A = min(R, E).

    Args:
        expert_offsets: int32 [E+1], ascending.
        tile_m: rows per tile.

    Returns:
        int32 [num, 4] = {expert, row_begin, row_end, 0}; experts ascending, rows ascending.
    """
    require_tensor("expert_offsets", expert_offsets, torch.int32, ("E+1",))
    if tile_m < 1:
        raise ValueError(f"tile_m: expected at least 1, got {tile_m}")
    offsets = expert_offsets.tolist()
    tiles = [
        (expert, row, min(row + tile_m, end), 0)
        for expert, (begin, end) in enumerate(pairwise(offsets))
        for row in range(begin, end, tile_m)
    ]
    return torch.tensor(tiles, dtype=torch.int32, device=expert_offsets.device).reshape(-1, 4)


def activate(
    gemm1: Tensor,
    row_expert: Tensor,
    w13_bias: Tensor | None,
    activation: str,
    alpha: float = 1.702,
    beta: float = 1.0,
    limit: float | None = 7.0,
) -> Tensor:
    """SwiGLU of the first GEMM's output, in float32.

    With the biases added to g and u: ``swiglu_oai`` (gpt-oss) first takes g = min(g, limit) and
    u = clamp(u, -limit, limit) and returns g * sigmoid(alpha*g) * (u + beta); ``swiglu`` returns g * sigmoid(g) * u
    and ignores alpha, beta and limit. NaN stays NaN.

    Args:
        gemm1: float32 [R, 2I] in prepared row order: groups of 16 columns = 8 gates, then their 8 ups.
        row_expert: int32 or int64 [R], the expert of each row, 0 <= expert < E.
        w13_bias: float32 [E, 2I] in the same order, or None.
        activation: "swiglu_oai" or "swiglu".
        alpha, beta, limit: swiglu_oai's numbers; limit None clamps nothing.

    Returns:
        float32 [R, I].
    """
    require_tensor("gemm1", gemm1, torch.float32, ("R", "2I"))
    rows, columns = gemm1.shape
    if columns % 16:
        raise ValueError(f"gemm1: expected 2I a multiple of 16, got float32 {[rows, columns]}")
    require_tensor("row_expert", row_expert, _IDS, (rows,), gemm1.device)
    if w13_bias is not None:
        require_tensor("w13_bias", w13_bias, torch.float32, ("E", columns), gemm1.device)
        gemm1 = gemm1 + w13_bias[row_expert]
    gate, up = (half.flatten(-2) for half in torch.unflatten(gemm1, -1, (columns // 16, 2, 8)).unbind(-2))
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if activation != "swiglu_oai":
        raise ValueError(f"activation: expected 'swiglu' or 'swiglu_oai', got {activation!r}")
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def finalize(
    rows: Tensor, topk_weights: Tensor, slot_row: Tensor, row_expert: Tensor, w2_bias: Tensor | None
) -> Tensor:
    """Adds up the rows of each token: acc = +0; for j = 0..k-1, valid slots only, acc = fma(weight, row + bias, acc).

    row + bias and acc are float32. The fma is a float64 product (exact) and a float64 sum, rounded to float32; the
    second rounding differs from a true fma only when the float64 sum lands exactly between two float32 numbers.

    Args:
        rows: bfloat16 or float16 [>= valid rows, H], the second GEMM's output.
        topk_weights: float32 [T, k].
        slot_row: int32 [T*k] from `route`.
        row_expert: int32 or int64 [valid rows].
        w2_bias: float32 [E, H] or None.

    Returns:
        [T, H] in the dtype of rows; a token without a valid slot is zero.
    """
    require_tensor("rows", rows, _HALVES, ("R", "H"))
    require_tensor("topk_weights", topk_weights, torch.float32, ("T", "k"), rows.device)
    tokens, k = topk_weights.shape
    require_tensor("slot_row", slot_row, torch.int32, (tokens * k,), rows.device)
    acc = torch.zeros(tokens, rows.shape[1], device=rows.device)
    for j in range(k):
        row = slot_row.view(tokens, k)[:, j].to(torch.int64)
        token = (row >= 0).nonzero().squeeze(1)
        row = row[token]
        value = rows[row].to(torch.float32)
        if w2_bias is not None:
            value += w2_bias[row_expert[row]]
        acc[token] = (topk_weights[token, j, None].double() * value.double() + acc[token].double()).to(torch.float32)
    return acc.to(rows.dtype)


def fused_moe(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, weights: MoEWeights) -> Tensor:
    """One MoE layer: the sum over each token's experts of topk_weight * (w2 . swiglu(w13 . x + bias) + bias).

    Activations are quantized to MXFP8 before each GEMM (`quantize_mxfp8`), and the second GEMM's rows are rounded to
    the output dtype before the weighted sum.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0.
        topk_weights: float32 [T, k], the router weights.
        topk_ids: int32 or int64 [T, k]; ids < 0 or >= E contribute nothing; an expert may repeat within a token.
        weights: prepared weights on the same device.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape or device.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    require_tensor("hidden_states", hidden_states, _HALVES, ("T", weights.hidden_size), weights.device)
    require_tensor("topk_ids", topk_ids, _IDS, (hidden_states.shape[0], "k"), weights.device)
    require_tensor("topk_weights", topk_weights, torch.float32, topk_ids.shape, weights.device)
    experts, hidden, inter = weights.num_experts, weights.hidden_size, weights.intermediate_size

    def w13(e: int) -> tuple[Tensor, Tensor]:
        return unrotate_words(weights.w13[e]), unswizzle_scales(weights.w13_scale[e], 2 * inter, hidden)

    def w2(e: int) -> tuple[Tensor, Tensor]:
        return unrotate_words(weights.w2[e]), unswizzle_scales(weights.w2_scale[e], hidden, inter)

    offsets, row_slot, slot_row = route(topk_ids, experts)
    row_slot = row_slot[: int(offsets[-1])]
    row_expert = torch.repeat_interleave(torch.arange(experts, device=offsets.device), offsets.diff())
    token = row_slot // max(topk_ids.shape[1], 1)

    codes, scales = quantize_mxfp8(hidden_states)
    gemm1 = _grouped_gemm(codes[token], scales[token], w13, 2 * inter, offsets, experts)
    act = activate(gemm1, row_expert, weights.w13_bias, weights.activation, weights.alpha, weights.beta, weights.limit)
    gemm2 = _grouped_gemm(*quantize_mxfp8(act), w2, hidden, offsets, experts)
    return finalize(gemm2.to(hidden_states.dtype), topk_weights, slot_row, row_expert, weights.w2_bias)


def _grouped_gemm(
    codes: Tensor,
    row_scales: Tensor,
    weight: Callable[[int], tuple[Tensor, Tensor]],
    n: int,
    expert_offsets: Tensor,
    experts: int,
) -> Tensor:
    """`grouped_gemm` with the plain weights of one expert, (packed [N, K/2], scales [N, K/32]), fetched when needed."""
    rows, k = codes.shape
    require_tensor("row_scales", row_scales, torch.uint8, (rows, k // BLOCK), codes.device)
    require_tensor("expert_offsets", expert_offsets, torch.int32, (experts + 1,), codes.device)
    offsets = expert_offsets.tolist()
    if offsets[0] < 0 or offsets[-1] > rows or offsets != sorted(offsets):
        raise ValueError(f"expert_offsets: expected ascending values in 0..{rows}, got {offsets}")
    out = torch.zeros(rows, n, device=codes.device)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            _gemm(codes[begin:end], row_scales[begin:end], *weight(e), out[begin:end])
    return out


def _gemm(codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """One expert's rows, tiled so that a CPU keeps the block sums in cache and a GPU gets few, large launches."""
    (m, k), n = codes.shape, packed.shape[0]
    weight_bytes, block_bytes = (128 * _MIB, 128 * _MIB) if codes.is_cuda else (64 * _MIB, 4 * _MIB)
    columns = min(n, max(128, weight_bytes // (12 * max(k, 1))))  # float32 and float64 of each weight
    rows = min(m, max(1, block_bytes // (16 * columns)))  # float64 sum, float32 sum, scale of each output
    blocks = max(1, block_bytes // (16 * columns * rows))

    a = decode_e4m3(codes).double().view(m, k // BLOCK, BLOCK).transpose(0, 1)
    a_scale = decode_e8m0(row_scales).t().unsqueeze(2)
    for c in range(0, n, columns):
        b = decode_e2m1(packed[c : c + columns]).double().view(-1, k // BLOCK, BLOCK).permute(1, 2, 0)
        b_scale = decode_e8m0(scales[c : c + columns]).t().unsqueeze(1)
        for r in range(0, m, rows):
            acc = out[r : r + rows, c : c + columns]
            for i in range(0, k // BLOCK, blocks):
                step = slice(i, i + blocks)
                products = torch.bmm(a[step, r : r + rows], b[step]).float()
                products *= a_scale[step, r : r + rows] * b_scale[step]
                for product in products:
                    acc += product
