"""FlashInfer's MXFP8 x MXFP4 layer for SM120 and SM121, made of CuTe kernels: route and quantize, GEMM1, GEMM2.

It could not be tried by us: it needs such a GPU. It has neither biases nor gpt-oss's SwiGLU, and quantizes activations
with a scale for 128 values; so what it computes is compared with our layer of the same weights without biases, and its
time with that of ours for all that gpt-oss asks for. The three calls are those of its own runner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import padded
from .packages import Absent, Found, find_package, make_importable

if TYPE_CHECKING:
    from torch import Tensor

    from ...weights import MoEWeights
    from ..inputs import CallInputs, LayerTensors

NAME = "flashinfer-sm12x"
DESCRIPTION = (
    "FlashInfer's CuTe kernels for SM12x, MXFP8 x MXFP4, plain SwiGLU without biases, padded to 128, compiled at first "
    "use; untried by us"
)

_PAD = 128
_LIMIT = 7.0


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """The package, on a GPU that these kernels are for, and of a version that has them.

    Raises:
        Absent: no such package, one without the kernels, or another GPU.
    """
    if capability not in ((12, 0), (12, 1)):
        raise Absent(
            "FlashInfer's CuTe layer for SM12x is for compute capability 12.0 and 12.1, this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    found = find_package("flashinfer", "flashinfer-python", folders)
    kernels = found.path / "fused_moe" / "cute_dsl" / "blackwell_sm12x"
    if not (kernels / "moe_mxfp8_mxfp4_fc1_act_q1.py").is_file():
        raise Absent(f"FlashInfer {found.version} in {found.path} has no CuTe layer of MXFP8 x MXFP4 for SM12x")
    return found


def layer(tensors: LayerTensors) -> MoEWeights:
    """What it computes."""
    return padded.plain_swiglu(tensors, _LIMIT)


def word_rows(scales: Tensor) -> Tensor:
    """uint8 [E, N, K/32] -> uint8 [E, K/128, 4 N]: for each K tile of 128, the four scales of every row."""
    experts, rows, blocks = scales.shape
    return scales.view(experts, rows, blocks // 4, 4).transpose(1, 2).reshape(experts, blocks // 4, 4 * rows)


def prepare(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """Rows as [up; gate], the scales of a K tile together."""
    make_importable(found)
    import torch
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_mxfp8_mxfp4_fc1_act_q1 as gemm1
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_mxfp8_mxfp4_fc2_finalize as gemm2
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_mxfp8_q0_route_triton as first
    from flashinfer.tllm_enums import ActivationType

    from ...routing import topk_softmax

    shape = tensors.shape
    given = padded.up_gate(tensors, _PAD)
    w13_scale, w2_scale = word_rows(given.w13_scale), word_rows(given.w2_scale)

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        hidden_states = given.pad_rows(inputs.hidden_states)
        device, slots = hidden_states.device, inputs.tokens * shape.top_k
        out = torch.empty_like(hidden_states)
        workspace = first.make_mxfp8_q0_route_workspace(
            hidden_states,
            torch.empty(inputs.tokens, shape.top_k, dtype=torch.int32, device=device),
            shape.experts,
        )
        between = torch.empty(slots, given.intermediate, dtype=torch.float8_e4m3fn, device=device)
        between_scale = torch.zeros(
            gemm1.out_sf_shape(slots, given.intermediate, shape.experts), dtype=torch.int32, device=device
        )

        def call() -> Tensor:
            topk_weights, topk_ids = topk_softmax(inputs.logits, shape.top_k)
            out.zero_()
            offsets, token_map, weights, codes, scale = first.mxfp8_q0_route_triton(
                hidden_states, topk_ids, topk_weights, shape.experts, workspace=workspace, enable_pdl=True
            )
            gemm1.cute_dsl_sm12x_fc1_act_q1_mxfp8_mxfp4(
                codes,
                scale,
                given.w13,
                w13_scale,
                offsets,
                tune=False,
                enable_pdl=True,
                activation=ActivationType.Swiglu,
                swiglu_limit=_LIMIT,
                out_q=between,
                out_sf=between_scale,
            )
            gemm2.cute_dsl_sm12x_fc2_finalize_mxfp8_mxfp4(
                between,
                between_scale,
                given.w2,
                w2_scale,
                offsets,
                token_map,
                weights,
                inputs.tokens,
                tune=False,
                enable_pdl=True,
                out=out,
            )
            return out[:, : shape.hidden]

        return call

    return make_call
