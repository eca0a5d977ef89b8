"""A wheel's manylinux tag: `python -m wheelbuild.repair WHEEL FOLDER`, in the tools' environment (auditwheel).

auditwheel decides; here its verdict is put into words, with the symbols that hold it where it is. A wheel that old
systems can load gets the tag of PLATFORM, which torch's own wheels have: a lower one would promise what torch does not
keep. One that needs newer systems gets the lowest tag that is true, and a warning.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from wheelbuild import BuildError
from wheelbuild.emulation import refuse_emulated

GOAL = (2, 28)
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*", "libcuda.so.*")


def policy(show: str) -> tuple[tuple[int, int], str]:
    """glibc's version and the machine of the lowest policy that `auditwheel show` found, e.g. ((2, 24), 'x86_64')."""
    match = re.search(r'constrains\s+the\s+platform\s+tag\s+to\s+"manylinux_(\d+)_(\d+)_(\w+)"', show)
    if match is None:
        raise BuildError(f"auditwheel found no manylinux policy for the wheel: {' '.join(show.split())}")
    return (int(match[1]), int(match[2])), match[3]


def _number(version: str) -> tuple[str, list[int]]:
    """GLIBCXX_3.4.21 as something that compares: its name, then its numbers."""
    name, _, digits = version.partition("_")
    return name, [int(part) for part in digits.split(".")]


def symbol_versions(library: Path) -> list[tuple[str, str]]:
    """(version, symbol) for every versioned symbol that a library takes from others, e.g. ('GLIBC_2.14', 'memcpy')."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as stream:
        elf = ELFFile(stream)
        needed = elf.get_section_by_name(".gnu.version_r")
        symbols = elf.get_section_by_name(".dynsym")
        indices = elf.get_section_by_name(".gnu.version")
        names = {auxiliary["vna_other"]: auxiliary.name for _, group in needed.iter_versions() for auxiliary in group}
        entries = zip(symbols.iter_symbols(), indices.iter_symbols(), strict=True)
        return [(names[index["ndx"]], symbol.name) for symbol, index in entries if index["ndx"] in names]


def highest(found: Iterable[tuple[str, str]]) -> dict[str, tuple[str, list[str]]]:
    """Of GLIBC, GLIBCXX and so on: the highest version that is asked for, and the symbols that ask for it."""
    versions: dict[str, dict[str, set[str]]] = {}
    for version, symbol in found:
        if re.fullmatch(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+", version):
            versions.setdefault(version.partition("_")[0], {}).setdefault(version, set()).add(symbol)
    tops = {name: max(group, key=_number) for name, group in sorted(versions.items())}
    return {name: (top, sorted(versions[name][top])) for name, top in tops.items()}


def wheel_versions(wheel: Path) -> dict[str, tuple[str, list[str]]]:
    """`highest` over all libraries of a wheel."""
    found: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                found += symbol_versions(Path(archive.extract(name, folder)))
    return highest(found)


# auditwheel repairs wheels for any machine, but its --plat takes the tags of the one that it runs on only.
_ELSEWHERE = "import platform, sys; platform.machine = lambda: {!r}; from auditwheel.main import main; sys.exit(main())"


def auditwheel_command(machine: str) -> list[str]:
    """auditwheel, for wheels for `machine`."""
    return ["auditwheel"] if machine == platform.machine() else [sys.executable, "-c", _ELSEWHERE.format(machine)]


def _auditwheel(machine: str, *words: str | Path) -> str:
    result = subprocess.run(
        [*auditwheel_command(machine), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise BuildError(f"auditwheel {words[0]} failed: {result.stdout.strip()}")
    return result.stdout


def repair(wheel: Path, folder: Path) -> Path:
    """Writes the tagged wheel into `folder`, tells what its tag rests on, and returns its path."""
    refuse_emulated(wheel)
    lowest, machine = policy(_auditwheel(platform.machine(), "show", wheel))
    goal = max(lowest, GOAL)
    tag = f"manylinux_{goal[0]}_{goal[1]}_{machine}"
    excluded = [word for pattern in EXCLUDED for word in ("--exclude", pattern)]
    with tempfile.TemporaryDirectory() as made:
        _auditwheel(machine, "repair", wheel, "--plat", tag, "--only-plat", *excluded, "--wheel-dir", made)
        (result,) = Path(made).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / result.name
        path.write_bytes(result.read_bytes())
    print(f"{wheel.name}: its symbols allow manylinux_{lowest[0]}_{lowest[1]}; tagged {tag}")
    for top, symbols in wheel_versions(path).values():
        few = ", ".join(symbols[:4]) + (f" and {len(symbols) - 4} more" if len(symbols) > 4 else "")
        print(f"  {top}: {few}")
    if lowest > GOAL:
        print(
            f"warning: older systems that torch supports (manylinux_{GOAL[0]}_{GOAL[1]}) cannot load this wheel; the "
            "symbols above hold it higher"
        )
    print(path)
    return path


if __name__ == "__main__":
    try:
        repair(Path(sys.argv[1]), Path(sys.argv[2]))
    except BuildError as error:
        sys.exit(f"error: {error}")
