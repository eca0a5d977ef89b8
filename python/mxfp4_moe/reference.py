"""The library's mathematics in plain torch: the CPU implementation, and the oracle that the kernels are compared with.

One call flows through `route` -> `quantize_mxfp8` -> `grouped_gemm` -> `activate` -> `quantize_mxfp8` ->
`grouped_gemm` -> `finalize`; `fused_moe` is that chain. All of it runs on CPU and CUDA tensors. `topk_softmax` is the
router in front of it.

Routing, quantization and the two GEMMs are what the kernels do bit for bit, the GEMMs under the arithmetic of their
architecture: `arithmetic.of_arch`. Who names none gets the fp32 chain, as CPU tensors do. `activate` and the softmax
evaluate the same float32 formulas with torch's exp instead of the kernel's, so they agree closely, not bitwise.

Words: T tokens, k experts per token, E experts, H hidden size, I intermediate size. A slot is one (token, choice)
pair, number t*k+j; a row is one slot's place in the activations sorted by expert; R = T*k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ._arguments import require_tensor
from .activations import Activation
from .arithmetic import FP32_CHAIN, Arithmetic, gemm
from .formats import (
    BLOCK,
    E4M3_NAN,
    E8M0_ONE,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    quantize_mxfp8,
    restore_weights,
    unswizzle_scales,
)
from .weights import MoEWeights

SCALE_LAYOUTS = ("linear", "swizzled")
MXFP8_INPUT_SCALE_MAX = 248  # the E8M0 byte of 2^121; csrc/moe/permute.cu says why

_IDS = (torch.int32, torch.int64)
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MXFP8 = (torch.uint8, torch.float8_e4m3fn)
_MIB = 1 << 20


def grouped_gemm(
    codes: Tensor,
    row_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    expert_offsets: Tensor,
    *,
    arithmetic: Arithmetic = FP32_CHAIN,
) -> Tensor:
    """MXFP8 rows times the MXFP4 weight of their expert, in the arithmetic of an architecture (docs/arithmetic.md).

    The fp32 chain, per output: acc = +0; for each block of 32 in k order, block = the exact sum of the 32 products,
    rounded to fp32; s = 2^(sa-127) * 2^(sb-127) in fp32; acc = fma(block, s, acc). Here block * s and the sum are two
    fp32 operations: s is a power of two, so the product is exact and the pair equals the fma, except where block * s
    falls into the subnormals (below 2^-126) and loses bits, or overflows. Float64 sums of 32 products are exact in any
    order: an E4M3 x E2M1 product is an integer below 2^22 in units of 2^-10.

    Other rules add up in the tensor core: one step per block of 32, or two with k 0..15 and then k 16..31 of it where a
    step has 16 products.

    Args:
        codes: uint8 [R, K] E4M3, rows sorted by expert, plain k order; K a multiple of 32.
        row_scales: uint8 [R, K/32] E8M0.
        packed: uint8 [E, N, K/2] E2M1, low nibble = even k (checkpoint order, not prepared).
        scales: uint8 [E, N, K/32] E8M0.
        expert_offsets: int32 [E+1]; expert e owns rows [expert_offsets[e], expert_offsets[e+1]).
        arithmetic: the rule; `arithmetic.of_arch` gives that of an architecture's kernels.

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
    return _grouped_gemm(codes, row_scales, lambda e: (packed[e], scales[e]), n, expert_offsets, experts, arithmetic)


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
    activation: Activation | str,
    alpha: float | Tensor = 1.702,
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = 7.0,
    *,
    rounding: torch.dtype | None = None,
) -> Tensor:
    """What stands between the GEMMs, in float32; the formulas are those of `Activation`. NaN stays NaN.

    Args:
        gemm1: float32 [R, 2I] in prepared row order: groups of 16 columns = 8 gates, then their 8 ups. [R, I] when the
            activation is not gated.
        row_expert: int32 or int64 [R], the expert of each row, 0 <= expert < E.
        w13_bias: float32 [E, 2I] or [E, I] in the same order, or None.
        activation: its name.
        alpha, beta: numbers of swiglu_oai, or float32 [E] with one for each expert; others ignore them.
        limit: the same for swiglu_oai and swiglu_step; None clamps nothing.
        rounding: bfloat16 or float16: gemm1, before the bias, and the result are rounded to it (to nearest, ties to
            even; beyond float16's range to infinity). None rounds neither.

    Returns:
        float32 [R, I].
    """
    try:
        kind = Activation(activation)
    except ValueError:
        names = ", ".join(repr(a.value) for a in Activation)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}") from None
    width = "2I" if kind.is_gated else "I"
    require_tensor("gemm1", gemm1, torch.float32, ("R", width))
    rows, columns = gemm1.shape
    if kind.is_gated and columns % 16:
        raise ValueError(f"gemm1: expected 2I a multiple of 16, got float32 {[rows, columns]}")
    require_tensor("row_expert", row_expert, _IDS, (rows,), gemm1.device)
    if rounding is not None and rounding not in _HALVES:
        raise TypeError(f"rounding: expected torch.bfloat16, torch.float16 or None, got {rounding}")

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(torch.float32)

    gemm1 = rounded(gemm1)
    if w13_bias is not None:
        require_tensor("w13_bias", w13_bias, torch.float32, ("E", columns), gemm1.device)
        gemm1 = gemm1 + w13_bias[row_expert]
    if not kind.is_gated:
        return rounded(_NOT_GATED[kind](gemm1))

    gate, up = (half.flatten(-2) for half in torch.unflatten(gemm1, -1, (columns // 16, 2, 8)).unbind(-2))

    def per_row(number: float | Tensor) -> float | Tensor:
        return number[row_expert].unsqueeze(1) if isinstance(number, Tensor) else number

    bound = per_row(math.inf if limit is None else limit)

    def clamp_above(x: Tensor) -> Tensor:
        return torch.where(x > bound, bound, x)

    def clamp_both(x: Tensor) -> Tensor:
        return torch.where(x < -bound, -bound, clamp_above(x))

    if kind is Activation.SWIGLU_OAI:
        gate = clamp_above(gate)
        return rounded(gate * torch.sigmoid(per_row(alpha) * gate) * (clamp_both(up) + per_row(beta)))
    if kind is Activation.SWIGLU_STEP:
        return rounded(clamp_above(_silu(gate)) * clamp_both(up))
    return rounded(_GATE[kind](gate) * up)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: Tensor) -> Tensor:
    """x * Phi(x); 1 + erf would cancel where x is far below zero."""
    tail: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return 0.5 * x * tail


def _gelu_tanh(x: Tensor) -> Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), by 1 + tanh(y) = 2 sigmoid(2y), which does not cancel."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def _relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, x)


def _relu2(x: Tensor) -> Tensor:
    return _relu(x) * _relu(x)


def _identity(x: Tensor) -> Tensor:
    return x


_GATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SWIGLU: _silu,
    Activation.GEGLU: _gelu,
    Activation.GEGLU_TANH: _gelu_tanh,
}
_NOT_GATED: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: _silu,
    Activation.GELU: _gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.RELU: _relu,
    Activation.RELU2: _relu2,
    Activation.IDENTITY: _identity,
}


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
    arithmetic: Arithmetic = FP32_CHAIN,
) -> Tensor:
    """One MoE layer: the sum over each token's experts of topk_weight * (w2 . act(w13 . x + bias) + bias).

    Activations are quantized to MXFP8 before each GEMM (`quantize_mxfp8`), and the second GEMM's rows are rounded to
    the output dtype before the weighted sum.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0. With hidden_states_scale: uint8 or float8_e4m3fn.
        topk_weights: float32 [T, k], the router weights.
        topk_ids: int32 or int64 [T, k]; ids < 0 or >= E contribute nothing; an expert may repeat within a token.
        weights: prepared weights on the same device.
        hidden_states_scale, scale_layout: as for `mxfp8_rows`.
        output_dtype: bfloat16 or float16; None: the dtype of hidden_states, bfloat16 where that is MXFP8.
        intermediate_rounding: `activate` with the output dtype as its rounding.
        arithmetic: of the two GEMMs.

    Returns:
        [T, H] in the output dtype.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape or device.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    if output_dtype is None:
        output_dtype = default_output_dtype(hidden_states, hidden_states_scale)
    rounding = output_dtype if intermediate_rounding else None

    def between(gemm1: Tensor, row_expert: Tensor) -> tuple[Tensor, Tensor]:
        numbers = (weights.alpha, weights.beta, weights.limit)
        values = activate(gemm1, row_expert, weights.w13_bias, weights.activation, *numbers, rounding=rounding)
        return quantize_mxfp8(values)

    return layer(
        hidden_states,
        topk_weights,
        topk_ids,
        weights,
        between,
        hidden_states_scale=hidden_states_scale,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        arithmetic=arithmetic,
    )


def layer(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    arithmetic: Arithmetic = FP32_CHAIN,
) -> Tensor:
    """`fused_moe` with another step between the GEMMs; with the kernel's own, the whole is the kernels' bit for bit.

    Args:
        between: (GEMM1's output float32 [R, 2I] or [R, I], row_expert int64 [R]) -> MXFP8 codes uint8 [R, I] in plain
            k order, scales uint8 [R, I/32]. R counts the valid rows.
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
        codes, scales = quantize_mxfp8(hidden_states)
    else:
        codes, scales = mxfp8_rows(hidden_states, hidden_states_scale, scale_layout)
    gemm1 = _grouped_gemm(codes[token], scales[token], w13, gemm1_width, offsets, experts, arithmetic)
    gemm2 = _grouped_gemm(*between(gemm1, row_expert), w2, hidden, offsets, experts, arithmetic)
    return finalize(gemm2.to(output_dtype), topk_weights, slot_row, row_expert, weights.w2_bias)


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


def _grouped_gemm(
    codes: Tensor,
    row_scales: Tensor,
    weight: Callable[[int], tuple[Tensor, Tensor]],
    n: int,
    expert_offsets: Tensor,
    experts: int,
    arithmetic: Arithmetic,
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
            one = codes[begin:end], row_scales[begin:end], *weight(e), out[begin:end]
            if arithmetic == FP32_CHAIN:
                _gemm(*one)
            else:
                gemm(arithmetic, *one)
    return out


def _gemm(codes: Tensor, row_scales: Tensor, packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """One expert's rows in the fp32 chain; a CPU keeps the block sums in cache, a GPU gets few, large launches."""
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
