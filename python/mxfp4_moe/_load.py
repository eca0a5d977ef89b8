"""Loading the wheel's prebuilt extensions: an import each, on first use, never at `import mxfp4_moe`.

Importing an extension registers its operators with torch; nothing is compiled and no file is written. Everything here
may be called from several threads: Python imports a module once, and registering a tile again changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from . import blocklist
from ._troubles import DOCTOR, TORCH_FLOOR, Versions, recognize, words
from ._wheel import REPORT as _REPORT
from ._wheel import conflict, library_fault, read_report
from .tiles import Manifest, Tile, load_manifest, nearest_tile

_EXTENSIONS = "mxfp4_moe._ext"


class LoadError(RuntimeError):
    """The wheel cannot be used with the torch, driver or GPU that is here; one sentence says why and what to do."""


@functools.cache
def manifest() -> Manifest:
    """The installed wheel's manifest, read once."""
    return load_manifest()


@functools.cache
def moe_ops() -> Any:
    """`torch.ops.mxfp4_moe` with the layer's operators (csrc/moe/operators.cpp) in it."""
    _import("moe")
    return torch.ops.mxfp4_moe


@functools.cache
def load_tile(tile: Tile) -> Any:
    """Loads a tile, makes it known to the layer, and returns its operator ``grouped_gemm_<name>``."""
    ops = moe_ops()
    ops.register_tile(_import(tile.module).entry)
    return getattr(ops, f"grouped_gemm_{tile.name}")


def load_nearest(wanted: Tile, device: str, capability: tuple[int, int]) -> Tile:
    """Loads `wanted` or, where it is blocked on the device or does not load, the nearest tile that can be used.

    Every tile gives the same bits, so a fall-back costs speed and nothing else; a warning says why it happened.

    Args:
        wanted: a tile of the manifest.
        device, capability: the GPU's name and compute capability.

    Raises:
        LoadError: the layer's own extension does not load, or no tile is left.
    """
    moe_ops()  # where this fails every tile would, and these are the words that help
    blocked = blocklist.blocked(device, capability)
    reasons: dict[Tile, str] = {}
    left = list(manifest().tiles)
    while left:
        tile = nearest_tile(wanted, left)
        left.remove(tile)
        if tile.name in blocked:
            reasons[tile] = f"it failed the self-test on this GPU ({blocked[tile.name]})"
            continue
        try:
            load_tile(tile)
        except LoadError as error:
            reasons[tile] = str(error)
            continue
        if tile != wanted:
            warnings.warn(
                f"tile {wanted.name} is not used on {device}: {reasons[wanted]}; {tile.name} takes its place, with "
                "the same results",
                RuntimeWarning,
                stacklevel=4,  # who called fused_moe
            )
        return tile
    raise LoadError(
        f"no tile can be used on {device}; {wanted.name}: {reasons[wanted]}; `mxfp4-moe doctor --selftest` tests them "
        "all and says what is wrong with each"
    )


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
        raise LoadError(_sentence(what, message)) from error


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """`explain` for whatever is raised inside."""
    try:
        yield
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        explain(what, error)
        raise


def _sentence(what: str, message: str) -> str:
    """What could not be done, the original's words, what they mean, what to do, and what is here."""
    here = versions()
    trouble = recognize(message, here)
    if trouble:
        means, remedy = trouble.words(here)
        advice = f"{means}; {remedy}"
    else:
        advice = f"install the wheel of your CUDA version with torch {TORCH_FLOOR} or newer"
    return f"{what} ({message}): {advice}; the wheel was built for {built_for()}, you have {environment()}; {DOCTOR}"


def _import(module: str) -> ModuleType:
    name = f"{_EXTENSIONS}.{module}"
    if torch.version.cuda is None:
        raise LoadError(
            f"{name} needs a CUDA build of torch: the wheel was built for {built_for()}, you have {environment()} "
            f"(CPU tensors need no extension); {DOCTOR}"
        )
    if two := conflict():
        raise LoadError(f"{name} is not loaded: {two}")
    if fault := library_fault(module):
        raise LoadError(_sentence(f"{name} cannot be loaded", fault))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(_sentence(f"{name} cannot be loaded", str(error))) from error
