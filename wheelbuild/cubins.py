"""The machine code in a library, file by file, and whether two builds of one tree have the same.

A library holds one cubin per source and arch. What compiles it is the same program on every platform, but the headers
that it sees are not, nor is whether `char` has a sign: so it is compared, not assumed.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from wheelbuild import BuildError


def read_cubins(cuobjdump: Path, library: Path) -> dict[str, str]:
    """SHA-256 of every cubin in a library, by the name that cuobjdump gives it, e.g. moe.3.sm_90a.cubin."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(cuobjdump), "-xelf", "all", str(library.resolve())]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = sorted(Path(folder).glob("*.cubin"))
        if result.returncode != 0 or not found:
            raise BuildError(f"{library.name} has no machine code that cuobjdump can extract: {result.stderr.strip()}")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def require_same_cubins(library: str, first: Mapping[str, str], second: Mapping[str, str]) -> None:
    """BuildError, naming one, when two builds of a library differ in a byte of their machine code."""
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            has = "differs" if name in first and name in second else "is in one build only"
            raise BuildError(f"{library}: {name} {has}, but both builds are of one source tree")
