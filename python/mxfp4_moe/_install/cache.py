"""What is remembered about a GPU between processes: one JSON file per kind, device name and compute capability.

Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

CACHE_DIR_VARIABLE = "MXFP4_MOE_CACHE_DIR"


def cache_dir() -> Path | None:
    """$MXFP4_MOE_CACHE_DIR, else mxfp4-moe under $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    if named := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG base directory specification: a relative path is to be ignored
        return Path(xdg) / "mxfp4-moe"
    try:
        return Path.home() / ".cache" / "mxfp4-moe"
    except RuntimeError:
        return None


def device_file(kind: str, device: str, capability: tuple[int, int]) -> Path | None:
    """The file of this kind ('blocklist') about a device, by its name and compute capability; it need not exist."""
    folder = cache_dir()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return None if folder is None else folder / kind / f"{slug}-sm{capability[0]}{capability[1]}.json"


def write_json(path: Path, data: Any) -> None:
    """Puts a file in place of the one before, whole or not at all.

    Raises:
        OSError: the cache directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
