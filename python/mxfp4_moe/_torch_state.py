"""What a program may have set for all of torch, and what of it would reach the arithmetic here.

A default dtype or device is no matter, since every tensor is made with both (tests/cpu/test_torch_state.py reads the
source for that); neither are grad and inference mode, nor deterministic algorithms. Two settings are: autocast, under
which a product of float32 matrices is one of bfloat16, and flush_denormal, under which the CPU takes numbers below
2^-126 for zeros, such as the scale 2^-127. What has to be exact is computed without both.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

_SUBNORMAL: float = struct.unpack("<d", (1).to_bytes(8, "little"))[0]  # by its bits: a computed one may be flushed
_DEVICES = ("cpu", "cuda")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def exact(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function under torch's own settings of autocast and flush_denormal, whatever the caller's are.

    The processor keeps flush_denormal for each thread, and threads inherit it from the one that starts them. So with
    it, the function runs on this thread alone, which is slow and right.
    """

    @functools.wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _undisturbed():
            return function(*args, **kwargs)
        with _own_settings():
            return function(*args, **kwargs)

    return guarded


def flushes() -> bool:
    """Whether this thread takes subnormal numbers for zeros; Python's floats are computed as torch's on the CPU are."""
    return _SUBNORMAL * 1.0 == 0.0


def _undisturbed() -> bool:
    return not (flushes() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    threads = torch.get_num_threads() if flushes() else None
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if threads is None:
            yield
            return
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(True)
