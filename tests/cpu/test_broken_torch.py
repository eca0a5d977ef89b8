"""A torch that cannot be imported gets its sentence whichever module is imported first, and whatever it raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mxfp4_moe
from mxfp4_moe._install import importing
from mxfp4_moe._install.troubles import DOCTOR

PACKAGE = Path(mxfp4_moe.__file__).parent


def imports_others_first(path: Path) -> bool:
    """Parts of an engine and rivals, which another library imports, or which import it: it may be missing."""
    return path.stem.startswith(("_vllm_", "_sglang_")) or path.parent.name == "rivals"


MODULES = sorted(
    ".".join(["mxfp4_moe", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__" and not imports_others_first(path)
)
# Each module is the first one that is imported, in a process that has none.
IMPORT_EACH = """
import importlib, json, sys
said = {}
for module in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mxfp4_moe", "torch")]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except BaseException as error:
        said[module] = [type(error).__name__, str(error), type(error.__cause__).__name__]
print(json.dumps(said))
"""
CUDNN = "libcudnn.so.9: cannot open shared object file: No such file or directory"
BROKEN = {
    "a library that is missing": (f"raise ImportError({CUDNN!r})", "torch itself cannot be imported here"),
    "what torch says of CUDA's libraries": (
        "raise ValueError('libcublas.so.*[0-9] not found in the system path []')",
        "torch itself cannot be imported here",
    ),
    "a library that does not load": ("raise OSError('libtorch.so: invalid ELF header')", "torch itself cannot be"),
    "an error of its own": ("class E(Exception): pass\nraise E('no')", "torch itself cannot be imported here"),
    "an assertion": ("assert False", "torch itself cannot be imported here"),
    "an exit": ("raise SystemExit('this torch is not for you')", "torch itself cannot be imported here"),
    "half of a package": ("from torch import nothing", "torch itself cannot be imported here"),
    "a package of its own that is missing": ("import sympy_that_is_missing", "torch itself cannot be imported here"),
    "numpy is missing": ("raise ModuleNotFoundError(\"No module named 'numpy'\")", "a package that mxfp4-moe or torch"),
    "an old one": ("class version: cuda = None\nclass Tensor: pass", "this torch is older than 2.10"),
    "none": ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "torch is not installed"),
}


def imported(folder: Path, torch: str, modules: list[str]) -> dict[str, list[str]]:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(torch + "\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE.parent)]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", IMPORT_EACH, json.dumps(modules)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    said: dict[str, list[str]] = json.loads(result.stdout)
    return said


@pytest.mark.parametrize("name", BROKEN)
def test_whichever_module_is_first(tmp_path: Path, name: str) -> None:
    torch, means = BROKEN[name]
    said = imported(tmp_path, torch, MODULES)
    for module in ("flashinfer_api", "integrations.transformers", "weights", "formats", "reference", "_call.launch"):
        assert f"mxfp4_moe.{module}" in said
    for module, (kind, message, cause) in said.items():
        assert kind == "ImportError", (module, message)
        assert message.startswith("mxfp4_moe cannot be used ("), (module, message)
        assert message.count("mxfp4_moe cannot be used") == 1, (module, message)
        assert means in message, (module, message)
        assert message.endswith(DOCTOR)
        assert "\n" not in message
        assert cause != "NoneType", module


def test_modules_that_need_no_torch_are_imported_without_it(tmp_path: Path) -> None:
    said = imported(tmp_path, "raise ValueError('no')", MODULES)
    for module in ("mxfp4_moe", "mxfp4_moe.cli", "mxfp4_moe.tiles", "mxfp4_moe._health.checks"):
        assert module not in said


def test_another_modules_fault_is_not_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words are the right ones; and what has been explained is not explained again."""
    monkeypatch.delitem(sys.modules, "torch")
    importing.explain(ImportError("this transformers is broken", name="transformers"))
    importing.explain(AttributeError("NoneType has no attribute"))
    words = r"^mxfp4_moe cannot be used \(ModuleNotFoundError: No module named 'torch'\)"
    with pytest.raises(ImportError, match=words) as caught:
        importing.explain(ModuleNotFoundError("No module named 'torch'", name="torch"))
    importing.explain(caught.value)


def test_the_package_is_watched_once() -> None:
    finders = [finder for finder in sys.meta_path if finder is importing._Finder]
    importing.watch()
    assert [finder for finder in sys.meta_path if finder is importing._Finder] == finders
    assert len(finders) == 1


def test_a_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ValueError('libcublas.so.*[0-9] not found')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    for command in ("bench", "tune"):
        words = [sys.executable, "-m", "mxfp4_moe.cli", command]
        result = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
        assert result.returncode == 2
        assert "ValueError: libcublas" in result.stderr
        assert DOCTOR in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
