"""Pieces of machine code for the tests of the build's checks."""

from __future__ import annotations

from wheelbuild import ROOT
from wheelbuild.machine_code import Code, parse_sass
from wheelbuild.tile_model import tiles

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
PTXAS = """ptxas info    : 9 bytes gmem
ptxas info    : Compiling entry function '_Z3oneILi1EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z3oneILi1EEvv
    72 bytes stack frame, 80 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : Compiling entry function '_Z3two' for 'sm_120f'
ptxas info    : Function properties for _Z3two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 60 registers, used 1 barriers, 128 bytes smem
"""


def code_of(*lines: str, kernel: str = "k") -> Code:
    """A kernel of these lines, 16 bytes apart as on the GPU; `{3}` in a line is the address of line 3."""
    addresses = [f"0x{16 * place:x}" for place in range(len(lines))]
    listing = "\n".join(f"  /*{16 * place:04x}*/  {line.format(*addresses)} ;" for place, line in enumerate(lines))
    return parse_sass(f"arch = sm_90a\n\t\tFunction : {kernel}\n{listing}\n")["90a"]


GOOD = (
    "LDSM.16.M88.4 R4, [R2]",
    "LDS.64 R4, [R2]",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "HMMA.16816.F32 R4, R8, R12, R4",
    "@P0 BRA {0}",
    "EXIT",
)
