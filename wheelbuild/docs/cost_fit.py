"""Fits the constants of SM90's cost model to results of `mxfp4-moe bench`, and says what its choices lose: a tool for
who changes the kernels or the model.

    PYTHONPATH=python python -m wheelbuild.docs.cost_fit s1.json s2.json ...

Each file is one shape over numbers of tokens and tiles, of one SM90 GPU; a shape may have one for each GPU. It prints
constants for `_choice/sm90_model.py`, the loss (time of the tile that the model chooses over the best of the file's
tiles, minus one) with these, and for each shape with constants that were fitted to the others. Needs NumPy, which the
package does not.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mxfp4_moe._choice import sm90_model
from mxfp4_moe._choice.facts import PUBLISHED, DeviceFacts, Layer
from mxfp4_moe._choice.sm90_model import Constants
from mxfp4_moe.bench import report
from mxfp4_moe.tiles import Tile, load_manifest

_NAMES = [field.name for field in fields(Constants) if field.name != "overlap"]


@dataclass(frozen=True)
class Case:
    """One shape and number of tokens: the measured microseconds of each tile among which the model chooses."""

    device: DeviceFacts
    layer: Layer
    tokens: int
    us: Mapping[Tile, float]
    best_us: float  # of all tiles in the file


def cases(path: Path) -> list[Case]:
    """The cases of a file of results."""
    results = report.read(path)
    device = next(facts for facts in PUBLISHED if facts.name == results.environment["device"])
    shape, manifest = results.shape, load_manifest()
    layer = Layer(experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, intermediate=shape.intermediate)
    found = []
    for tokens in results.tokens:
        mine = [m for m in results.measurements if m.ours and not m.automatic and m.tokens == tokens]
        us = {manifest.tile(m.tile): m.us.median for m in mine}
        sensible = {tile: value for tile, value in us.items() if sm90_model.sensible(tile)}
        found.append(Case(device, layer, tokens, sensible, min(us.values())))
    return found


def loss(case: Case, constants: Constants) -> float:
    """What the model's choice costs over the best tile."""
    times = {tile: sm90_model.layer_us(tile, case.device, case.layer, case.tokens, constants) for tile in case.us}
    return case.us[sm90_model.pick(times)] / case.best_us - 1


def _residuals(values: np.ndarray, given: Sequence[Case]) -> np.ndarray:
    """Logarithms of model over measurement: of a tile against the others of its case, and a little of all of them.
    Tiles that are far from the best count little, because nobody would choose them.
    """
    constants, parts = constants_of(values), []
    for case in given:
        wrong, weights = [], []
        for tile, us in case.us.items():
            model = sm90_model.layer_us(tile, case.device, case.layer, case.tokens, constants)
            wrong.append(math.log(model / us))
            weights.append(1 / (1 + 10 * (us / case.best_us - 1)) ** 1.5)
        errors, shares = np.array(wrong), np.array(weights)
        mean = float((errors * shares).sum() / shares.sum())
        parts.append(np.append(shares * (errors - mean), 0.3 * mean))
    return np.concatenate(parts)


def constants_of(values: np.ndarray) -> Constants:
    fitted = dict(zip(_NAMES, np.exp(values).tolist(), strict=True))
    return Constants(overlap=sm90_model.CONSTANTS.overlap, **fitted)


def fit(given: Sequence[Case], start: Constants, steps: int) -> Constants:
    """Levenberg-Marquardt steps on the logarithms of the constants, from a start."""
    values, damping = np.log([getattr(start, name) for name in _NAMES]), 1e-2
    errors = _residuals(values, given)
    for _ in range(steps):
        columns = []
        for place in range(len(values)):
            moved = values.copy()
            moved[place] += 1e-3
            columns.append((_residuals(moved, given) - errors) / 1e-3)
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        while damping < 1e4:
            step = np.linalg.solve(
                normal + damping * (np.diag(np.diag(normal)) + 1e-4 * np.eye(len(values))), -jacobian.T @ errors
            )
            tried = values + np.clip(step, -0.5, 0.5)
            new = _residuals(tried, given)
            if new @ new < errors @ errors:
                values, errors, damping = tried, new, damping / 4
                break
            damping *= 4
        else:
            break
    return constants_of(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--steps", type=int, default=15, help="steps of a fit, 15 by default; 0: the constants of today"
    )
    arguments = parser.parse_args()
    files = [cases(path) for path in arguments.files]
    together = [case for given in files for case in given]
    fitted = fit(together, sm90_model.CONSTANTS, arguments.steps)
    print(*(f"    {name}={getattr(fitted, name):.4g}," for name in _NAMES), sep="\n")
    _print_losses("loss", [(given, fitted) for given in files])
    if arguments.steps:
        apart = []
        for given in files:
            others = [case for case in together if case.layer != given[0].layer]
            apart.append((given, fit(others, fitted, arguments.steps)))
        _print_losses("without the shape itself", apart)


def _print_losses(what: str, of: Sequence[tuple[Sequence[Case], Constants]]) -> None:
    print(f"{what}, tokens: %")
    every: list[float] = []
    for given, constants in of:
        losses = [100 * loss(case, constants) for case in given]
        every += losses
        case = given[0]
        sizes = (case.layer.experts, case.layer.top_k, case.layer.hidden, case.layer.intermediate)
        cells = (f"{case.tokens}: {value:.1f}" for case, value in zip(given, losses, strict=True))
        print(f"{case.device.name}, {', '.join(map(str, sizes))} |", " | ".join(cells), flush=True)
    print(f"mean {statistics.mean(every):.2f} %, max {max(every):.1f} %")


if __name__ == "__main__":
    main()
