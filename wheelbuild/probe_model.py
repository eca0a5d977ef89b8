"""The package's probe, loaded by path as tile_model.py loads `tiles`: what measures must be this source tree's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wheelbuild import tile_model

if TYPE_CHECKING:
    from mxfp4_moe.probe import assemblers, kernel, matrix, run, variants
else:
    import importlib

    _probe = f"{tile_model.archs.__package__}.probe"
    assemblers, kernel, matrix, run, variants = (
        importlib.import_module(f"{_probe}.{name}") for name in ("assemblers", "kernel", "matrix", "run", "variants")
    )

__all__ = ["assemblers", "kernel", "matrix", "run", "variants"]
