"""Equal sources give equal wheels: one tile built from the tree and from the sdist, in different folders, by builders
with other habits. What is built here is then installed in the ways that need a build.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from release_tools import verb

from mxfp4_moe._install.wheel import kernels
from mxfp4_moe.tiles import load_manifest
from wheelbuild import ROOT
from wheelbuild.release.audit import audit

TILE = "m8n64_swap"  # the smallest
ODD = "some where, (el):s'e\"="  # a folder's name that shells, compilers and make would misread
EPOCH = "1700000000"


def build_python() -> Path:
    """Of the environment with compilers, which ci/test.sh names."""
    prefix = os.environ.get("MXFP4_MOE_BUILD_ENV")
    return Path(prefix) / "bin" / "python" if prefix else Path(sys.executable)


BUILD = "build --wheel --no-isolation --skip-dependency-check --outdir"
PIP = "pip wheel --no-deps --no-build-isolation --wheel-dir"  # asks for the metadata before it asks for the wheel


def start(
    source: Path, output: Path, umask: str, env: Mapping[str, str], frontend: str = BUILD
) -> subprocess.Popen[str]:
    """A build of the wheel of one tile."""
    command = f'umask {umask} && exec "$0" -m {frontend} "$1" "$2"'
    return subprocess.Popen(
        ["bash", "-c", command, str(build_python()), str(output), str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env={
            "MXFP4_MOE_TOOLCHAIN": "pypi",
            **os.environ,
            "MXFP4_MOE_TILES": TILE,
            "MAX_JOBS": "1",
            "SOURCE_DATE_EPOCH": EPOCH,
            **env,
        },
    )


def finished(process: subprocess.Popen[str], output: Path) -> Path:
    said, _ = process.communicate()
    assert process.returncode == 0, said
    (wheel,) = output.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Builds:
    tree: Path  # the folder in which the first was built
    from_tree: Path  # wheels
    from_sdist: Path


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    folder = tmp_path_factory.mktemp("builds")
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    verb("sdist", folder / "sdist")
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 and 3.10.12 has no filters; the archive is our own.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder / ODD, **safely)
    (unpacked,) = (folder / ODD).iterdir()
    temporary = folder / ODD / "temporary"
    temporary.mkdir()
    first = start(tree, folder / "first", "022", {"LC_ALL": "C"})
    other = {"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo", "TMPDIR": str(temporary)}
    second = start(unpacked, folder / "second", "077", other, PIP)
    return Builds(tree, finished(first, folder / "first"), finished(second, folder / "second"))


def hashes(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_libraries_are_equal(builds: Builds) -> None:
    first, second = (
        {name: digest for name, digest in hashes(wheel).items() if name.endswith(".so")}
        for wheel in (builds.from_tree, builds.from_sdist)
    )
    assert len(first) == 2
    assert first == second


def test_wheels_are_equal_to_the_byte(builds: Builds) -> None:
    assert builds.from_tree.name == builds.from_sdist.name
    assert hashes(builds.from_tree) == hashes(builds.from_sdist)
    assert builds.from_tree.read_bytes() == builds.from_sdist.read_bytes()


def test_repaired_wheels_are_equal_and_pass_the_audit(builds: Builds, tmp_path: Path) -> None:
    made = []
    for name, wheel in (("first", builds.from_tree), ("second", builds.from_sdist)):
        verb("repair", wheel, tmp_path / name, env={"SOURCE_DATE_EPOCH": EPOCH})
        made += (tmp_path / name).glob("*.whl")
    assert made[0].read_bytes() == made[1].read_bytes()
    assert "1 tiles" in audit(made[0])


def test_costs_stay_in_the_build_folder(builds: Builds) -> None:
    (path,) = builds.tree.glob("build/*/build_costs.json")
    costs = json.loads(path.read_text(encoding="utf-8"))
    assert list(costs["tiles"]) == [TILE]
    of_kernels = [cost for arch in costs["tiles"][TILE]["archs"].values() for cost in arch.values()]
    each = [*of_kernels, costs["tiles"][TILE]["host"], costs["moe"]]
    assert len(each) == len(kernels(load_manifest().tile(TILE))) + 2
    for cost in each:
        assert set(cost) == {"cpu_seconds", "wall_seconds", "peak_mb"}
        assert all(value > 0 for value in cost.values())


def test_a_wheel_for_pypi_has_its_cuda_version_in_its_name(builds: Builds, tmp_path: Path) -> None:
    """The same libraries under another name; nothing is compiled again."""
    with zipfile.ZipFile(builds.from_tree) as archive:
        report = json.loads(archive.read("mxfp4_moe/build_report.json"))
    suffix = f"cu{report['built_with']['cuda'].split('.')[0]}"
    process = start(builds.tree, tmp_path, "022", {"MXFP4_MOE_NAME_SUFFIX": suffix})
    wheel = finished(process, tmp_path)
    version = report["version"].replace("+cu" + "".join(report["built_with"]["cuda"].split(".")[:2]) + ".", "+")
    assert wheel.name.split("-cp310")[0] == f"mxfp4_moe_{suffix}-{version}"
    assert "1 tiles" in audit(wheel)
    before, after = hashes(builds.from_tree), hashes(wheel)
    libraries = [name for name in before if name.endswith(".so")]
    assert [before[name] for name in libraries] == [after[name] for name in libraries]


def test_an_editable_install_runs_from_the_tree(builds: Builds, tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    # What pip does for --editable, with the Python that built here before, so that nothing is compiled again.
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    env = {"MXFP4_MOE_TOOLCHAIN": "pypi", **os.environ, "MXFP4_MOE_TILES": TILE, "MAX_JOBS": "1"}
    command = [str(build_python()), "-c", build, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=builds.tree, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = tmp_path / "env" / "bin" / "python"
    result = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    program = "import mxfp4_moe; print(mxfp4_moe.__file__); print(mxfp4_moe.__version__)"
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run([python, "-c", program], capture_output=True, text=True, env=plain, cwd="/", check=True)
    file, version = told.stdout.split()
    assert Path(file) == builds.tree / "python" / "mxfp4_moe" / "__init__.py"
    assert version == builds.from_tree.name.split("-")[1]
    tiles = subprocess.run(
        [tmp_path / "env" / "bin" / "mxfp4-moe", "tiles"],
        capture_output=True,
        text=True,
        env=plain,
        cwd="/",
        check=True,
    )
    assert TILE in tiles.stdout
    assert "missing" not in tiles.stdout
    command = [python, "-m", "pip", "uninstall", "--yes", "mxfp4-moe"]
    subprocess.run(command, capture_output=True, env=plain, cwd="/", check=True)
    told = subprocess.run([python, "-c", program], capture_output=True, text=True, env=plain, cwd="/", check=False)
    assert "No module named 'mxfp4_moe'" in told.stderr
