"""The doctor in environments that are broken for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_wheel
import pytest
from broken import CAPABILITY, CPU_TORCH, GPU, NO_CUDA, OLD_TORCH, Place, cudart, make_driver
from doctor_cases import ALL_SUBJECTS, FIRST

from mxfp4_moe._health import environment
from mxfp4_moe._install import blocklist, driver
from mxfp4_moe._install import wheel as _wheel
from mxfp4_moe._install.driver import Gpu
from mxfp4_moe.tiles import Tile, load_manifest


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver with one GPU, and the CUDA runtime, as LD_LIBRARY_PATH would have them."""
    folder = tmp_path_factory.mktemp("libraries")
    make_driver(folder)
    (folder / cudart().name).symlink_to(cudart())
    return folder


@pytest.fixture
def place(tmp_path: Path, stubs: Path) -> Place:
    return Place(folder=tmp_path, libraries=stubs)


def expect(place: Place, status: int, *expected: tuple[str, str, str, str], arguments: tuple[str, ...] = ()) -> None:
    """The doctor's exit status and all its findings that are not ok: level, subject, words, next step."""
    code, data = place.doctor(*arguments)
    findings = [finding for finding in data["findings"] if finding["level"] != "ok"]
    assert [(f["level"], f["subject"]) for f in findings] == [(level, subject) for level, subject, _, _ in expected]
    assert code == status
    for finding, (_, _, text, step) in zip(findings, expected, strict=True):
        assert text in finding["text"]
        assert step in finding["next_step"]


def test_all_is_well(place: Place) -> None:
    code, data = place.doctor("--verify")
    assert (code, data["worst"]) == (0, "ok"), data
    subjects = [finding["subject"] for finding in data["findings"]]
    assert subjects[: len(ALL_SUBJECTS)] == ALL_SUBJECTS
    assert set(subjects[len(ALL_SUBJECTS) :]) == {"engines"}, "one for each that is installed, or one for none"
    texts = {finding["subject"]: finding["text"] for finding in data["findings"]}
    assert texts["GPU"] == f"cuda:0, {GPU}, compute capability 12.0: runs the cubin for sm_120f"
    assert texts["driver"].endswith("which serves CUDA 13.0")
    assert cudart().resolve().name in texts["CUDA runtime"]
    count = len(load_manifest().tiles) + 1
    assert texts["loading"] == f"{count} of {count} libraries load"


def test_without_torch(place: Place) -> None:
    place.set_torch("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    step = "pip install 'torch>=2.10', in a build for CUDA 13"
    expect(place, 2, ("error", "torch", "torch is not installed in this Python", step))
    use = place.run("-c", "import mxfp4_moe; mxfp4_moe.fused_moe")
    last = use.stderr.splitlines()[-1]
    assert last.startswith("ImportError: mxfp4_moe cannot be used (ModuleNotFoundError: No module named 'torch')")
    assert step in last
    assert last.endswith("`mxfp4-moe doctor` says more")
    assert place.run("-m", "mxfp4_moe.cli", "tiles").returncode == 0


def test_with_an_old_torch(place: Place) -> None:
    place.set_torch(OLD_TORCH)
    words, step = "2.9.1+cu130 with CUDA 13.0: older than 2.10", "pip install --upgrade 'torch>=2.10'"
    expect(place, 2, ("error", "torch", words, step))


def test_with_a_cpu_torch(place: Place) -> None:
    place.set_torch(CPU_TORCH)
    words = "with no CUDA: it sees no GPU, and there is one here"
    expect(place, 2, ("error", "torch", words, "install a torch 2.10 or newer that is built for CUDA 13"))


def test_without_the_cuda_runtime(place: Place) -> None:
    place.set_cuda_of_wheel(NO_CUDA)
    place.env["TEST_TORCH_CUDA"] = f"{NO_CUDA}.0"
    missing = f"libcudart.so.{NO_CUDA}: cannot open shared object file: No such file or directory"
    step = f"reinstall torch for CUDA {NO_CUDA} with what it depends on"
    expect(
        place,
        2,
        ("error", "driver", f"too old for the wheel, which is for CUDA {NO_CUDA}", f"serves CUDA {NO_CUDA}"),
        ("error", "CUDA runtime", f"is not found ({missing})", step),
        ("error", "loading", f"is not found ({missing}) (and {len(load_manifest().tiles)} more", step),
    )
    place.env["TEST_TORCH_CUDA"] = "13.0"
    step = f"install a torch that is built for CUDA {NO_CUDA}, or the mxfp4-moe wheel for CUDA 13"
    expect(
        place,
        2,
        ("error", "driver", "too old for the wheel", ""),
        ("error", "CUDA runtime", f"this torch brings that of CUDA 13 ({missing})", step),
        ("error", "loading", f"this torch brings that of CUDA 13 ({missing})", step),
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # inside the machine code for the GPU
    path.write_bytes(data)


def test_with_a_truncated_library(place: Place) -> None:
    cut(place.library(FIRST.module))
    words, step = f"{FIRST.module}.abi3.so is truncated", "reinstall the wheel"
    expect(place, 1, ("warning", "libraries", words, step))
    cut(place.library("moe"))
    expect(
        place, 2, ("error", "libraries", f"moe.abi3.so is truncated: {place.library('moe').stat().st_size:,} of", step)
    )


def test_with_an_edited_library(place: Place) -> None:
    flip(place.library(FIRST.module))
    expect(place, 0)
    words = f"1 of {len(load_manifest().tiles) + 1} libraries are not what was built: {FIRST.module}.abi3.so"
    expect(place, 2, ("error", "hashes", words, "reinstall the wheel"), arguments=("--verify",))


def test_with_a_foreign_blocklist(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", place.env["MXFP4_MOE_CACHE_DIR"])
    path = blocklist.write(GPU, CAPABILITY, {FIRST: "3 of 9 values differ"})
    assert path is not None
    expect(place, 1, ("warning", "blocklist", f"{FIRST.name} failed the self-test on {GPU}: 3 of 9", "--selftest"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wheel": "0.0.9"}))
    step = "run `mxfp4-moe doctor --selftest` to write a new one"
    expect(place, 1, ("warning", "blocklist", "for another wheel", step))


def test_the_driver_is_asked_without_torch(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], Any] = driver.ctypes.CDLL
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: real(str(stubs / name)))
    assert driver.driver_cuda() == "13.0"
    assert driver.driver_gpus() == (Gpu(index=0, name=GPU, capability=CAPABILITY),)


def test_a_driver_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        status = 803

        def cuInit(self, flags: int) -> int:
            return self.status

        def cuGetErrorString(self, status: int, text: Any) -> int:
            text._obj.value = b"system has unsupported display driver / cuda driver combination"
            return 0

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Refusing())
    with pytest.raises(RuntimeError, match=r"^cuInit: system has unsupported .* combination \(803\)$"):
        driver.driver_gpus()
    facts = environment.read_driver()
    assert facts.error.startswith("cuInit: system has unsupported")
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match=r"^libcuda\.so\.1 has no cuInit: it is not the NVIDIA driver's$"):
        driver.driver_gpus()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Refusing())
    monkeypatch.setattr(Refusing, "status", 100)
    assert driver.driver_gpus() == (), "a driver without a GPU is no fault"


def test_where_the_libraries_stand_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash that the build wrote is looked up for each module, and a report without one is no crash."""
    fake_wheel.install(tmp_path, monkeypatch, [FIRST, Tile.from_mn((128, 128))])
    assert _wheel.built_sha256(FIRST.module) == "0" * 64
    assert _wheel.built_sha256("moe") is None
    wheel = environment.read_wheel(verify=True)
    assert next(library.module for library in wheel.libraries) == "moe"
    assert (wheel.cudart, wheel.glibc_floor) == ("", "")
