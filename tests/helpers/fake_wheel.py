"""A wheel without machine code: a build report and libraries that look whole, for tests that load none of them."""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mxfp4_moe._install import wheel
from mxfp4_moe._install.elf import MACHINES
from mxfp4_moe.tiles import Tile, prove

VERSION = "0.1.0+cu130"
ARCHS = ("90a", "120f")


def elf(module: str, size: int = 4096) -> bytes:
    """A 64-bit ELF file of this size, by its headers, that names the module's initializer."""
    machine = next(number for number, name in MACHINES.items() if name == platform.machine())
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    return (header + segment + f"\0PyInit_{module}\0".encode()).ljust(size, b"\0")


def arch_entry(tile: Tile, arch: str, registers: int, instructions_per_mma: float | None) -> dict[str, Any]:
    """What the report says of a tile on this arch: of the kernel for MXFP8 activations."""
    proof = prove(tile, arch)
    entry: dict[str, Any] = {"function": proof.function, **proof.facts(), "registers": registers}
    if instructions_per_mma is not None:
        entry["main_loop"] = {"instructions_per_mma": instructions_per_mma}
    return {proof.pair: entry}


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tiles: Sequence[Tile], archs: dict[str, Any] | None = None
) -> Path:
    """Makes `folder` the installed wheel's package with these tiles, and an empty folder beside it the cache."""
    package = folder / "mxfp4_moe"
    (package / "_ext").mkdir(parents=True)
    report = {
        "schema": 4,
        "version": VERSION,
        "profile": "mxfp4_minimal",
        "pairs": ["mxfp4_mxfp8"],
        "archs": list(ARCHS),
        "built_with": {"cuda": "13.0.88", "torch": "2.13.0"},
        "tiles": {
            tile.name: {"library": {"sha256": "0" * 64}, "archs": (archs or {}).get(tile.name, {})} for tile in tiles
        },
    }
    (package / "build_report.json").write_text(json.dumps(report), encoding="utf-8")
    for module in (*(tile.module for tile in tiles), "moe"):
        (package / "_ext" / f"{module}.abi3.so").write_bytes(elf(module))
    monkeypatch.setattr(wheel, "PACKAGE", package)
    monkeypatch.setattr(wheel, "REPORT", package / "build_report.json")
    monkeypatch.setattr(wheel, "version", lambda: VERSION)
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", str(folder / "cache"))
    return package
