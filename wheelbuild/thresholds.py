"""ci/thresholds.toml: limits of what the build makes. A figure beyond its limit fails the build with a sentence.

`python -m wheelbuild.thresholds --update build_report.json` writes the tables of what was measured anew: the
instructions per MMA of each tile in that report, and a twentieth more for another release of ptxas. What is set by hand
stays; an arch with a table there, though it be empty, is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wheelbuild import ROOT, BuildError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

THRESHOLDS = Path("ci/thresholds.toml")
SLACK = 1.05
_MEASURED = "[instructions_per_mma.measured]"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    instructions_per_mma: Mapping[str, Mapping[str, Mapping[str, float]]]  # by arch, pair of formats and tile
    peak_mb: float  # of one run of nvcc
    wheel_bytes: int

    def limit(self, arch: str, pair: str, tile: str) -> float | None:
        """Instructions per MMA in the main loop of a tile's kernel; None where there is no limit."""
        return self.instructions_per_mma.get(arch, {}).get(pair, {}).get(tile)


def parse_thresholds(text: str) -> Thresholds:
    """The limits in `text`; what is set by hand wins over what was measured."""
    try:
        data = tomllib.loads(text)
        tables = data["instructions_per_mma"]
        measured, by_hand = tables["measured"], tables["set"]
        limits: dict[str, dict[str, dict[str, float]]] = {}
        for table in (measured, by_hand):
            for arch, pairs in table.items():
                for pair, of_tiles in pairs.items():
                    known = limits.setdefault(arch, {}).setdefault(pair, {})
                    known.update({tile: float(limit) for tile, limit in of_tiles.items()})
        return Thresholds(
            instructions_per_mma=limits,
            peak_mb=data["compile"]["peak_mb"],
            wheel_bytes=data["wheel"]["bytes"],
        )
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError) as error:
        raise BuildError(f"{THRESHOLDS}: not what wheelbuild.thresholds reads: {error!r}") from error


def load_thresholds() -> Thresholds:
    return parse_thresholds((ROOT / THRESHOLDS).read_text(encoding="utf-8"))


def check_wheel(wheel: Path, thresholds: Thresholds) -> None:
    """BuildError when the wheel is larger than allowed."""
    size = wheel.stat().st_size
    if size > thresholds.wheel_bytes:
        raise BuildError(f"{wheel.name} has {size:,} bytes, at most {thresholds.wheel_bytes:,} allowed ({THRESHOLDS})")


def updated(text: str, report: Mapping[str, Any]) -> str:
    """`text` with the measured limits of the archs and pairs it has, and of every tile of `report` without one by hand.

    A profile that lacks a pair leaves that pair's limits as they are.
    """
    tables = tomllib.loads(text)["instructions_per_mma"]
    lines = []
    for arch, pair in ((arch, pair) for arch, pairs in tables["set"].items() for pair in pairs):
        lines += ["", f'[instructions_per_mma.measured."{arch}".{pair}]']
        kernels = {name: tile["archs"].get(arch, {}).get(pair) for name, tile in report["tiles"].items()}
        if not any(kernels.values()):
            known = tables.get("measured", {}).get(arch, {}).get(pair, {})
            lines += [f"{name} = {limit}" for name, limit in known.items()]
        for name, built in kernels.items():
            if name not in tables["set"][arch][pair] and built is not None:
                figure = built["main_loop"]["instructions_per_mma"]
                lines.append(f"{name} = {math.ceil(round(figure * SLACK * 10, 6)) / 10}")
    head, marker, _ = text.partition(_MEASURED)
    return head + marker + "\n" + "\n".join(lines[1:]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, required=True, metavar="REPORT", help="build_report.json of a build")
    path = ROOT / THRESHOLDS
    report = json.loads(parser.parse_args().update.read_text(encoding="utf-8"))
    path.write_text(updated(path.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
