"""FlashInfer's layout of MXFP4 weights for bf16 x MXFP4: its two functions that make it, and the way back.

FlashInfer multiplies these weights on SM90 alone, by a GEMM of mixed inputs that loads codes as its MMA's fragments and
expands them by a table; hence the functions' names. Here the layout is only what callers hand over: weights are put
back into rows when they are prepared, for every device. Both layouts are FlashInfer 0.7.2.post1's; scales that an older
version folded as [E, K/128, 4N] are refused by their shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._arguments import describe, require_contiguous, require_tensor
from .._checkpoints.layers import RawLayer, rows_name
from .._checkpoints.sources import Source, ceil_div, mxfp4_source
from ..formats import BLOCK

_GROUP = 16  # rows of an MMA, which lie together
_STEP = 32  # bytes of a row that four MMAs of 16 k read
_SCALE_ROWS = 64  # of a block of folded scales; 128 k are its columns
_SCALE_K = 128
LAYER_MULTIPLE = 128  # H and I are rows of one GEMM's scales and k of the other's
_PIECES = 8  # of an expert, so that moving bits needs little memory


@torch.no_grad()
def interleave_moe_weights_for_sm90_mixed_gemm(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """Packed MXFP4 in the byte order of FlashInfer's mixed-input GEMM, for fc1 and fc2 of bf16 x MXFP4.

    Of rows r and r + 8 in a group of 16, and 64 k, the codes that thread t of four holds of an MMA of 16 k (m16n8k16:
    k = 2t, 2t + 1 and 2t + 8, 2t + 9 of both rows) become one little-endian word. Its low half has the even k: row r's
    first code with its sign at bit 15 and its magnitude at 8..6, row r + 8's at 12 and 5..3; of the second codes row
    r's at 9 and 2..0, row r + 8's at 14, 11..10 and, the last bit, 13. The odd k stand in the high half, alike. The
    words of MMAs 0 and 2 of the four lie in row r, of 1 and 3 in row r + 8, t after t.

    Args:
        weight: uint8 [E, N, K/2], low nibble = even k; N a multiple of 16 and K of 64.
        quant_type: "fp4", MXFP4 for bfloat16 activations.

    Returns:
        uint8 [E, N, K/2], a new tensor, on the weight's device.

    Raises:
        NotImplementedError: another quant_type of FlashInfer's.
        TypeError, ValueError: another dtype or shape; no quant_type.
    """
    if quant_type in ("int4", "fp4_fp8"):
        what = "INT4 weights" if quant_type == "int4" else "MXFP4 weights for FP8 activations"
        raise NotImplementedError(f"quant_type: this library has no {quant_type!r}, {what} of SM90; it has 'fp4' only")
    if quant_type != "fp4":
        raise ValueError(f"quant_type: expected 'fp4', got {quant_type!r}")
    require_tensor("weight", weight, torch.uint8, ("E", "N", "K/2"))
    rows, row_bytes = weight.shape[1:]
    if rows % _GROUP or row_bytes % _STEP:
        raise ValueError(
            f"weight: expected N a multiple of {_GROUP} and K of {2 * _STEP}, got {rows} and {2 * row_bytes}"
        )
    weight = weight.detach()
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, made in zip(weight, result, strict=True):
        for piece in _pieces(rows):
            made[piece] = _interleaved(expert[piece])
    return result


@torch.no_grad()
def interleave_moe_scales_for_sm90_mixed_gemm(scales: Tensor, group_size: int = BLOCK) -> Tensor:
    """E8M0 scales folded as FlashInfer's mixed-input GEMM reads them: the four of a row and 128 k stay together.

    Args:
        scales: uint8 or float8_e8m0fnu [E, N, K/32]; N a multiple of 64 and K of 128.
        group_size: 32.

    Returns:
        The same dtype, [E, N/64, K/128, 16, 16]: at [e, b, c, i, 4j + g] that of row 64b + 16j + i and k-block 4c + g.
        ``cutlass_fused_moe`` takes it as it is, or as a view of int32.

    Raises:
        NotImplementedError: the group_size of INT4 weights.
        TypeError, ValueError: another dtype or shape.
    """
    if group_size != BLOCK:
        raise NotImplementedError(
            f"group_size: this library has MXFP4 only, whose group is {BLOCK}, got {group_size!r}; INT4 is not here"
        )
    require_tensor("scales", scales, (torch.uint8, torch.float8_e8m0fnu), ("E", "N", "K/32"))
    experts, rows, blocks = scales.shape
    if rows % _SCALE_ROWS or blocks % 4:
        raise ValueError(
            f"scales: expected N a multiple of {_SCALE_ROWS} and K of {_SCALE_K}, got {rows} and {BLOCK * blocks}"
        )
    parts = scales.detach().view(torch.uint8).reshape(experts, rows // 64, 4, 16, blocks // 4, 4)
    folded = parts.permute(0, 1, 4, 3, 2, 5).reshape(experts, rows // 64, blocks // 4, 16, 16)
    return folded.contiguous().view(scales.dtype)


def restore_weights(interleaved: Tensor) -> Tensor:
    """Of one expert, what `interleave_moe_weights_for_sm90_mixed_gemm` was given: uint8 [N, K/2] to the same."""
    result = torch.empty_like(interleaved)
    for piece in _pieces(len(interleaved)):
        result[piece] = _in_rows(interleaved[piece])
    return result


def restore_scales(folded: Tensor) -> Tensor:
    """Of one expert, what `interleave_moe_scales_for_sm90_mixed_gemm` was given: uint8 [N/64, K/128, 16, 16]."""
    high, wide = folded.shape[:2]
    return folded.reshape(high, wide, 16, 4, 4).permute(0, 3, 2, 1, 4).reshape(64 * high, 4 * wide)


def mixed_gemm_layer(
    fc1_expert_weights: Tensor,
    fc1_scale: Tensor,
    fc2_expert_weights: Tensor,
    fc2_scale: Tensor,
    fc1_expert_biases: Tensor | None,
    fc2_expert_biases: Tensor | None,
    gated: bool,
) -> RawLayer:
    """A layer in these layouts, as `flashinfer_layer`; folded scales are whole blocks, so H and I are multiples of 128.

    Args:
        fc1_scale, fc2_scale: as they were made, or views of int32.
    """
    names = ("fc1_expert_weights", "fc1_scale", "fc2_expert_weights", "fc2_scale")
    require_tensor(names[0], fc1_expert_weights, torch.uint8, ("E", rows_name(gated), "H/2"))
    (experts, rows, row_bytes), device = fc1_expert_weights.shape, fc1_expert_weights.device
    hidden, inter = 2 * row_bytes, rows // 2 if gated else rows
    for what, size in (("H (the last dimension, in values)", hidden), ("I", inter)):
        if size == 0 or size % LAYER_MULTIPLE or experts == 0 or (gated and rows % 2):
            raise ValueError(
                f"{names[0]}: expected experts, and {what} a multiple of {LAYER_MULTIPLE}, got {size} from "
                f"{describe(fc1_expert_weights)}"
            )
    require_tensor(names[2], fc2_expert_weights, torch.uint8, (experts, hidden, inter // 2), device)
    for name, scale, n, k in ((names[1], fc1_scale, rows, hidden), (names[3], fc2_scale, hidden, inter)):
        last = 4 if isinstance(scale, Tensor) and scale.dtype is torch.int32 else 16
        shape = (experts, n // _SCALE_ROWS, k // _SCALE_K, 16, last)
        require_tensor(name, scale, (torch.int32, torch.uint8, torch.float8_e8m0fnu), shape, device)
    layer = (fc1_expert_weights, fc1_scale, fc2_expert_weights, fc2_scale)
    for name, tensor in zip(names, layer, strict=True):
        require_contiguous(name, tensor)

    def source(which: int) -> Source:
        return mixed_gemm_source(names[which + 1], layer[which].__getitem__, layer[which + 1].__getitem__)

    return RawLayer(
        w13=source(0),
        w2=source(2),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=device,
        w13_bias=fc1_expert_biases,
        w2_bias=fc2_expert_biases,
        bias_names=("fc1_expert_biases", "fc2_expert_biases"),
    )


def mixed_gemm_source(name: str, weight: Callable[[int], Tensor], scales: Callable[[int], Tensor]) -> Source:
    """Of weights and scales per expert in these layouts; name is that of the scales."""
    return mxfp4_source(
        name,
        lambda expert: restore_weights(weight(expert)),
        lambda expert: restore_scales(scales(expert).view(torch.uint8)),
    )


def _interleaved(packed: Tensor) -> Tensor:
    # [group, row / 8, row % 8, 64 k, MMA, byte / 4, t]
    parts = packed.reshape(-1, 2, 8, packed.shape[1] // _STEP, 4, 2, 4)
    first, second = parts.select(-2, 0), parts.select(-2, 1)
    bytes_ = (first[:, 0], first[:, 1], second[:, 0], second[:, 1])
    made = []
    for a, b, c, d in ([part & 15 for part in bytes_], [part >> 4 for part in bytes_]):
        made.append((a & 3) << 6 | (b & 7) << 3 | c & 7)
        made.append((a & 8) << 4 | (d & 8) << 3 | (d & 1) << 5 | (b & 8) << 1 | (d & 6) << 1 | (c & 8 | a & 4) >> 2)
    # [group, row % 8, 64 k, MMA, t, byte] -> [group, MMA % 2, row % 8, 64 k, MMA / 2, t, byte]
    words = torch.unflatten(torch.stack(made, -1), 3, (2, 2))
    return words.permute(0, 4, 1, 2, 3, 5, 6).reshape(packed.shape)


def _in_rows(interleaved: Tensor) -> Tensor:
    words = interleaved.reshape(-1, 2, 8, interleaved.shape[1] // _STEP, 2, 4, 4)
    low0, high0, low1, high1 = words.permute(0, 2, 3, 4, 1, 5, 6).flatten(3, 4).unbind(-1)

    def codes(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return (
            high >> 4 & 8 | (high & 1) << 2 | low >> 6,
            high >> 1 & 8 | low >> 3 & 7,
            (high & 2) << 2 | low & 7,
            high >> 3 & 8 | high >> 1 & 6 | high >> 5 & 1,
        )

    pairs = zip(codes(low0, high0), codes(low1, high1), strict=True)
    a, b, c, d = (even | odd << 4 for even, odd in pairs)
    rows = torch.stack((torch.stack((a, c), 4), torch.stack((b, d), 4)), 1)
    return rows.reshape(interleaved.shape)


def _pieces(rows: int) -> list[slice]:
    step = ceil_div(ceil_div(rows, _PIECES), _GROUP) * _GROUP
    return [slice(begin, begin + step) for begin in range(0, rows, step)]
