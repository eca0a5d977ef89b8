"""Checks of arguments, and how an error names a tensor. Everything above may use them; they know no format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Dtype and shape for error messages: ``"uint8 [4, 5760, 90]"``."""
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def require_tensor(
    name: str,
    value: object,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks one argument and raises an error that names it, what was expected and what came.

    Args:
        name: argument name for the message.
        value: what the caller passed.
        dtypes: allowed dtype or dtypes.
        shape: expected shape; a string stands for a dimension of any size and names it in the message.
        device: expected device, if it matters.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    expected = " or ".join(_dtype_name(d) for d in allowed)
    expected += " tensor" if shape is None else f" [{', '.join(str(s) for s in shape)}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if shape is not None and (
        value.dim() != len(shape) or any(isinstance(s, int) and s != d for s, d in zip(shape, value.shape, strict=True))
    ):
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected {expected} on {device}, got {describe(value)} on {value.device}")


def named_device(name: str, value: object) -> torch.device:
    """The device that was meant, by itself, by its name or by a GPU's number; it need not be here.

    Raises:
        TypeError, ValueError: no device, such as a dtype, or one that torch does not know.
    """
    if not isinstance(value, (torch.device, str, int)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a torch.device, its name or a GPU's number, got {value!r}")
    try:
        return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    except RuntimeError as error:
        known = "'cpu', 'cuda' or 'cuda:0'"
        raise ValueError(f"{name}: expected a device such as {known}, got {value!r}") from error


def require_device(name: str, value: object) -> torch.device:
    """`named_device`, with its index.

    Raises:
        TypeError, ValueError: the same.
        RuntimeError, AssertionError: torch's, for a device that is not here.
    """
    return torch.empty(0, dtype=torch.uint8, device=named_device(name, value)).device


def has_values(tensor: Tensor) -> bool:
    """Whether values can be read: not of a meta or a fake tensor, nor while a graph is traced or captured."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def require_contiguous(name: str, tensor: Tensor) -> None:
    """Raises a ValueError that names the argument and its strides."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def require_count(name: str, value: object) -> None:
    """Raises an error that names the argument, unless it is an integer from 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")


def require_multiple(name: str, value: int, multiple: int) -> None:
    """Raises an error that names the argument, unless it is an integer, a multiple, and not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 0 or value % multiple:
        raise ValueError(f"{name}: expected a multiple of {multiple}, got {value}")


def require_blocks(name: str, tensor: Tensor, multiple: int) -> None:
    """Raises an error that names the tensor, unless it is one and its last dimension is a multiple."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() == 0 or tensor.shape[-1] % multiple:
        raise ValueError(f"{name}: expected a last dimension that is a multiple of {multiple}, got {describe(tensor)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
