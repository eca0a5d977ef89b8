"""The installed wheel as files: its folder, build report and libraries. Standard library alone; nothing is loaded.

A library is looked at before it is loaded, because loading is where a broken one takes the process along: reading past
the end of a truncated file is a bus error, and a tile's library under another tile's name registers an operator that
is there already, at which torch ends the process.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from ..archs import arch_runs_on, check_arch
from ..tiles import PAIRS, Tile, kernel_pair, kernel_pairs, load_manifest
from .elf import ElfError, read_elf

PACKAGE = Path(__file__).resolve().parents[1]
REPORT = PACKAGE / "build_report.json"


def distribution() -> str:
    """The name under which this wheel is installed: mxfp4-moe, or one with a CUDA version, such as mxfp4-moe-cu13."""
    return str((read_report() or {}).get("distribution", "mxfp4-moe"))


def version() -> str:
    """The distribution's version, such as '0.1.0+cu130'; '0+source' in a source tree that is not installed."""
    try:
        return installed_version(distribution())
    except PackageNotFoundError:
        return "0+source"


def conflict() -> str | None:
    """What is wrong, with the remedy, when two distributions share this package's folder; None when it has one owner.

    mxfp4-moe and mxfp4-moe-cu13 are two names to pip, which lets the second overwrite the files of the first.
    """
    found = sorted(PACKAGE.parent.glob("mxfp4_moe*-*.dist-info"))
    pattern = re.compile(r"(mxfp4_moe(?:_cu\d+)?)-(.+)\.dist-info")
    matches = [match for folder in found if (match := pattern.fullmatch(folder.name))]
    owners = {match[1].replace("_", "-"): match[2] for match in matches}
    if len(owners) < 2:
        return None
    listed = " and ".join(f"{name} {version}" for name, version in owners.items())
    return (
        f"{listed} are both installed in {PACKAGE.parent}, and one has overwritten the other's files: pip uninstall "
        f"{' '.join(owners)}, then install the one for your CUDA version"
    )


def read_report(path: Path | None = None) -> dict[str, Any] | None:
    """The build report, None when there is none or when it cannot be read."""
    try:
        report = json.loads((REPORT if path is None else path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def built_tiles() -> tuple[Tile, ...]:
    """The tiles that this wheel was built with, in the manifest's order; all of the manifest without a report.

    A developer's build has fewer than the manifest.
    """
    tiles = load_manifest().tiles
    report = read_report()
    names = report.get("tiles") if report else None
    return tuple(tile for tile in tiles if tile.name in names) if isinstance(names, dict) else tiles


def profile() -> str:
    """The manifest's profile that this wheel was built by; without a report the default one."""
    report = read_report()
    name = report.get("profile") if report else None
    return str(name) if name else load_manifest().default_profile


def tiles_of(pair: str, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The manifest's tiles that this wheel has kernels for that compute a pair of formats on such a GPU."""
    arch, manifest = arch_for(capability), load_manifest()
    if arch is None or pair not in PAIRS:
        return ()
    built = profile()
    read = kernel_pair(arch, pair)
    return tuple(tile for tile in manifest.tiles if read in kernel_pairs(arch, manifest.pairs_of(built, tile)))


def kernels(tile: Tile | None = None) -> tuple[tuple[str, str], ...]:
    """The kernels of a tile in this wheel, by arch and pair of formats that they read; without a tile those of any."""
    manifest, built = load_manifest(), profile()
    pairs = manifest.profile(built).pairs if tile is None else manifest.pairs_of(built, tile)
    return tuple((arch, read) for arch in built_archs() for read in kernel_pairs(arch, pairs))


def built_archs() -> tuple[str, ...]:
    """The archs that this wheel has machine code for, such as ('90a', '120f')."""
    report = read_report()
    archs = report.get("archs") if report else None
    return tuple(archs) if isinstance(archs, list) else load_manifest().archs


def emulated_on() -> str | None:
    """The arch as whose machine code this wheel has its archs' kernels, such as '90a'; None unless it emulates.

    A development build does (wheelbuild/emulation.py); a wheel that is released never.
    """
    emulates = (read_report() or {}).get("emulates")
    return str(emulates["on"]) if isinstance(emulates, dict) and "on" in emulates else None


def emulation_words(archs: Sequence[str], on: str | None) -> str:
    """What must be known about a build that emulates, in one line; empty about any other."""
    if not on:
        return ""
    listed = ", ".join(f"sm_{arch}" for arch in archs)
    return f"development build, for tests alone: kernels of {listed}, whose MMA is emulated on sm_{on}"


def arch_for(
    capability: tuple[int, int], archs: Sequence[str] | None = None, compiled_for: str | None = None
) -> str | None:
    """The arch whose kernels run on a GPU of this compute capability; None when there are none for it.

    Args:
        capability: the GPU's.
        archs: to choose from; by default those that this wheel has.
        compiled_for: whose machine code the archs' kernels are, as `emulated_on`; by default their own, and this
            wheel's with its archs.
    """
    if archs is None:
        archs, compiled_for = built_archs(), emulated_on()
    return next((arch for arch in archs if arch_runs_on(compiled_for or arch, capability)), None)


def served_as(capability: tuple[int, int]) -> tuple[int, int]:
    """The compute capability whose kernels a GPU is given: its own; in a build that emulates, the emulated arch's."""
    arch = arch_for(capability) if emulated_on() else None
    return capability if arch is None else check_arch(arch)[:2]


def library(module: str) -> Path:
    """Where the library of `mxfp4_moe._ext.<module>` belongs; it need not be there."""
    return PACKAGE / "_ext" / f"{module}.abi3.so"


def modules() -> tuple[str, ...]:
    """All extension modules that this wheel has: the layer's own, then one for each tile."""
    return ("moe", *(tile.module for tile in built_tiles()))


def built_sha256(module: str) -> str | None:
    """The SHA-256 that the library had when it was built, None when the report does not say."""
    report = read_report() or {}
    entry = report.get("moe") if module == "moe" else (report.get("tiles") or {}).get(module.removeprefix("tile_"))
    try:
        return str((entry or {})["library"]["sha256"])
    except (KeyError, TypeError):
        return None


def fingerprint() -> str:
    """SHA-256 over the libraries as they are here, so that what is remembered about them ends with any change."""
    digest = hashlib.sha256(version().encode())
    for module in modules():
        digest.update(f"\0{module}\0{sha256(library(module))}".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str | None:
    """The file's SHA-256 in hexadecimal, None when it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def library_fault(module: str) -> str | None:
    """Why the file cannot be the library of `mxfp4_moe._ext.<module>`, in words; None when it looks whole and right.

    It is an ELF file that ends where its headers say, and it has the module's initializer. A changed byte elsewhere is
    not seen here: that is what the hashes in the build report are for.
    """
    path = library(module)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    try:
        elf = read_elf(data)
    except ElfError as error:
        return f"{path.name} {error}"
    if elf.machine != platform.machine():
        return f"{path.name} is for another processor: {elf.machine}, and this is {platform.machine()}"
    if f"PyInit_{module}\0".encode() not in data:
        return f"{path.name} is another module's library: it has no PyInit_{module}"
    return None
