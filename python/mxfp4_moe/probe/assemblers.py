"""Finding every ptxas on this machine, and asking one to assemble."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .variants import Isa, parse_isa

# Where PyPI packages put it: nvidia-cuda-nvcc (nvidia/cu13/bin), nvidia-cuda-nvcc-cu12 (nvidia/cuda_nvcc/bin), and the
# copy that Triton carries for itself.
PACKAGED = ("nvidia/*/bin/ptxas", "triton/backends/nvidia/bin/ptxas*")
_SECONDS = 120  # longer than any call here by far; a ptxas that hangs is an error, not a wait


class AssemblerError(RuntimeError):
    """A ptxas cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """One ptxas. `version` is (13, 0, 88); `isa` is the newest PTX ISA version that it reads."""

    path: Path
    origin: str
    version: tuple[int, ...]
    isa: Isa

    @property
    def cuda(self) -> str:
        """The CUDA release, such as '13.0'."""
        return f"{self.version[0]}.{self.version[1]}"

    @property
    def label(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one call of ptxas said: nothing when it accepted, else (line of the source or None, words) per complaint."""

    accepted: bool
    complaints: tuple[tuple[int | None, str], ...]


# It begins with the program's name, which is not ptxas for every copy of it (triton has a ptxas-blackwell).
_COMPLAINT = re.compile(r"^ptxas\S* (?:.*?, line (\d+); )?(?:error|fatal)\s*: (.*)$", re.MULTILINE)


def assemble(path: Path, target: str | None, source: str) -> Answer:
    """Assembles PTX for a target such as 'sm_120f', or the assembler's default, and throws the result away.

    Raises:
        AssemblerError: the program cannot be run, or failed without a word; there is no place for its input.
    """
    option = [f"--gpu-name={target}"] if target else []
    try:
        with tempfile.TemporaryDirectory(prefix="mxfp4-moe-probe-") as folder:
            file = Path(folder) / "probe.ptx"
            file.write_text(source, encoding="utf-8")
            result = _call([str(path), *option, file.name, "--output-file", os.devnull], folder)
    except OSError as error:
        raise AssemblerError(f"no place for a temporary file: {error}; set TMPDIR to a folder that has") from error
    if result.returncode == 0:
        return Answer(accepted=True, complaints=())
    found = _COMPLAINT.findall(result.stdout + result.stderr)
    complaints = tuple((int(line) if line else None, words.strip()) for line, words in found)
    if not complaints:
        said = (result.stderr or result.stdout).strip() or "it said nothing"
        raise AssemblerError(f"{path} ended with status {result.returncode} for {target or 'its own default'}: {said}")
    return Answer(accepted=False, complaints=complaints)


def _call(command: Sequence[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except OSError as error:
        raise AssemblerError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise AssemblerError(f"{command[0]} did not end within {_SECONDS} seconds") from error


def examine(path: Path, origin: str) -> Assembler:
    """The ptxas at `path`: its version, and the newest PTX ISA that it reads, both in its own words.

    Raises:
        AssemblerError: it cannot be run, or is no ptxas.
    """
    said = _call([str(path), "--version"]).stdout
    release = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)", said)
    if release is None or "ptxas" not in said:
        raise AssemblerError(f"{path} is no ptxas: --version says {said.strip()[:80]!r}")
    # A version of the future: the refusal names the newest one there is. The target is this assembler's own default,
    # since there is none that all releases have.
    refusal = assemble(path, None, ".version 99.0\n.target sm_75\n.address_size 64\n")
    newest = re.search(r"current version is '(\d+\.\d+)'", " ".join(words for _, words in refusal.complaints))
    if newest is None:
        raise AssemblerError(f"{path} (CUDA {release[1]}.{release[2]}) does not say which PTX ISA it reads")
    version = tuple(int(part) for part in release.groups())
    return Assembler(path=path, origin=origin, version=version, isa=parse_isa(newest[1]))


def _candidates(env: Mapping[str, str], folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for folder in filter(None, env.get("PATH", "").split(os.pathsep)):
        if on_path := shutil.which("ptxas", path=folder):
            yield "PATH", Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := env.get(variable):
            yield variable, Path(home) / "bin" / "ptxas"
    for place in folders:
        for pattern in PACKAGED:
            for packaged in sorted(place.glob(pattern)):
                yield "packages", packaged


def find(
    env: Mapping[str, str], folders: Iterable[Path] | None = None, named: Sequence[Path] = ()
) -> tuple[list[Assembler], list[str]]:
    """Every ptxas, oldest first and each version once; and a sentence for each that was found and cannot be used.

    Args:
        env: the environment, for PATH, CUDA_HOME and CUDA_PATH.
        folders: where packages may be installed; sys.path by default.
        named: those that the user named. They come on top, and one that cannot be used is an error.

    Raises:
        AssemblerError: a named one cannot be used.
    """
    if folders is None:
        folders = [Path(entry) for entry in sys.path if entry]
    found = [examine(_absolute(path), "--ptxas") for path in named]
    faults = []
    seen = set()
    for origin, path in _candidates(env, folders):
        if not os.access(path, os.X_OK) or path.is_dir() or path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            found.append(examine(path, origin))
        except AssemblerError as error:
            faults.append(str(error))
    once: dict[tuple[int, ...], Assembler] = {}
    for assembler in found:  # the same version answers the same, wherever it lies
        once.setdefault(assembler.version, assembler)
    return sorted(once.values(), key=lambda assembler: assembler.version), faults


def _absolute(path: Path) -> Path:
    """A toolkit's folder will do for its ptxas."""
    path = path.expanduser().absolute()
    for inside in (path / "bin" / "ptxas", path / "ptxas"):
        if inside.is_file():
            return inside
    if not path.exists():
        raise AssemblerError(f"--ptxas: there is no {path}")
    return path
