"""FlashInfer's CUTLASS MoE, MXFP8 activations and MXFP4 weights, on the GPUs where it has that mode.

Unlike the others it could not be tried by us: it needs a Blackwell GPU. The call is the one whose signature and layouts
`mxfp4_moe.flashinfer_api` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .packages import Absent, Found, find_package, make_importable

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import CallInputs, LayerTensors

NAME = "flashinfer"
DESCRIPTION = "FlashInfer's cutlass_fused_moe, MXFP8 x MXFP4, compiled at first use; its call is untried by us"


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """The package, on a GPU that its MXFP8 x MXFP4 kernels are for.

    Raises:
        Absent: no such package, or another GPU.
    """
    if capability[0] not in (10, 12):
        raise Absent(
            "FlashInfer's MXFP8 x MXFP4 layer is for compute capability 10.x and 12.x, this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    return find_package("flashinfer", "flashinfer-python", folders)


def prepare(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """Rows as [up; gate], scales in the 128x4 layout, weights and scales viewed as FlashInfer wants them."""
    make_importable(found)
    import torch
    from flashinfer import mxfp8_quantize
    from flashinfer.fused_moe import cutlass_fused_moe

    from ...formats import swizzle_scales
    from ...routing import topk_softmax

    shape, device = tensors.shape, tensors.w13.device
    inter = torch.arange(shape.intermediate, device=device)
    up_gate = torch.cat([2 * inter + 1, 2 * inter])

    def scales(rows: Tensor) -> Tensor:
        swizzled = swizzle_scales(rows)
        padded_rows, columns = -(-rows.shape[1] // 128) * 128, -(-rows.shape[2] // 4) * 4
        return swizzled.reshape(shape.experts, padded_rows, columns).view(torch.int32)

    w13, w2 = tensors.w13[:, up_gate].contiguous().view(torch.int64), tensors.w2.view(torch.int64)
    bias13, bias2 = tensors.w13_bias[:, up_gate].contiguous(), tensors.w2_bias
    ones = torch.ones(shape.experts, dtype=torch.float32, device=device)
    quantized = [scales(tensors.w13_scale[:, up_gate]), ones, scales(tensors.w2_scale), ones]
    alpha, beta, limit = ones * 1.702, ones, ones * 7.0

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        out = torch.empty_like(inputs.hidden_states)

        def call() -> Tensor:
            topk_weights, topk_ids = topk_softmax(inputs.logits, shape.top_k)
            x, x_scale = mxfp8_quantize(inputs.hidden_states, True, 32)
            cutlass_fused_moe(
                x,
                topk_ids,
                topk_weights,
                w13,
                w2,
                torch.bfloat16,
                quant_scales=quantized,
                fc1_expert_biases=bias13,
                fc2_expert_biases=bias2,
                input_sf=x_scale,
                swiglu_alpha=alpha,
                swiglu_beta=beta,
                swiglu_limit=limit,
                output=out,
                use_mxfp8_act_scaling=True,
            )
            return out

        return call

    return make_call
