"""The installed wheel as files: its folder, build report and libraries. Standard library alone; nothing is loaded.

A library is looked at before it is loaded, because loading is where a broken one takes the process along: reading past
the end of a truncated file is a bus error, and a tile's library under another tile's name registers an operator that
is there already, at which torch ends the process.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from .tiles import Tile, arch_runs_on, load_manifest

PACKAGE = Path(__file__).resolve().parent
REPORT = PACKAGE / "build_report.json"

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


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


def built_archs() -> tuple[str, ...]:
    """The archs that this wheel has machine code for, such as ('90a', '120f')."""
    report = read_report()
    archs = report.get("archs") if report else None
    return tuple(archs) if isinstance(archs, list) else load_manifest().archs


def arch_for(capability: tuple[int, int]) -> str | None:
    """The arch whose machine code runs on a GPU of this compute capability; None when the wheel has none for it."""
    return next((arch for arch in built_archs() if arch_runs_on(arch, capability)), None)


def library(module: str) -> Path:
    """Where the library of `mxfp4_moe._ext.<module>` belongs; it need not be there."""
    return PACKAGE / "_ext" / f"{module}.abi3.so"


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
    if len(data) < _ELF_HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        return f"{path.name} is no library: {len(data):,} bytes without the header of one"
    size = _elf_size(data)
    if len(data) < size:
        return f"{path.name} is truncated: {len(data):,} of {size:,} bytes"
    if f"PyInit_{module}\0".encode() not in data:
        return f"{path.name} is another module's library: it has no PyInit_{module}"
    return None


def _elf_size(data: bytes) -> int:
    """Bytes that the headers of a 64-bit little-endian ELF file say it has, as far as they are there."""
    *_, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = _ELF_HEADER.unpack_from(data)
    ends = [phoff + phentsize * phnum, shoff + shentsize * shnum]
    for place in range(phnum):
        at = phoff + phentsize * place
        if at + _PROGRAM_HEADER.size <= len(data):
            _, _, offset, _, _, file_size, _, _ = _PROGRAM_HEADER.unpack_from(data, at)
            ends.append(offset + file_size)
    return int(max(ends))
