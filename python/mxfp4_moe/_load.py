"""Loading the wheel's prebuilt extensions: an import each, on first use, never at `import mxfp4_moe`.

Importing an extension registers its operators with torch; nothing is compiled and no file is written. Everything here
may be called from several threads: Python imports a module once, and registering a tile again changes nothing.
"""

from __future__ import annotations

import functools
import importlib
import json
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .tiles import Manifest, Tile, load_manifest

_EXTENSIONS = "mxfp4_moe._ext"
_REPORT = Path(__file__).with_name("build_report.json")


class LoadError(RuntimeError):
    """A prebuilt extension cannot be used with this torch; the message says what it was built for and what is here."""


@functools.cache
def manifest() -> Manifest:
    """The installed wheel's manifest, read once."""
    return load_manifest()


@functools.cache
def moe_ops() -> Any:
    """`torch.ops.mxfp4_moe` with the layer's operators (csrc/moe/ops.cpp) in it."""
    _import("moe")
    return torch.ops.mxfp4_moe


@functools.cache
def load_tile(tile: Tile) -> Any:
    """Loads a tile, makes it known to the layer, and returns its operator ``grouped_gemm_<name>``."""
    ops = moe_ops()
    ops.register_tile(_import(tile.module).entry)
    return getattr(ops, f"grouped_gemm_{tile.name}")


def environment() -> str:
    """torch and Python as they are here, for error messages."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"torch {torch.__version__} with {cuda} and Python {platform.python_version()}"


def built_for() -> str:
    """What the wheel was built for, for error messages: its build report's words."""
    try:
        built_with = json.loads(_REPORT.read_text(encoding="utf-8"))["built_with"]
        return f"CUDA {built_with['cuda']} with torch {built_with['torch']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown CUDA (it has no build report)"


def _import(module: str) -> ModuleType:
    name = f"{_EXTENSIONS}.{module}"
    if torch.version.cuda is None:
        raise LoadError(
            f"{name} needs a CUDA build of torch: the wheel was built for {built_for()}, you have {environment()} "
            "(CPU tensors need no extension)"
        )
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(
            f"{name} cannot be loaded ({error}): the wheel was built for {built_for()}, you have {environment()}; "
            "install the wheel of your CUDA version with torch 2.10 or newer"
        ) from error
