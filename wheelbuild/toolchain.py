"""Finding the compilers and headers: CUDA toolkit, CUTLASS, torch, Python, g++.

The CUDA toolkit comes from CUDA_HOME, else from the nvcc on PATH, else from the PyPI packages in this environment
(`nvidia/cu13/...` under site-packages), so that a machine with Python and g++ is enough. `python -m
wheelbuild.toolchain` prints what was found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wheelbuild import BuildError
from wheelbuild.platforms import Platform
from wheelbuild.target import find_target, require_tools
from wheelbuild.tile_model import archs as arch_model
from wheelbuild.tile_model import floors, tiles
from wheelbuild.versions import load_versions

TOOLCHAIN_VARIABLE = "MXFP4_MOE_TOOLCHAIN"  # "pypi": use the packages whatever else is installed
CUTLASS_VARIABLE = "MXFP4_MOE_CUTLASS_INCLUDE"
BUILD_ENV_VARIABLE = "MXFP4_MOE_BUILD_ENV"  # prefix of another environment whose packages count as installed
TORCH_TARGET = floors.TORCH  # the oldest torch that the extensions load under


@dataclass(frozen=True, kw_only=True)
class Cuda:
    origin: str  # where it was found, in words
    version: tuple[int, ...]
    nvcc: Path
    include_dirs: tuple[Path, ...]
    cudart: Path  # the shared library, by its versioned name
    cuobjdump: Path

    @property
    def label(self) -> str:
        return f"cu{self.version[0]}{self.version[1]}"


@dataclass(frozen=True, kw_only=True)
class Headers:
    version: str
    include_dirs: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Torch:
    version: str
    include_dirs: tuple[Path, ...]
    library_dir: Path


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    cuda: Cuda
    cutlass: Headers
    torch: Torch
    python: Headers
    cxx: Path
    cxx_version: str
    target_python: tuple[str, ...] = ()  # runs the platform's Python where that is not this one


def package_dirs(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Folders in which packages may be installed: this interpreter's, then the build environment's if one is named."""
    folders = [Path(entry) for entry in sys.path if entry]
    if prefix := env.get(BUILD_ENV_VARIABLE):
        folders += sorted(Path(prefix).glob("lib/python3*/site-packages"))
    return tuple(folder for folder in dict.fromkeys(folders) if folder.is_dir())


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _output(command: Sequence[str | Path]) -> str:
    try:
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: cannot be run ({error.strerror})") from error
    if result.returncode != 0:
        raise BuildError(f"{command[0]}: exit status {result.returncode}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# CUDA
# ----------------------------------------------------------------------------------------------------------------------


def _from_packages(folders: Sequence[Path]) -> Path | None:
    """The newest nvcc that PyPI packages brought."""
    found = [nvcc for folder in folders for nvcc in folder.glob("nvidia/cu*/bin/nvcc")]
    return max(found, key=lambda nvcc: int("0" + "".join(filter(str.isdigit, nvcc.parts[-3]))), default=None)


def _find_nvcc(env: Mapping[str, str], folders: Sequence[Path]) -> tuple[str, Path]:
    install = f'pip install "{load_versions().cuda[0].requirement}" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm'
    forced = env.get(TOOLCHAIN_VARIABLE, "")
    if forced not in ("", "pypi"):
        raise BuildError(f"{TOOLCHAIN_VARIABLE}: expected 'pypi' or nothing, got {forced!r}")
    if forced != "pypi":
        if home := env.get("CUDA_HOME"):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.exists():
                raise BuildError(f"CUDA_HOME is {home}, which has no bin/nvcc: point it at a CUDA toolkit or unset it")
            return "CUDA_HOME", nvcc
        if on_path := shutil.which("nvcc", path=env.get("PATH", "")):
            return "PATH", Path(on_path).resolve()
    if packaged := _from_packages(folders):
        return "packages", packaged
    if forced == "pypi":
        raise BuildError(f"{TOOLCHAIN_VARIABLE}=pypi, but this environment has no packaged nvcc: {install}")
    raise BuildError(f"no CUDA compiler: set CUDA_HOME, put nvcc on PATH, or {install}")


def parse_nvcc_version(text: str) -> tuple[int, ...]:
    """(13, 0, 88) from the output of nvcc --version."""
    match = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"nvcc --version: no release in its output: {text.strip()!r}")
    return tuple(int(part) for part in match.groups())


def _toolkit_root(nvcc: Path) -> Path:
    """The toolkit that this nvcc belongs to; asked of nvcc itself, because the one on PATH may be a wrapper script."""
    script = subprocess.run(
        [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    match = re.search(r"^#\$ TOP=(.+)$", script.stderr + script.stdout, re.MULTILINE)
    return Path(match[1].strip()).resolve() if match else nvcc.parent.parent


def require_archs(origin: str, nvcc: Path, version: tuple[int, ...], archs: Sequence[str]) -> None:
    """BuildError when this nvcc is too old for an arch."""
    for arch in archs:
        oldest = arch_model.oldest_cuda(arch)
        if version[:2] < oldest:
            raise BuildError(
                f"nvcc {'.'.join(map(str, version))} ({origin}: {nvcc}) is too old for sm_{arch}, which needs CUDA "
                f"{oldest[0]}.{oldest[1]} or newer: install a newer toolkit, or set {TOOLCHAIN_VARIABLE}=pypi after "
                f'pip install "{load_versions().cuda[0].requirement}"'
            )


def resolve_cuda(env: Mapping[str, str], folders: Sequence[Path], archs: Sequence[str]) -> Cuda:
    """The CUDA toolkit for these archs; BuildError with one sentence when none serves."""
    origin, nvcc = _find_nvcc(env, folders)
    version = parse_nvcc_version(_output([nvcc, "--version"]))
    require_archs(origin, nvcc, version, archs)

    root = _toolkit_root(nvcc)
    includes = tuple(path for path in (root / "include", root / "include" / "cccl") if path.is_dir())
    soname = f"libcudart.so.{version[0]}"
    places = [root / "lib", root / "lib64", *sorted(root.glob("targets/*/lib"))]
    cudart = _first(place / soname for place in places)
    if cudart is None:
        raise BuildError(f"{root} has no {soname}: install the CUDA runtime library of the same toolkit")
    dumpers = [root / "bin" / "cuobjdump"]
    if on_path := shutil.which("cuobjdump", path=env.get("PATH", "")):
        dumpers.append(Path(on_path))
    dumpers += [path for folder in folders for path in sorted(folder.glob("nvidia/*/bin/cuobjdump"))]
    cuobjdump = _first(dumpers)
    if cuobjdump is None:
        raise BuildError(
            f"no cuobjdump in {root / 'bin'}, on PATH or among the packages; the build reads the machine code it made: "
            "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    return Cuda(origin=origin, version=version, nvcc=nvcc, include_dirs=includes, cudart=cudart, cuobjdump=cuobjdump)


# ----------------------------------------------------------------------------------------------------------------------
# The others
# ----------------------------------------------------------------------------------------------------------------------


def find_cutlass(env: Mapping[str, str], folders: Sequence[Path]) -> Headers:
    """CUTLASS's headers: the folder named by MXFP4_MOE_CUTLASS_INCLUDE, else the nvidia-cutlass package's."""
    if named := env.get(CUTLASS_VARIABLE):
        include: Path | None = Path(named)
        if not (Path(named) / "cutlass" / "cutlass.h").exists():
            raise BuildError(f"{CUTLASS_VARIABLE} is {named}, which has no cutlass/cutlass.h")
    else:
        found = [folder / "cutlass_library" / "source" / "include" for folder in folders]
        include = _first(path for path in found if (path / "cutlass" / "cutlass.h").exists())
    if include is None:
        raise BuildError(f"no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0, or set {CUTLASS_VARIABLE}")
    header = include / "cutlass" / "version.h"
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    parts = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(part[1] for part in parts if part)
    return Headers(version=version or "unknown", include_dirs=(include.resolve(),))


def find_torch(folders: Sequence[Path]) -> Torch:
    """torch's headers and libraries, without importing it."""
    root = _first(folder / "torch" for folder in folders if (folder / "torch" / "version.py").exists())
    if root is None:
        raise BuildError(f"no torch in this environment: pip install torch=={load_versions().torch_build}")
    match = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text(encoding="utf-8"))
    version = match[1] if match else "0"
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < TORCH_TARGET:
        raise BuildError(
            f"torch {version} is too old to build with, which needs {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or newer: "
            f"pip install torch=={load_versions().torch_build}"
        )
    include = root / "include"
    return Torch(
        version=version,
        include_dirs=(include, include / "torch" / "csrc" / "api" / "include"),
        library_dir=root / "lib",
    )


def find_python() -> Headers:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise BuildError(f"{include} has no Python.h: install this Python's headers (python3-dev)")
    return Headers(version=sysconfig.get_python_version(), include_dirs=(include,))


def _version_line(cxx: Path) -> str:
    return _output([cxx, "--version"]).splitlines()[0]


def find_cxx(env: Mapping[str, str]) -> Path:
    name = env.get("CXX") or "g++"
    found = shutil.which(name, path=env.get("PATH", ""))
    if found is None:
        raise BuildError(f"no C++ compiler: {name} is not on PATH; install g++ or set CXX")
    return Path(found)


def resolve_toolchain(env: Mapping[str, str], archs: Sequence[str]) -> Toolchain:
    """Everything the plan needs; BuildError, one sentence, for the first thing that is missing."""
    folders = package_dirs(env)
    cxx = find_cxx(env)
    return Toolchain(
        cuda=resolve_cuda(env, folders, archs),
        cutlass=find_cutlass(env, folders),
        torch=find_torch(folders),
        python=find_python(),
        cxx=cxx,
        cxx_version=_version_line(cxx),
    )


def resolve_cross_toolchain(env: Mapping[str, str], archs: Sequence[str], platform: Platform) -> Toolchain:
    """The same for another platform: compilers, CUTLASS and torch's headers of this one, the rest of that one."""
    folders = package_dirs(env)
    cxx = require_tools(env, platform)
    target = find_target(env, platform)
    cuda = resolve_cuda(env, folders, archs)
    toolkit = target.cuda(cuda.version[0])
    cudart = toolkit / "lib" / cuda.cudart.name
    if not cudart.exists():
        raise BuildError(
            f"{cuda.nvcc} is of CUDA {cuda.version[0]}, and {target.folder} has no {cudart.name}: run "
            f"ci/build-{platform.machine}.sh, which makes it anew for the CUDA packages that are installed"
        )
    return Toolchain(
        cuda=replace(cuda, include_dirs=(toolkit / "include", toolkit / "include" / "cccl"), cudart=cudart),
        cutlass=find_cutlass(env, folders),
        torch=replace(find_torch(folders), library_dir=target.packages / "torch" / "lib"),
        python=Headers(version=target.python_version, include_dirs=target.python_include_dirs),
        cxx=cxx,
        cxx_version=_version_line(cxx),
        target_python=target.python,
    )


if __name__ == "__main__":
    try:
        found = resolve_toolchain(os.environ, tiles.load_manifest().archs)
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(asdict(found), indent=2, default=str))
