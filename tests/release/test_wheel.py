"""The wheel in dist/, as a file and as installed: names, contents, metadata, report, and the checks that guard it.

These tests need the wheel of the whole manifest: `ci/build.sh` makes it, `ci/test.sh` says which one it is.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mxfp4_moe
from wheelbuild import ROOT, BuildError
from wheelbuild.check import check_library
from wheelbuild.machine_code import COUNTED, has_ptx, read_sass
from wheelbuild.plan import Plan, plan
from wheelbuild.settings import read_settings
from wheelbuild.thresholds import load_thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Cuda, Headers, Toolchain, Torch, package_dirs, resolve_cuda

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")
PACKAGE = Path(mxfp4_moe.__file__).parent
MODULES = [*(tile.module for tile in MANIFEST.tiles), "moe"]
THRESHOLDS = load_thresholds()


@cache
def wheel_path() -> Path:
    if named := os.environ.get("MXFP4_MOE_WHEEL"):
        return Path(named)
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    assert wheels, "dist/ has no wheel: run ci/build.sh"
    return wheels[-1]


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_path()) as opened:
        yield opened


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return resolve_cuda(os.environ, package_dirs(os.environ), MANIFEST.archs)


@pytest.fixture(scope="module")
def report(wheel: zipfile.ZipFile) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(wheel.read("mxfp4_moe/build_report.json"))
    return data


def metadata(wheel: zipfile.ZipFile, name: str) -> Message:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return Parser().parsestr(wheel.read(path).decode())


def library(module: str) -> Path:
    return PACKAGE / "_ext" / f"{module}.abi3.so"


# ---- the file --------------------------------------------------------------------------------------------------------


def test_one_wheel_serves_every_python(wheel: zipfile.ZipFile) -> None:
    name = rf"mxfp4_moe-0\.1\.0\+cu\d+-cp310-abi3-(linux|manylinux\w+)_{platform.machine()}\.whl"
    assert re.fullmatch(name, wheel_path().name)
    tags = metadata(wheel, "WHEEL").get_all("Tag")
    assert tags is not None
    assert all(tag.startswith("cp310-abi3-") for tag in tags)
    assert metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "false"


def test_metadata(wheel: zipfile.ZipFile, report: dict[str, Any]) -> None:
    data = metadata(wheel, "METADATA")
    assert data["Name"] == "mxfp4-moe"
    assert data["Version"] == report["version"] == wheel_path().name.split("-")[1]
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] == ">=3.10"
    needed = [line for line in data.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert [re.split(r"[><=;]", line)[0] for line in needed] == ["torch", "safetensors", "tomli"]
    assert "torch>=2.10" in needed, "a floor and no ceiling"
    assert needed[2].endswith('python_version < "3.11"')
    assert data.get_payload(), "the README is the long description"


def test_the_command_comes_with_it(wheel: zipfile.ZipFile) -> None:
    (path,) = [path for path in wheel.namelist() if path.endswith(".dist-info/entry_points.txt")]
    points = configparser.ConfigParser()
    points.read_string(wheel.read(path).decode())
    assert dict(points["console_scripts"]) == {"mxfp4-moe": "mxfp4_moe.cli:main"}
    assert set(points) == {"DEFAULT", "console_scripts", "sglang.srt.plugins", "vllm.general_plugins"}


def test_every_tile_is_there_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert len(names) == len(set(names))
    libraries = [name for name in names if name.endswith(".so")]
    assert sorted(libraries) == sorted(f"mxfp4_moe/_ext/{module}.abi3.so" for module in MODULES)
    folders = {name.split("/")[0] for name in names}
    assert folders == {"mxfp4_moe", wheel_path().name.split("-cp310")[0] + ".dist-info"}
    inside = [name for name in names if name.startswith("mxfp4_moe/") and not name.endswith((".so", ".py"))]
    known = {"tile_manifest.toml", "build_report.json", "py.typed", "probe/kernel.toml", "probe/variants.toml"}
    assert {name for name in inside if "/tuned/" not in name} == {f"mxfp4_moe/{name}" for name in known}


def test_the_manifest_is_the_one_it_was_built_from(wheel: zipfile.ZipFile) -> None:
    assert wheel.read("mxfp4_moe/tile_manifest.toml") == (ROOT / "tile_manifest.toml").read_bytes()


def test_the_wheel_is_small(report: dict[str, Any]) -> None:
    assert wheel_path().stat().st_size <= THRESHOLDS.wheel_bytes[report["profile"]]


def test_the_tests_run_against_the_installed_wheel(wheel: zipfile.ZipFile) -> None:
    assert not PACKAGE.is_relative_to(ROOT / "python")
    for name in wheel.namelist():
        if name.startswith("mxfp4_moe/"):
            assert (PACKAGE.parent / name).read_bytes() == wheel.read(name), name


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_with_what_it_was_built(report: dict[str, Any]) -> None:
    assert report["schema"] == 4
    assert report["profile"] == MANIFEST.default_profile
    assert report["archs"] == list(MANIFEST.archs)
    assert report["pairs"] == list(MANIFEST.profile(MANIFEST.default_profile).pairs)
    built_with = report["built_with"]
    assert report["distribution"] == "mxfp4-moe"
    assert set(built_with) == {"cuda", "cutlass", "torch", "torch_target", "python", "python_target", "cxx"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", built_with["cuda"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", built_with["cutlass"])
    label = "cu" + "".join(built_with["cuda"].split(".")[:2])
    assert report["version"].endswith(f"+{label}")


def test_the_report_knows_every_library(report: dict[str, Any]) -> None:
    entries = {tile.module: report["tiles"][tile.name] for tile in MANIFEST.tiles} | {"moe": report["moe"]}
    assert set(report["tiles"]) == {tile.name for tile in MANIFEST.tiles}
    for module, entry in entries.items():
        data = library(module).read_bytes()
        assert entry["library"] == {
            "file": f"_ext/{module}.abi3.so",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


@pytest.mark.parametrize("arch", MANIFEST.archs)
@pytest.mark.parametrize("tile", MANIFEST.tiles, ids=lambda tile: tile.name)
def test_the_report_of_a_tile_is_complete_and_agrees_with_the_proof(
    tile: tiles.Tile, arch: str, report: dict[str, Any]
) -> None:
    entry = report["tiles"][tile.name]
    assert (entry["m"], entry["n"], entry["swap_ab"]) == (tile.m, tile.n, tile.swap_ab)
    assert entry["ops"] == [f"mxfp4_moe::grouped_gemm_{tile.name}"]
    pairs = tiles.kernel_pairs(arch, MANIFEST.pairs_of(report["profile"], tile))
    assert tuple(entry["archs"][arch]) == pairs
    for pair, data in entry["archs"][arch].items():
        check_kernel(data, tiles.prove(tile, arch, pair))


def check_kernel(data: dict[str, Any], proof: tiles.TileProof) -> None:
    assert set(data["instructions"]) == {"total", *COUNTED}
    assert data["instructions"]["LDL"] == data["instructions"]["STL"] == data["instructions"]["BRA.U.ANY"] == 0
    assert data["function"] == proof.function
    of_the_arch = {key: value for key, value in proof.facts().items() if key not in ("tile_m", "tile_n", "swap_ab")}
    assert of_the_arch.items() <= data.items()
    assert 32 <= data["registers"] <= 255
    assert data["registers"] * data["threads"] * data["blocks_per_sm"] <= 65_536
    assert data["spill_store_bytes"] == data["spill_load_bytes"] == 0
    loop = data["main_loop"]
    assert set(loop) == {"instructions", "nops", "mma", "ldsm", "instructions_per_mma"}
    assert loop["mma"] + loop["ldsm"] + loop["nops"] < loop["instructions"] <= data["instructions"]["total"]
    assert loop["instructions_per_mma"] == round(loop["instructions"] / loop["mma"], 2)
    limit = THRESHOLDS.limit(proof.arch, proof.pair, proof.tile.name)
    assert limit is not None
    assert loop["instructions_per_mma"] <= limit
    assert loop["ldsm"] >= (0 if proof.opcode == "HGMMA" else 2)


def test_the_report_has_nothing_that_differs_from_build_to_build(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("mxfp4_moe/build_report.json").decode()
    assert not re.findall(r"seconds|peak_mb|/(?:home|tmp|root|usr)/", text)


# ---- the libraries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_machine_code_for_both_archs_and_no_ptx(module: str, cuda: Cuda) -> None:
    code = read_sass(cuda.cuobjdump, library(module))
    assert sorted(code) == sorted(MANIFEST.archs)
    assert not has_ptx(cuda.cuobjdump, library(module))
    for tile in MANIFEST.tiles:
        for arch in MANIFEST.archs if tile.module == module else ():
            assert code[arch].count(tiles.prove(tile, arch).opcode) > 0
            assert code[arch].waterfalls(tiles.prove(tile, arch).opcode) == 0


@pytest.mark.parametrize("module", MODULES)
def test_a_library_shows_its_initializer_and_needs_only_what_every_user_has(module: str) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library(module)], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert [line.split()[-1] for line in symbols if line] == [f"PyInit_{module}"]
    dynamic = subprocess.run(["readelf", "-d", library(module)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|pthread)\.so\.\d|ld-linux-[\w-]+\.so\.\d"
    allowed = rf"libtorch\.so|libtorch_cpu\.so|libcudart\.so\.\d+|{system}"
    assert all(re.fullmatch(allowed, name) for name in needed), needed
    assert "libtorch.so" in needed, "through it a CUDA torch lends us libtorch_cuda"
    undefined = subprocess.run(["nm", "-D", "-C", "-u", library(module)], capture_output=True, text=True, check=True)
    cxx = [line for line in undefined.stdout.splitlines() if re.search(r" (c10|at|torch)::", line)]
    assert not cxx, "the stable ABI is plain C"
    unversioned = [line for line in undefined.stdout.splitlines() if " std::" in line and "@" not in line]
    assert not unversioned, "libstdc++ is asked, not a torch library that happens to export parts of it"
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


# ---- the checks that guard it ----------------------------------------------------------------------------------------

FIRST, SECOND = MANIFEST.tiles[:2]


@pytest.fixture(scope="module")
def made(cuda: Cuda) -> Plan:
    """The plan that the wheel was built by, as far as its checks go: they know what to expect of each library."""
    toolchain = Toolchain(
        cuda=cuda,
        cutlass=Headers(version="", include_dirs=()),
        torch=Torch(version="", include_dirs=(), library_dir=Path()),
        python=Headers(version="", include_dirs=()),
        cxx=Path("g++"),
        cxx_version="",
    )
    return plan(read_settings({}, MANIFEST), toolchain, THRESHOLDS, [], Path())


def expected(made: Plan, module: str, kind: str) -> dict[str, Any]:
    (job,) = made.jobs_of(module, kind)
    data: dict[str, Any] = json.loads(job.command[job.command.index("--expect") + 1])
    return data


def check(path: Path, tile: tiles.Tile, made: Plan, cuda: Cuda) -> dict[str, Any]:
    """The build's check of the code in a tile's library. What ptxas said is not in the library: nothing bad."""
    said = (
        "ptxas info    : Compiling entry function 'k' for 'sm_{}'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers\n"
    )
    return check_library(
        library=path,
        archs=MANIFEST.archs,
        expect=expected(made, tile.module, "check"),
        records={arch: {"cpu_seconds": 1, "peak_mb": 1, "output": said.format(arch)} for arch in MANIFEST.archs},
        cuobjdump=cuda.cuobjdump,
    )


def load(made: Plan, cuda: Cuda, output: Path, *paths: Path, **changes: object) -> list[str]:
    """The build's load of these libraries, which have their modules' names; returns its refusals, one for each.

    `changes` replace what the proof says of each tile's kernels.
    """
    expect = expected(made, "extensions", "load")
    for tile in expect.values():
        for kernels in tile.get("facts", {}).values():
            for facts in kernels.values():
                facts |= changes
    words = ["--expect", json.dumps(expect), "--cudart", str(cuda.cudart), "--output", str(output), *map(str, paths)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "wheelbuild.load", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in result.stderr, result.stderr
    refusals = [line.removeprefix("refused: ") for line in result.stdout.splitlines()]
    assert result.returncode == (1 if refusals else 0)
    assert output.exists() != bool(refusals)
    return refusals


def test_the_checks_pass_what_is_in_the_wheel(made: Plan, cuda: Cuda, report: dict[str, Any], tmp_path: Path) -> None:
    seen = check(library(FIRST.module), FIRST, made, cuda)
    entry = report["tiles"][FIRST.name]
    assert seen["sha256"] == entry["library"]["sha256"]
    assert seen["main_loop"] == {
        arch: {pair: kernel["main_loop"] for pair, kernel in entry["archs"][arch].items()} for arch in MANIFEST.archs
    }
    scaled = {pair: kernel.get("block_scaled") for pair, kernel in entry["archs"]["120f"].items()}
    assert seen["block_scaled"] == {"120f": {pair: found for pair, found in scaled.items() if found}}
    assert "mxfp4_mxfp8" in seen["block_scaled"]["120f"]

    assert load(made, cuda, tmp_path / "load.json", *map(library, MODULES)) == []
    loaded = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    assert set(loaded) == set(MODULES)
    for tile in MANIFEST.tiles:
        assert loaded[tile.module]["facts"] == {
            arch: {
                pair: tiles.facts(tile, arch, pair)
                for pair in tiles.kernel_pairs(arch, MANIFEST.pairs_of(report["profile"], tile))
            }
            for arch in MANIFEST.archs
        }
        assert loaded[tile.module]["ops"] == report["tiles"][tile.name]["ops"]


def test_another_tiles_library_under_this_name_is_refused(made: Plan, cuda: Cuda, tmp_path: Path) -> None:
    swapped = []
    for name, other in ((FIRST, SECOND), (SECOND, FIRST)):
        swapped.append(tmp_path / library(name.module).name)
        shutil.copy(library(other.module), swapped[-1])
    assert load(made, cuda, tmp_path / "load.json", *swapped, library("moe")) == [
        f"{path.name} registers mxfp4_moe::grouped_gemm_{other.name}, expected exactly mxfp4_moe::grouped_gemm_"
        f"{name.name}"
        for path, name, other in ((swapped[0], FIRST, SECOND), (swapped[1], SECOND, FIRST))
    ]


def test_a_truncated_library_is_refused(made: Plan, cuda: Cuda, tmp_path: Path) -> None:
    data = library(FIRST.module).read_bytes()
    paths = []
    for part in (0.0, 0.001, 0.5, 0.99):
        paths.append(tmp_path / str(part) / library(FIRST.module).name)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(data[: int(len(data) * part)])
    refusals = load(made, cuda, tmp_path / "load.json", *paths)
    assert len(refusals) >= 3
    assert all(refusal.startswith(f"{paths[0].name} cannot be loaded: ") for refusal in refusals)
    for path in paths:  # the last lacks only what is not loaded, but the code cannot be read any more
        with pytest.raises(BuildError, match=f"^{path.name} has machine code for no arch, expected "):
            check(path, FIRST, made, cuda)


def test_libraries_that_disagree_with_the_proof_are_refused(made: Plan, cuda: Cuda, tmp_path: Path) -> None:
    paths = [library(tile.module) for tile in MANIFEST.tiles]
    for path, refusal in zip(paths, load(made, cuda, tmp_path / "load.json", *paths, stages=9), strict=True):
        sentence = r" on sm_\w+, \w+: stages is \d in the compiled tile and 9 in the proof of tiles/\w+\.py; csrc/tile/"
        assert re.match(re.escape(path.name) + sentence, refusal)


def test_code_for_fewer_archs_than_the_manifests_is_refused(cuda: Cuda) -> None:
    path = library(FIRST.module)
    with pytest.raises(BuildError, match=f"^{path.name} has machine code for sm_120f, sm_90a, expected sm_90a$"):
        check_library(library=path, archs=["90a"], expect={"compile": {}}, records={}, cuobjdump=cuda.cuobjdump)


def test_importing_the_package_loads_no_extension() -> None:
    program = "import sys, mxfp4_moe; print([name for name in sys.modules if name.startswith('mxfp4_moe._ext')])"
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"
