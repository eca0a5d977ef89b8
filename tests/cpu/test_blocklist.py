"""The blocklist: where it is, what it holds, when it counts, and what a damaged or foreign one does (nothing)."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_wheel
import pytest

from mxfp4_moe._install import blocklist, wheel
from mxfp4_moe.tiles import Tile

DEVICE, CAPABILITY = "NVIDIA GeForce RTX 5090", (12, 0)
FIRST, SECOND = Tile(m=64, n=128, swap_ab=False), Tile(m=8, n=128, swap_ab=True)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    blocklist.blocked.cache_clear()
    return fake_wheel.install(tmp_path, monkeypatch, [FIRST, SECOND])


def written(**reasons: str) -> Path:
    tiles = {tile.name: tile for tile in (FIRST, SECOND)}
    path = blocklist.write(DEVICE, CAPABILITY, {tiles[name]: reason for name, reason in reasons.items()})
    assert path is not None
    return path


# ---- where it is -----------------------------------------------------------------------------------------------------


def test_one_file_per_device_and_capability(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "blocklist"
    assert blocklist.path_of(DEVICE, CAPABILITY) == folder / "nvidia-geforce-rtx-5090-sm120.json"
    assert blocklist.path_of("NVIDIA H200", (9, 0)) == folder / "nvidia-h200-sm90.json"
    assert blocklist.path_of("../../etc/x (TM)", (12, 1)) == folder / "etc-x-tm-sm121.json"


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MXFP4_MOE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert blocklist.cache_dir() == tmp_path / "xdg" / "mxfp4-moe"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert blocklist.cache_dir() == tmp_path / "home" / ".cache" / "mxfp4-moe"


def test_a_user_without_a_home_has_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MXFP4_MOE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert blocklist.write(DEVICE, CAPABILITY, {FIRST: "wrong"}) is None
    assert blocklist.read(DEVICE, CAPABILITY) == {}


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read() -> None:
    assert blocklist.read(DEVICE, CAPABILITY) == {}
    path = written(m64n128="wrong bits", m8n128_swap="signal SIGABRT")
    assert blocklist.read(DEVICE, CAPABILITY) == {"m64n128": "wrong bits", "m8n128_swap": "signal SIGABRT"}
    assert blocklist.read("NVIDIA GeForce RTX 5080", CAPABILITY) == {}
    assert blocklist.read(DEVICE, (12, 1)) == {}
    data = json.loads(path.read_text())
    assert data["wheel"] == fake_wheel.VERSION
    assert data["tiles"]["m64n128"]["sha256"] == wheel.sha256(wheel.library(FIRST.module))


def test_writing_replaces_and_nothing_to_block_removes() -> None:
    path = written(m64n128="wrong bits")
    written(m8n128_swap="other")
    assert blocklist.read(DEVICE, CAPABILITY) == {"m8n128_swap": "other"}
    for _ in range(2):
        assert blocklist.write(DEVICE, CAPABILITY, {}) is None
        assert not path.exists()


@pytest.mark.parametrize("failing", ["replace", "fdopen"])
def test_a_write_that_fails_leaves_the_list_before_it(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(m64n128="wrong bits")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            written(m8n128_swap="other")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_cache_that_is_no_folder_has_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", os.devnull)
    assert blocklist.read(DEVICE, CAPABILITY) == {}
    with pytest.raises(OSError):
        written(m64n128="wrong bits")


# ---- damaged and foreign lists ---------------------------------------------------------------------------------------


def changed(**changes: object) -> Callable[[Path, Path], None]:
    def change(path: Path, _: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def emptied(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def binary(path: Path, _: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00{}")


def rebuilt(_: Path, package: Path) -> None:
    (package / "_ext" / f"{FIRST.module}.abi3.so").write_bytes(fake_wheel.elf(FIRST.module, size=8192))


def removed(_: Path, package: Path) -> None:
    (package / "_ext" / f"{FIRST.module}.abi3.so").unlink()


def folder_in_its_place(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


BAD: list[tuple[Callable[[Path, Path], None], str]] = [
    (truncated, "is damaged (JSONDecodeError: "),
    (emptied, "is damaged (JSONDecodeError: "),
    (binary, "is damaged ("),
    (changed(tiles=["m64n128"]), "is damaged (AttributeError: "),
    (changed(tiles={"m64n128": "wrong"}), "is damaged (TypeError: "),
    (changed(tiles={"m64n128": {}}), "is damaged (KeyError: 'sha256')"),
    (changed(capability=None), "is damaged (TypeError: "),
    (changed(schema=1), "is for another schema (1, here 2)"),
    (changed(rules=1), "is for another version of the self-test (1, here 2)"),
    (
        changed(device="NVIDIA H200"),
        "is for another device (NVIDIA H200 (12, 0), here NVIDIA GeForce RTX 5090 (12, 0))",
    ),
    (changed(wheel="0.0.9+cu129"), "is for another wheel (0.0.9+cu129, here 0.1.0+cu130)"),
    (rebuilt, "is for another build of m64n128 (SHA-256 "),
    (removed, "here no such library)"),
    (folder_in_its_place, "cannot be read (Is a directory)"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_a_bad_list_is_ignored_with_one_warning_that_says_what_to_run(
    spoil: Callable[[Path, Path], None], words: str, package: Path
) -> None:
    path = written(m64n128="wrong bits")
    spoil(path, package)
    with pytest.raises(blocklist.BlocklistError, match=re.escape(words)):
        blocklist.read(DEVICE, CAPABILITY)
    with pytest.warns(RuntimeWarning) as caught:
        assert blocklist.blocked(DEVICE, CAPABILITY) == {}
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"blocklist {path} ")
    assert words in message
    assert message.endswith("is ignored: run `mxfp4-moe doctor --selftest` to write a new one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert blocklist.blocked(DEVICE, CAPABILITY) == {}, "asked again, it is silent"


def test_a_bad_list_is_replaced(package: Path) -> None:
    path = written(m64n128="wrong bits")
    path.write_text("{")
    written(m8n128_swap="other")
    assert blocklist.read(DEVICE, CAPABILITY) == {"m8n128_swap": "other"}
    shutil.rmtree(path.parent.parent)
    assert blocklist.read(DEVICE, CAPABILITY) == {}
