"""Edits of a kernel's PTX and the machine code that ptxas makes of them, for the tests of what MMAs read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from wheelbuild.machine_code import Code, parse_sass
from wheelbuild.plain_paths import PlainPaths, make_links
from wheelbuild.toolchain import Cuda

ARCH = "120f"


def read(cuda: Cuda, path: Path) -> Code:
    """The code for ARCH in a library or a cubin; a cubin's listing does not name the arch."""
    command = [str(cuda.cuobjdump), "-sass", "-arch", f"sm_{ARCH}", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_sass(f"arch = sm_{ARCH}\n{listing}")[ARCH]


MMA = re.compile(
    r"mma\.sync\S+ \{[^}]*\}, \{([^}]*)\}, \{([^}]*)\}, (\{[^}]*\}), (%r\d+), (\{\d,\d\}), (%r\d+), (\{\d,\d\});"
)


class Mma:
    """One MMA of a PTX text, by its place among them."""

    def __init__(self, ptx: str, place: int) -> None:
        self.ptx = ptx
        self.match = list(MMA.finditer(ptx))[place]
        a, b, self.c, self.scale_a, self.selector_a, self.scale_b, self.selector_b = self.match.groups()
        self.a, self.b = a.split(","), b.split(",")

    def having(self, *, before: str = "", after: str = "", **changes: str | list[str]) -> str:
        """The text with other operands of this MMA, and other statements around it."""
        a, b = changes.get("a", self.a), changes.get("b", self.b)
        name = self.match[0].split(" ")[0]
        statement = f"{name} {self.c}, {{{','.join(a)}}}, {{{','.join(b)}}}, {self.c}, " + ", ".join(
            str(changes.get(part, getattr(self, part))) for part in ("scale_a", "selector_a", "scale_b", "selector_b")
        )
        return self.ptx[: self.match.start()] + before + statement + ";" + after + self.ptx[self.match.end() :]

    def replacing(self, old: str, new: str) -> str:
        """The text with the last of `old` before this MMA replaced."""
        head, found, tail = self.ptx[: self.match.start()].rpartition(old)
        assert found, old
        return head + new + tail + self.ptx[self.match.start() :]


def defining(ptx: str, register: str, name: str) -> str:
    """The statement `name` that writes a register."""
    match = re.search(rf"{name}\s+\{{?(%r\d+, )?{register}\b[^;]*;", ptx)
    assert match, (name, register)
    return match[0]


def assembled(ptx: str, cuda: Cuda, folder: Path) -> Code:
    source, cubin = folder / "tile.ptx", folder / "tile.cubin"
    source.write_text(ptx, encoding="utf-8")
    plain = PlainPaths(Path("links"))
    command = [str(plain(cuda.nvcc)), "-cubin", f"-arch=sm_{ARCH}", source.name, "-objtemp", "-o", cubin.name]
    make_links(plain.links, folder)
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return read(cuda, cubin)
