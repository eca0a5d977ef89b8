"""Fits what the cost models know of main loops to the machine code that a build report counts: a tool for who changes
the kernels.

    PYTHONPATH=python python -m wheelbuild.docs.loop_fit build_report.json

A wheel has the report, as `mxfp4_moe/build_report.json`. It prints, for each pair of formats that the report has, the
line for `_choice/cost_model.py` with its largest error over SM12x's tiles, and for `_choice/sm90_model.py` how many
times the instructions of MXFP4 weights in bf16 another kernel has. Needs NumPy, which the package does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mxfp4_moe._choice import cost_model, sm90_model
from mxfp4_moe._choice.choice import counted_instructions
from mxfp4_moe.tiles import MXFP4_BF16, PAIRS, Tile, kernel_pairs, load_manifest, prove
from mxfp4_moe.tiles.bf16 import has_wgmma

Line = tuple[float, float, float, float]


def counted(report: Mapping[str, Any], arch: str, pair: str) -> dict[Tile, float]:
    """Instructions of a warp in a K tile, of each tile that the report has for this pair."""
    known = counted_instructions(report, arch, pair)
    return {tile: known[tile.name] for tile in load_manifest().tiles if tile.name in known}


def fit(counts: Mapping[Tile, float], arch: str, pair: str) -> Line:
    """The line of least relative squares without negative numbers, which are no instructions."""
    terms = np.array([cost_model.loop_terms(prove(tile, arch, pair)) for tile in counts])
    terms /= np.array(list(counts.values()))[:, None]
    best, found = np.inf, np.zeros(4)
    for places in (list(some) for size in range(1, 5) for some in combinations(range(4), size)):
        numbers, *_ = np.linalg.lstsq(terms[:, places], np.ones(len(terms)), rcond=None)
        wrong = float(((terms[:, places] @ numbers - 1) ** 2).sum())
        if (numbers >= 0).all() and wrong < best:
            best, found = wrong, np.zeros(4)
            found[places] = numbers
    constant, weights, acts, fragments = found.tolist()
    return constant, weights, acts, fragments


def errors(line: Line, counts: Mapping[Tile, float], arch: str, pair: str) -> dict[Tile, float]:
    """The line over the count, minus one."""
    return {tile: cost_model.on_line(line, prove(tile, arch, pair)) / count - 1 for tile, count in counts.items()}


def expanding(report: Mapping[str, Any], pair: str) -> tuple[float, float]:
    """Instructions of the tiles among which SM90's model chooses, over those of MXFP4 weights in bf16: the mean of
    mma.sync's and that of wgmma's. Left out are tiles whose warps have other rows with the other weights.
    """
    usual, these = (counted(report, sm90_model.ARCH, which) for which in (MXFP4_BF16, pair))
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for tile in filter(sm90_model.sensible, these):
        rows = {prove(tile, sm90_model.ARCH, which).warp_m for which in (MXFP4_BF16, pair)}
        if len(rows) == 1:
            ratios[has_wgmma(tile.m, tile.n)].append(these[tile] / usual[tile])
    return statistics.mean(ratios[False]), statistics.mean(ratios[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    report = json.loads(parser.parse_args().report.read_text(encoding="utf-8"))
    for pair in PAIRS:
        if counts := counted(report, cost_model.ARCH, pair):
            line = fit(counts, cost_model.ARCH, pair)
            worst = max(map(abs, errors(line, counts, cost_model.ARCH, pair).values()))
            print(f"{pair}: ({', '.join(f'{number:.1f}' for number in line)}), at most {worst:.0%} off")
    for pair in kernel_pairs(sm90_model.ARCH, PAIRS):
        if counted(report, sm90_model.ARCH, pair):
            print(f"{pair} on SM90: ({', '.join(f'{ratio:.2f}' for ratio in expanding(report, pair))})")


if __name__ == "__main__":
    main()
