"""b12x, CuTe kernels for SM120 and SM121: its fused MoE of MXFP4 weights with MXFP8 activations ("w4a8_mx").

It could not be tried by us: it needs such a GPU. It has neither biases nor gpt-oss's SwiGLU in this mode; so what it
computes is compared with our layer of the same weights without biases, and its time with that of ours for all that
gpt-oss asks for. The calls are those of its tensor-based interface, without its autotuner.
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

NAME = "b12x"
DESCRIPTION = "b12x's fused_moe, w4a8_mx, plain SwiGLU without biases, compiled at first use; untried by us"

_MODE = "w4a8_mx"


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """The package, on a GPU that it is for.

    FlashInfer's wheel has a package of this name too, which leads to FlashInfer's own copy and not to this interface.

    Raises:
        Absent: no such package, FlashInfer's, or another GPU.
    """
    if capability not in ((12, 0), (12, 1)):
        raise Absent(f"b12x is for compute capability 12.0 and 12.1, this GPU has {capability[0]}.{capability[1]}")
    found = find_package("b12x", "b12x", folders)
    if not (found.path / "moe" / "fused_moe" / "api.py").is_file():
        raise Absent(f"the package b12x in {found.path} is FlashInfer's, which has no moe/fused_moe/api.py")
    return found


def layer(tensors: LayerTensors) -> MoEWeights:
    """What it computes."""
    return padded.plain_swiglu(tensors)


def prepare(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """Rows as [up; gate], scales as they are; unpadded, since its sizes are multiples of 32."""
    make_importable(found)
    import torch
    from b12x.moe import fused_moe

    from ...routing import topk_softmax

    shape, device = tensors.shape, tensors.w13.device
    given = padded.up_gate(tensors, 32)
    plan = fused_moe.plan_weights(
        quant_modes=_MODE,
        source_format="fp4_e8m0_k32",
        activation="silu",
        params_dtype=torch.bfloat16,
        num_experts=shape.experts,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        w13_layout="up_gate",
    )
    ones = torch.ones(shape.experts, dtype=torch.float32, device=device)
    one = torch.ones((), dtype=torch.float32, device=device)
    experts = fused_moe.prepare_weights(
        plan=plan,
        params_dtype=torch.bfloat16,
        w1_fp4=given.w13,
        w2_fp4=given.w2,
        w1_global_scale=ones,
        w2_global_scale=ones,
        w1_blockscale=given.w13_scale,
        w2_blockscale=given.w2_scale,
        a1_gscale=one,
        a2_gscale=one,
    )

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        caps = fused_moe.Caps(
            max_tokens=inputs.tokens, num_topk=shape.top_k, device=device, weight_plan=plan, quant_mode=_MODE
        )
        scratch = fused_moe.plan(caps)
        buffers = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in scratch.shapes_and_dtypes()]
        out = torch.empty_like(inputs.hidden_states)

        def call() -> Tensor:
            topk_weights, topk_ids = topk_softmax(inputs.logits, shape.top_k)
            binding = fused_moe.bind(
                scratch,
                scratch=buffers,
                a=inputs.hidden_states,
                experts=experts,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                output=out,
            )
            result: Tensor = fused_moe.run(binding=binding)
            return result

        return call

    return make_call
