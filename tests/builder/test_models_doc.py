"""docs/models.md is what the tables say today."""

from __future__ import annotations

import dataclasses

import pytest

from wheelbuild import ROOT
from wheelbuild.docs import models as document
from wheelbuild.docs.models import COLUMNS, DOCUMENT


def rows() -> dict[str, dict[str, str]]:
    """Of the page's first table."""
    table = next(part for part in document.document().split("\n\n") if part.startswith("| Model "))
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in lines[2:]}


def test_the_document_is_current() -> None:
    written = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert written == document.document(), "run python -m wheelbuild.docs.models"


@pytest.mark.parametrize("model", document.models.MODELS, ids=lambda model: model.name)
def test_every_model_has_a_row(model: document.models.Model) -> None:
    row = rows()[model.name]
    assert (row["hidden"], row["experts"]) == (str(model.hidden_size), str(model.num_experts))
    assert row["namings"].replace("`", "").split(", ") == list(model.schemes)
    assert set(model.schemes) <= set(document.schemes.BY_NAME)


def test_what_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, row in rows().items() if row["runs"] != "yes"] == []
    first = document.models.MODELS[0]
    odd = dataclasses.replace(first, name="odd", hidden_size=2872, num_experts=2048)
    monkeypatch.setattr(document.models, "MODELS", (odd,))
    assert rows()["odd"]["runs"] == "more than 1024 experts; sizes"


def test_names_are_those_of_the_table() -> None:
    text = document.document()
    for name in (
        "block.N.mlp.mlp1_weight.blocks",
        "layers.N.mlp.experts.E.gate_up_proj.bias",
        "layers.N.ffn.experts.E.w3.scale",
        "layers.N.block_sparse_moe.experts.E.w2.weight_packed",
    ):
        assert f"\n{name}\n" in text
