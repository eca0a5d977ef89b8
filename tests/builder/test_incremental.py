"""What a change rebuilds: the real plan and a real ninja, over a copy of the sources, with stand-ins for the compilers.

The stand-ins follow #include as a compiler does and write the same dependency files, so what ninja schedules here is
what it schedules in a build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wheelbuild import ROOT, graph
from wheelbuild.plan import Plan, plan
from wheelbuild.settings import read_settings
from wheelbuild.thresholds import Thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Cuda, Headers, Toolchain, Torch

HEAD = """
archs = ["90a", "120f"]
default_profile = "plain"
[profile.plain]
pairs = ["mxfp4_mxfp8"]
out_dtypes = ["bfloat16"]
"""
ROWS = [(128, 128, "false"), (8, 128, "true")]
ANOTHER = (64, 32, "false")
LIMITS = Thresholds(instructions_per_mma={}, peak_mb=2000, wheel_bytes=12_000_000)

# A compiler, a linker and a check in one: writes its output, and for a source every file that it includes.
STAND_IN = """#!{python} -SE
import os, re, sys

def read(path, seen):
    if path in seen:
        return
    seen.append(path)
    for name in re.findall(r'^#include "([^"]+)"', open(path).read(), re.M):
        for folder in (os.path.dirname(path), "csrc"):
            included = os.path.normpath(os.path.join(folder, name))
            if os.path.exists(included):
                read(included, seen)
                break

words = sys.argv[1:]
output = words[words.index("--output" if "--output" in words else "-o") + 1]
if "-MF" in words:
    (source,) = [word for word in words if word.endswith((".cu", ".cpp")) and "=" not in word]
    files = []
    read(source, files)
    open(words[words.index("-MF") + 1], "w").write(output + ": " + " ".join(files) + "\\n")
open(output, "w").write(" ".join(words))
"""


@dataclasses.dataclass(frozen=True)
class Tree:
    """A copy of the source tree that has been built."""

    root: Path
    tool: Path

    def plan(self, rows: list[tuple[int, int, str]], thresholds: Thresholds = LIMITS) -> Plan:
        text = HEAD + "".join(f"[[tile]]\nm = {m}\nn = {n}\nswap_ab = {swap}\n" for m, n, swap in rows)
        toolchain = Toolchain(
            cuda=Cuda(
                origin="here",
                version=(13, 0, 88),
                nvcc=self.tool,
                include_dirs=(),
                cudart=self.root / "libcudart.so.13",
                cuobjdump=self.tool,
            ),
            cutlass=Headers(version="4.2.0", include_dirs=()),
            torch=Torch(version="2.13.0", include_dirs=(), library_dir=self.root),
            python=Headers(version="3.11", include_dirs=()),
            cxx=self.tool,
            cxx_version="g++ 12",
        )
        settings = read_settings({}, tiles.parse_manifest(text))
        sources = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/moe/*.c*") if path.suffix != ".cuh")
        made = plan(settings, toolchain, thresholds, sources, Path("build/x/ninja"))
        # A check's command begins with this Python and the module: the stand-in takes the place of the Python.
        jobs = [
            dataclasses.replace(job, command=(str(self.tool), *job.command[1:]))
            if job.kind in ("check", "load")
            else job
            for job in made.jobs
        ]
        return dataclasses.replace(made, jobs=tuple(jobs))

    def scheduled(self, made: Plan) -> set[str]:
        """Names of the jobs that a build would run now."""
        (self.root / made.folder / "build.ninja").write_text(graph.graph_text(made, 2), encoding="utf-8")
        command = [graph.find_ninja(), "-n", "-f", str(made.folder / "build.ninja")]
        result = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        names = {job.description: job.name for job in made.jobs}
        return {names[description] for description in re.findall(r"^\[\d+/\d+\] (.*)$", result.stdout, re.MULTILINE)}

    @contextlib.contextmanager
    def touched(self, *paths: str) -> Iterator[None]:
        before = {self.root / path: (self.root / path).stat() for path in paths}
        for path in before:
            os.utime(path, (time.time() + 5, time.time() + 5))
        yield
        for path, stat in before.items():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    root = tmp_path_factory.mktemp("tree")
    for folder in ("csrc", "ci", "python", "wheelbuild"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "_ext"))
    for name in ("tile_manifest.toml", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    (root / "libcudart.so.13").touch()
    tool = root / "stand-in"
    tool.write_text(STAND_IN.replace("{python}", sys.executable), encoding="utf-8")
    tool.chmod(0o755)
    made = Tree(root, tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "ROOT", root)
        graph.run_plan(made.plan(ROWS), 2)
        yield made


def names(made: Plan, *kinds: str, tile: str = "tile_") -> set[str]:
    """Jobs of these kinds of all tiles, or of one."""
    return {job.name for job in made.jobs if job.kind in kinds and job.module.startswith(tile)}


def test_an_unchanged_tree_has_nothing_to_do(tree: Tree, capfd: pytest.CaptureFixture[str]) -> None:
    made = tree.plan(ROWS)
    assert tree.scheduled(made) == set()
    start = time.monotonic()
    graph.run_plan(made, 1)
    assert time.monotonic() - start < 10
    out = capfd.readouterr().out
    assert "tiles: 2, of which up to date: 2" in out
    assert "job 1" not in out


def test_a_first_build_has_everything_to_do(tree: Tree) -> None:
    made = tree.plan(ROWS)
    log = tree.root / made.folder / ".ninja_log"
    saved = log.read_bytes()
    log.unlink()
    assert tree.scheduled(made) == {job.name for job in made.jobs}
    log.write_bytes(saved)


def test_python_rebuilds_nothing(tree: Tree) -> None:
    files = [str(path.relative_to(tree.root)) for path in tree.root.glob("python/**/*.py")]
    assert "python/mxfp4_moe/tiles/proof.py" in files
    with tree.touched(*files, "setup.py", "pyproject.toml"):
        assert tree.scheduled(tree.plan(ROWS)) == set()


def test_settings_count_by_what_they_say(tree: Tree) -> None:
    with tree.touched("tile_manifest.toml", "ci/thresholds.toml"):
        assert tree.scheduled(tree.plan(ROWS)) == set()


def test_a_new_row_compiles_one_tile(tree: Tree) -> None:
    for rows in ([*ROWS, ANOTHER], [ANOTHER, *ROWS]):
        made = tree.plan(rows)
        assert tree.scheduled(made) == names(made, "nvcc", "cxx", "link", "check", tile="tile_m64n32") | {"load"}


def test_a_changed_row_compiles_one_tile(tree: Tree) -> None:
    made = tree.plan([ROWS[0], ANOTHER])
    assert tree.scheduled(made) == {job.name for job in made.jobs if job.module == "tile_m64n32"} | {"load"}


def test_a_removed_row_compiles_nothing(tree: Tree) -> None:
    assert tree.scheduled(tree.plan(ROWS[:1])) == {"load"}


def test_the_kernel_compiles_every_tile_for_every_arch_and_nothing_of_moe(tree: Tree) -> None:
    made = tree.plan(ROWS)
    expected = names(made, "nvcc", "link", "check") | {"load"}
    assert len(expected) == len(ROWS) * 4 + 1
    for header in ("sm12x/plain_kernel.cuh", "sm90/wgmma_kernel.cuh", "launcher.cuh", "tile.cu"):
        with tree.touched(f"csrc/tile/{header}"):
            assert tree.scheduled(made) == expected


def test_the_tiles_operator_compiles_no_kernel(tree: Tree) -> None:
    made = tree.plan(ROWS)
    with tree.touched("csrc/tile/tile_op.cpp"):
        assert tree.scheduled(made) == names(made, "cxx", "link", "check") | {"load"}


def test_a_source_of_moe_compiles_that_source(tree: Tree) -> None:
    with tree.touched("csrc/moe/route.cu"):
        assert tree.scheduled(tree.plan(ROWS)) == {"moe.route.cu", "moe.link", "moe.check", "load"}


def test_the_border_between_tiles_and_moe_compiles_both(tree: Tree) -> None:
    made = tree.plan(ROWS)
    with tree.touched("csrc/tile_abi.h"):
        scheduled = tree.scheduled(made)
    assert names(made, "nvcc", "cxx") < scheduled
    assert "moe.operators.cpp" in scheduled


def test_the_build_code_checks_again_and_compiles_nothing(tree: Tree) -> None:
    made = tree.plan(ROWS)
    with tree.touched("wheelbuild/main_loop.py"):
        assert tree.scheduled(made) == {job.name for job in made.jobs if job.kind == "check"}
    with tree.touched("wheelbuild/load.py"):
        assert tree.scheduled(made) == {"load"}
    with tree.touched("wheelbuild/plan.py", "wheelbuild/graph.py", "wheelbuild/report.py"):
        assert tree.scheduled(made) == set()


def test_a_threshold_checks_its_tile_again_and_compiles_nothing(tree: Tree) -> None:
    tighter = dataclasses.replace(LIMITS, instructions_per_mma={"120f": {"mxfp4_mxfp8": {"m128n128": 3.0}}})
    assert tree.scheduled(tree.plan(ROWS, tighter)) == {"tile_m128n128.check"}
    assert tree.scheduled(tree.plan(ROWS, dataclasses.replace(LIMITS, wheel_bytes=1))) == set()
