"""The package's `tiles.py`, loaded by path: the package itself needs torch and does not exist yet while it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wheelbuild import ROOT

if TYPE_CHECKING:
    from mxfp4_moe import tiles
else:
    import importlib.util
    import sys

    _spec = importlib.util.spec_from_file_location("wheelbuild_tiles", ROOT / "python" / "mxfp4_moe" / "tiles.py")
    tiles = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = tiles
    _spec.loader.exec_module(tiles)

__all__ = ["tiles"]
