"""The plan as a ninja graph, and how it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from build_cases import MANIFEST, make_plan

from wheelbuild import ROOT, BuildError
from wheelbuild.graph import available_memory, find_ninja, graph_text, job_counts
from wheelbuild.plan import CompileJob, Plan


def standing_in(folder: Path, jobs: Mapping[str, tuple[str, ...]]) -> Plan:
    """A plan whose commands are these, in place of compilers; a name is also the name of the file that it makes."""
    made = tuple(
        CompileJob(
            name=name,
            kind="check" if name.endswith(".check.json") else "link",
            module=name.split(".")[0],
            archs=(),
            inputs=(),
            implicit=(),
            output=folder / name,
            record=None,
            depfile=None,
            command=command,
        )
        for name, command in jobs.items()
    )
    return Plan(jobs=made, modules=(), tiles=MANIFEST.tiles[:1], archs=MANIFEST.archs, folder=folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Mapping[str, tuple[str, ...]]], None]:
    from wheelbuild import graph

    monkeypatch.setattr(graph, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda jobs: graph.run_plan(standing_in(Path("build/x"), jobs), 1)


Runner = Callable[[Mapping[str, tuple[str, ...]]], None]


def test_progress_counts_jobs_and_tiles(run: Runner, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = {"tile_m64n128.link": ("touch", "build/x/tile_m64n128.link")}
    jobs["tile_m64n128.check.json"] = ("touch", "build/x/tile_m64n128.check.json")
    run(jobs)
    out = capfd.readouterr().out
    assert "tiles: 1, of which up to date: 0" in out
    assert re.search(r"\[ +\d+ s\] job 1 of 2, tile [01] of 1: tile_m64n128: ", out)
    assert re.search(r"\[ +\d+ s\] job 2 of 2, tile 1 of 1: tile_m64n128: ", out)
    assert (tmp_path / "build/x/tile_m64n128.link").exists()
    run(jobs)
    out = capfd.readouterr().out
    assert "tiles: 1, of which up to date: 1" in out
    assert "job 1" not in out


def test_a_changed_command_runs_again_and_nothing_else(run: Runner, tmp_path: Path) -> None:
    def jobs(word: str) -> dict[str, tuple[str, ...]]:
        return {
            "a.so": (sys.executable, "-c", f"open('build/x/a.so', 'a').write('{word}')"),
            "b.so": (sys.executable, "-c", "open('build/x/b.so', 'a').write('b')"),
        }

    for word in ("1", "1", "2"):
        run(jobs(word))
    assert (tmp_path / "build/x/a.so").read_text() == "12"
    assert (tmp_path / "build/x/b.so").read_text() == "b"


def test_a_refusal_is_the_builds_last_word(run: Runner) -> None:
    refuse = (sys.executable, "-c", "print('refused: x.abi3.so is not right'); raise SystemExit(1)")
    with pytest.raises(BuildError, match=r"^x\.abi3\.so is not right$"):
        run({"x.check.json": refuse})
    with pytest.raises(BuildError, match=r"y\.so failed \(exit status 1\); what it said is above"):
        run({"y.so": ("false",)})


def test_a_command_is_passed_through_the_shell_unharmed(run: Runner, tmp_path: Path) -> None:
    words = ["a b", "$HOME", "$$", "X(90a) X(120f)", '{"a": "b"}', "it's", ":", "*"]
    program = "import json, sys; open('build/x/w.so', 'w').write(json.dumps(sys.argv[1:]))"
    run({"w.so": (sys.executable, "-c", program, *words)})
    assert json.loads((tmp_path / "build/x/w.so").read_text()) == words


def test_ninja_accepts_the_whole_graph(tmp_path: Path) -> None:
    made = make_plan(folder="ninja")
    (tmp_path / "build.ninja").write_text(graph_text(made, 2), encoding="utf-8")
    command = [find_ninja(), "-C", str(tmp_path), "-t", "targets", "all"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for job in made.jobs:
        assert f"{job.output}: {'compile' if job.depfile else 'run'}" in result.stdout


def test_jobs_are_bounded_by_cores_memory_and_request() -> None:
    gigabyte = 1024**3
    assert job_counts(2, 24 * gigabyte, None) == (2, 2)
    assert job_counts(64, 24 * gigabyte, None) == (64, 12)
    assert job_counts(64, 24 * gigabyte, 3) == (3, 3)
    assert job_counts(4, gigabyte, None) == (4, 1)
    assert job_counts(4, 64 * gigabyte, 100) == (4, 4)


def test_memory_is_the_systems_or_the_containers(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2048 kB\n")
    assert available_memory(tmp_path) == 2 * 1024**2
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("100\n")
    assert available_memory(tmp_path) == 2 * 1024**2
    (cgroup / "memory.max").write_text("1100\n")
    assert available_memory(tmp_path) == 1000


def test_a_job_records_its_cost_and_hides_ptxas_chatter(tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    program = (
        "x = bytearray(200_000_000); print('ptxas info    : Used 12 registers'); print('a warning'); "
        "print('    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads')"
    )
    command = [sys.executable, "-m", "wheelbuild.job", str(record), sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0
    assert result.stdout == "a warning\n"
    data = json.loads(record.read_text())
    assert data["peak_mb"] >= 190
    assert 0 <= data["cpu_seconds"] < 60
    assert 0 < data["wall_seconds"] < 60
    assert "Used 12 registers" in data["output"]

    failing = [*command[:4], sys.executable, "-c", "print('ptxas info'); raise SystemExit(7)"]
    result = subprocess.run(failing, capture_output=True, text=True, check=False, env=env)
    assert (result.returncode, result.stdout) == (7, "ptxas info\n")
