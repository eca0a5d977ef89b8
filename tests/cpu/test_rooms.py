"""Who imports whom, and how long a file is: the plan of the house (CONTRIBUTING.md), held against the source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from source_imports import Import, brings, circle, imports_of, module_names

from wheelbuild import ROOT

# Rooms of the package from the ground up: each imports its own and those before it, and nothing else of the package.
FLOORS = (
    ("_arguments", "_floors", "_router_rules", "_torch_state", "activations", "archs", "routers", "tiles", "probe"),
    ("_install",),
    ("formats",),
    ("_mma", "accuracy", "arithmetic"),
    ("_choice",),
    ("_checkpoints",),
    ("weights",),
    ("reference", "shared_experts"),
    ("_call",),
    ("routing",),
    ("problems", "flashinfer_api", "engines"),
    ("pair_problems",),
    ("_health",),
    ("integrations",),
    ("bench",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# May be missing where the package runs, so functions import them, and modules that bring them.
MAY_BE_MISSING = {"sglang", "torch", "transformers", "triton", "vllm"}

PACKAGE = module_names(ROOT / "python", "mxfp4_moe")
BUILDER = module_names(ROOT, "wheelbuild")
MODULES = {**PACKAGE, **BUILDER}
IMPORTS = [one for name, path in MODULES.items() for one in imports_of(name, path, MODULES)]


def edges(imports: list[Import], lazy: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in imports:
        if lazy or not one.lazy:
            found.setdefault(one.importer, []).append(one.imported)
    return found


def test_nothing_imports_in_a_circle() -> None:
    """Imports inside of functions count: one that hides a circle is one."""
    assert circle(edges(IMPORTS, lazy=True)) == []


def hidden(imports: list[Import]) -> list[str]:
    """Imports of the project inside of functions that are not there for a library that may be missing."""
    at_once = edges(imports, lazy=False)
    return [
        f"{one.importer}, line {one.line}: {one.imported}"
        for one in imports
        if one.lazy
        and one.imported in MODULES
        and not (brings(one.imported, at_once) & MAY_BE_MISSING) - brings(one.importer, at_once)
        and one.imported != "mxfp4_moe"  # whose names bring torch when they are asked for
    ]


def test_functions_import_the_project_for_torch_alone() -> None:
    assert hidden(IMPORTS) == []


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(imports: list[Import]) -> list[str]:
    """Imports of a room above one's own, and of the package's front door by a room that is behind it."""
    found = []
    for one in imports:
        if one.importer not in PACKAGE or one.imported not in PACKAGE or not room(one.importer):
            continue
        allowed = (
            room(one.importer) in ("bench", "cli")
            if not room(one.imported)
            else (FLOOR_OF[room(one.imported)] <= FLOOR_OF[room(one.importer)])
        )
        if not allowed:
            found.append(f"{one.importer}, line {one.line}: {one.imported}")
    return found


def test_every_room_has_a_floor() -> None:
    assert sorted({room(name) for name in PACKAGE} - {""} - FLOOR_OF.keys()) == []


def test_rooms_import_downward() -> None:
    assert upward(IMPORTS) == []


def test_the_build_knows_neither_release_nor_documents() -> None:
    """Nor the package, which does not exist yet: tile_model.py and probe_model.py load what they need of it by path."""
    inner = [one for one in IMPORTS if one.importer in BUILDER and room(one.importer) not in ("release", "docs")]
    assert [one for one in inner if room(one.imported) in ("release", "docs") and one.imported in BUILDER] == []
    assert [one for one in inner if one.imported.partition(".")[0] == "mxfp4_moe"] == []


def test_the_ground_floor_runs_without_torch() -> None:
    at_once = edges(IMPORTS, lazy=False)
    for name in (
        "archs",
        "tiles",
        "activations",
        "_choice.choice",
        "_choice.tuned",
        "_install.wheel",
        "_health.selftest",
    ):
        assert not brings(f"mxfp4_moe.{name}", at_once) & MAY_BE_MISSING, name
    assert not brings("mxfp4_moe.cli", at_once) & MAY_BE_MISSING


def test_weights_know_no_loader() -> None:
    assert "mxfp4_moe._install.loading" not in brings("mxfp4_moe.weights", edges(IMPORTS, lazy=True))


# ---- how long a file is ----------------------------------------------------------------------------------------------

LONGEST = 450  # lines: what is read in one sitting. Data may be longer.
SOURCES = {".py", ".sh", ".h", ".cuh", ".cu", ".cpp"}


def too_long(root: Path, folders: Iterable[str]) -> set[str]:
    """Sources in these folders with more lines than one sitting has."""
    files = [path for folder in folders for path in sorted((root / folder).rglob("*")) if path.suffix in SOURCES]
    return {
        str(path.relative_to(root)) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST
    }


def test_a_file_is_one_idea_in_450_lines() -> None:
    assert too_long(ROOT, ("ci", "csrc", "docs", "python", "tests", "wheelbuild")) == set()


def test_a_long_file_is_found(tmp_path: Path) -> None:
    for name, lines in (("short.py", 450), ("long.cu", 451), ("data.toml", 5000)):
        (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / "b" / name).write_text("line\n" * lines, encoding="utf-8")
    assert too_long(tmp_path, ["a"]) == {"a/b/long.cu"}


# ---- the reader ------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, **texts: str) -> list[Import]:
    """Imports of a package `p` with these modules."""
    (tmp_path / "p").mkdir()
    for name, text in texts.items():
        (tmp_path / "p" / f"{name}.py").write_text(text, encoding="utf-8")
    modules = module_names(tmp_path, "p")
    return [one for name, path in modules.items() for one in imports_of(name, path, modules)]


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    text = (
        "import os.path\nfrom typing import TYPE_CHECKING\nfrom . import b\nfrom .c import name\nimport p.d\n"
        "if TYPE_CHECKING:\n    from . import e\nelse:\n    from . import f\n"
        "def function():\n    from .g import name\n"
        "class Class:\n    from .h import name\n    def method(self):\n        import torch.nn\n"
    )
    found = read(tmp_path, __init__="", a=text, **dict.fromkeys("bcdefgh", ""))
    assert [(one.imported, one.lazy) for one in found] == [
        *(("os", False), ("typing", False), ("p.b", False), ("p.c", False), ("p.d", False), ("p.f", False)),
        *(("p.g", True), ("p.h", False), ("torch", True)),
    ]


@pytest.mark.parametrize("last", ["from . import a", "def f():\n    from .a import x"])
def test_a_circle_is_found(tmp_path: Path, last: str) -> None:
    found = read(tmp_path, a="from . import b", b="from . import c", c=last, d="from . import a")
    assert circle(edges(found, lazy=True)) == ["p.a", "p.b", "p.c", "p.a"]


def test_a_hidden_import_and_one_upward_are_found() -> None:
    one = Import("mxfp4_moe.weights", "mxfp4_moe.reference", True, 3)
    assert hidden([one]) == ["mxfp4_moe.weights, line 3: mxfp4_moe.reference"]
    assert upward([one]) == ["mxfp4_moe.weights, line 3: mxfp4_moe.reference"]
    assert hidden([one, Import("mxfp4_moe.reference", "torch", False, 1)]) == []
    front_door = Import("mxfp4_moe.weights", "mxfp4_moe", False, 1)
    assert upward([front_door]) == ["mxfp4_moe.weights, line 1: mxfp4_moe"]
