"""`Environment`: everything the doctor looks at, as plain data; and `gather`, which fills it.

Nothing here judges, and nothing here raises: a part that cannot be looked at is None, and `faults` says why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .._install import blocklist, cache
from .._install import driver as _driver
from .._install import wheel as _wheel
from .._install.driver import Gpu
from .._install.elf import ElfError, read_elf
from .._install.troubles import words
from . import remembered

TORCH_SECONDS = 300.0  # for importing torch from a slow disk and loading all tiles

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PythonFacts:
    version: str
    implementation: str  # 'CPython'
    free_threaded: bool
    libc: tuple[str, str]  # ('glibc', '2.36'); empty where Python does not know
    executable: str


@dataclass(frozen=True, kw_only=True)
class Library:
    """One of the wheel's libraries. The hashes are empty where they were not asked for, or the report has none."""

    module: str
    fault: str  # why the file cannot be this library, empty when it looks whole
    built_sha256: str = ""
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class WheelFacts:
    version: str
    path: str
    has_report: bool
    profile: str
    archs: tuple[str, ...]
    tiles: int
    cuda: str  # that built it, empty when unknown
    torch: str
    torch_floor: str
    python_floor: str
    libraries: tuple[Library, ...]
    cudart: str  # the soname that the libraries need, such as libcudart.so.13
    glibc_floor: str  # the newest GLIBC version that they need, such as 2.34
    emulated_on: str = ""  # the arch whose machine code stands for `archs`, in a development build that emulates them
    conflict: str = ""  # what is wrong, with the remedy, when another distribution owns these files too


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """torch as a process of its own found it; `error` is empty when it can be imported."""

    error: str = ""
    version: str = ""
    cuda: str = ""
    hip: str = ""
    path: str = ""
    cudart: str = ""  # the runtime library that came with importing it
    gpus: tuple[str, ...] = ()
    gpu_error: str = ""  # torch's words when it sees no GPU
    loaded: Mapping[str, str] = field(default_factory=dict)  # module -> why it does not load, empty when it does
    ended: str = ""  # how the process ended, when not as it should: 'signal SIGBUS while loading moe'


@dataclass(frozen=True, kw_only=True)
class CudartFacts:
    """The CUDA runtime that the wheel's libraries would get."""

    soname: str
    path: str = ""
    version: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class DriverFacts:
    version: str  # 'unknown' where the system does not say
    cuda: str  # the newest CUDA that it serves; 'none' without a driver
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What earlier self-tests left about one kind of GPU."""

    device: str
    path: str  # of the blocklist, empty for a user without a home
    blocked: Mapping[str, str] = field(default_factory=dict)
    blocklist_fault: str = ""
    result: remembered.Result | None = None
    same_libraries: bool = False  # the result is about the libraries that are here


@dataclass(frozen=True, kw_only=True)
class TunedTable:
    name: str  # of the file
    device: str = ""
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What is here. None: that part could not be looked at, see `faults`."""

    python: PythonFacts | None
    wheel: WheelFacts | None
    torch: TorchFacts | None
    cudart: CudartFacts | None
    driver: DriverFacts | None
    memories: tuple[Remembered, ...] | None
    tuned: tuple[TunedTable, ...] | None
    verified: bool = False
    cache_dir: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)  # part -> why


def gather(*, verify: bool = False) -> Environment:
    """Looks at everything that can be looked at without running a kernel; a second or two, most of it torch's import.

    Args:
        verify: also hash each library.
    """
    faults: dict[str, str] = {}

    def part(name: str, look: Callable[[], _T]) -> _T | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say, findings say
                return look()
        except Exception as error:
            faults[name] = words(error)
            return None

    wheel = part("wheel", lambda: read_wheel(verify=verify))
    loading = part("torch", lambda: read_torch(wheel))
    torch, cudart = loading or (None, None)
    driver = part("driver", read_driver)
    gpus = driver.gpus if driver else ()
    return Environment(
        python=part("Python", read_python),
        wheel=wheel,
        torch=torch,
        cudart=cudart,
        driver=driver,
        memories=part("self-test", lambda: read_memories(gpus)),
        tuned=part("tuned tables", read_tuned),
        verified=verify,
        cache_dir=part("cache", lambda: str(cache.cache_dir() or "")) or "",
        faults=faults,
    )


def read_python() -> PythonFacts:
    return PythonFacts(
        version=platform.python_version(),
        implementation=platform.python_implementation(),
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        libc=platform.libc_ver(),
        executable=sys.executable,
    )


def read_wheel(*, verify: bool) -> WheelFacts:
    report = _wheel.read_report()
    built_with = (report or {}).get("built_with") or {}
    libraries: list[Library] = []
    needed: set[str] = set()
    glibc: set[tuple[int, ...]] = set()
    for module in _wheel.modules():
        fault = _wheel.library_fault(module) or ""
        hashes = {}
        if verify:
            hashes = {
                "built_sha256": _wheel.built_sha256(module) or "",
                "sha256": _wheel.sha256(_wheel.library(module)) or "",
            }
        libraries.append(Library(module=module, fault=fault, **hashes))
        if not fault:
            names, versions = _needs(_wheel.library(module))
            needed.update(names)
            glibc.update(versions)
    return WheelFacts(
        version=_wheel.version(),
        path=str(_wheel.PACKAGE),
        has_report=report is not None,
        profile=str((report or {}).get("profile", "")),
        archs=_wheel.built_archs(),
        tiles=len(_wheel.built_tiles()),
        cuda=str(built_with.get("cuda", "")),
        torch=str(built_with.get("torch", "")),
        torch_floor=str(built_with.get("torch_target", "")),
        python_floor=str(built_with.get("python_target", "")),
        libraries=tuple(libraries),
        cudart=max(needed, default=""),
        glibc_floor=".".join(map(str, max(glibc, default=()))),
        emulated_on=_wheel.emulated_on() or "",
        conflict=_wheel.conflict() or "",
    )


def _needs(path: Path) -> tuple[set[str], set[tuple[int, ...]]]:
    """The CUDA runtime's soname and the GLIBC versions that a library needs."""
    try:
        elf = read_elf(path.read_bytes())
    except (OSError, ElfError):  # broken since it was looked at
        return set(), set()
    names = {name for name in elf.needed if name.startswith("libcudart.so")}
    symbols = [symbol for versions in elf.versions.values() for symbol in versions]
    found = (re.fullmatch(r"GLIBC_([\d.]+)", symbol) for symbol in symbols)
    return names, {tuple(map(int, match[1].split("."))) for match in found if match}


def read_driver() -> DriverFacts:
    version, cuda = _driver.driver_version(), _driver.driver_cuda()
    try:
        return DriverFacts(version=version, cuda=cuda, gpus=_driver.driver_gpus())
    except RuntimeError as error:
        return DriverFacts(version=version, cuda=cuda, error=str(error))


def read_memories(gpus: Sequence[Gpu]) -> tuple[Remembered, ...]:
    """One for each kind of GPU."""
    kinds = dict.fromkeys((gpu.name, gpu.capability) for gpu in gpus)
    return tuple(_memory(name, capability) for name, capability in kinds)


def _memory(name: str, capability: tuple[int, int]) -> Remembered:
    blocked: Mapping[str, str] = {}
    fault = ""
    try:
        blocked = blocklist.read(name, capability)
    except blocklist.BlocklistError as error:
        fault = str(error).removesuffix(f": {blocklist.REMEDY}")
    result = remembered.read(name, capability)
    return Remembered(
        device=name,
        path=str(blocklist.path_of(name, capability) or ""),
        blocked=blocked,
        blocklist_fault=fault,
        result=result,
        same_libraries=result is not None and result.fingerprint == _wheel.fingerprint(),
    )


def read_tuned() -> tuple[TunedTable, ...]:
    """The tuned tables in the wheel, by their files' names."""
    return tuple(read_tuned_table(path) for path in sorted((_wheel.PACKAGE / "tuned").glob("*.json")))


def read_tuned_table(path: Path) -> TunedTable:
    """One table: whether it can be read, and for which GPU it is, by its key "device"."""
    try:
        data = json.loads(path.read_bytes())
        return TunedTable(name=path.name, device=str(data["device"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return TunedTable(name=path.name, fault=words(error))


# ---- torch, in a process of its own ----------------------------------------------------------------------------------


# The package is found where this one is, however the doctor was started, and behind everything else.
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from mxfp4_moe._health import torch_facts; torch_facts.main()"


def torch_command(soname: str, modules: Sequence[str]) -> list[str]:
    folder = Path(__file__).resolve().parent.parent.parent
    return [sys.executable, "-c", _PROGRAM, str(folder), f"--soname={soname}", *modules]


def read_torch(wheel: WheelFacts | None) -> tuple[TorchFacts, CudartFacts | None]:
    """What torch is, what it sees, and which of the wheel's whole libraries load under it."""
    soname = wheel.cudart if wheel else ""
    modules = [library.module for library in wheel.libraries if not library.fault] if wheel else []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            torch_command(soname, modules),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            # The folder that the user stands in is no place to import from.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        late = False
        try:
            output, _ = process.communicate(timeout=TORCH_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            late = True
        except BaseException:  # Ctrl-C
            process.kill()
            process.communicate()
            raise
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    whole = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]  # the last may be cut short
    messages = [json.loads(line) for line in whole]
    how = f"gave no answer in {TORCH_SECONDS:.0f} s" if late else ended(process.returncode, said)
    return torch_from(messages, how)


def ended(code: int, said: Sequence[str]) -> str:
    """How a process ended, and the last thing it said on stderr."""
    how = f"ended with exit status {code}" if code >= 0 else f"ended with signal {signal.Signals(-code).name}"
    return how + (f" ({said[-1][:300]})" if said else "")


def torch_from(messages: Sequence[Mapping[str, Any]], how: str) -> tuple[TorchFacts, CudartFacts | None]:
    """The messages of torch_facts.py as facts; `how` counts where they break off."""
    facts: dict[str, Any] = {}
    loaded: dict[str, str] = {}
    cudart = None
    doing, finished = "torch was imported", False
    for message in messages:
        if "torch" in message:
            facts |= message["torch"]
            doing = "CUDA was initialized"
        elif "cudart" in message:
            cudart = CudartFacts(**message["cudart"])
        elif "gpus" in message:
            facts |= {"gpus": tuple(message["gpus"]), "gpu_error": message["gpu_error"]}
        elif "loading" in message:
            doing = f"{message['loading']} was loaded"
        elif "loaded" in message:
            loaded[message["loaded"]] = message["error"]
        finished = finished or "end" in message
    return TorchFacts(**facts, loaded=loaded, ended="" if finished else f"{how} while {doing}"), cudart
