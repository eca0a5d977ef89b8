"""The drop-in's signatures against those of the published FlashInfer, which flashinfer_signatures.json has."""

from __future__ import annotations

import enum
import inspect
import json
import os
from pathlib import Path
from typing import Any

import flashinfer_signatures as signatures
import pytest
import torch

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import quantizers

TABLE = json.loads(signatures.TABLE.read_text(encoding="utf-8"))
# What we have beyond them, all with defaults and behind theirs; and where a default is another.
MORE = {
    "cutlass_fused_moe": ["auto_tile_select", "tile_mn", "raw_weights"],
    "get_cutlass_fused_moe_module": ["tile_mn"],
}
OTHER_DEFAULTS = {("get_cutlass_fused_moe_module", "backend"): ("'100'", "'120'")}


def written(value: Any) -> str:
    """A default as FlashInfer's source writes it."""
    if value is quantizers.OMITTED:
        return "_UNSET"
    if isinstance(value, enum.IntEnum):
        return f"{type(value).__name__}.{value.name}"
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def ours(name: str) -> list[dict[str, str]]:
    parameters = inspect.signature(getattr(fi, name)).parameters.values()
    empty = inspect.Parameter.empty
    return [
        {"name": p.name, "kind": p.kind.name} | ({} if p.default is empty else {"default": written(p.default)})
        for p in parameters
    ]


def differences(name: str, theirs: list[dict[str, str]]) -> list[str]:
    found = ours(name)
    if more := MORE.get(name, []):
        assert [one["name"] for one in found[-len(more) :]] == more
        assert all("default" in one for one in found[-len(more) :])
        found = found[: -len(more)]
    for (function, parameter), (default, our_default) in OTHER_DEFAULTS.items():
        for one in found:
            if (function, parameter) == (name, one["name"]):
                assert one["default"] == our_default
                one["default"] = default
    wanted, having = ([json.dumps(one) for one in some] for some in (theirs, found))
    return [f"{name}: expected {a}, got {b}" for a, b in zip(wanted, having, strict=False) if a != b] + (
        [f"{name}: expected {len(wanted)} parameters, got {len(having)}"] if len(wanted) != len(having) else []
    )


@pytest.mark.parametrize("name", signatures.FUNCTIONS)
def test_signature(name: str) -> None:
    assert differences(name, TABLE["functions"][name]) == []


@pytest.mark.parametrize("name", signatures.ENUMS)
def test_enum(name: str) -> None:
    assert {member.name: member.value for member in getattr(fi, name)} == TABLE["enums"][name]


def test_version_is_the_one_that_the_documentation_names() -> None:
    assert fi.__doc__ is not None
    assert f"FlashInfer {TABLE['version']}" in fi.__doc__


@pytest.mark.parametrize("name", signatures.FUNCTIONS)
def test_differences_are_seen(name: str) -> None:
    theirs = TABLE["functions"][name]
    assert differences(name, theirs[:-1])
    assert differences(name, [{**theirs[0], "name": "another"}, *theirs[1:]])
    assert differences(name, [*theirs, {"name": "more", "kind": "KEYWORD_ONLY", "default": "None"}])
    assert differences(name, [{**one, "default": "5"} if "default" in one else one for one in theirs]) or not any(
        "default" in one for one in theirs
    )
    assert differences(name, [*theirs[1::-1], *theirs[2:]])


def test_source_is_read(tmp_path: Path) -> None:
    """The reader itself, on a package of two lines a function."""
    (tmp_path / "flashinfer_python-9.9.dist-info").mkdir()
    for file in {*signatures.FUNCTIONS.values(), *signatures.ENUMS.values()}:
        path = tmp_path / "flashinfer" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [name for name, where in signatures.FUNCTIONS.items() if where == file]
        lines = [f"@wrapped\ndef {name}(a: int, b=Kind.One, *, c: str = 'x'):\n    return 1\n" for name in names]
        enums = [name for name, where in signatures.ENUMS.items() if where == file]
        lines += [f"class {name}(IntEnum):\n    'words'\n    One = 1\n    Two = 2\n" for name in enums]
        path.write_text("".join(lines), encoding="utf-8")
    table = signatures.read(tmp_path)
    assert table["version"] == "9.9"
    parameters = [
        {"name": "a", "kind": "POSITIONAL_OR_KEYWORD"},
        {"name": "b", "kind": "POSITIONAL_OR_KEYWORD", "default": "Kind.One"},
        {"name": "c", "kind": "KEYWORD_ONLY", "default": "'x'"},
    ]
    assert table["functions"] == dict.fromkeys(signatures.FUNCTIONS, parameters)
    assert table["enums"] == {name: {"One": 1, "Two": 2} for name in signatures.ENUMS}
    assert json.loads(signatures.text(table)) == table
    assert signatures.text(TABLE) == signatures.TABLE.read_text(encoding="utf-8")


@pytest.mark.flashinfer
def test_table_is_the_published_package() -> None:
    folder = os.environ.get("MXFP4_MOE_FLASHINFER")
    if folder is None:
        pytest.fail("marked flashinfer, and MXFP4_MOE_FLASHINFER names no folder; run ci/test-flashinfer.sh")
    assert signatures.read(Path(folder)) == TABLE
