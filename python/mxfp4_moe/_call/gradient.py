"""No gradient flows through the layer, and whoever asks for one is told, eager or compiled.

The call itself goes through, since models run without torch.no_grad() too: the error comes from the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def message(call: str) -> str:
    """What a backward pass through `call` says."""
    return (
        f"{call}: no gradient can be computed through it, since FP4 weights are for inference; call it under "
        "torch.no_grad() or torch.inference_mode(), or train with the model's own experts and convert them afterwards"
    )


# ---- eager -----------------------------------------------------------------------------------------------------------


class _Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.mark_dirty(result)  # so that the very tensor comes back that was written to
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(message(ctx.call))


def refuse_gradient(call: str, result: Tensor, *inputs: Tensor) -> Tensor:
    """The result of a call; a backward pass that comes to it raises RuntimeError where an input asks for a gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        refusing: Tensor = _Refuses.apply(call, result, *inputs)  # type: ignore[no-untyped-call]
        return refusing
    return result


# ---- in graphs -------------------------------------------------------------------------------------------------------


def _no_gradient(gradient: Tensor, shape: list[int], dtype: torch.dtype, call: str) -> Tensor:
    raise RuntimeError(message(call))


def _no_gradient_fake(gradient: Tensor, shape: list[int], dtype: torch.dtype, call: str) -> Tensor:
    return gradient.new_empty(shape, dtype=dtype)


def define(library: torch.library.Library) -> None:
    """Defines `no_gradient`, which stands where a gradient would be computed: it is traced, and running it raises."""
    schema = "no_gradient(Tensor gradient, SymInt[] shape, ScalarType dtype, str call) -> Tensor"
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    library.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("mxfp4_moe::no_gradient", _no_gradient_fake, lib=library)


def refuse_in_graphs(library: torch.library.Library, name: str, call: str, inputs: int) -> None:
    """Gives an operator, whose first inputs may ask for gradients, a backward pass that raises when it runs."""
    torch.library.register_autograd(
        f"mxfp4_moe::{name}", _backward, setup_context=functools.partial(_remember, call, inputs), lib=library
    )


def _remember(call: str, count: int, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.call, ctx.others = call, len(inputs) - count
    ctx.asked = [(tensor.shape, tensor.dtype) for tensor in inputs[:count]]


def _backward(ctx: Any, gradient: Tensor, *of_ids: Tensor | None) -> tuple[Tensor | None, ...]:
    no_gradient = torch.ops.mxfp4_moe.no_gradient.default
    needed = zip(ctx.asked, ctx.needs_input_grad, strict=False)
    refusals = [no_gradient(gradient, shape, dtype, ctx.call) if asks else None for (shape, dtype), asks in needed]
    return (*refusals, *[None] * ctx.others)
