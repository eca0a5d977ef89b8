"""What an error of torch, CUDA or the loader means here, as one sentence with the next step. Loads nothing."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import torch

from .troubles import DOCTOR, TORCH_FLOOR, Versions, recognize, words
from .wheel import REPORT as _REPORT
from .wheel import read_report


class LoadError(RuntimeError):
    """The wheel cannot be used with the torch, driver or GPU that is here; one sentence says why and what to do."""


def environment() -> str:
    """torch and Python as they are here, for error messages."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"torch {torch.__version__} with {cuda} and Python {platform.python_version()}"


def built_for() -> str:
    """What the wheel was built for, for error messages: its build report's words."""
    try:
        built_with = (read_report(_REPORT) or {})["built_with"]
        return f"CUDA {built_with['cuda']} with torch {built_with['torch']}"
    except (KeyError, TypeError):
        return "an unknown CUDA (it has no build report)"


def versions() -> Versions:
    """What the words about an error depend on."""
    built_with = (read_report(_REPORT) or {}).get("built_with") or {}
    return Versions(wheel_cuda=str(built_with.get("cuda", "")), torch_cuda=torch.version.cuda or "")


def explain(what: str, error: Exception) -> None:
    """Raises a `LoadError` from an error of torch or CUDA that is known to be about the install; returns otherwise.

    Args:
        what: what could not be done, the beginning of the sentence.
        error: what was raised.
    """
    message = words(error)
    if not isinstance(error, LoadError) and recognize(message, versions()):
        raise LoadError(sentence(what, message)) from error


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """`explain` for whatever is raised inside."""
    try:
        yield
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        explain(what, error)
        raise


def sentence(what: str, message: str) -> str:
    """What could not be done, the original's words, what they mean, what to do, and what is here."""
    here = versions()
    trouble = recognize(message, here)
    if trouble:
        means, remedy = trouble.words(here)
        advice = f"{means}; {remedy}"
    else:
        advice = f"install the wheel of your CUDA version with torch {TORCH_FLOOR} or newer"
    return f"{what} ({message}): {advice}; the wheel was built for {built_for()}, you have {environment()}; {DOCTOR}"
