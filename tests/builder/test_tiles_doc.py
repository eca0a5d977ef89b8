"""docs/tiles.md is what the proof says today, and says it of every candidate."""

from __future__ import annotations

import dataclasses

import pytest

from wheelbuild import ROOT
from wheelbuild.docs.tiles import COLUMNS, DOCUMENT, document
from wheelbuild.tile_model import tiles

MANIFEST = tiles.load_manifest(ROOT / "tile_manifest.toml")


KERNELS = [("90a", "mxfp4_bf16"), ("120f", "mxfp4_mxfp8"), ("120f", "mxfp4_bf16")]


def rows(text: str, arch: str, pair: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of one table by M and N, each by column."""
    (section,) = [part for part in text.split("\n## ") if part.startswith(f"sm_{arch}, {pair}\n")]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]}


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_document_is_current() -> None:
    written = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert written == document(MANIFEST), "run python -m wheelbuild.docs.tiles"


@pytest.mark.parametrize(("arch", "pair"), KERNELS)
def test_every_candidate_has_a_row_with_its_numbers(arch: str, pair: str) -> None:
    table = rows(document(MANIFEST), arch, pair)
    assert len(tiles.CANDIDATES) == 27
    assert len(table) == 27
    for tile in tiles.CANDIDATES:
        proof, row = tiles.prove(tile, arch, pair), table[str(tile.m), str(tile.n)]
        assert row["kernel"] == f"`{proof.function}`"
        assert row["mode"] == ("swapped" if tile.swap_ab else "native")
        assert int(row["threads"]) == proof.threads
        assert int(row["stages"]) == proof.stages
        names = ("activations", "weights and scales", "activation scales", "barriers")
        parts = [number(row[name]) for name in names]
        assert sum(parts) == number(row["bytes per stage"])
        once = number(row["once per block"])
        assert number(row["shared memory"]) == proof.smem_bytes == proof.stages * sum(parts) + once
        assert row["blocks per SM"] == (str(proof.blocks_per_sm) if proof.legal else "-")
        assert row["verdict"].startswith("impossible: ") != proof.legal
        assert all(refusal in row["verdict"] for refusal in proof.refusals)
        only_full = (arch, pair) == KERNELS[2]
        assert row["verdict"] == ("in profile full" if only_full else "in the wheel") or not proof.legal


def test_what_fits_and_is_not_built_is_not_said_to_be_in_the_wheel() -> None:
    fewer = dataclasses.replace(MANIFEST, tiles=MANIFEST.tiles[1:])
    left_out = MANIFEST.tiles[0]
    for kernel in KERNELS:
        before, after = rows(document(MANIFEST), *kernel), rows(document(fewer), *kernel)
        changed = [key for key in after if after[key] != before[key]]
        assert changed == [(str(left_out.m), str(left_out.n))]
        assert after[changed[0]]["verdict"] == "fits; not in the manifest"


def test_what_the_archs_do_not_share_is_said() -> None:
    text = document(MANIFEST)
    memory = [f"A block has at most {tiles.max_smem_per_block(arch):,} bytes" for arch in MANIFEST.archs]
    assert len(set(memory)) == 2
    assert all(sentence in text for sentence in memory)
    assert "## sm_90a" not in document(dataclasses.replace(MANIFEST, archs=("120f",)))


def test_all_that_fit_are_in_the_wheel() -> None:
    legal = {tile for tile in tiles.CANDIDATES if all(tiles.prove(tile, arch).legal for arch in MANIFEST.archs)}
    assert set(MANIFEST.tiles) == legal
    assert len(legal) == 26
