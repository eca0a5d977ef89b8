"""What a caller says about weights beside the tensors: order of rows, numbers of the activation, ranks."""

from __future__ import annotations

import math
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

from .._arguments import require_contiguous, require_tensor

Number = float | Tensor  # one for all experts, or float32 [E]

_EnumT = TypeVar("_EnumT", bound=Enum)
_Otherwise = TypeVar("_Otherwise", float, None)


class GateUpOrder(str, Enum):
    """Order of a checkpoint's w13 rows; means nothing for activations that are not gated."""

    INTERLEAVED = "interleaved"  # g0, u0, g1, u1, ... (gpt-oss)
    GATE_UP = "gate_up"  # all gates, then all ups
    UP_GATE = "up_gate"  # all ups, then all gates (FlashInfer)


def source_rows(order: GateUpOrder, intermediate_size: int, gated: bool, device: torch.device) -> Tensor:
    """int64 [W]: the checkpoint row that stands at each prepared row."""
    if not gated:
        return torch.arange(intermediate_size, device=device)
    row = torch.arange(2 * intermediate_size, device=device)
    j, up = row // 16 * 8 + row % 8, row % 16 // 8
    if order is GateUpOrder.INTERLEAVED:
        return 2 * j + up
    return j + intermediate_size * (up if order is GateUpOrder.GATE_UP else 1 - up)


def split_number(value: Number | None, otherwise: _Otherwise) -> tuple[float | _Otherwise, Tensor | None]:
    """A number of the activation as the operators take it: the one for all experts, the tensor with one for each."""
    if isinstance(value, Tensor):
        return otherwise, value
    return (otherwise if value is None else value), None


def check_number(name: str, value: object, experts: int, device: torch.device) -> None:
    """One float for all experts, or float32 [E]."""
    if isinstance(value, Tensor):
        require_tensor(name, value, torch.float32, (experts,), device)
        return require_contiguous(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, or float32 [{experts}], got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_int(name: str, value: object) -> None:
    """An integer, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def shard_of(kind: str, rank: int, size: int, total: int, multiple: int) -> tuple[int, int]:
    """[begin, end) of one rank's share of total, a multiple of `multiple`."""
    check_int(f"{kind}_rank", rank)
    check_int(f"{kind}_size", size)
    if size < 1 or total % size or total // size % multiple:
        what = f"the {total} experts" if kind == "ep" else f"an intermediate size of {total} in multiples of {multiple}"
        raise ValueError(f"{kind}_size: expected a number of ranks that divides {what}, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"{kind}_rank: expected 0 to {size - 1}, got {rank}")
    return rank * (total // size), (rank + 1) * (total // size)


def member(name: str, kind: type[_EnumT], value: object) -> _EnumT:
    """The member of an enum that was meant, by itself or by its value."""
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(m.value) for m in kind)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}") from None
