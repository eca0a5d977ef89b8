"""NVFP4 x NVFP4 whose input is NVFP4 already: codes and scales as FlashInfer's quantizers give them, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._call.checks import check_limits, check_output
from .._call.transforms import refuse_transforms
from ..formats import NVFP4_BLOCK, unswizzle_scales
from ..reference import fp4
from ..weights import MoEWeights

_SIGN = 0x80  # an E4M3 scale has none


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the reference looks at values
@torch.no_grad()
def layer_of_codes(
    input: Tensor,
    input_sf: Tensor | None,
    swizzled: bool,
    token_final_scales: Tensor,
    token_selected_experts: Tensor,
    weights: MoEWeights,
    output_dtype: torch.dtype,
    output: Tensor | None,
) -> Tensor:
    """The layer of `cutlass_fused_moe`, by its arguments' names.

    Args:
        input: uint8 [T, H/2], low nibble = even k, or int64 [T, H/16], a view of that; under fc1 act global.
        input_sf: uint8 or float8_e4m3fn, 128x4-swizzled with rows padded to 128, of any shape; or [T, H/16].

    Raises:
        TypeError, ValueError: as `cutlass_fused_moe`.
    """
    hidden, (tokens, top_k) = weights.hidden_size, token_selected_experts.shape
    refuse_transforms("cutlass_fused_moe", input, token_final_scales)
    codes = input.contiguous().view(torch.uint8) if input.dtype is torch.int64 and input.dim() else input
    require_tensor("input", codes, torch.uint8, (tokens, hidden // 2), weights.device)
    if top_k == 0:
        raise ValueError(f"token_selected_experts: expected [{tokens}, k] with k at least 1, got k = 0")
    check_limits(weights.num_experts, tokens, top_k)
    check_output(output, output_dtype, tokens, hidden, weights.device)
    result = fp4.fused_moe(
        codes,
        token_final_scales,
        token_selected_experts,
        weights,
        activation_format="nvfp4",
        output_dtype=output_dtype,
        intermediate_rounding=True,
        hidden_states_scale=_linear(input_sf, swizzled, tokens, hidden),
    )
    return result if output is None else output.copy_(result)


def _linear(input_sf: Tensor | None, swizzled: bool, tokens: int, hidden: int) -> Tensor:
    if input_sf is None:
        raise ValueError("input_sf: expected the scales of input that is NVFP4 already, got None")
    require_tensor("input_sf", input_sf, (torch.uint8, torch.float8_e4m3fn))
    tiles, blocks = (-(-tokens // 128), -(-hidden // (4 * NVFP4_BLOCK))), hidden // NVFP4_BLOCK
    size = tiles[0] * tiles[1] * 512 if swizzled else tokens * blocks
    if input_sf.numel() != size or not input_sf.is_cpu:
        rows, order = (128 * tiles[0], "128x4-swizzled") if swizzled else (tokens, "linear")
        columns = 4 * tiles[1] if swizzled else blocks
        raise ValueError(f"input_sf: expected {order} [{rows}, {columns}] on cpu, got {describe(input_sf)}")
    scales = input_sf.contiguous().view(torch.uint8)
    linear = unswizzle_scales(scales.view(*tiles, 512), tokens, hidden, NVFP4_BLOCK) if swizzled else scales
    if bool((linear >= _SIGN).any()):
        raise ValueError(f"input_sf: expected E4M3 bytes without a sign, 0..127, got {int(linear.max())}")
    return linear.view(tokens, blocks)
