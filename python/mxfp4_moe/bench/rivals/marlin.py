"""Marlin's MoE GEMM through vLLM's library: bfloat16 activations, W4A16, sizes padded as vLLM pads them.

Weights are put into Marlin's order here, by the kernel's own layout, so the library alone is enough and vLLM need not
be importable. vLLM's activation kernel is in another of its libraries; ours in Triton stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import vllm_ops
from .packages import Absent, Found, find_vllm_moe_library

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import CallInputs, LayerTensors

NAME = "marlin"
DESCRIPTION = "vLLM's moe_wna16_marlin_gemm, W4A16, padded"

_HIDDEN_PAD, _INTER_PAD = 256, 128  # what vLLM pads gpt-oss to for this kernel
_PAD_SCALE = 118
_BLOCKS = (8, 16, 32, 48, 64)
_FULL_ENOUGH = 0.9  # a block this full on average is still taken
# vLLM's scalar_type.py packs a type's facts into an integer from bit 0 up: 8 bits of exponent's width, 8 of mantissa's,
# one for a sign, 32 of bias, one for "no infinities" and 8 that say how NaN is stored (0: never).
_FLOAT4_E2M1F = 2 | 1 << 8 | 1 << 16 | 1 << 49


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """vLLM's library.

    Raises:
        Absent: no library, or a GPU before compute capability 8.0.
    """
    if capability < (8, 0):
        raise Absent(f"Marlin needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}")
    return find_vllm_moe_library(folders)


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """vLLM's choice of rows per block: the smallest that its mean expert does not fill."""
    return next((size for size in _BLOCKS if tokens * top_k / experts / size < _FULL_ENOUGH), _BLOCKS[-1])


def marlin_weights(blocks: Tensor) -> Tensor:
    """uint8 [N, K/2] with the low nibble first -> int32 [K/16, 2N], the order of Marlin's 4-bit fragments.

    A tile of 16 k by 64 n is 128 words: word 4 * lane + warp holds, for a lane of an m16n8k16 fragment, its k pairs
    (2 * (lane % 4) + 0, 1, 8, 9) of columns 16 * warp + lane / 4 and 8 further, in nibble order 0 2 4 6 1 3 5 7.
    """
    import torch

    n, k = blocks.shape[0], blocks.shape[1] * 2
    device = blocks.device
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).view(n, k)
    tiles = nibbles.view(n // 64, 64, k // 16, 16).permute(2, 0, 3, 1)  # [K/16, N/64, 16 k, 64 n]
    lane, warp = torch.arange(32, device=device)[:, None, None], torch.arange(4, device=device)[None, :, None]
    value = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7], dtype=torch.int64, device=device)
    k_of = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9], dtype=torch.int64, device=device)[value % 4]
    n_of = 16 * warp + lane // 4 + 8 * (value // 4)
    at = (k_of * 64 + n_of).flatten()  # [32 lanes, 4 warps, 8 nibbles]
    picked = tiles.reshape(k // 16, n // 64, 1024)[:, :, at].view(k // 16, n // 64, 128, 4, 2)
    packed = picked[..., 0] | picked[..., 1] << 4  # bytes of little-endian words
    return packed.contiguous().view(torch.int32).view(k // 16, 2 * n)


def marlin_scales(scales: Tensor) -> Tensor:
    """uint8 E8M0 [N, K/32] -> [K/32, N]: columns of 64 as an 8 x 8 matrix transposed, then 0 2 1 3 in each four."""
    by_k = scales.t().contiguous()
    groups, n = by_k.shape
    return (
        by_k.view(groups, n // 64, 8, 8).transpose(-2, -1).reshape(groups, n // 4, 4)[..., [0, 2, 1, 3]].view(groups, n)
    )


def marlin_bias(bias: Tensor) -> Tensor:
    """[..., N] with each 32 columns in the order in which a thread of the epilogue holds them."""
    import torch

    columns = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    order = torch.tensor(columns, dtype=torch.int64, device=bias.device)
    return bias.view(*bias.shape[:-1], -1, 32)[..., order].reshape(bias.shape).contiguous()


def prepare(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """Weights padded with zeros and in Marlin's order, expert by expert."""
    import torch
    from torch.nn.functional import pad

    from .triton_sums import swiglu_oai

    ops = vllm_ops.load(found)
    shape, device = tensors.shape, tensors.w13.device
    experts, top_k = shape.experts, shape.top_k
    hidden, inter = -(-shape.hidden // _HIDDEN_PAD) * _HIDDEN_PAD, -(-shape.intermediate // _INTER_PAD) * _INTER_PAD

    def convert(blocks: Tensor, scales: Tensor, bias: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        more = n - blocks.shape[1]
        weights = torch.empty(experts, k // 16, 2 * n, dtype=torch.int32, device=device)
        exponents = torch.empty(experts, k // 32, n, dtype=torch.uint8, device=device)
        for expert in range(experts):
            weights[expert] = marlin_weights(pad(blocks[expert], (0, k // 2 - blocks.shape[2], 0, more)))
            padded = pad(scales[expert], (0, k // 32 - scales.shape[2], 0, more), value=_PAD_SCALE)
            exponents[expert] = marlin_scales(padded)
        return weights, exponents.view(torch.float8_e8m0fnu), marlin_bias(pad(bias, (0, more)))

    w13, scale13, bias13 = convert(tensors.w13, tensors.w13_scale, tensors.w13_bias, 2 * inter, hidden)
    w2, scale2, bias2 = convert(tensors.w2, tensors.w2_scale, tensors.w2_bias, hidden, inter)
    locks = torch.zeros(
        torch.cuda.get_device_properties(device).multi_processor_count * 4, dtype=torch.int32, device=device
    )

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        tokens, slots = inputs.tokens, inputs.tokens * top_k
        router = vllm_ops.Router(ops, inputs, top_k)
        size = block_size(tokens, top_k, experts)
        blocks, fill = router.blocks(size, experts)
        x = pad(inputs.hidden_states, (0, hidden - shape.hidden))

        def empty(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=torch.bfloat16, device=device)

        pairs, between, each, out = (
            empty(slots, 2 * inter),
            empty(slots, inter),
            empty(slots, hidden),
            empty(tokens, hidden),
        )

        def gemm(
            rows: Tensor, into: Tensor, weights: Tensor, bias: Tensor, scale: Tensor, m: int, n: int, k: int, last: bool
        ) -> None:
            no_scales_or_order = (None,) * 5  # activation and global scales, zero points, group index, permutation
            ops.moe_wna16_marlin_gemm(
                *(rows, into, weights, bias, scale, *no_scales_or_order, locks),
                *(blocks.slots, blocks.experts, blocks.padded, router.weights, size),
                *(1 if last else top_k, last, _FLOAT4_E2M1F, m, n, k),
                *(True, False, True, False, -1, -1, -1),  # whole K, no atomics, float32 sums, its own tile
            )

        def call() -> Tensor:
            router.run()
            fill()
            gemm(x, pairs, w13, bias13, scale13, tokens, 2 * inter, hidden, False)
            swiglu_oai(pairs, between)
            gemm(between, each, w2, bias2, scale2, slots, hidden, inter, True)
            ops.moe_sum(each.view(tokens, top_k, hidden), out)
            return out[:, : shape.hidden]

        return call

    return make_call
