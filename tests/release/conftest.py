"""Fixtures that several files of tests/release use."""

from __future__ import annotations

from pathlib import Path

import pytest
from release_cases import built_wheel
from release_tools import verb


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with its manylinux tag; ci/repair.sh's words are beside it."""
    folder = tmp_path_factory.mktemp("repaired")
    said = verb("repair", built_wheel(), folder)
    (folder / "said").write_text(said, encoding="utf-8")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(repaired: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "site"
    verb("index", repaired.parent, folder)
    return folder
