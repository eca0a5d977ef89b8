"""What a program sets for all of torch changes nothing here: every public function, under every setting.

Everything is computed on one thread but where a test says otherwise (tests/conftest.py).
"""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from public_calls import CASES, OTHERS, Inputs, expected, flat, public_functions

import mxfp4_moe
from mxfp4_moe import _torch_state
from wheelbuild import ROOT


def default_dtype(dtype: torch.dtype) -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def state() -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return state


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    assert torch.set_flush_denormal(True), "this processor cannot"
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def matmul_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for state in (default_dtype(torch.float16), default_device, deterministic, matmul_precision, flushing):
            stack.enter_context(state())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "default dtype bfloat16": default_dtype(torch.bfloat16),
    "default dtype float16": default_dtype(torch.float16),
    "default dtype float64": default_dtype(torch.float64),
    "default device": default_device,
    "device as a context": lambda: torch.device("meta"),
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic algorithms": deterministic,
    "flush denormal": flushing,
    "medium matmul precision": matmul_precision,
    "all at once": all_at_once,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


def settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        _torch_state.flushes(),
        torch.get_rng_state().tolist()[:64] if torch.get_default_device().type == "cpu" else None,
    )


def test_every_public_function_is_called_here() -> None:
    assert public_functions() - OTHERS == CASES.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("state", STATES)
def test_a_setting_changes_nothing_and_is_left_as_it_is(state: str, name: str, inputs: Inputs) -> None:
    wanted = expected(name, inputs)
    with STATES[state]():
        before = settings()
        result = CASES[name](inputs)
        assert settings() == before
    assert flat(result) == wanted


@pytest.mark.parametrize("state", ["autocast to bfloat16", "flush denormal"])
def test_these_settings_would_change_results(state: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are such that the guard is what keeps the bits."""
    monkeypatch.setattr(_torch_state, "_undisturbed", lambda: True)
    changed = set()
    for name, case in CASES.items():
        wanted = expected(name, inputs)
        with STATES[state]():
            try:
                result = flat(case(inputs))
            except RuntimeError:
                changed.add(name)
                continue
        if result != wanted:
            changed.add(name)
    if state == "flush denormal":
        least = {"formats.quantize_mxfp8", "formats.dequantize_mxfp4", "reference.finalize", "mxfp4_moe.fused_moe"}
    else:
        least = {"reference.fused_moe", "arithmetic.gemm"}
    assert least <= changed


THREADS = """
import torch
torch.set_flush_denormal(True)  # before torch starts threads, which inherit it
torch.set_num_threads(4)
big = torch.full((1 << 22,), 2.0**-120)
assert float((big * 2.0**-20).sum()) == 0.0, "the threads flush"
from mxfp4_moe import formats
scales = torch.zeros(1 << 17, 1, dtype=torch.uint8)
values = formats.dequantize_mxfp8(torch.full((1 << 17, 32), 0x38, dtype=torch.uint8), scales)
assert (values.view(torch.int32) == 0x00400000).all(), values
assert torch.get_num_threads() == 4
"""


def test_threads_that_flush_take_no_part() -> None:
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---- the source ------------------------------------------------------------------------------------------------------

FLOATS_BY_DEFAULT = {"tensor", "zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye", "as_tensor"}
INTEGERS_BY_DEFAULT = {"arange", "randint", "randperm"}


def factories(path: Path) -> Iterator[tuple[int, str, set[str]]]:
    """Calls of torch's factories in a source: line, name, and keywords."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            if isinstance(owner, ast.Name) and owner.id == "torch" and name in FLOATS_BY_DEFAULT | INTEGERS_BY_DEFAULT:
                yield node.lineno, name, {keyword.arg or "**" for keyword in node.keywords}


def test_every_tensor_is_made_with_its_dtype_and_device() -> None:
    found, missing = 0, []
    for path in sorted((ROOT / "python").rglob("*.py")):
        for line, name, keywords in factories(path):
            found += 1
            needed = {"device"} if name in INTEGERS_BY_DEFAULT else {"device", "dtype"}
            missing += [f"{path.relative_to(ROOT)}:{line}: torch.{name} without {each}" for each in needed - keywords]
    assert found > 50
    assert missing == []


def test_the_source_is_read_by_its_meaning(tmp_path: Path) -> None:
    source = tmp_path / "made.py"
    source.write_text("import torch\nx = torch.zeros(3, device='cpu')\ny = torch.zeros_like(x)\nz = torch.arange(3)\n")
    assert list(factories(source)) == [(2, "zeros", {"device"}), (4, "arange", set())]
    assert mxfp4_moe.__version__
