"""Repaired wheels for the tests of the release."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from wheelbuild import ROOT


def built_wheel() -> Path:
    if named := os.environ.get("MXFP4_MOE_WHEEL"):
        return Path(named)
    return max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)


def changed(wheel: Path, folder: Path, name: str, edit: Callable[[bytes], bytes | None]) -> Path:
    """A copy of the wheel in which the file that ends with `name` has been edited, or is missing."""
    copy = folder / wheel.name
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as after:
        for item in before.infolist():
            data: bytes | None = before.read(item)
            if item.filename.endswith(name):
                data = edit(before.read(item))
            if data is not None:
                after.writestr(item, data)
    return copy
