"""A kernel of a tile that the installed wheel need not have: its PTX, and a library with its launcher, from one nvcc.

Wheels for users have one pair of formats; the kernels of the others are tested with what this makes of the sources. The
library holds PTX instead of machine code, which nobody loads: the runtime it meets is a fake.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from mxfp4_moe.tiles import Tile
from wheelbuild import ROOT, toolchain
from wheelbuild.plain_paths import PlainPaths, make_links
from wheelbuild.plan import HIDDEN, NVCC_FLAGS, kernel_defines, own_name

ARCH = "120f"
_SOURCE = Path("csrc/tile/tile.cu")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    (ROOT / "build").mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="ptx-")


@functools.cache
def built(tile: Tile, pair: str, arch: str = ARCH) -> tuple[Path, str]:
    """The library, whose launcher is exported by the name that csrc/tile/tile.cu gives it, and the kernel's PTX."""
    folders = toolchain.package_dirs(os.environ)
    cuda, cxx = toolchain.resolve_cuda(os.environ, folders, [arch]), toolchain.find_cxx(os.environ)
    includes = [*toolchain.find_cutlass(os.environ, folders).include_dirs, *cuda.include_dirs]
    folder = Path(_folder().name).relative_to(ROOT) / f"{tile.name}.{arch}.{pair}"
    (ROOT / folder).mkdir()
    plain, made, library = PlainPaths(folder / "links"), folder / "tile.o", folder / "tile.so"
    visible = [flag for flag in HIDDEN if flag != "-fvisibility=hidden"]
    compile_ = [
        *(str(plain(cuda.nvcc)), "-ccbin", str(plain(cxx)), "-Xcompiler", ",".join(visible)),
        *(flag for flag in NVCC_FLAGS if flag not in ("-Xptxas", "-v", "-O3")),
        *("-O3", "-gencode", f"arch=compute_{arch},code=compute_{arch}", "--keep", "--keep-dir", str(folder)),
        *own_name(_SOURCE),
        *kernel_defines(tile, arch, pair),
        *(word for include in includes for word in ("-isystem", str(plain(include)))),
        *(str(_SOURCE), "-o", str(made)),
    ]
    link = [str(plain(cxx)), "-shared", "-o", str(library), str(made), str(plain(cuda.cudart))]
    make_links(plain.links, ROOT)
    for command in (compile_, link):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    (ptx,) = (ROOT / folder).glob("*.ptx")
    return ROOT / library, ptx.read_text(encoding="utf-8")


def launcher(pair: str, arch: str = ARCH) -> str:
    """The name of the function in the library."""
    return f"mxfp4_moe_tile_launch_{arch}_{pair}"


def facts(pair: str, arch: str = ARCH) -> str:
    """The name of the kernel's facts in the library."""
    return f"mxfp4_moe_tile_facts_{arch}_{pair}"
