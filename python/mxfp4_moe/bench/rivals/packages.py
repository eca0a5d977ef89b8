"""Where a rival's package is: in a folder that the user names, or installed. Nothing is imported by looking."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class Absent(Exception):
    """A rival cannot be measured here; the message is one sentence that says why."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A package or library, and what is known of its version ('unknown' for one that does not say)."""

    path: Path
    version: str


def find_package(name: str, distribution: str, folders: Sequence[Path]) -> Found:
    """The package `name`, in one of the folders before what is installed.

    Raises:
        Absent: it is in neither place.
    """
    for folder in folders:
        if (folder / name / "__init__.py").is_file():
            return Found(path=folder / name, version=_version_in(folder / name))
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        looked = f" and not in {', '.join(map(str, folders))}" if folders else ""
        raise Absent(f"the package {name} ({distribution}) is not installed{looked}")
    return Found(path=Path(next(iter(spec.submodule_search_locations))), version=_installed_version(distribution))


def find_vllm_moe_library(folders: Sequence[Path]) -> Found:
    """vLLM's library of MoE operators (`torch.ops._moe_C`): a file of that name in a folder, or in vLLM's package.

    Raises:
        Absent: there is none.
    """
    for folder in folders:
        for place in (folder, folder / "vllm"):
            if found := sorted(place.glob("_moe_C*.so")):
                return Found(path=found[0], version=_version_in(place))
    try:
        package = find_package("vllm", "vllm", ())
    except Absent:
        looked = f", and no _moe_C*.so is in {', '.join(map(str, folders))}" if folders else ""
        raise Absent(f"vLLM is not installed{looked}") from None
    if found := sorted(package.path.glob("_moe_C*.so")):
        return Found(path=found[0], version=package.version)
    raise Absent(f"vLLM {package.version} in {package.path} has no _moe_C*.so")


def make_importable(found: Found) -> None:
    """Puts the package's folder in front of everything that Python looks through."""
    folder = str(found.path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _version_in(package: Path) -> str:
    """What a package's own files say: _version.py, or the folder of metadata beside it."""
    try:
        said = re.search(r"^_*version_*\s*=.*?['\"]([^'\"]+)['\"]", (package / "_version.py").read_text(), re.MULTILINE)
    except OSError:
        said = None
    if said:
        return said[1]
    beside = sorted(package.parent.glob(f"{package.name}*.dist-info"))
    return beside[0].name.removesuffix(".dist-info").rpartition("-")[2] if beside else "unknown"


def _installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
