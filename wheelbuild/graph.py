"""The plan as one ninja graph, and running it: bounded by cores and memory, with progress as it goes."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from wheelbuild import REFUSED, ROOT, BuildError
from wheelbuild.plain_paths import make_links
from wheelbuild.plan import CompileJob, Plan

BYTES_PER_NVCC = 2 * 1024**3  # one nvcc job on CuTe headers, rounded up
_DONE = re.compile(r"\[(\d+)/(\d+)\] (.*)")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(job: CompileJob) -> str:
    command = list(job.command)
    if job.record is not None:
        command = [sys.executable, "-m", "wheelbuild.job", str(job.record), *command]
    return shlex.join(command).replace("$", "$$")


def graph_text(plan: Plan, nvcc_jobs: int) -> str:
    """build.ninja for this plan; at most `nvcc_jobs` nvcc commands run at a time."""
    text = io.StringIO()
    text.write("# Written by wheelbuild.graph.\nninja_required_version = 1.8\n")
    text.write(f"builddir = {_escape(plan.folder)}\n\n")
    text.write(f"pool nvcc\n  depth = {nvcc_jobs}\n\n")
    text.write("rule compile\n  command = $cmd\n  description = $desc\n  depfile = $out.d\n  deps = gcc\n\n")
    text.write("rule run\n  command = $cmd\n  description = $desc\n\n")
    for job in plan.jobs:
        rule = "compile" if job.depfile is not None else "run"
        text.write(f"build {_escape(job.output)}: {rule} {' '.join(map(_escape, job.inputs))}")
        if job.implicit:
            text.write(" | " + " ".join(map(_escape, job.implicit)))
        text.write(f"\n  cmd = {_command(job)}\n  desc = {job.description}\n")
        if job.kind == "nvcc":
            text.write("  pool = nvcc\n")
        text.write("\n")
    return text.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# How many at a time
# ----------------------------------------------------------------------------------------------------------------------


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be used: the system's, or this container's if that is less. `root` is for tests."""
    meminfo = root / "proc" / "meminfo"
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    available = int(match[1]) * 1024 if match else 4 * 1024**3
    limit, used = root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def job_counts(cores: int, memory: int, max_jobs: int | None) -> tuple[int, int]:
    """(jobs at a time, nvcc jobs at a time): cores bound the first, memory too the second; at least one each."""
    jobs = max(1, min(cores, max_jobs or cores))
    return jobs, max(1, min(jobs, memory // BYTES_PER_NVCC))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def find_ninja() -> str:
    try:
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.exists():
            return str(packaged)
    except ImportError:
        pass
    on_path = shutil.which("ninja")
    if on_path is None:
        raise BuildError("no ninja: pip install ninja")
    return on_path


def _environment() -> Mapping[str, str]:
    # The source tree by its short name, in which commands run: its path may have PYTHONPATH's separator in it.
    python_path = os.pathsep.join(filter(None, [os.curdir, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": python_path, "NINJA_STATUS": "[%f/%t] "}


def _checks_in(lines: Iterable[str]) -> int:
    return sum(line.endswith(": check") and ": tile_" not in line and "] tile_" in line for line in lines)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def run_plan(plan: Plan, max_jobs: int | None) -> None:
    """Builds what is out of date. Prints a line per finished job; BuildError when one fails."""
    jobs, nvcc_jobs = job_counts(_cores(), available_memory(), max_jobs)
    make_links(plan.links, ROOT)
    graph = ROOT / plan.folder / "build.ninja"
    _write_if_changed(graph, graph_text(plan, nvcc_jobs))
    command = [find_ninja(), "-f", str(plan.folder / "build.ninja"), "-j", str(jobs)]
    environment = _environment()

    # A dry run tells how many tiles are up to date already, so that "tile k of n" counts all n.
    dry = subprocess.run([*command, "-n"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    total = len(plan.tiles)
    done = total - _checks_in(dry.stdout.splitlines())
    print(f"tiles: {total}, of which up to date: {done}; jobs at a time: {jobs}, of nvcc: {nvcc_jobs}", flush=True)

    start = time.monotonic()
    refusals = []
    failed = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.rstrip("\n")
            if match := _DONE.fullmatch(line):
                done += _checks_in([line])
                elapsed = f"[{time.monotonic() - start:4.0f} s]"
                print(f"{elapsed} job {match[1]} of {match[2]}, tile {done} of {total}: {match[3]}", flush=True)
                continue
            if line.startswith("FAILED: "):
                failed = failed or line.removeprefix("FAILED: ").split("] ")[-1].strip()
            if line.startswith(REFUSED):
                refusals.append(line.removeprefix(REFUSED))
            # A compiler's command helps to see why it failed, a check's does not.
            if not re.search(r" -m wheelbuild\.(check|load) ", line):
                print(line, flush=True)
    if refusals:
        raise BuildError("; ".join(refusals))
    if process.returncode != 0:
        raise BuildError(f"{failed or 'ninja'} failed (exit status {process.returncode}); what it said is above")
