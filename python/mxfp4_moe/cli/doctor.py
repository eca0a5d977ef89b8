"""What this install is, whether it works here, and what to do where it does not.

Exit status: 0 when all is well, 1 with a warning (such as no GPU, or a tile that is blocked or failed the self-test),
2 with an error (nothing works on this GPU).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .. import __version__, _driver, _wheel, blocklist, selftest
from ..tiles import Tile

HELP = "what works here, what does not, and the self-test"

_SCHEMA = 1
_SHOWN = 3
_REINSTALL = f"reinstall the wheel: pip install --force-reinstall --no-deps {_wheel.distribution()}"
_TEST = "`mxfp4-moe doctor --selftest` runs every tile and writes the list anew"


class Level(IntEnum):
    """How bad; the worst one is the exit status."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing seen, and where it is not ok, the next step."""

    level: Level
    subject: str
    text: str
    next_step: str = ""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    index: int
    capability: tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run every tile on the GPU against the reference (seconds), and block those that fail on this machine",
    )
    parser.add_argument("--device", type=int, default=0, help="the GPU's number for --selftest, 0 by default")
    parser.add_argument("--json", action="store_true", help="the findings for machines")


def run(arguments: argparse.Namespace) -> int:
    report = None
    findings: list[Finding] = []
    if arguments.selftest:
        try:
            report, findings = run_selftest(arguments.device)
        except Exception as error:
            text = f"cannot be run: {type(error).__name__}: {error}"
            findings = [Finding(level=Level.ERROR, subject="self-test", text=text, next_step=_REINSTALL)]
    findings = [*collect(), *findings]
    worst = max((finding.level for finding in findings), default=Level.OK)
    if arguments.json:
        data = {
            "schema": _SCHEMA,
            "worst": worst.name.lower(),
            "findings": [{**vars(finding), "level": finding.level.name.lower()} for finding in findings],
            "selftest": report.as_dict() if report else None,
        }
        print(json.dumps(data, indent=1))
    else:
        print(_text(findings))
        if report:
            print(f"\n{report.text()}")
    return int(worst)


def _text(findings: Sequence[Finding]) -> str:
    lines = [f"mxfp4-moe doctor, version {__version__}"]
    subjects = max(len(finding.subject) for finding in findings)
    for finding in findings:
        lines.append(f"  {finding.level.name.lower():<7}  {finding.subject:<{subjects}}  {finding.text}")
        if finding.next_step:
            lines.append(f"  {'':<7}  {'':<{subjects}}  -> {finding.next_step}")
    return "\n".join(lines)


# ---- the self-test ---------------------------------------------------------------------------------------------------


def run_selftest(device: int) -> tuple[selftest.Report, list[Finding]]:
    """Runs it with progress on stderr, and writes or removes the device's blocklist."""

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tiles = _wheel.built_tiles()
    progress(f"self-test of {len(tiles)} tiles on GPU {device}: starting torch, computing what must come out")
    report = selftest.run(tiles, selftest.worker_command(device), progress=progress)
    findings = [_selftest_finding(report)]
    try:
        selftest.record(report)
    except OSError as error:
        findings.append(
            Finding(
                level=Level.WARNING,
                subject="blocklist",
                text=f"cannot be written: {error}",
                next_step=f"set {blocklist.CACHE_DIR_VARIABLE} to a folder that can",
            )
        )
    return report, findings


def _selftest_finding(report: selftest.Report) -> Finding:
    if report.passed:
        return Finding(level=Level.OK, subject="self-test", text=f"all {len(report.results)} tiles passed")
    passed = len(report.having(selftest.Status.PASSED))
    if report.fault and not report.device:
        step = "the findings above say what is missing"
    else:
        step = "open an issue with this report" + ("; calls fall back to tiles that passed" if passed else "")
    return Finding(
        level=Level.WARNING if passed else Level.ERROR,
        subject="self-test",
        text=f"{passed} of {len(report.results)} tiles passed" + (f": {report.fault}" if report.fault else ""),
        next_step=step,
    )


# ---- findings --------------------------------------------------------------------------------------------------------


def collect() -> list[Finding]:
    """Everything that can be found out without running a kernel. Never raises: a check that fails is a finding."""
    findings: list[Finding] = []

    def add(subject: str, check: Callable[[], Iterator[Finding]]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say is said by findings
                findings.extend(check())
        except Exception as error:
            words = f"cannot be examined: {type(error).__name__}: {error}"
            findings.append(Finding(level=Level.ERROR, subject=subject, text=words, next_step=_REINSTALL))

    add("wheel", _wheel_findings)
    add("libraries", _library_findings)
    torch, finding = _import_torch()
    findings.append(finding)
    gpus: list[Gpu] = []
    if torch is not None and torch.version.cuda:
        add("GPU", lambda: _gpu_findings(torch, gpus))
    blocked: set[str] = set()
    add("blocklist", lambda: _blocklist_findings(gpus, blocked))
    if torch is not None and torch.version.cuda:
        add("tiles", lambda: _loading_findings(blocked))
    return findings


def _wheel_findings() -> Iterator[Finding]:
    if two := _wheel.conflict():
        text, _, step = two.partition(": ")
        yield Finding(level=Level.ERROR, subject="wheel", text=text, next_step=step)
    report = _wheel.read_report()
    built_with = report.get("built_with", {}) if report else {}
    archs = ", ".join(f"sm_{arch}" for arch in _wheel.built_archs())
    if report:
        cuda, torch = built_with.get("cuda", "unknown"), built_with.get("torch", "unknown")
        text = f"{__version__}, profile {report.get('profile')}, {len(_wheel.built_tiles())} tiles for {archs}, built "
        text += f"with CUDA {cuda} and torch {torch}"
        yield Finding(level=Level.OK, subject="wheel", text=text)
    else:
        text = f"{__version__} has no build report: a source tree, or a damaged install"
        yield Finding(level=Level.ERROR, subject="wheel", text=text, next_step=_REINSTALL)


def _library_findings() -> Iterator[Finding]:
    tiles = _wheel.built_tiles()
    faults = [fault for tile in tiles if (fault := _wheel.library_fault(tile.module))]
    if fault := _wheel.library_fault("moe"):
        yield Finding(level=Level.ERROR, subject="libraries", text=fault, next_step=_REINSTALL)
    if faults:
        level = Level.ERROR if len(faults) == len(tiles) else Level.WARNING
        yield Finding(level=level, subject="libraries", text=_some(faults), next_step=_REINSTALL)
    if len(faults) < len(tiles):
        text = f"{len(tiles) - len(faults)} of {len(tiles)} tiles have a whole library of their own"
        yield Finding(level=Level.OK, subject="libraries", text=text)


def _some(sentences: Sequence[str]) -> str:
    """The first few; where every tile has the same trouble, the rest says nothing new."""
    shown = "; ".join(sentences[:_SHOWN])
    return shown if len(sentences) <= _SHOWN else f"{shown}; and {len(sentences) - _SHOWN} more"


def _import_torch() -> tuple[Any, Finding]:
    where = f"Python {platform.python_version()}, {' '.join(platform.libc_ver()) or 'unknown libc'}"
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever it likes
        text = f"cannot be imported in {where}: {type(error).__name__}: {error}"
        return None, Finding(level=Level.ERROR, subject="torch", text=text, next_step="pip install 'torch>=2.10'")
    text = f"{torch.__version__} with {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}, {where}"
    if torch.version.cuda:
        return torch, Finding(level=Level.OK, subject="torch", text=text)
    step = "CPU tensors work, slowly; for a GPU install a CUDA build of torch"
    return torch, Finding(level=Level.WARNING, subject="torch", text=text, next_step=step)


def _gpu_findings(torch: Any, gpus: list[Gpu]) -> Iterator[Finding]:
    """Also fills `gpus`."""
    driver = f"driver {_driver.driver_version()}, which serves CUDA {_driver.driver_cuda()}"
    if not torch.cuda.is_available():
        step = "CPU tensors work, slowly; for a GPU check the driver with nvidia-smi"
        text = f"torch sees none ({driver})"
        yield Finding(level=Level.WARNING, subject="GPU", text=text, next_step=step)
        return
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(Gpu(name=name, index=index, capability=capability))
        major, minor = capability
        arch = _wheel.arch_for(capability)
        text = f"cuda:{index}, {name}, compute capability {major}.{minor}, {driver}"
        if arch:
            yield Finding(level=Level.OK, subject="GPU", text=f"{text}: runs the machine code for sm_{arch}")
        else:
            archs = ", ".join(f"sm_{arch}" for arch in _wheel.built_archs())
            step = f"this wheel runs on {archs}; CPU tensors work, slowly"
            text += ": no machine code for it"
            yield Finding(level=Level.ERROR, subject="GPU", text=text, next_step=step)


def _blocklist_findings(gpus: Sequence[Gpu], blocked: set[str]) -> Iterator[Finding]:
    """Also fills `blocked` with the names of the tiles that are blocked on any GPU here."""
    if not gpus:
        text = f"no GPU to have one; lists are in {blocklist.cache_dir() or 'no folder, for there is no home'}"
        yield Finding(level=Level.OK, subject="blocklist", text=text)
    for name, capability in dict.fromkeys((gpu.name, gpu.capability) for gpu in gpus):
        path = blocklist.path_of(name, capability)
        try:
            reasons = blocklist.read(name, capability)
        except blocklist.BlocklistError as error:
            text, _, step = str(error).rpartition(": ")
            yield Finding(level=Level.WARNING, subject="blocklist", text=text, next_step=step)
            continue
        blocked.update(reasons)
        for tile, reason in reasons.items():
            text = f"{tile} failed the self-test on {name}: {reason} ({path})"
            yield Finding(level=Level.WARNING, subject="blocklist", text=text, next_step=_TEST)
        if not reasons:
            tested = "" if path is None else f" ({path} would say so)"
            yield Finding(level=Level.OK, subject="blocklist", text=f"no tile is blocked on {name}{tested}")


def _loading_findings(blocked: set[str]) -> Iterator[Finding]:
    from .. import _load

    try:
        _load.moe_ops()
    except _load.LoadError as error:
        yield Finding(level=Level.ERROR, subject="tiles", text=str(error), next_step=_REINSTALL)
        return
    loaded: list[Tile] = []
    errors: list[str] = []
    tiles = [tile for tile in _wheel.built_tiles() if tile.name not in blocked]
    for tile in tiles:
        try:
            _load.load_tile(tile)
            loaded.append(tile)
        except _load.LoadError as error:
            errors.append(str(error))
    if errors:
        level = Level.WARNING if loaded else Level.ERROR
        yield Finding(level=level, subject="tiles", text=_some(errors), next_step=_REINSTALL)
    if loaded:
        yield Finding(level=Level.OK, subject="tiles", text=f"{len(loaded)} of {len(tiles)} not blocked load")
