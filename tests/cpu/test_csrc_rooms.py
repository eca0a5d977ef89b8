"""Who may include whom in csrc, and how long its lines may be, which clang-format does not say of comments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(
    path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")
)
# A room, and the rooms that its files may include beside their own; "" is csrc's top.
ROOMS = {"": (), "shared": ("",), "moe": ("", "shared"), "tile": ("", "shared"), "bf16": ("", "shared", "tile")}
ROOMS["sm12x"] = ROOMS["sm90"] = (*ROOMS["bf16"], "bf16")  # both have kernels of bf16 MMAs
SEAMS = ("tile/archs.cuh", "tile/launcher.cuh")  # where architectures plug in


def room(name: str) -> str:
    return Path(name).parent.name


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_includes_its_own_room_and_those_below(name: str) -> None:
    text = (CSRC / name).read_text(encoding="utf-8")
    for included in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
        assert included in SOURCES, f"{name}: {included} is not a file's whole path below csrc"
        plugs_in = name in SEAMS and room(included) in ("sm12x", "sm90", "bf16")
        assert plugs_in or room(included) in (room(name), *ROOMS[room(name)]), f"{name} includes {included}"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    lines = (CSRC / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450
    assert [line for line in lines if len(line) > 120] == []
