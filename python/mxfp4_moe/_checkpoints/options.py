"""What a caller says about weights beside the tensors: order of rows, numbers of the activation, ranks."""

from __future__ import annotations

import math
import struct
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

from .._arguments import has_values, require_contiguous, require_tensor

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


def check_number(name: str, value: object, experts: int | str, device: torch.device, *, above_zero: str = "") -> None:
    """One float for all experts, or float32 [E]: finite, and a limit or what has to be above 0, as float32 has it.

    A tensor's values are read, which on a GPU waits for them; where there is nothing to read, as of meta tensors, they
    are not looked at.

    Args:
        above_zero: with what else it has to be above 0, such as " with activation 'situ'"; "" for nothing.

    Raises:
        TypeError, ValueError: not so.
    """
    positive = bool(above_zero) or name == "limit"
    above = f" above 0{above_zero}" if positive else ""
    if isinstance(value, Tensor):
        require_tensor(name, value, torch.float32, (experts,), device)
        require_contiguous(name, value)
        numbers = value.tolist() if has_values(value) else []
        wrong = [e for e, number in enumerate(numbers) if not _is_number(number, positive)]
        if wrong:
            raise ValueError(
                f"{name}: expected finite numbers{above}, got {numbers[wrong[0]]} for expert {wrong[0]}"
                + (f" (of {len(wrong)} such experts)" if len(wrong) > 1 else "")
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, or float32 [{experts}], got {type(value).__name__}")
    if not _is_number(value, positive):
        wanted = above + (", or None" if name == "limit" else "")
        raise ValueError(f"{name}: expected a finite number{wanted}, got {value}")


def _is_number(value: float, positive: bool) -> bool:
    """Whether float32, in which the kernels compute, has it as something finite, and as something above 0."""
    try:
        number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (OverflowError, struct.error):  # the second for an integer beyond float64
        return False
    return math.isfinite(number) and (number > 0 or not positive)


def check_int(name: str, value: object) -> None:
    """An integer, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_layer(layer: object) -> None:
    """A layer's number."""
    check_int("layer", layer)
    if layer < 0:  # type: ignore[operator]
        raise ValueError(f"layer: expected 0 or more, got {layer}")


def shard_of(kind: str, rank: int, size: int, total: int, multiple: int) -> tuple[int, int]:
    """[begin, end) of one rank's share of total: whole multiples, one more for the first ranks where some are left."""
    check_int(f"{kind}_rank", rank)
    check_int(f"{kind}_size", size)
    units = total // multiple
    if max(size, units) < 1:  # total came from size
        raise ValueError(f"{kind}_size: expected 1 or more ranks, got {size}")
    if not 1 <= size <= units:
        what = (
            f"{total} experts" if kind == "ep" else f"{units} blocks of {multiple} of an intermediate size of {total}"
        )
        raise ValueError(f"{kind}_size: expected 1 to {units} ranks for {what}, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"{kind}_rank: expected 0 to {size - 1}, got {rank}")
    share, left_over = divmod(units, size)
    begin = rank * share + min(rank, left_over)
    return multiple * begin, multiple * (begin + share + (rank < left_over))


def member(name: str, kind: type[_EnumT], value: object) -> _EnumT:
    """The member of an enum that was meant, by itself or by its value."""
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(m.value) for m in kind)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}") from None
