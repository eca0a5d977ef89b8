"""The operators that torch.compile and torch.export see: functional, with fake implementations, and without a tile.

`mxfp4_moe::moe_layer`, `topk_softmax` and `select_experts` stand in a graph for the calls `fused_moe`, `topk_softmax`
and `select_experts`, whose modules import this one so that the operators are there before anything is traced. Their
implementations take the shapes of each call as they come, so a graph holds for every number of tokens; on the GPU they
end in the same C++ operators as the eager calls, which do not pass through here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .. import reference
from .._checkpoints.tensor_scales import INPUT_ARGUMENTS, WEIGHT_ARGUMENTS, TensorScales, of_operator_arguments
from .._install import errors
from ..formats import FP16_NVFP4_UNIT, WeightFormat, WordOrder
from ..reference import routers as reference_routers
from ..routers import Router
from ..weights import Activation, MoEWeights
from . import gradient, launch
from .activation_format import check_format_on, code_of
from .checks import (
    check_call,
    check_layer,
    check_limits,
    check_output,
    check_router,
    check_topk_softmax,
    check_word_order,
)
from .selection import select


class LayerCall(NamedTuple):
    """The arguments of `mxfp4_moe::moe_layer`, in the order of its schema, which is made from them."""

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor  # counted from the first expert that is here
    w13: Tensor
    w13_bias: Tensor | None
    w2: Tensor
    w2_bias: Tensor | None
    hidden_size: int
    intermediate_size: int
    word_order: str
    activation: str
    alpha: float
    beta: float
    limit: float | None
    alphas: Tensor | None  # in place of alpha, one for each expert; so are betas and limits
    betas: Tensor | None
    limits: Tensor | None
    hidden_states_scale: Tensor | None
    scale_layout: str
    output_dtype: torch.dtype
    intermediate_rounding: bool = False
    num_global_experts: int = 0  # of the layer of which w13 is a part, for the choice of a tile; 0: those of w13
    activation_format: str = "mxfp8"
    # What sums are multiplied by for the weights: of NVFP4 `TensorScales.operator_arguments`, with "fp16"
    # `MoEWeights.fp16_factors`.
    w13_factors: Tensor | None = None
    w2_factors: Tensor | None = None
    # Of NVFP4 activations under the checkpoint's scales of inputs, the same `TensorScales.operator_arguments`.
    w13_input_factors: Tensor | None = None
    w2_input_factors: Tensor | None = None
    w13_input_global_scales: Tensor | None = None
    w2_input_global_scales: Tensor | None = None
    weight_format: str = "mxfp4"

    def check(self, device: torch.device) -> None:
        """Checks the tensors that come with each call; also fake ones."""
        check_call(
            self.hidden_states,
            self.topk_weights,
            self.topk_ids,
            self.hidden_states_scale,
            self.scale_layout,
            self.output_dtype,
            self.hidden_size,
            device,
            self.activation_format,
        )

    def factors(self) -> dict[str, Tensor | None]:
        """The arguments that are scales, by their names."""
        return {name: getattr(self, name) for name in (*WEIGHT_ARGUMENTS, *INPUT_ARGUMENTS)}

    def tensor_scales(self) -> TensorScales | None:
        if self.weight_format != WeightFormat.NVFP4:
            return None
        unit = FP16_NVFP4_UNIT if self.activation_format == "fp16" else 1.0
        gated = Activation(self.activation).is_gated
        return of_operator_arguments(self.factors(), experts=self.w13.shape[0], gated=gated, unit=unit)

    def weights(self) -> MoEWeights:
        return MoEWeights(
            w13=self.w13,
            w2=self.w2,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            word_order=WordOrder(self.word_order),
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            activation=Activation(self.activation),
            alpha=self.alpha if self.alphas is None else self.alphas,
            beta=self.beta if self.betas is None else self.betas,
            limit=self.limit if self.limits is None else self.limits,
            weight_format=WeightFormat(self.weight_format),
            tensor_scales=self.tensor_scales(),
        )


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    str: "str",
    bool: "bool",
    float: "float",
    float | None: "float?",
    torch.dtype: "ScalarType",
}


def _schema_of(call: type[NamedTuple]) -> str:
    defaults = {name: "=" + (f'"{v}"' if isinstance(v, str) else f"{v}") for name, v in call._field_defaults.items()}
    types = get_type_hints(call)
    return ", ".join(f"{_SCHEMA_TYPES[types[name]]} {name}{defaults.get(name, '')}" for name in call._fields)


def _moe_layer_cpu(*arguments: object) -> Tensor:
    call = LayerCall(*arguments)  # type: ignore[arg-type]  # by the schema
    rows, weights = (call.hidden_states, call.topk_weights, call.topk_ids), call.weights()
    check_layer(*rows, weights, call.hidden_states_scale, call.scale_layout, call.output_dtype, call.activation_format)
    with torch.no_grad():
        return reference.fused_moe(
            *rows,
            weights,
            hidden_states_scale=call.hidden_states_scale,
            scale_layout=call.scale_layout,
            output_dtype=call.output_dtype,
            intermediate_rounding=call.intermediate_rounding,
            activation_format=call.activation_format,
        )


def _moe_layer_cuda(*arguments: object) -> Tensor:
    call = LayerCall(*arguments)  # type: ignore[arg-type]  # by the schema
    hidden_states, device = call.hidden_states, call.hidden_states.device
    kind = WeightFormat(call.weight_format)
    check_word_order(WordOrder(call.word_order), device, call.activation_format, kind)
    call.check(device)
    check_format_on(call.activation_format, device, kind)
    experts, (tokens, top_k) = call.w13.shape[0], call.topk_ids.shape
    check_limits(experts, tokens, top_k)
    sizes = call.hidden_size, call.intermediate_size
    among = call.num_global_experts or experts
    chosen = select(tokens, top_k, among, *sizes, device.index, call.activation_format, kind)
    op, tile = launch.layer_operator_for(call.activation_format, device.index, chosen, kind)
    rare: dict[str, Any] = {name: value for name, value in call.factors().items() if value is not None}
    if kind is not WeightFormat.MXFP4:
        rare["weight_format"] = kind.code
    output = torch.empty_like(hidden_states, dtype=call.output_dtype)
    try:
        op(
            hidden_states if call.hidden_states_scale is None else hidden_states.view(torch.uint8),
            call.topk_weights,
            call.topk_ids,
            None,
            0,
            call.w13,
            call.w13_bias,
            call.w2,
            call.w2_bias,
            call.intermediate_size,
            Activation(call.activation).code,
            call.alpha,
            call.beta,
            math.inf if call.limit is None else call.limit,
            tile.m,
            tile.n,
            output,
            True,  # renormalize, of router_logits alone
            0,  # first_expert: topk_ids count from it already
            call.alphas,
            call.betas,
            call.limits,
            call.hidden_states_scale,
            call.scale_layout == "swizzled",
            call.intermediate_rounding,
            code_of(call.activation_format),
            **rare,
        )
    except RuntimeError as error:
        errors.explain(f"mxfp4_moe::moe_layer cannot run on {device}", error)
        raise
    return output


def _moe_layer_fake(*arguments: object) -> Tensor:
    call = LayerCall(*arguments)  # type: ignore[arg-type]  # by the schema
    call.check(call.w13.device)
    return torch.empty_like(call.hidden_states, dtype=call.output_dtype)


def _topk_softmax_cpu(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    check_topk_softmax(router_logits, top_k)
    with torch.no_grad():
        return reference.topk_softmax(router_logits, top_k, renormalize)


def _topk_softmax_cuda(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    check_topk_softmax(router_logits, top_k)
    return launch.topk_softmax(router_logits, top_k, renormalize)


def _topk_softmax_fake(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    check_topk_softmax(router_logits, top_k)
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


class RouterCall(NamedTuple):
    """The arguments of `mxfp4_moe::select_experts`, in the order of its schema, which is made from them."""

    router_logits: Tensor
    topk_ids: Tensor | None
    e_score_correction_bias: Tensor | None
    top_k: int
    scoring_func: str
    renormalize: bool
    num_expert_group: int
    topk_group: int
    group_score: str
    routed_scaling_factor: float

    def router(self) -> Router:
        """The router, checked with the tensors; also fake ones."""
        fields = self._asdict()
        del fields["router_logits"], fields["topk_ids"]
        router = Router(**fields)
        check_router(self.router_logits, router, self.topk_ids)
        return router


def _select_experts_cpu(*arguments: object) -> tuple[Tensor, Tensor]:
    call = RouterCall(*arguments)  # type: ignore[arg-type]  # by the schema
    with torch.no_grad():
        return reference_routers.select_experts(call.router_logits, call.router(), call.topk_ids)


def _select_experts_cuda(*arguments: object) -> tuple[Tensor, Tensor]:
    call = RouterCall(*arguments)  # type: ignore[arg-type]  # by the schema
    return launch.select_experts(call.router_logits, call.router(), call.topk_ids)


def _select_experts_fake(*arguments: object) -> tuple[Tensor, Tensor]:
    call = RouterCall(*arguments)  # type: ignore[arg-type]  # by the schema
    call.router()
    shape = (call.router_logits.shape[0], call.top_k)
    logits = call.router_logits
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _write_output(output: Tensor, result: Tensor) -> None:
    _write_output_fake(output, result)
    output.copy_(result)


def _write_output_fake(output: Tensor, result: Tensor) -> None:
    tokens, hidden_size = result.shape
    check_output(output, result.dtype, tokens, hidden_size, result.device)


_LIBRARY = torch.library.Library("mxfp4_moe", "FRAGMENT")  # type: ignore[no-untyped-call]
# The kernels read contiguous tensors: a compiler must not choose other strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _schema, _cpu, _cuda, _fake in (
    (f"moe_layer({_schema_of(LayerCall)}) -> Tensor", _moe_layer_cpu, _moe_layer_cuda, _moe_layer_fake),
    (
        "topk_softmax(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)",
        *(_topk_softmax_cpu, _topk_softmax_cuda, _topk_softmax_fake),
    ),
    (
        f"select_experts({_schema_of(RouterCall)}) -> (Tensor, Tensor)",
        *(_select_experts_cpu, _select_experts_cuda, _select_experts_fake),
    ),
):
    _name = _LIBRARY.define(_schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _cpu, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mxfp4_moe::{_name}", _fake, lib=_LIBRARY)
_name = _LIBRARY.define("write_output(Tensor(a!) output, Tensor result) -> ()", tags=_TAGS)  # type: ignore[no-untyped-call]
_LIBRARY.impl(_name, _write_output, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"mxfp4_moe::{_name}", _write_output_fake, lib=_LIBRARY)
gradient.define(_LIBRARY)
gradient.refuse_in_graphs(_LIBRARY, "moe_layer", "fused_moe", 2)
gradient.refuse_in_graphs(_LIBRARY, "topk_softmax", "topk_softmax", 1)
gradient.refuse_in_graphs(_LIBRARY, "select_experts", "select_experts", 1)

moe_layer = torch.ops.mxfp4_moe.moe_layer.default
topk_softmax = torch.ops.mxfp4_moe.topk_softmax.default
select_experts = torch.ops.mxfp4_moe.select_experts.default
write_output = torch.ops.mxfp4_moe.write_output.default  # of exported programs
