"""Standard output that may be closed, full, or a pipe whose reader has left."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class OutputError(Exception):
    """Standard output cannot be written; the message is the system's. No OSError, which argparse would swallow."""


class _Output:
    """A stream whose failures to write are known from all other errors."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _failing():
            return self._open().write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with _failing():
                self._stream.flush()

    def _open(self) -> TextIO:
        if self._stream is None:  # what Python makes of a descriptor that is closed when it starts
            raise OutputError("it is closed")
        return self._stream


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror) from error
    except ValueError as error:  # Python's, of a stream that was closed since
        raise OutputError("it is closed") from error


@contextlib.contextmanager
def checked() -> Iterator[Callable[[str], None]]:
    """Inside, what stdout cannot take is an `OutputError`. Gives a function that says so on stderr, if that is open."""
    before, errors = sys.stdout, sys.stderr
    sys.stdout = _Output(before)
    with contextlib.ExitStack() as stack:
        if errors is None:  # print would take None for stdout
            sys.stderr = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        try:
            yield _say
        finally:
            sys.stdout, sys.stderr = before, errors
            _forget(before)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)


def _forget(stream: TextIO | None) -> None:
    """Lets go of what is left to write where it cannot be: Python would try again as it ends, and complain."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
