"""Whether a wheel for another platform is what its users need, as far as this machine can tell.

`python -m wheelbuild.release.cross_check WHEEL NATIVE_WHEEL` compares it with the wheel that the same source tree gives
for the machine that builds (native): the same files, the same Python, machine code that is the same byte by byte. Every
library must be for the platform. Then the platform's own pip installs the wheel into the environment that
make_target.py made, under qemu; there every extension is loaded against torch, a MoE layer runs on the CPU, and so
do the tests of the CPU reference. A table at the end; exit status 1, and a sentence for each, when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wheelbuild import REFUSED, ROOT, BuildError
from wheelbuild.build import make_plan, resolve_build
from wheelbuild.cubins import read_cubins, require_same_cubins
from wheelbuild.platforms import PLATFORMS, Platform
from wheelbuild.settings import PLATFORM_VARIABLE
from wheelbuild.target import Target, find_target, pip_install
from wheelbuild.toolchain import package_dirs, resolve_cuda

EXTENSIONS = "mxfp4_moe/_ext"
LAYER = ("--device", "cpu", "--size", "256")  # of ci/run_layer.py; emulation is slow
REFERENCE_TESTS = (  # of the CPU's mathematics
    *("test_formats.py", "test_quantizers.py", "test_reference.py", "test_reference_layer.py"),
    *("test_weights.py", "test_weights_sources.py"),
)


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    path: Path

    @property
    def tag(self) -> str:
        """The platform part of its name, e.g. manylinux_2_34_aarch64; several are joined by dots."""
        return self.path.stem.split("-")[-1]

    @property
    def platform(self) -> Platform:
        """By its tag; BuildError for one that no wheel of ours has."""
        for platform in PLATFORMS.values():
            if self.tag.endswith(f"_{platform.machine}"):
                return platform
        raise BuildError(f"{self.path.name}: its platform {self.tag} is none of {', '.join(PLATFORMS)}")

    @property
    def glibc(self) -> str:
        """The oldest glibc that it promises to run with, which is the oldest of its tags."""
        versions = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)_", self.tag)]
        return ".".join(map(str, min(versions))) if versions else "not promised"

    def unpack(self, folder: Path) -> Path:
        with zipfile.ZipFile(self.path) as opened:
            opened.extractall(folder)
        return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of an unpacked wheel, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def elf_machine(data: bytes) -> int | None:
    """e_machine of an ELF file, None of any other. Both byte orders are in the ELF header; ours are little."""
    if data[:4] != b"\x7fELF":
        return None
    return int.from_bytes(data[18:20], "little" if data[5] == 1 else "big")


def check_machines(files: Mapping[str, bytes], platform: Platform) -> int:
    """How many ELF files there are; BuildError when one is for another machine, or when there are none."""
    machines = {name: machine for name, data in files.items() if (machine := elf_machine(data)) is not None}
    for name, machine in machines.items():
        if machine != platform.elf_machine:
            raise BuildError(
                f"{name} is for ELF machine {machine}, expected {platform.elf_machine} ({platform.machine})"
            )
    if not machines:
        raise BuildError(f"the wheel has no library for {platform.machine}")
    return len(machines)


def check_same_files(ours: Mapping[str, bytes], native: Mapping[str, bytes]) -> int:
    """How many files there are; BuildError when only one wheel has a file, or when their Python is not the same."""
    if differing := sorted(ours.keys() ^ native.keys()):
        raise BuildError(f"{', '.join(differing)}: in one of both wheels only; build both of the same tree and tiles")
    for name in ours:
        if name.endswith(".py") and ours[name] != native[name]:
            raise BuildError(f"{name} is not the same in both wheels; build both of the same tree")
    return len(ours)


def check_cubins(ours: Path, native: Path, cuobjdump: Path) -> int:
    """How many cubins there are, all of them the same in both unpacked wheels."""
    count = 0
    for library in sorted((ours / EXTENSIONS).glob("*.so")):
        cubins = read_cubins(cuobjdump, library)
        require_same_cubins(library.name, cubins, read_cubins(cuobjdump, native / EXTENSIONS / library.name))
        count += len(cubins)
    return count


# ----------------------------------------------------------------------------------------------------------------------
# Under emulation
# ----------------------------------------------------------------------------------------------------------------------


def install(target: Target, wheel: Path) -> None:
    """By the platform's own pip, which refuses a tag that is not the platform's."""
    pip_install(target, (f"{wheel}[test]",))  # with what it and its tests depend on
    pip_install(target, ("--no-deps", "--force-reinstall", str(wheel)))  # also if another of this version was there


def _python(target: Target, words: Sequence[str]) -> str:
    """Output of the platform's Python, run outside of the source tree; BuildError with its last line when it fails."""
    command = (*target.python, "-W", "ignore", *words)
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        refusals = [line.removeprefix(REFUSED) for line in result.stdout.splitlines() if line.startswith(REFUSED)]
        said = (result.stderr or result.stdout).strip().splitlines()
        raise BuildError("; ".join(refusals) or f"{' '.join(words[:2])}: {said[-1] if said else result.returncode}")
    return result.stdout


def load_all(target: Target, env: Mapping[str, str]) -> list[str]:
    """The modules of the installed wheel that load, checked as the build checks its own (wheelbuild.load)."""
    build = resolve_build({**env, PLATFORM_VARIABLE: target.platform.name})
    made = make_plan(build)
    (job,) = made.jobs_of("extensions", "load")
    inputs = {str(path): path.name for path in job.inputs}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "load.json"
        words = [
            str(target.packages / EXTENSIONS / inputs[word]) if word in inputs else word
            for word in job.command[job.command.index("-m") :]
        ]
        words[words.index("--output") + 1] = str(output)
        _python(target, words)
        return sorted(json.loads(output.read_text(encoding="utf-8")))


def run_layer(target: Target) -> str:
    """What ci/run_layer.py says of a layer's largest relative error."""
    said = _python(target, (str(ROOT / "ci" / "run_layer.py"), *LAYER))
    print(said, flush=True)
    errors = re.findall(r"^ *\d+ +\S+ +\S+ +(\S+) +\S+$", said, re.MULTILINE)
    return f"yes, relative error at most {max(errors, key=float)}"


def run_tests(target: Target) -> str:
    """The tests of the reference, of formats and of weights, against the installed wheel."""
    tests = (str(ROOT / "tests" / "cpu" / name) for name in REFERENCE_TESTS)
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    last = _python(target, ("-m", "pytest", *options, *tests)).strip().splitlines()[-1]
    return last.split(",")[0]


# ----------------------------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------------------------


def check(wheel: WheelFile, native: WheelFile, env: Mapping[str, str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The table's rows, and a sentence for each thing that is wrong."""
    target = find_target(env, wheel.platform)
    cuobjdump = resolve_cuda(env, package_dirs(env), ()).cuobjdump
    rows: list[tuple[str, str]] = []
    failures: list[str] = []

    def row(name: str, found: Callable[[], str]) -> None:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            value = found()
        except BuildError as error:
            failures.append(f"{name}: {error}")
            value = "NO"
        rows.append((name, f"{value} ({time.monotonic() - start:.0f} s)"))

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = wheel.unpack(Path(folder) / "ours"), native.unpack(Path(folder) / "native")
        files = read_files(ours)
        libraries = sorted(path.name for path in (ours / EXTENSIONS).glob("*.so"))
        machine = wheel.platform.machine

        def loaded() -> str:
            install(target, wheel.path)
            modules = load_all(target, env)
            if missing := {*libraries} ^ {f"{module}.abi3.so" for module in modules}:
                raise BuildError(f"{', '.join(sorted(missing))}: in the wheel or in the plan, not in both")
            return f"{len(modules)} of {len(libraries)}"

        rows += [
            ("wheel", wheel.path.name),
            ("size", f"{wheel.path.stat().st_size:,} bytes (native: {native.path.stat().st_size:,})"),
            ("tag", wheel.tag),
            ("tiles", str(sum(name.startswith("tile_") for name in libraries))),
            ("glibc, at least", wheel.glibc),
        ]
        row("files as in the native wheel", lambda: f"yes, {check_same_files(files, read_files(theirs))}")
        row(f"libraries for {machine} only", lambda: f"yes, {check_machines(files, wheel.platform)}")
        row("machine code as in the native wheel", lambda: f"yes, {check_cubins(ours, theirs, cuobjdump)} cubins")
        row(f"extensions that {machine} torch loads", loaded)
        row("MoE layer on the CPU", lambda: run_layer(target))
        row("tests of the CPU reference", lambda: run_tests(target))
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("native", type=Path)
    parser.add_argument("--seconds", type=float, default=0, help="what building it took, for the table")
    args = parser.parse_args()
    try:
        rows, failures = check(WheelFile(path=args.wheel), WheelFile(path=args.native), os.environ)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.seconds:
        rows.append(("seconds to build it", f"{args.seconds:.0f}"))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:{width}}  {value}" for name, value in rows))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
