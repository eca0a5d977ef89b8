"""docs/tiles.md is what the proof says today, and says it of every candidate."""

from __future__ import annotations

import dataclasses

from wheelbuild import ROOT
from wheelbuild.tile_model import tiles
from wheelbuild.tiles_doc import COLUMNS, DOCUMENT, document

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The table's rows by (M, N), each by column."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]}


def test_the_document_is_current() -> None:
    written = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert written == document(MANIFEST), "run PYTHONPATH=ci python -m wheelbuild.tiles_doc"


def test_every_candidate_has_a_row_with_its_numbers() -> None:
    table = rows(document(MANIFEST))
    assert len(table) == len(tiles.CANDIDATES) == 27
    for tile in tiles.CANDIDATES:
        proof, row = tiles.prove(tile, "120f"), table[str(tile.m), str(tile.n)]
        assert row["mode"] == ("swapped" if tile.swap_ab else "native")
        assert int(row["threads"]) == proof.threads
        assert int(row["stages"]) == proof.stages
        parts = [int(row[name].replace(",", "")) for name in COLUMNS[COLUMNS.index("activations") :][:5]]
        assert sum(parts) == int(row["bytes per stage"].replace(",", ""))
        total = next(value for name, value in row.items() if name.startswith("shared memory"))
        assert int(total.replace(",", "")) == proof.smem_bytes == proof.stages * sum(parts)
        assert row["verdict"].startswith("impossible: ") != proof.legal
        assert all(refusal in row["verdict"] for refusal in proof.refusals)


def test_what_fits_and_is_not_built_is_not_said_to_be_in_the_wheel() -> None:
    fewer = dataclasses.replace(MANIFEST, tiles=MANIFEST.tiles[1:])
    left_out = MANIFEST.tiles[0]
    before, after = rows(document(MANIFEST)), rows(document(fewer))
    changed = [key for key in after if after[key] != before[key]]
    assert changed == [(str(left_out.m), str(left_out.n))]
    assert after[changed[0]]["verdict"] == "fits; not in the manifest"


def test_all_that_fit_are_in_the_wheel() -> None:
    legal = {tile for tile in tiles.CANDIDATES if all(tiles.prove(tile, arch).legal for arch in MANIFEST.archs)}
    assert set(MANIFEST.tiles) == legal
    assert len(legal) == 26
