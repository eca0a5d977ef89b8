"""Tiles that failed the self-test on a device, remembered in the user's cache directory and left out from then on.

One JSON file per device name and compute capability. It counts only for the build that was tested and by the rules that
it was judged by: the wheel's version, each blocked library's SHA-256 and the self-test's version are in it. `mxfp4-moe
doctor --selftest` writes it, or removes it when all tiles pass; `fused_moe` reads it once per device. A list that is
damaged, of another build or by other rules is ignored, with a warning. Standard library alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..tiles import Tile
from . import wheel as _wheel
from .cache import CACHE_DIR_VARIABLE, cache_dir, device_file, write_json

__all__ = ["CACHE_DIR_VARIABLE", "REMEDY", "BlocklistError", "blocked", "cache_dir", "path_of", "read", "write"]

REMEDY = "run `mxfp4-moe doctor --selftest` to write a new one"
_SCHEMA = 2
RULES = 2  # the self-test's: it blocks for layout, accuracy or agreement. 1 also took other last bits for a fault


class BlocklistError(ValueError):
    """A blocklist that is there but cannot be used; the message says which file, why, and what to run."""


def path_of(device: str, capability: tuple[int, int]) -> Path | None:
    """The list of a device, by its name (such as 'NVIDIA H200') and compute capability; it need not exist."""
    return device_file("blocklist", device, capability)


def read(device: str, capability: tuple[int, int]) -> dict[str, str]:
    """The device's blocked tiles: name -> why. Empty when there is no list.

    Raises:
        BlocklistError: a damaged list, or one of another device or build.
    """
    path = path_of(device, capability)
    if path is None:
        return {}
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise BlocklistError(f"blocklist {path} cannot be read ({error.strerror}) and is ignored: {REMEDY}") from error
    try:
        data = json.loads(text)
        tested_device, tested_capability = str(data["device"]), tuple(data["capability"])
        wheel, schema, rules = str(data["wheel"]), data["schema"], data.get("rules")
        tiles = {str(name): (entry["sha256"], str(entry["reason"])) for name, entry in data["tiles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        raise BlocklistError(f"blocklist {path} is damaged ({words}) and is ignored: {REMEDY}") from error

    def foreign(what: str, has: object, here: object) -> BlocklistError:
        return BlocklistError(f"blocklist {path} is for another {what} ({has}, here {here}) and is ignored: {REMEDY}")

    if schema != _SCHEMA:
        raise foreign("schema", schema, _SCHEMA)
    if rules != RULES:
        raise foreign("version of the self-test", rules, RULES)
    if (tested_device, tested_capability) != (device, capability):
        raise foreign("device", f"{tested_device} {tested_capability}", f"{device} {capability}")
    if wheel != _wheel.version():
        raise foreign("wheel", wheel, _wheel.version())
    for name, (tested, _) in tiles.items():
        here = _wheel.sha256(_wheel.library(f"tile_{name}"))
        if tested != here:
            raise foreign(f"build of {name}", f"SHA-256 {tested}", here or "no such library")
    return {name: reason for name, (_, reason) in tiles.items()}


@functools.cache
def blocked(device: str, capability: tuple[int, int]) -> Mapping[str, str]:
    """`read`, once per device and process; a list that cannot be used is a warning and blocks nothing."""
    try:
        return read(device, capability)
    except BlocklistError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return {}


def write(device: str, capability: tuple[int, int], reasons: Mapping[Tile, str]) -> Path | None:
    """Puts the device's list in place of the one before, whole or not at all; without tiles it is removed.

    Args:
        device, capability: as in `path_of`.
        reasons: the tiles to block, and why, in words for people.

    Returns:
        The file, None when there is nothing to block or no place to write.

    Raises:
        OSError: the cache directory cannot be written.
    """
    path = path_of(device, capability)
    if path is None:
        return None
    if not reasons:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        return None
    data = {
        "schema": _SCHEMA,
        "device": device,
        "capability": list(capability),
        "wheel": _wheel.version(),
        "rules": RULES,
        "tiles": {
            tile.name: {"sha256": _wheel.sha256(_wheel.library(tile.module)), "reason": reason}
            for tile, reason in reasons.items()
        },
    }
    write_json(path, data)
    return path
