"""Which tile takes the place of one that is blocked, missing or broken, and how a broken library is recognized.

The last part needs the installed wheel: it breaks a copy of it and loads that, on any machine.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import fake_wheel
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mxfp4_moe
from mxfp4_moe._call.launch import layer_operator
from mxfp4_moe._install import blocklist, loading, wheel
from mxfp4_moe.tiles import Tile, load_manifest, nearest_tile
from wheelbuild import ROOT
from wheelbuild.toolchain import package_dirs, resolve_cuda

TILES = load_manifest().tiles
PACKAGE = Path(mxfp4_moe.__file__).parent
NATIVE = [Tile(m=m, n=n, swap_ab=False) for m in (64, 128, 256) for n in (8, 16, 32, 64, 128, 256)]
SWAPPED = [Tile(m=m, n=n, swap_ab=True) for m in (8, 16, 32) for n in (64, 128, 256)]
ANY = st.sampled_from(NATIVE + SWAPPED)
SOME = st.lists(ANY, min_size=1, unique=True)


# ---- which one -------------------------------------------------------------------------------------------------------


def steps(a: Tile, b: Tile) -> tuple[float, float]:
    return abs(math.log2(a.m / b.m)), abs(math.log2(a.n / b.n))


@given(ANY, SOME)
def test_the_nearest_has_the_same_mode_then_the_nearest_m_then_the_nearest_n(
    wanted: Tile, available: list[Tile]
) -> None:
    nearest = nearest_tile(wanted, available)
    assert nearest in available
    assert (nearest == wanted) == (wanted in available)
    rivals = [tile for tile in available if tile.swap_ab == wanted.swap_ab] or available
    assert nearest in rivals
    assert steps(wanted, nearest) == min(steps(wanted, tile) for tile in rivals)


@given(ANY, SOME, st.randoms(use_true_random=False))
def test_the_nearest_depends_on_the_set_alone(wanted: Tile, available: list[Tile], random: object) -> None:
    nearest = nearest_tile(wanted, available)
    shuffled = sorted(available, key=lambda tile: random.random())  # type: ignore[attr-defined]
    assert nearest_tile(wanted, shuffled) == nearest
    assert nearest_tile(wanted, [*available, *available]) == nearest
    assert nearest_tile(nearest, available) == nearest
    assert nearest_tile(wanted, iter(available)) == nearest


@given(ANY, SOME)
def test_losing_another_tile_changes_nothing(wanted: Tile, available: list[Tile]) -> None:
    nearest = nearest_tile(wanted, available)
    for lost in available:
        if lost != nearest:
            assert nearest_tile(wanted, [tile for tile in available if tile != lost]) == nearest


# ---- the choice, once per device and tile ----------------------------------------------------------------------------

A, B, C = Tile.from_mn((64, 128)), Tile.from_mn((128, 128)), Tile.from_mn((8, 128))
DEVICE, CAPABILITY = "NVIDIA GeForce RTX 5090", (12, 0)


class Loader:
    """Stands for _load's loading of libraries; `broken` ones do not load."""

    def __init__(self) -> None:
        self.broken: set[Tile] = set()
        self.loaded: list[Tile] = []

    def load_tile(self, tile: Tile) -> None:
        if tile in self.broken:
            raise loading.LoadError(f"{tile.name} cannot be loaded: its library is missing")
        self.loaded.append(tile)


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Three tiles on an SM120 GPU, for as much of it as choosing a tile asks for."""
    fake_wheel.install(tmp_path, monkeypatch, [A, B, C])
    loader = Loader()
    ops = type("Ops", (), {"fused_moe": type("Packet", (), {"default": "the layer's operator"})})
    manifest = type("Three", (), {"tiles": (A, B, C), "archs": fake_wheel.ARCHS})
    monkeypatch.setattr(loading, "manifest", lambda: manifest)
    monkeypatch.setattr(loading, "moe_ops", lambda: ops)
    monkeypatch.setattr(loading, "load_tile", loader.load_tile)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITY)
    for cached in (layer_operator, blocklist.blocked):
        cached.cache_clear()
    yield loader
    for cached in (layer_operator, blocklist.blocked):
        cached.cache_clear()


def test_a_good_tile_is_itself(loader: Loader) -> None:
    for tile in (A, B, C):
        assert layer_operator(0, tile) == ("the layer's operator", tile)
    assert loader.loaded == [A, B, C]


def test_a_blocked_tile_falls_back_with_one_warning(loader: Loader) -> None:
    blocklist.write(DEVICE, CAPABILITY, {A: "3 of 9 values differ"})
    expected = (
        "tile m64n128 is not used on NVIDIA GeForce RTX 5090: it failed the self-test on this GPU (3 of 9 values "
        "differ); m128n128 takes its place, with the same results"
    )
    with pytest.warns(RuntimeWarning) as caught:
        assert layer_operator(0, A)[1] == B
    assert [str(warning.message) for warning in caught] == [expected]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert layer_operator(0, A)[1] == B, "decided already"
        assert layer_operator(0, B)[1] == B
    assert A not in loader.loaded
    with pytest.warns(RuntimeWarning, match="tile m64n128 is not used"):
        assert layer_operator(1, A)[1] == B, "another device, another warning"


def test_a_tile_that_does_not_load_falls_back_with_one_warning(loader: Loader) -> None:
    loader.broken = {B}
    with pytest.warns(
        RuntimeWarning, match="tile m128n128 is not used .*: m128n128 cannot be loaded: .*; m64n128 takes"
    ):
        assert layer_operator(0, B)[1] == A
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer_operator(0, B)[1] == A


def test_the_fall_back_falls_back(loader: Loader) -> None:
    loader.broken = {B}
    blocklist.write(DEVICE, CAPABILITY, {A: "no answer in 60 s"})
    with pytest.warns(RuntimeWarning, match=r"tile m64n128 .* \(no answer in 60 s\); m8n128_swap takes its place"):
        assert layer_operator(0, A)[1] == C


def test_when_no_tile_is_left_the_call_fails_in_one_sentence(loader: Loader) -> None:
    loader.broken = {B, C}
    blocklist.write(DEVICE, CAPABILITY, {A: "no answer in 60 s"})
    with pytest.raises(RuntimeError, match=r"no tile can be used on NVIDIA .*; m64n128: it failed .*doctor --selftest"):
        layer_operator(0, A)


def test_a_layer_that_does_not_load_is_not_the_tiles_fault(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise loading.LoadError("mxfp4_moe._ext.moe cannot be loaded")

    monkeypatch.setattr(loading, "moe_ops", broken)
    with pytest.raises(loading.LoadError, match="^mxfp4_moe._ext.moe cannot be loaded$"):
        layer_operator(0, A)


def test_a_foreign_list_blocks_nothing(loader: Loader) -> None:
    path = blocklist.write(DEVICE, CAPABILITY, {A: "wrong"})
    assert path is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wheel": "0.0.9"}))
    with pytest.warns(RuntimeWarning, match="for another wheel .* is ignored: run `mxfp4-moe doctor --selftest`"):
        assert layer_operator(0, A)[1] == A


def test_prewarm_leaves_out_what_does_not_load(loader: Loader) -> None:
    loader.broken = {B}
    with pytest.warns(RuntimeWarning, match="m128n128 cannot be loaded"):
        assert mxfp4_moe.prewarm_moe_tiles() == [A.name, C.name]
    loader.broken = {A, B, C}
    with pytest.raises(RuntimeError, match="m64n128 cannot be loaded"):
        mxfp4_moe.prewarm_moe_tiles()


# ---- what a library must look like -----------------------------------------------------------------------------------


def test_a_whole_library_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = fake_wheel.install(tmp_path, monkeypatch, [A])
    path = package / "_ext" / f"{A.module}.abi3.so"
    assert wheel.library_fault(A.module) is None
    whole = path.read_bytes()
    for data, words in (
        (b"", "is no library: 0 bytes"),
        (b"\x7fELF", "is no library: 4 bytes"),
        (b"<html>" + bytes(4090), "is no library: 4,096 bytes"),
        (whole[:80], "is truncated: 80 of 120 bytes"),
        (whole[:-1], "is truncated: 4,095 of 4,096 bytes"),
        (fake_wheel.elf(C.module), "is another module's library: it has no PyInit_tile_m64n128"),
        (fake_wheel.elf(A.module + "_swap"), "is another module's library: it has no PyInit_tile_m64n128"),
    ):
        path.write_bytes(data)
        fault = wheel.library_fault(A.module)
        assert fault is not None
        assert fault.startswith(f"tile_m64n128.abi3.so {words}")
    path.unlink()
    assert wheel.library_fault(A.module) == "tile_m64n128.abi3.so is missing"
    path.mkdir()
    assert wheel.library_fault(A.module) == "tile_m64n128.abi3.so cannot be read: Is a directory"


# ---- the installed wheel, broken -------------------------------------------------------------------------------------

WANTED, OTHER = TILES[:2]

# A CUDA torch, as far as loading goes: the runtime library is there before any extension, as with a real one.
PROGRAM = """
import ctypes, json, sys, warnings
cudart, *names = sys.argv[1:]
ctypes.CDLL(cudart, mode=ctypes.RTLD_GLOBAL)
import torch
torch.version.cuda = "13.0"
torch.cuda.get_device_name = lambda index: "Test GPU"
torch.cuda.get_device_capability = lambda index: (9, 0)
from mxfp4_moe._install import loading
from mxfp4_moe._call.launch import layer_operator
for name in names:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        op, tile = layer_operator(0, loading.manifest().tile(name))
    print(json.dumps([tile.name, [str(warning.message) for warning in caught]]), flush=True)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed package that may be broken."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "mxfp4_moe", ignore=shutil.ignore_patterns("__pycache__")))


def library(package: Path, tile: Tile) -> Path:
    return package / "_ext" / f"{tile.module}.abi3.so"


def choose(package: Path, *wanted: Tile) -> list[tuple[str, list[str]]]:
    """The tiles that are used for the wanted ones, each with its warnings, in a process that loads from `package`."""
    cuda = resolve_cuda(os.environ, package_dirs(os.environ), load_manifest(ROOT / "tile_manifest.toml").archs)
    env = os.environ | {"PYTHONPATH": str(package.parent), "MXFP4_MOE_CACHE_DIR": str(package.parent / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(cuda.cudart), *(tile.name for tile in wanted)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=package.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    return [(name, caught) for name, caught in map(json.loads, result.stdout.splitlines())]


def test_every_tile_of_the_wheel_loads(copy: Path) -> None:
    assert choose(copy, *TILES) == [(tile.name, []) for tile in TILES]


def check_fall_back(package: Path, fault: str) -> None:
    """The wanted tile gives way with the fault's words, and all others still load: the process is as it was."""
    (name, caught), *others = choose(package, WANTED, *(tile for tile in TILES if tile != WANTED))
    assert name == nearest_tile(WANTED, [tile for tile in TILES if tile != WANTED]).name
    (warning,) = caught
    assert warning.startswith(f"tile {WANTED.name} is not used on Test GPU: mxfp4_moe._ext.{WANTED.module} cannot be ")
    assert f"({WANTED.module}.abi3.so {fault}" in warning
    assert others == [(tile.name, []) for tile in TILES if tile != WANTED]


def test_a_missing_library(copy: Path) -> None:
    library(copy, WANTED).unlink()
    check_fall_back(copy, "is missing)")


def test_another_tiles_library_under_this_name(copy: Path) -> None:
    """Loading it would register the other tile's operator, and loading the other one after it would end the process."""
    shutil.copy(library(copy, OTHER), library(copy, WANTED))
    check_fall_back(copy, f"is another module's library: it has no PyInit_{WANTED.module})")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_library(part: float, copy: Path) -> None:
    path = library(copy, WANTED)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    header = int(len(data) * part) < 64
    check_fall_back(copy, "is no library: " if header else f"is truncated: {int(len(data) * part):,} of ")
