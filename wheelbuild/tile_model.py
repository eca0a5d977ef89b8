"""The package's `tiles`, `archs.py` and `_floors.py`, loaded by path: the package does not exist while it is built.

They are loaded as parts of a package of another name with the same folder, so that one can import the other, and so
that an installed mxfp4_moe is neither used nor shadowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wheelbuild import ROOT

if TYPE_CHECKING:
    from mxfp4_moe import _floors as floors
    from mxfp4_moe import archs, tiles
else:
    import importlib
    import sys
    from types import ModuleType

    _package = ModuleType("wheelbuild_model")
    _package.__path__ = [str(ROOT / "python" / "mxfp4_moe")]
    sys.modules[_package.__name__] = _package
    floors = importlib.import_module("wheelbuild_model._floors")
    archs = importlib.import_module("wheelbuild_model.archs")
    tiles = importlib.import_module("wheelbuild_model.tiles")

__all__ = ["archs", "floors", "tiles"]
