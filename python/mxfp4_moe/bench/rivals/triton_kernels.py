"""triton_kernels, the MXFP4 MoE of OpenAI's Triton, as vLLM carries it: bfloat16 activations, W4A16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .packages import Absent, Found, find_package, make_importable

if TYPE_CHECKING:
    from torch import Tensor

    from ..inputs import CallInputs, LayerTensors

NAME = "triton_kernels"
DESCRIPTION = "triton_kernels.matmul_ogs, W4A16, SwiGLU fused, split_k 1"


def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
    """The package, also where vLLM carries it.

    Raises:
        Absent: no such package, or an API that is not the one with `matmul_ogs`.
    """
    try:
        found = find_package("triton_kernels", "triton_kernels", folders)
    except Absent as absent:
        try:
            vllm = find_package("vllm", "vllm", ())
        except Absent:
            raise absent from None
        path = vllm.path / "third_party" / "triton_kernels"
        if not path.is_dir():
            raise absent from None
        found = Found(path=path, version=f"of vLLM {vllm.version}")
    if not (found.path / "matmul_ogs.py").is_file():
        raise Absent(f"triton_kernels in {found.path} has no matmul_ogs; its newer API is not known here")
    return found


def prepare(found: Found, tensors: LayerTensors) -> Callable[[CallInputs], Callable[[], Tensor]]:
    """Weights in the layout that the library chooses for this GPU."""
    make_importable(found)
    from triton_kernels.matmul_ogs import (
        FlexCtx,
        FnSpecs,
        FusedActivation,
        PrecisionConfig,
        matmul_ogs,
    )
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.numerics import InFlexData
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    opt_flags.update_opt_flags_constraints({"split_k": 1})  # as vLLM has it for this layer

    def convert(blocks: Tensor, scales: Tensor) -> tuple[Any, Any]:
        chosen, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        weight = convert_layout(wrap_torch_tensor(blocks.transpose(-2, -1), dtype=FP4), chosen, **options)
        chosen, options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        scale = convert_layout(wrap_torch_tensor(scales.transpose(-2, -1)), chosen, **options)
        return weight, PrecisionConfig(weight_scale=scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))

    w13, precision13 = convert(tensors.w13, tensors.w13_scale)
    w2, precision2 = convert(tensors.w2, tensors.w2_scale)
    bias13, bias2 = tensors.w13_bias.float(), tensors.w2_bias.float()
    activation = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2)
    top_k = tensors.shape.top_k

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        logits = inputs.logits.bfloat16()  # exact: see inputs.call_inputs

        def call() -> Tensor:
            rows, gather, scatter = routing(logits, top_k)
            between = matmul_ogs(
                inputs.hidden_states,
                w13,
                bias13,
                rows,
                gather_indx=gather,
                precision_config=precision13,
                fused_activation=activation,
            )
            out: Tensor = matmul_ogs(
                between, w2, bias2, rows, scatter_indx=scatter, precision_config=precision2, gammas=rows.gate_scal
            )
            return out

        return call

    return make_call
