"""Engines that are not there: a folder with a package of an engine's name, its hooks, and metadata of a version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import mxfp4_moe
from mxfp4_moe.integrations._engines import Engine

# What vLLM does when it starts: it runs every entry point of the group, and goes on.
START = """
import importlib.metadata, sys
import {module}
for point in importlib.metadata.entry_points(group={group!r}):
    point.load()()
    point.load()()  # engines do so in every process, and may do it twice in one
print("started")
"""


def write_engine(
    folder: Path, engine: Engine, version: str, hooks: Iterable[str] | None = None, *, broken: str = "", point: str = ""
) -> None:
    """An engine as a folder for PYTHONPATH.

    Args:
        hooks: those it has, by default all of its row's.
        broken: what its hooks' modules do when they are imported, such as "raise ImportError('libfoo.so')".
        point: its entry point for us, "group = module:function".
    """
    classes: dict[str, dict[str, set[str]]] = {}
    for hook in engine.hooks if hooks is None else hooks:
        module, _, path = hook.partition(":")
        name, _, attribute = path.partition(".")
        classes.setdefault(module, {}).setdefault(name, set()).update({attribute} - {""})
    _package(folder, engine.module, f"__version__ = {version!r}\n")
    for module, names in classes.items():
        lines = [f"{broken}\n"]
        for name, attributes in names.items():
            body = [f"    def {attribute}(self): ..." for attribute in sorted(attributes)] or ["    ..."]
            lines += [f"class {name}:", *body]
        _package(folder, module, "\n".join(lines) + "\n")
    info = folder / f"{engine.distributions[0]}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine.distributions[0]}\nVersion: {version}\n")
    if point:
        group, _, value = point.partition(" = ")
        (info / "entry_points.txt").write_text(f"[{group}]\nmxfp4_moe = {value}\n")


def _package(folder: Path, module: str, text: str) -> None:
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        file = folder.joinpath(*parts[:depth]) / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        if depth == len(parts) or not file.exists():
            file.write_text(text if depth == len(parts) else "")


def run(folder: Path, code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A Python program that finds the stubs in `folder` before everything else, and this package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MXFP4_MOE_")}
    here = str(Path(mxfp4_moe.__file__).parents[1])
    environment |= {"PYTHONPATH": os.pathsep.join((str(folder), here)), **settings}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
