"""What a call finds around itself: a graph that is being made, which records it as an operator, or a transform that no
kernel of it can follow, which is refused by name. docs/torch.md says which is which.

Each question is a call of torch's C++ and takes less than a tenth of a microsecond.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .gradient import message

_INSTEAD = "torch.compile and torch.export record it as an operator"


def in_graph(tensor: Tensor) -> bool:
    """Whether the call is recorded, or only asked for shapes: compiled, exported, under a dispatch mode, fake tensors.

    A fake tensor is one also where its mode is not active.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(tensor).__name__ == "FakeTensor"
    )


def refuse_transforms(call: str, *tensors: Tensor) -> None:
    """Refuses what would fail somewhere inside or, worse, be wrong without a word.

    Raises:
        RuntimeError: under torch.jit.trace, or a transform of torch.func; a tensor with a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._is_tracing():
        raise RuntimeError(f"{call}: torch.jit.trace would record one call's routing for all others; {_INSTEAD}")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{call}: torch.func's transforms (vmap, grad, jvp) cannot pass through it; the tokens of all batches go "
            "into one call, as [T, H], and gradients are not computed"
        )
    if forward_ad._current_level >= 0 and any(_has_tangent(tensor) for tensor in tensors):
        raise RuntimeError(message(call))


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def as_fake(tensor: Tensor | None, beside: Tensor) -> Tensor | None:
    """A weight as a fake tensor of the mode of a fake one beside it, if that takes no real ones; else as it is."""
    if tensor is None or type(beside).__name__ != "FakeTensor" or type(tensor).__name__ == "FakeTensor":
        return tensor
    mode = beside.fake_mode  # type: ignore[attr-defined]
    fake: Tensor = tensor if mode.allow_non_fake_inputs else mode.from_tensor(tensor)
    return fake
