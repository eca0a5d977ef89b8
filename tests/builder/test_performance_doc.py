"""docs/performance.md says what the package's functions and the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_results import results

from mxfp4_moe.bench import floors, report
from mxfp4_moe.bench.shapes import DEFAULT_TOKENS, PRESETS
from wheelbuild import ROOT
from wheelbuild.docs import performance

PAGE = (ROOT / performance.DOCUMENT).read_text(encoding="utf-8")


def test_the_page_and_the_pictures_are_current() -> None:
    assert performance.stale(ROOT) == [], "run PYTHONPATH=python python -m wheelbuild.docs.performance"


def test_the_floors_are_those_of_the_presets() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:2] == "| "]
    for shape in PRESETS.values():
        for tokens in DEFAULT_TOKENS:
            read = floors.weight_bytes(shape, floors.expected_active_experts(shape, tokens))
            start = [str(tokens), f"{floors.expected_active_experts(shape, tokens):.1f}", f"{read / 1e6:,.1f}"]
            assert any(row[:3] == start for row in rows), (shape.name, tokens)


def test_modelled_times_are_never_without_that_word() -> None:
    before, _, after = PAGE.partition("<!-- generated: model -->")
    heading = [line for line in before.splitlines() if line.startswith("## ")][-1]
    assert heading == "## Modelled, not measured: SM120 and SM121"
    assert "No code of this project has run on an SM120 or SM121 GPU" in before
    assert "RTX 5090" in after


def test_a_committed_run_reaches_the_page(tmp_path: Path) -> None:
    folder = tmp_path / performance.RESULTS
    folder.mkdir(parents=True)
    (tmp_path / performance.DOCUMENT).write_text(PAGE, encoding="utf-8")
    report.write(results(), folder / "a-gpu.json")
    assert performance.stale(tmp_path) == [
        *("docs/performance.md", "docs/performance/a-gpu.svg", "docs/performance/a-gpu-roofline.svg")
    ]
    page = performance.rendered(PAGE, performance.committed(tmp_path))
    assert report.markdown(results()) in page
    assert "![Roofline](performance/a-gpu-roofline.svg)" in page
    assert "No run is committed yet" not in page
    (tmp_path / performance.DOCUMENT).write_text(page, encoding="utf-8")
    for name, text in performance.pictures(performance.committed(tmp_path)).items():
        (folder / name).write_text(text, encoding="utf-8")
    assert performance.stale(tmp_path) == []


def test_a_part_that_is_missing() -> None:
    with pytest.raises(
        ValueError,
        match="expected the generated parts floors, model, model_pairs, .*, got floors, results, model_pairs",
    ):
        performance.rendered(PAGE.replace("<!-- generated: model -->", ""), {})
