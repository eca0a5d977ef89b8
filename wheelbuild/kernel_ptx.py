"""What the tile kernel is made of, read from the PTX that nvcc makes of it: python/mxfp4_moe/probe/kernel.toml.

`python -m wheelbuild.kernel_ptx` compiles every tile of the manifest to PTX, for one arch of each path, and writes each
instruction once that is more than plain scalar arithmetic, with its registers renamed. `mxfp4-moe probe --kernel` asks
assemblers about them. `--check` says whether the file is current; a test checks a few tiles.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from wheelbuild import ROOT, BuildError
from wheelbuild.plain_paths import PlainPaths, make_links
from wheelbuild.plan import NVCC_FLAGS, kernel_defines, own_name
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import find_cutlass, find_cxx, package_dirs, resolve_cuda

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Tile

TABLE = Path("python/mxfp4_moe/probe/kernel.toml")
COMMAND = "python -m wheelbuild.kernel_ptx"
PATHS = {"SM90": "90a", "SM12x": "120f"}  # an arch's kernel is that of its family: csrc/tile/archs.cuh

HEAD = f"""# What the tile kernel is made of, by path: each PTX instruction once that is more than scalar arithmetic, in
# program order over all tiles. Written by `{COMMAND}` from what nvcc emits.
"""

# Instructions and modifiers that every target has had for a decade. Whatever is not among them is listed, so that a new
# one cannot be overlooked; an instruction is plain only if its modifiers are.
_PLAIN = frozenset(
    "abs add and bfe bfi bfind bra brev call clz cnot copysign cvt cvta div ex2 exit fma ld lg2 lop3 mad max min mov "
    "mul neg not or popc prmt rcp rem ret rsqrt selp set setp shf shl shr sqrt st sub testp trap xor".split()
)
_PLAIN_MODIFIER = re.compile(
    r"[usfb](8|16|32|64)|pred|global|shared|param|local|const|volatile|v[24]|lo|hi|wide|cc|r[nzmp]i?|ftz|sat|approx|full"
    r"|eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|ls|hs|num|nan|and|or|xor|uni|wrap|clamp|l|r|to"
)
_LETTER = {"pred": "p", "b8": "b", "b16": "h", "b32": "r", "b64": "d", "b128": "q"}  # as in probe/variants.toml


def statements(ptx: str) -> Iterator[str]:
    """The statements of all functions in a PTX file, without labels, guards, braces of blocks and comments."""
    text = re.sub(r"//[^\n]*", "", ptx)
    for piece in text.split(";"):
        statement = " ".join(piece.split())
        while True:
            # A closing or opening brace of a block, a label, a guard. A vector's brace never stands first.
            stripped = re.sub(r"^(?:[{}]|[\w$]+:(?!:)|@!?%?\w+)\s*", "", statement)
            if stripped == statement:
                break
            statement = stripped
        # A function's head ends in the brace of its body.
        statement = statement.rpartition(") ")[2] if statement.startswith(".visible") else statement
        if statement:
            yield statement


def _bits(kind: str) -> str:
    """The register bank of a type: 'f32', 's32' and 'u32' live in what variants.toml calls 'b32'."""
    return kind if kind == "pred" else "b" + kind.lstrip("bsuf")


def is_plain(instruction: str) -> bool:
    name, *modifiers = instruction.split(".")
    return name in _PLAIN and all(_PLAIN_MODIFIER.fullmatch(modifier) for modifier in modifiers)


def instructions(ptx: str) -> dict[str, str]:
    """The instructions that are not plain, in program order: name with modifiers -> one statement of it.

    Registers are renamed as in variants.toml, counted from 0 in each statement; every other symbol becomes `smem`.
    """
    banks: dict[str, str] = {}  # register, or the prefix of a numbered range of them -> letter
    found: dict[str, str] = {}
    for statement in statements(ptx):
        if register := re.search(r"\.reg \.(\w+) (.+)$", statement):
            for name in register[2].split(","):
                banks[re.sub(r"<\d+>", "", name).strip()] = _LETTER[_bits(register[1])]
            continue
        name, _, operands = statement.partition(" ")
        if statement.startswith(".") or is_plain(name) or name in found:
            continue
        found[name] = f"{name} {_renamed(operands, banks)}".rstrip() + ";"
    return found


def _renamed(operands: str, banks: Mapping[str, str]) -> str:
    names: dict[str, str] = {}
    counts: dict[str, int] = {}

    def rename(match: re.Match[str]) -> str:
        symbol = match[0]
        if symbol in names or symbol == "_":
            return names.get(symbol, symbol)
        bank = banks.get(symbol) or banks.get(symbol.rstrip("0123456789"))
        if bank is None:
            return "smem"
        names[symbol] = f"%{bank}{counts.get(bank, 0)}"
        counts[bank] = counts.get(bank, 0) + 1
        return names[symbol]

    renamed = re.sub(r"(?<![\w.])[%A-Za-z_$][\w$]*", rename, operands)
    return re.sub(r",\s*", ", ", renamed).replace("{ ", "{").replace(" }", "}")


def compile_to_ptx(tile: Tile, arch: str, pair: str = tiles.MXFP4_MXFP8) -> str:
    """What nvcc makes of the tile's kernel for a pair of formats. BuildError in its words where it refuses."""
    defines = kernel_defines(tile, arch, tiles.kernel_pair(arch, pair))
    return compile_source_to_ptx(Path("csrc/tile/tile.cu"), arch, defines, tile.name)


def compile_source_to_ptx(source: Path, arch: str, defines: Sequence[str], name: str, *, root: Path = ROOT) -> str:
    """What nvcc makes of a source for an arch: the kernels have the names that they have in the wheel.

    Args:
        source: relative to the source tree's root.
        defines: words for the command line.
        name: what the error speaks of.
        root: of the source tree; tests compile changed ones.

    Raises:
        BuildError: in nvcc's words where it refuses.
    """
    folders = package_dirs(os.environ)
    cuda = resolve_cuda(os.environ, folders, [arch])
    includes = [*find_cutlass(os.environ, folders).include_dirs, *cuda.include_dirs]
    (root / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / "build") as made:  # where its path is plain, seen from the root
        folder = Path(made).relative_to(root)
        plain, output = PlainPaths(folder / "links"), folder / "kernel.ptx"
        command = [
            *(str(plain(cuda.nvcc)), "-ptx", "-ccbin", str(plain(find_cxx(os.environ)))),
            *(flag for flag in NVCC_FLAGS if flag not in ("-c", "-Xptxas", "-v")),
            *("-gencode", f"arch=compute_{arch},code=compute_{arch}"),
            *own_name(source),
            *defines,
            *(word for include in includes for word in ("-isystem", str(plain(include)))),
            *(str(source), "-o", str(output)),
        ]
        make_links(plain.links, root)
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"{name} for sm_{arch} does not compile to PTX: {result.stderr.strip()}")
        return (root / output).read_text(encoding="utf-8")


def collect(chosen: Mapping[Tile, Sequence[str]]) -> dict[str, dict[str, str]]:
    """The instructions of these tiles, each for these pairs of formats, by path."""
    jobs = [
        (tile, arch, pair)
        for arch in PATHS.values()
        for tile, pairs in chosen.items()
        for pair in tiles.kernel_pairs(arch, pairs)
    ]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        compiled = dict(zip(jobs, pool.map(lambda job: compile_to_ptx(*job), jobs), strict=True))
    found: dict[str, dict[str, str]] = {path: {} for path in PATHS}
    for path, arch in PATHS.items():
        for job in jobs:
            for name, statement in instructions(compiled[job]).items() if job[1] == arch else ():
                found[path].setdefault(name, statement)
    return found


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """The text of kernel.toml."""
    blocks = [HEAD]
    for path, by_name in found.items():
        rows = "".join(f'  "{statement}",\n' for statement in by_name.values())
        blocks.append(f"[{path}]\nptx = [\n{rows}]\n")
    return "\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the file is not current")
    check: bool = parser.parse_args(arguments).check
    try:
        manifest = tiles.load_manifest()
        every = [pair for pair in tiles.PAIRS if any(pair in profile.pairs for profile in manifest.profiles)]
        text = table(collect({tile: manifest.narrowed.get(tile, every) for tile in manifest.tiles}))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path = ROOT / TABLE
    if not check:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        print(f"{TABLE} is not what the kernel is made of: run {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
