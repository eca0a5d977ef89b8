"""Loading the wheel's prebuilt extensions: an import each, on first use, never at `import mxfp4_moe`.

Importing an extension registers its operators with torch; nothing is compiled and no file is written. Everything here
may be called from several threads: Python imports a module once, and registering a tile again changes nothing.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch

from ..tiles import Manifest, Tile, load_manifest, nearest_tile
from . import blocklist
from .errors import LoadError as LoadError  # what loading raises
from .errors import built_for, environment, sentence
from .troubles import DOCTOR
from .wheel import conflict, library_fault

_EXTENSIONS = "mxfp4_moe._ext"


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


def load_nearest(wanted: Tile, device: str, capability: tuple[int, int], among: tuple[Tile, ...] | None = None) -> Tile:
    """Loads `wanted` or, where it is blocked on the device or does not load, the nearest tile that can be used.

    Every tile gives the same bits, so a fall-back costs speed and nothing else; a warning says why it happened.

    Args:
        wanted: a tile of the manifest.
        device, capability: the GPU's name and compute capability.
        among: the tiles that can take its place; by default all of the manifest.

    Raises:
        LoadError: the layer's own extension does not load, or no tile is left.
    """
    moe_ops()  # where this fails every tile would, and these are the words that help
    blocked = blocklist.blocked(device, capability)
    reasons: dict[Tile, str] = {}
    left = list(manifest().tiles if among is None else among)
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
        raise LoadError(sentence(f"{name} cannot be loaded", fault))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(sentence(f"{name} cannot be loaded", str(error))) from error
