"""The operators that torch.compile and torch.export see: functional, with fake implementations, and without a tile.

`mxfp4_moe::moe_layer` and `mxfp4_moe::topk_softmax` stand in a graph for `fused_moe` and `topk_softmax`, whose modules
import this one so that the operators are there before anything is traced. Their implementations take the shapes of each
call as they come, so a graph holds for every number of tokens; on the GPU they end in the same C++ operators as the
eager calls, which do not pass through here. They call back into those two modules, hence the imports inside functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._install import loading
from ..formats import WordOrder
from ..weights import Activation, MoEWeights

_LIBRARY = torch.library.Library("mxfp4_moe", "FRAGMENT")  # type: ignore[no-untyped-call]
# The kernels read contiguous tensors: a compiler must not choose other strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIBRARY.define(  # type: ignore[no-untyped-call]
    "moe_layer(Tensor hidden_states, Tensor topk_weights, Tensor topk_ids, Tensor w13, Tensor? w13_bias, "
    "Tensor w2, Tensor? w2_bias, int hidden_size, int intermediate_size, str word_order, str activation, "
    "float alpha, float beta, float? limit, Tensor? alphas, Tensor? betas, Tensor? limits, "
    "Tensor? hidden_states_scale, str scale_layout, ScalarType output_dtype, bool intermediate_rounding=False) "
    "-> Tensor",
    tags=_TAGS,
)
_LIBRARY.define("topk_softmax(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)", tags=_TAGS)  # type: ignore[no-untyped-call]


def _moe_layer_cpu(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Tensor,
    w13_bias: Tensor | None,
    w2: Tensor,
    w2_bias: Tensor | None,
    hidden_size: int,
    intermediate_size: int,
    word_order: str,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    alphas: Tensor | None,
    betas: Tensor | None,
    limits: Tensor | None,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype,
    intermediate_rounding: bool = False,
) -> Tensor:
    from .fused_moe import fused_moe

    weights = MoEWeights(
        w13=w13,
        w2=w2,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        word_order=WordOrder(word_order),
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=Activation(activation),
        alpha=alpha if alphas is None else alphas,
        beta=beta if betas is None else betas,
        limit=limit if limits is None else limits,
    )
    return fused_moe(
        hidden_states,
        topk_weights,
        topk_ids,
        weights,
        hidden_states_scale=hidden_states_scale,
        scale_layout=scale_layout,
        output_dtype=output_dtype,
        intermediate_rounding=intermediate_rounding,
    )


def _moe_layer_cuda(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Tensor,
    w13_bias: Tensor | None,
    w2: Tensor,
    w2_bias: Tensor | None,
    hidden_size: int,
    intermediate_size: int,
    word_order: str,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    alphas: Tensor | None,
    betas: Tensor | None,
    limits: Tensor | None,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype,
    intermediate_rounding: bool = False,
) -> Tensor:
    from .fused_moe import _operator, check_call, check_limits, check_word_order, select

    check_word_order(WordOrder(word_order), hidden_states.device)
    check_call(
        hidden_states,
        topk_weights,
        topk_ids,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        hidden_size,
        hidden_states.device,
    )
    tokens, top_k = topk_ids.shape
    check_limits(w13.shape[0], tokens, top_k)
    index = hidden_states.device.index
    op, tile = _operator(index, select(tokens, top_k, w13.shape[0], hidden_states.shape[1], intermediate_size, index))
    output = torch.empty_like(hidden_states, dtype=output_dtype)
    try:
        op(
            hidden_states if hidden_states_scale is None else hidden_states.view(torch.uint8),
            topk_weights,
            topk_ids,
            None,
            0,
            w13,
            w13_bias,
            w2,
            w2_bias,
            intermediate_size,
            Activation(activation).code,
            alpha,
            beta,
            math.inf if limit is None else limit,
            tile.m,
            tile.n,
            output,
            True,  # renormalize, of router_logits alone
            0,  # first_expert: topk_ids count from it already
            alphas,
            betas,
            limits,
            hidden_states_scale,
            scale_layout == "swizzled",
            intermediate_rounding,
        )
    except RuntimeError as error:
        loading.explain(f"mxfp4_moe::moe_layer cannot run on {hidden_states.device}", error)
        raise
    return output


def _moe_layer_fake(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Tensor,
    w13_bias: Tensor | None,
    w2: Tensor,
    w2_bias: Tensor | None,
    hidden_size: int,
    intermediate_size: int,
    word_order: str,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    alphas: Tensor | None,
    betas: Tensor | None,
    limits: Tensor | None,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype,
    intermediate_rounding: bool = False,
) -> Tensor:
    from .fused_moe import check_call

    check_call(
        hidden_states,
        topk_weights,
        topk_ids,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        hidden_size,
        w13.device,
    )
    return torch.empty_like(hidden_states, dtype=output_dtype)


def _topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    from ..routing import topk_softmax

    return topk_softmax(router_logits, top_k, renormalize)


def _topk_softmax_fake(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    from ..routing import check_topk_softmax

    check_topk_softmax(router_logits, top_k)
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


_LIBRARY.impl("moe_layer", _moe_layer_cpu, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("moe_layer", _moe_layer_cuda, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("topk_softmax", _topk_softmax, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("topk_softmax", _topk_softmax, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("mxfp4_moe::moe_layer", _moe_layer_fake, lib=_LIBRARY)
torch.library.register_fake("mxfp4_moe::topk_softmax", _topk_softmax_fake, lib=_LIBRARY)

moe_layer = torch.ops.mxfp4_moe.moe_layer.default
topk_softmax = torch.ops.mxfp4_moe.topk_softmax.default
