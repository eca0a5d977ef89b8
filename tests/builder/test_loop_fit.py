"""What the cost models know of main loops is what the wheel's build report counts, and the fit of it can be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import mxfp4_moe
from mxfp4_moe._choice import cost_model, sm90_model
from mxfp4_moe._choice.facts import PUBLISHED
from mxfp4_moe.tiles import PAIRS, Tile, kernel_pairs, prove
from wheelbuild.docs import loop_fit

REPORT: dict[str, Any] = json.loads((Path(mxfp4_moe.__file__).parent / "build_report.json").read_text(encoding="utf-8"))
PROFILE = [pair for pair in PAIRS if pair in REPORT["pairs"]]
SM12X = next(device for device in PUBLISHED if device.capability == (12, 0))
LINE = (30.0, 5.0, 0.0, 9.0)


def line_of(pair: str, tile: Tile) -> loop_fit.Line:
    return cost_model._model_of(SM12X, prove(tile, cost_model.ARCH, pair)).loop_instructions


@pytest.mark.parametrize("pair", PROFILE)
def test_the_models_line_is_as_near_as_the_best(pair: str) -> None:
    counts = loop_fit.counted(REPORT, cost_model.ARCH, pair)
    line = line_of(pair, next(iter(counts)))
    lines = {"model": line, "best": loop_fit.fit(counts, cost_model.ARCH, pair)}
    found = {what: loop_fit.errors(numbers, counts, cost_model.ARCH, pair) for what, numbers in lines.items()}
    squares = {what: sum(error**2 for error in errors.values()) for what, errors in found.items()}
    assert squares["model"] <= 1.05 * squares["best"] + 1e-4, found
    wide = {tile: error for tile, error in found["model"].items() if tile.n >= 64}  # others are never chosen
    assert max(map(abs, wide.values())) < 0.15, wide


@pytest.mark.parametrize("pair", kernel_pairs("90a", PROFILE))
def test_sm90s_kernels_have_so_many_times_the_instructions(pair: str) -> None:
    assert loop_fit.expanding(REPORT, pair) == pytest.approx(sm90_model.EXPANDING[pair], rel=0.02)


def test_a_line_is_found_again() -> None:
    counts = loop_fit.counted(REPORT, cost_model.ARCH, PROFILE[0])
    exact = {tile: cost_model.on_line(LINE, prove(tile, cost_model.ARCH)) for tile in counts}
    assert loop_fit.fit(exact, cost_model.ARCH, PROFILE[0]) == pytest.approx(LINE, abs=1e-6)
    assert max(map(abs, loop_fit.errors(LINE, exact, cost_model.ARCH, PROFILE[0]).values())) < 1e-12


def test_no_number_is_negative() -> None:
    counts = loop_fit.counted(REPORT, cost_model.ARCH, PROFILE[0])
    falling = {tile: 1000.0 - cost_model.on_line(LINE, prove(tile, cost_model.ARCH)) for tile in counts}
    assert min(loop_fit.fit(falling, cost_model.ARCH, PROFILE[0])) >= 0


def test_another_line_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth more instructions for each weight row, and a third more beside them."""
    pair = PROFILE[0]
    counts = loop_fit.counted(REPORT, cost_model.ARCH, pair)
    constant, weights, acts, fragments = line_of(pair, next(iter(counts)))
    more = dataclasses.replace(
        cost_model.ARCH_MODELS[12], loop_instructions=(1.3 * constant, 1.1 * weights, acts, fragments)
    )
    monkeypatch.setitem(cost_model.ARCH_MODELS, 12, more)
    with pytest.raises(AssertionError):
        test_the_models_line_is_as_near_as_the_best(pair)
