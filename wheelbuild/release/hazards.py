"""Whether ptxas's control bits cover the dependencies of our SM12x machine code.

    python -m wheelbuild.release.hazards WHEEL

SM12x does not interlock: an instruction's stall count and scoreboards say how long those after it must wait, and a
wait that is too short is a wrong result. The checker is basalt-sass (dependency group `release`), which holds these
bits against latencies measured on an RTX 5070 Ti and against what ptxas does in 25,634 kernels. It reads every sm_120
cubin of the wheel. An error refuses the wheel; so does a warning that ci/hazards.toml does not list with the reason
why it is none, and an opcode that the checker does not know and the file does not list. Also takes a .cubin.

It is no proof: where as many cycles pass behind a load as it has seen ptxas leave, it asks for no scoreboard, and what
an unknown opcode reads it does not follow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wheelbuild import ROOT, BuildError
from wheelbuild.toolchain import package_dirs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ACCEPTED = Path("ci/hazards.toml")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the checker says of one dependency, from the instruction that wrote or read a register to the next one."""

    error: bool
    kind: str  # understalled, no-barrier-set, barrier-not-awaited, overwritten-before-read
    producer: str  # opcodes with their modifiers
    consumer: str
    cycles: int  # between the two, where they are too few
    scoreboards: frozenset[str]  # opcodes in between that signal a scoreboard for which the consumer has waited
    words: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One kernel's check."""

    instructions: int
    dependencies: int
    findings: tuple[Finding, ...]
    unknown: frozenset[str]  # opcodes


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Warnings of one kind that are none: an entry of ci/hazards.toml."""

    kind: str
    producer: str
    consumers: tuple[str, ...]
    at_most: int
    reason: str
    fewest_cycles: int = 0
    scoreboard_of: tuple[str, ...] = ()  # one of these must have signalled one, if any are named

    def is_about(self, finding: Finding) -> bool:
        named = (finding.kind, finding.producer) == (self.kind, self.producer) and finding.consumer in self.consumers
        waited = not self.scoreboard_of or bool(finding.scoreboards & set(self.scoreboard_of))
        return named and waited and finding.cycles >= self.fewest_cycles


@dataclass(frozen=True, kw_only=True)
class Accepted:
    warnings: tuple[Warned, ...]
    unknown: Mapping[str, str]  # opcode -> what it is, and why nothing is missed


def parse_accepted(text: str) -> Accepted:
    """The file's content; BuildError where it is not what this module reads."""
    try:
        data = tomllib.loads(text)
        lists = ("consumers", "scoreboard_of")
        warnings = []
        for entry in data["warning"]:
            fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in entry.items()}
            warnings.append(Warned(**fields))
        return Accepted(warnings=tuple(warnings), unknown=dict(data["unknown"]))
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError) as error:
        raise BuildError(f"{ACCEPTED}: not what wheelbuild.release.hazards reads: {error!r}") from error


def load_accepted() -> Accepted:
    return parse_accepted((ROOT / ACCEPTED).read_text(encoding="utf-8"))


def judge(name: str, seen: Iterable[Seen], accepted: Accepted) -> str:
    """BuildError for the first error, new warning or unknown opcode. Returns what was seen, as a line."""
    counts: Counter[Warned] = Counter()
    kernels = list(seen)
    for kernel in kernels:
        for opcode in sorted(kernel.unknown - set(accepted.unknown)):
            raise BuildError(
                f"{name}: the hazard checker does not know {opcode}; see what it reads and writes, and list it in "
                f"{ACCEPTED}"
            )
        for finding in sorted(kernel.findings, key=lambda finding: not finding.error):
            if finding.error:
                raise BuildError(f"{name}: a hazard in the machine code: {finding.words}")
            entry = next((warned for warned in accepted.warnings if warned.is_about(finding)), None)
            if entry is None:
                raise BuildError(
                    f"{name}: a warning that {ACCEPTED} does not list: {finding.words}; find out whether it is a "
                    "hazard, and list it with the reason if it is none"
                )
            counts[entry] += 1
    for warned, count in counts.items():
        if count > warned.at_most:
            raise BuildError(
                f"{name}: {count} warnings of {warned.producer} before {' or '.join(warned.consumers)}, at most "
                f"{warned.at_most} allowed ({ACCEPTED})"
            )
    dependencies = sum(kernel.dependencies for kernel in kernels)
    if not dependencies:
        raise BuildError(f"{name}: the hazard checker found no dependency to check in {len(kernels)} kernels")
    unknown = sorted(frozenset().union(*(kernel.unknown for kernel in kernels)))
    return (
        f"{name}: {len(kernels)} kernels for sm_120, {sum(kernel.instructions for kernel in kernels):,} instructions, "
        f"{dependencies:,} dependencies: no error, {sum(counts.values())} warnings of {len(counts)} kinds, each listed "
        f"in {ACCEPTED}; opcodes unknown to the checker: {', '.join(unknown) or 'none'}"
    )


# ---- the checker -----------------------------------------------------------------------------------------------------


def find_tools(folders: Sequence[Path]) -> Path:
    """The folder of cuobjdump and nvdisasm, which come as packages of the dependency group `release`."""
    for folder in folders:
        for place in sorted(folder.glob("nvidia/*/bin")):
            if (place / "nvdisasm").exists() and (place / "cuobjdump").exists():
                return place
    raise BuildError(
        "no nvdisasm and cuobjdump among the packages: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump"
    )


def cubins(cuobjdump: Path, library: Path, folder: Path) -> list[Path]:
    """The sm_120 cubins of a library, extracted into an empty folder."""
    folder.mkdir()
    command = [str(cuobjdump), "-xelf", "all", str(library.resolve())]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    found = sorted(folder.glob("*.sm_120*.cubin"))
    if not found:
        raise BuildError(f"{library.name} has no sm_120 cubin that cuobjdump can extract")
    return found


@contextmanager
def _unpacked(path: Path, cuobjdump: Path) -> Iterator[list[Path]]:
    """The cubins of a wheel, all of its libraries', or of the cubin that `path` is."""
    if path.suffix == ".cubin":
        yield [path]
        return
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(path) as wheel:
        folder = Path(name)
        libraries = sorted(entry for entry in wheel.namelist() if entry.endswith(".so"))
        found = []
        for library in libraries:
            wheel.extract(library, folder)
            found += cubins(cuobjdump, folder / library, folder / Path(library).name.replace(".so", ""))
        if not found:
            raise BuildError(f"{path.name} has no library")
        yield found


@cache
def _model() -> tuple[Any, Any]:
    """The checker's latencies, and its record of what ptxas does."""
    from basalt.paths import LATENCIES, OBSERVED_STALLS
    from basalt.verify.latency import LatencyModel
    from basalt.verify.observed import ObservedStalls

    return LatencyModel.assumed().overlay(LATENCIES), ObservedStalls.read(OBSERVED_STALLS)


def _scoreboards(program: Any, first: int, last: int) -> frozenset[str]:
    """Opcodes behind the `first` instruction that signal a scoreboard for which something up to the `last` waits."""
    signalled: dict[int, str] = {}
    waited: set[str] = set()
    for place in range(first, last + 1):
        instruction = program.instructions[place]
        mask = instruction.word.field("wait_mask")
        waited |= {opcode for number, opcode in signalled.items() if mask >> number & 1}
        if place > first and instruction.opcode in ("BRA", "BRX", "BRXU", "EXIT", "RET", "CALL"):
            return frozenset()
        if (number := instruction.word.field("write_barrier")) != 7:
            signalled[number] = instruction.opcode
    return frozenset(waited)


def _only_reads(opcode: str, operands: str, register: str) -> bool:
    """Whether the checker takes for written what a PLOP3 or a VOTEU reads.

    PLOP3 writes its first two predicates and reads the others (CUDA Binary Utilities: "Predicate Logic Operation"; its
    lookup table has three inputs). The checker takes every predicate that comes first for written, so that of a uniform
    one which PLOP3 copies it asks again what was asked of the instruction that made it. VOTEU votes on a predicate and
    writes uniform registers and predicates alone ("Voting across SIMD Thread Group with Results in Uniform
    Destination").
    """
    if opcode == "VOTEU":
        return register.startswith("P")
    names = [name.strip().lstrip("!") for name in operands.split(",")]
    return opcode in ("PLOP3", "UPLOP3") and register in names[2:] and register not in names[:2]


def examine(program: Any) -> Seen:
    """One kernel, as basalt.disasm gives it."""
    from basalt.verify.hazards import Severity, verify_program

    latencies, observed = _model()
    report = verify_program(program, latencies, observed=observed)
    if report.incomplete_graph:
        raise BuildError("the hazard checker cannot follow a branch to a computed address in this kernel")
    found = []
    for hazard in report.hazards:
        if hazard.severity is Severity.INFO:
            continue
        first, last = (program.instructions[index] for index in (hazard.def_index, hazard.use_index))
        if _only_reads(first.opcode, first.operands, hazard.register):
            continue
        found.append(
            Finding(
                error=hazard.severity is Severity.ERROR,
                kind=str(hazard.kind),
                producer=first.mnemonic,
                consumer=last.mnemonic,
                cycles=hazard.actual,
                scoreboards=_scoreboards(program, hazard.def_index, hazard.use_index),
                words=f"{first.text} at 0x{first.offset:x}, then {last.text} at 0x{last.offset:x}: "
                f"{hazard.describe().partition('] ')[2]}",
            )
        )
    return Seen(
        instructions=report.instructions,
        dependencies=report.checked_pairs,
        findings=tuple(found),
        unknown=frozenset(report.unknown_opcodes),
    )


def check(path: Path) -> str:
    """Every kernel of a wheel or a cubin; BuildError, or what was seen as a line."""
    try:
        from basalt.disasm import disassemble_kernels
        from basalt.toolchain import Toolchain
    except ImportError as error:
        raise BuildError(
            f"no hazard checker here ({error}): pip install basalt-sass, on Python 3.11 or newer"
        ) from error
    tools = find_tools(package_dirs(os.environ))
    programs = []
    with _unpacked(path, tools / "cuobjdump") as found:
        for cubin in found:
            kernels = disassemble_kernels(Toolchain(tools), cubin)
            if not kernels:
                raise BuildError(f"{path.name}: nvdisasm reads no kernel in {cubin.name}")
            programs += list(kernels.values())
    programs.sort(key=len, reverse=True)  # the long ones first, so that no worker ends with one
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return judge(path.name, pool.map(examine, programs), load_accepted())


if __name__ == "__main__":
    try:
        print(check(Path(sys.argv[1])))
    except BuildError as error:
        sys.exit(f"error: {error}")
