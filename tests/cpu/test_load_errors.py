"""What ld.so, Python, torch and CUDA say about a broken install becomes one sentence that says what to do.

Where a message can be provoked on any machine it is, with copies of the wheel's libraries; the others are quoted."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import CUDA_TORCH, NO_CUDA, PACKAGE, Place, cudart
from hypothesis import given
from hypothesis import strategies as st

import mxfp4_moe
from mxfp4_moe._call import launch, operators
from mxfp4_moe._checkpoints import from_files
from mxfp4_moe._install import loading
from mxfp4_moe._install.elf import ElfError, read_elf
from mxfp4_moe._install.troubles import DOCTOR, TROUBLES, Versions, recognize, words
from mxfp4_moe.problems import random_call, random_weights
from mxfp4_moe.tiles import Tile

SAME = Versions(wheel_cuda="13.0.88", torch_cuda="13.0")
BY_NAME = {trouble.name: trouble for trouble in TROUBLES}
# Each case in a fork of a process that has imported torch, which takes longer than everything else here.
LOAD = """
import importlib.machinery as m, json, os, sys, torch
for site, cuda, stable_abi in json.loads(sys.argv[1]):
    if process := os.fork():
        os.waitpid(process, 0)
        continue
    torch.version.cuda = cuda
    sys.path.insert(0, site)
    if not stable_abi:  # as in a free-threaded Python, whose finder does not look for such files
        suffixes = [suffix for suffix in m.EXTENSION_SUFFIXES if "abi3" not in suffix]
        loaders = (m.ExtensionFileLoader, suffixes), (m.SourceFileLoader, m.SOURCE_SUFFIXES)
        sys.path_hooks[-1] = m.FileFinder.path_hook(*loaders)
        sys.path_importer_cache.clear()
    from mxfp4_moe._install import loading
    said = ["loaded", "", ""]
    try:
        loading.moe_ops()
    except loading.LoadError as error:
        said = [str(error), type(error.__cause__).__name__, str(error.__cause__)]
    print(json.dumps(said), flush=True)
    os._exit(0)
"""


def replace(old: str, new: str) -> Callable[[Place], None]:
    """Changes a name in the layer's library; `old` is a pattern, `new` as long as what it matches."""

    def change(place: Place) -> None:
        path = place.library("moe")
        data, count = re.subn(old.encode(), new.encode(), path.read_bytes())
        assert count, "the library has no such name"
        path.write_bytes(data)

    return change


def nothing(place: Place) -> None:
    """Leaves all well."""


def other_cuda(place: Place) -> None:
    place.set_cuda_of_wheel(NO_CUDA)


NO_CUDART = f"libcudart.so.{NO_CUDA}: cannot open shared object file: No such file or directory"
# How the install is broken, the CUDA of torch, whether Python has the stable ABI; the row, the original's words, and
# what to do.
REAL: dict[str, tuple[Callable[[Place], None], str, bool, str, str, str]] = {
    "all is well": (nothing, "13.0", True, "", "", ""),
    "undefined symbol": (
        *(replace("\0aoti_torch_get_sizes\0", "\0aoti_torch_get_sizeX\0"), "13.0", True),
        *("a torch that is too old", "undefined symbol: aoti_torch_get_sizeX", "pip install --upgrade 'torch>=2.10'"),
    ),
    "missing libcudart": (
        *(other_cuda, f"{NO_CUDA}.0", True),
        *("no CUDA runtime library", NO_CUDART, f"reinstall torch for CUDA {NO_CUDA}"),
    ),
    "another CUDA": (
        *(other_cuda, "13.0", True),
        *("a wheel for another CUDA", NO_CUDART, "or the mxfp4-moe wheel for CUDA 13"),
    ),
    "glibc": (
        *(replace(r"\0GLIBC_2\.2\.5\0", "\0GLIBC_9.2.5\0"), "13.0", True),
        *("a glibc that is too old", "version `GLIBC_9.2.5' not found", "use a newer Linux"),
    ),
    "libstdc++": (
        *(replace(r"\0GLIBCXX_3\.4\0", "\0GLIBCXX_9.4\0"), "13.0", True),
        *("a libstdc++ that is too old", "version `GLIBCXX_9.4' not found", "-c conda-forge libstdcxx-ng"),
    ),
    "free-threaded": (
        *(nothing, "13.0", False),
        *("a Python that cannot load the wheel", "No module named 'mxfp4_moe._ext.moe'", "ordinary build of CPython"),
    ),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA runtime that the wheel needs, for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / cudart().name).symlink_to(cudart())
    return folder


@pytest.fixture
def place(tmp_path: Path, libraries: Path) -> Place:
    return Place(folder=tmp_path, libraries=libraries)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> dict[str, list[str]]:
    """What loading the layer's library raised in each case: the message, the cause's type and its message."""
    cases, place = [], None
    for break_it, cuda, stable_abi, *_ in REAL.values():
        place = Place(folder=tmp_path_factory.mktemp("place"), libraries=libraries)
        break_it(place)
        cases.append((str(place.package.parent), cuda, stable_abi))
    assert place is not None
    (place.folder / "stubs" / "torch" / "__init__.py").unlink()  # this torch is the real one
    (place.folder / "stubs" / "torch").rmdir()
    result = place.run("-c", LOAD, json.dumps(cases))
    lines = result.stdout.splitlines()
    assert len(lines) == len(REAL), result.stderr
    return {case: json.loads(line) for case, line in zip(REAL, lines, strict=True)}


@pytest.mark.parametrize("case", [case for case in REAL if case != "all is well"])
def test_what_the_loader_says_is_translated(case: str, said: dict[str, list[str]]) -> None:
    *_, name, original, remedy = REAL[case]
    assert said["all is well"] == ["loaded", "", ""]
    message, cause, cause_message = said[case]
    assert message.startswith("mxfp4_moe._ext.moe cannot be loaded (")
    assert cause == ("ModuleNotFoundError" if case == "free-threaded" else "ImportError")
    assert original in cause_message
    assert f"({cause_message}): {BY_NAME[name].means.partition('{')[0]}" in message, "quoted, then explained"
    assert remedy in message
    assert "the wheel was built for CUDA" in message
    assert message.endswith(DOCTOR)
    assert "\n" not in message


def test_a_package_that_is_missing(place: Place) -> None:
    place.set_torch("raise ModuleNotFoundError(\"No module named 'typing_extensions'\")")
    last = place.run("-c", "import mxfp4_moe; mxfp4_moe.MoEWeights").stderr.splitlines()[-1]
    assert "typing_extensions" in last
    assert "pip install mxfp4-moe, without --no-deps" in last
    assert last.endswith(DOCTOR)


def test_a_torch_that_lacks_what_the_package_uses(place: Place) -> None:
    place.set_torch("__version__ = '1.13.1'\nclass version: cuda = None\nclass Tensor: pass\n")
    last = place.run("-c", "import mxfp4_moe; mxfp4_moe.MoEWeights").stderr.splitlines()[-1]
    assert last.startswith("ImportError: mxfp4_moe cannot be used (")
    assert "this torch is older than 2.10" in last
    assert last.endswith(DOCTOR)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (35, "a driver that is too old"),  # cudaErrorInsufficientDriver
        (100, "no driver or no GPU"),  # cudaErrorNoDevice
        (200, "a GPU of another arch"),  # cudaErrorInvalidKernelImage
        (209, "a GPU of another arch"),  # cudaErrorNoKernelImageForDevice
        (803, "a driver in two versions"),  # cudaErrorSystemDriverMismatch
        (804, "a driver in two versions"),  # cudaErrorCompatNotSupportedOnDevice
        (2, ""),  # cudaErrorMemoryAllocation
        (700, ""),  # cudaErrorIllegalAddress
    ],
)
def test_the_cuda_runtimes_own_words_are_known(number: int, name: str) -> None:
    runtime = ctypes.CDLL(str(cudart()))
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    text = runtime.cudaGetErrorString(number).decode()
    trouble = recognize(f"route kernel did not launch: {text}", SAME)
    assert (trouble.name if trouble else "") == name


@pytest.mark.parametrize(
    ("data", "original"),
    [(b"", "file too short"), (b"\x7fELF", "file too short"), (b"<html>" + bytes(4090), "invalid ELF header")],
)
def test_what_ld_so_says_about_a_damaged_file_is_known(data: bytes, original: str, tmp_path: Path) -> None:
    path = tmp_path / "moe.abi3.so"
    path.write_bytes(data)
    with pytest.raises(OSError, match=original) as caught:
        ctypes.CDLL(str(path))
    trouble = recognize(words(caught.value), SAME)
    assert trouble is BY_NAME["a library that is damaged"]


def test_a_torch_or_machine_without_a_gpu_is_one_sentence(place: Place) -> None:
    """Whatever this machine's torch says when a GPU is asked for and there is none: each of its words is known."""
    place.set_torch(CUDA_TORCH.partition("torch.version.cuda")[0])  # the real one
    place.env["CUDA_VISIBLE_DEVICES"] = ""
    program = (
        "import torch; from mxfp4_moe.problems import random_weights\n"
        "weights = random_weights(2, 32, 32, torch.device('cpu'))\n"
        "try: weights.to('cuda')\n"
        "except RuntimeError as error: print(type(error).__name__, type(error.__cause__).__name__, error)\n"
    )
    result = place.run("-c", program)
    assert result.stdout.startswith("LoadError "), result.stderr
    assert "weights cannot be put on cuda (" in result.stdout
    assert result.stdout.strip().endswith(DOCTOR)
    assert result.stdout.count("\n") == 1


MESSAGES = [
    (AssertionError("Torch not compiled with CUDA enabled"), "install a torch that is built for CUDA"),
    (RuntimeError("No CUDA GPUs are available"), "check nvidia-smi"),
    (
        RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nAdvice"),
        "update the NVIDIA driver",
    ),
    (
        RuntimeError("route kernel did not launch: CUDA driver version is insufficient for CUDA runtime version"),
        "update the NVIDIA driver",
    ),
    (
        RuntimeError("tile (64, 128): launch failed (no kernel image is available for execution on the device)"),
        "use a GPU that `mxfp4-moe doctor` names",
    ),
    (
        RuntimeError("CUDA error: system has unsupported display driver / cuda driver combination\nadvice"),
        "restart the machine",
    ),
]
KERNEL_MESSAGES = [(error, remedy) for error, remedy in MESSAGES if isinstance(error, RuntimeError)]


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> Any:
        raise error

    return function


def check_sentence(call: Callable[[], object], error: Exception, remedy: str) -> None:
    with pytest.raises(loading.LoadError) as caught:
        call()
    message = str(caught.value)
    assert str(error).splitlines()[0] in message
    assert remedy in message
    assert message.endswith(DOCTOR)
    assert "\n" not in message
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(("error", "remedy"), MESSAGES)
def test_putting_weights_on_a_gpu(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first touch of the GPU; and later, with a device that any machine has in its place."""
    layer = random_weights(2, 32, 32, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", raising(error))
        check_sentence(lambda: layer.to("cuda"), error, remedy)
    monkeypatch.setattr(mxfp4_moe.MoEWeights, "_map", raising(error))
    check_sentence(lambda: layer.to("meta"), error, remedy)
    monkeypatch.setattr(from_files, "Checkpoint", raising(error))
    check_sentence(lambda: mxfp4_moe.MoEWeights.from_safetensors("x", layer=0, device="cuda"), error, remedy)


@pytest.mark.parametrize(("error", "remedy"), KERNEL_MESSAGES)
def test_kernels_that_do_not_start(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' CUDA paths, up to the operator; the tensors of this machine stand for a GPU's."""
    layer = random_weights(2, 32, 32, torch.device("cpu"))
    call = random_call(3, 2, layer)
    monkeypatch.setattr(launch, "layer_operator", lambda index, tile: (raising(error), tile))
    tensors = (layer.w13, layer.w13_bias, layer.w2, layer.w2_bias)
    layout = (layer.hidden_size, layer.intermediate_size, layer.word_order.value)
    numbers = (layer.activation.value, 1.0, 0.0, None, None, None, None, None, "linear", torch.bfloat16)
    check_sentence(lambda: operators._moe_layer_cuda(*call.args(), *tensors, *layout, *numbers), error, remedy)


@pytest.mark.gpu
@pytest.mark.parametrize(("error", "remedy"), KERNEL_MESSAGES)
def test_calls_whose_kernels_do_not_start(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_weights(2, 32, 32, torch.device("cuda"))
    call = random_call(3, 2, layer)
    logits = torch.zeros(3, 2, device="cuda")
    monkeypatch.setattr(launch, "layer_operator", lambda index, tile: (raising(error), tile))
    monkeypatch.setattr(launch, "topk_kernel", lambda index: raising(error))
    check_sentence(lambda: mxfp4_moe.fused_moe(*call.args(), layer), error, remedy)
    check_sentence(lambda: mxfp4_moe.topk_softmax(logits, 2), error, remedy)


def test_other_errors_pass_through_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_weights(2, 32, 32, torch.device("cpu"))
    for error in (RuntimeError("CUDA out of memory"), torch.OutOfMemoryError("CUDA out of memory"), OSError("disk")):
        monkeypatch.setattr(mxfp4_moe.MoEWeights, "_map", raising(error))
        with pytest.raises(type(error)) as caught:
            layer.to("meta")
        assert caught.value is error
    already = loading.LoadError("no kernel image is available")
    monkeypatch.setattr(mxfp4_moe.MoEWeights, "_map", raising(already))
    with pytest.raises(loading.LoadError) as again:
        layer.to("meta")
    assert again.value is already


def test_a_gpu_of_another_arch_is_told_by_the_wheels_own_archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the manifest's: a wheel may have been built for fewer."""
    import fake_wheel

    from mxfp4_moe._call.launch import check_capability

    package = fake_wheel.install(tmp_path, monkeypatch, [Tile.from_mn((64, 128))])
    report = package / "build_report.json"
    check_capability((12, 1), "GB10")
    report.write_text(json.dumps(json.loads(report.read_text()) | {"archs": ["90a"]}))
    check_capability((9, 0), "H200")
    with pytest.raises(
        loading.LoadError, match=r"machine code for \(sm_90a\), got one on GB10, which is sm_121; .*doctor"
    ):
        check_capability((12, 1), "GB10")


LIBRARIES = sorted(PACKAGE.glob("_ext/*.so"))


@pytest.mark.parametrize("path", [PACKAGE / "_ext" / "moe.abi3.so", LIBRARIES[-1]], ids=lambda path: path.name)
def test_elf_is_read_as_readelf_reads_it(path: Path) -> None:
    elf = read_elf(path.read_bytes())
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert list(elf.needed) == re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    versions = subprocess.run(["readelf", "-V", "-W", path], capture_output=True, text=True, check=True).stdout
    expected: dict[str, list[str]] = {}
    for line in versions.partition("Version needs section")[2].splitlines():
        if file := re.search(r"File: (\S+)", line):
            names = expected.setdefault(file[1], [])
        if name := re.search(r"Name: (\S+)", line):
            names.append(name[1])
    assert {soname: list(names) for soname, names in elf.versions.items()} == expected
    assert any(name.startswith("GLIBC_2.") for names in elf.versions.values() for name in names)


@given(st.data())
def test_a_file_of_any_bytes_is_an_elf_error_or_read(data: st.DataObject) -> None:
    """Headers that make no sense end in a sentence, never in another exception."""
    whole = bytearray(ELF)
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(6, 1023))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ElfError):
        read_elf(bytes(whole))


ELF = min(LIBRARIES, key=lambda path: path.stat().st_size).read_bytes()
