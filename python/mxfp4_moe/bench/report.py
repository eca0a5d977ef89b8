"""Results of one run: as JSON, and as the tables that people read. Pure; figures are derived here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .floors import Floor, floor, flops, weight_bytes
from .kernel_records import KernelTime
from .shapes import MoEShape
from .statistics import Summary

SCHEMA = 1
OURS = "mxfp4-moe"


class ResultsError(ValueError):
    """A file of results that cannot be read; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One implementation at one number of tokens."""

    implementation: str
    tokens: int
    tile: str  # the tile that was used, "" for rivals
    automatic: bool  # ours, with the tile that the package chose
    active_experts: float  # mean over the inputs
    us: Summary
    relative_error: float | None = None  # against ours, of rivals
    exact_error: float | None = (
        None  # against float64 with activations as they come (exact.py), at one number of tokens
    )
    kernels: tuple[KernelTime, ...] = ()

    @property
    def ours(self) -> bool:
        return self.implementation == OURS


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that was to be measured and was not, and why."""

    implementation: str
    tokens: int | None  # None: at all numbers of tokens
    reason: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run. `environment` is for people: device, driver, versions, date, method and command."""

    shape: MoEShape
    environment: Mapping[str, Any]
    ceilings: Mapping[str, float | None]  # Ceilings.as_dict()
    measurements: Sequence[Measurement]
    failures: Sequence[Failure] = ()
    rivals: Mapping[str, str] = field(default_factory=dict)  # name -> version and what it is, of those that were found
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        return sorted({m.tokens for m in self.measurements})

    @property
    def implementations(self) -> list[str]:
        """In the order of measuring: ours first."""
        return list(dict.fromkeys(m.implementation for m in self.measurements))

    def automatic(self, tokens: int) -> Measurement | None:
        """Ours with its own choice of a tile."""
        return next((m for m in self.measurements if m.ours and m.automatic and m.tokens == tokens), None)

    def best_tile(self, tokens: int) -> Measurement | None:
        """Ours with the fastest of the tiles that were measured."""
        mine = [m for m in self.measurements if m.ours and m.tokens == tokens]
        return min(mine, key=lambda m: m.us.median, default=None)

    def of(self, implementation: str, tokens: int) -> Measurement | None:
        """An implementation's measurement; of ours the automatic one, or the fastest where there is none."""
        if implementation == OURS:
            return self.automatic(tokens) or self.best_tile(tokens)
        return next((m for m in self.measurements if m.implementation == implementation and m.tokens == tokens), None)

    def best_rival(self, tokens: int) -> Measurement | None:
        rivals = [m for m in self.measurements if not m.ours and m.tokens == tokens]
        return min(rivals, key=lambda m: m.us.median, default=None)

    def figures(self, m: Measurement) -> Figures:
        """What a measurement comes to."""
        read, work = weight_bytes(self.shape, m.active_experts), flops(self.shape, m.tokens)
        copy, bf16 = self.ceilings.get("copy_gb_per_s"), self.ceilings.get("bf16_tflops")
        rates = (read / m.us.median / 1e3, work / m.us.median / 1e6)
        rival = self.best_rival(m.tokens)
        return Figures(
            gb_per_s=rates[0],
            tflops=rates[1],
            percent_of_copy=100 * rates[0] / copy if copy else None,
            percent_of_bf16=100 * rates[1] / bf16 if bf16 else None,
            floor=floor(read, work, gb_per_s=copy, tflops=bf16) if copy and bf16 else None,
            speedup=rival.us.median / m.us.median if rival else None,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "shape": self.shape.as_dict(),
            "ceilings": dict(self.ceilings),
            "rivals": dict(self.rivals),
            "host": dict(self.host),
            "measurements": [self._measurement_dict(m) for m in self.measurements],
            "failures": [vars(failure) for failure in self.failures],
        }

    def _measurement_dict(self, m: Measurement) -> dict[str, Any]:
        plain = {
            key: value
            for key, value in vars(m).items()
            if key not in ("us", "kernels", "relative_error", "exact_error")
        }
        figures = self.figures(m)
        return {
            **plain,
            "us": m.us.as_dict(),
            "relative_error": None if m.relative_error is None else round(m.relative_error, 5),
            "exact_error": None if m.exact_error is None else round(m.exact_error, 6),
            "gb_per_s": round(figures.gb_per_s, 1),
            "tflops": round(figures.tflops, 2),
            "kernels": [kernel.as_dict() for kernel in m.kernels],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """The results that `as_dict` made.

        Raises:
            ResultsError: another schema, or fields that are missing or of another type.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ResultsError(f"expected schema {SCHEMA}, got {data['schema']!r}")
            return cls(
                shape=MoEShape(**data["shape"]),
                environment=data["environment"],
                ceilings=data["ceilings"],
                rivals=data["rivals"],
                host=data["host"],
                measurements=tuple(_measurement(entry) for entry in data["measurements"]),
                failures=tuple(Failure(**entry) for entry in data["failures"]),
            )
        except ResultsError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ResultsError(f"not the results of a run: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a time comes to; None where a ceiling or a rival was not measured."""

    gb_per_s: float  # weight bytes of the experts that are hit, per second
    tflops: float
    percent_of_copy: float | None
    percent_of_bf16: float | None
    floor: Floor | None
    speedup: float | None  # the best rival's time over this one


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    return Measurement(
        implementation=entry["implementation"],
        tokens=entry["tokens"],
        tile=entry["tile"],
        automatic=entry["automatic"],
        active_experts=entry["active_experts"],
        us=Summary(**entry["us"]),
        relative_error=entry["relative_error"],
        exact_error=entry.get("exact_error"),  # files before it have none
        kernels=tuple(KernelTime(**kernel) for kernel in entry["kernels"]),
    )


def write(results: Results, path: Path) -> None:
    """Writes JSON that `read` takes.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        ResultsError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: {error}") from error
    try:
        return Results.from_dict(data)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from error


# ---- tables ----------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "tokens",
    "implementation",
    "tile",
    "us",
    "+-",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of bf16",
    "best rival / this",
)


def table(results: Results) -> str:
    """Every measurement in a line, for a terminal."""
    rows = [list(_COLUMNS)]
    for tokens in results.tokens:
        at = [m for m in results.measurements if m.tokens == tokens]
        for m in sorted(at, key=lambda m: (not m.ours, not m.automatic, m.us.median)):
            rows.append(_cells(results, m))
    return "\n".join(aligned(rows, left=(1, 2)))


def _cells(results: Results, m: Measurement) -> list[str]:
    figures = results.figures(m)
    return [
        str(m.tokens),
        m.implementation,
        (m.tile + (", auto" if m.automatic else "")) if m.ours else "",
        f"{m.us.median:.1f}",
        f"{50 * m.us.spread:.1f}%",
        f"{figures.gb_per_s:.0f}",
        _percent(figures.percent_of_copy),
        f"{figures.tflops:.1f}",
        _percent(figures.percent_of_bf16),
        "-" if figures.speedup is None or not m.ours else f"{figures.speedup:.2f}x",
    ]


def losses(results: Results) -> str:
    """What the automatic choice loses to the fastest of the tiles that were asked for, at each number of tokens; empty
    where there is no choice or no such tile.
    """
    lines = []
    for tokens in results.tokens:
        auto = results.automatic(tokens)
        asked = [m for m in results.measurements if m.ours and not m.automatic and m.tokens == tokens]
        if auto is None or not asked:
            continue
        best = min(asked, key=lambda m: m.us.median)
        # A tile against itself is two measurements of one thing: their difference is noise, and no loss.
        lost = 0.0 if best.tile == auto.tile else 100 * (auto.us.median / best.us.median - 1)
        lines.append(
            f"loss of auto at {tokens} tokens: {lost:.1f}% ({auto.tile} {auto.us.median:.1f} us, "
            f"best {best.tile} {best.us.median:.1f} us)"
        )
    return "\n".join(lines)


def kernel_table(results: Results) -> str:
    """The kernels of each call whose kernels were recorded."""
    rows = [["tokens", "implementation", "#", "kernel", "us", "own us"]]
    for m in results.measurements:
        for place, kernel in enumerate(m.kernels, start=1):
            who = m.implementation if m.automatic or not m.ours else f"{m.implementation} {m.tile}"
            times = (f"{kernel.duration_us:.1f}", f"{kernel.own_us:.1f}")
            rows.append([str(m.tokens), who, str(place), kernel.name, *times])
    return "\n".join(aligned(rows, left=(1, 3))) if len(rows) > 1 else ""


def markdown(results: Results) -> str:
    """One line for each number of tokens: ours, every rival, the floor, and how ours compares; and where tiles were
    measured beside the automatic choice, the fastest of them.
    """
    rivals = [name for name in results.implementations if name != OURS]
    tiles = any(m.ours and not m.automatic for m in results.measurements) and any(
        m.automatic for m in results.measurements
    )
    head = ["tokens", "experts hit", f"{OURS} (us)", "tile", *(["fastest tile (us)"] * tiles)]
    head += [*(f"{name} (us)" for name in rivals), "floor (us)", "of copy speed", "TFLOP/s", "best rival / ours"]
    lines = [head, [":--" if "tile" in name else "--:" for name in head]]
    for tokens in results.tokens:
        mine, best = results.of(OURS, tokens), results.best_tile(tokens)
        if mine is None or best is None:
            continue
        figures = results.figures(mine)
        others = [results.of(name, tokens) for name in rivals]
        lines.append(
            [
                *(str(tokens), f"{mine.active_experts:.1f}", f"{mine.us.median:.1f}", mine.tile),
                *([f"{best.tile} {best.us.median:.1f}"] * tiles),
                *("-" if m is None else f"{m.us.median:.1f}" for m in others),
                "-" if figures.floor is None else f"{figures.floor.us:.1f}",
                _percent(figures.percent_of_copy),
                f"{figures.tflops:.1f}",
                "-" if figures.speedup is None else f"{figures.speedup:.2f}x",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summary(results: Results) -> str:
    """Where and how it was measured, the ceilings, host times, and what is missing and why."""
    environment = results.environment
    lines = [results.shape.words]
    device = [environment.get("device"), environment.get("driver") and f"driver {environment['driver']}"]
    software = [
        environment.get(key) and f"{name} {environment[key]}"
        for key, name in (("cuda", "CUDA"), ("torch", "torch"), ("mxfp4_moe", "mxfp4-moe"))
    ]
    lines.append(", ".join(str(part) for part in (*device, *software, environment.get("date")) if part))
    ceilings = [
        f"{name} {value:,.0f} {unit}"
        for key, name, unit in (
            ("copy_gb_per_s", "copy (read + write)", "GB/s"),
            ("bf16_tflops", "bf16 matmul", "TFLOP/s"),
            ("f16_tflops", "f16 matmul", "TFLOP/s"),
            ("fp8_tflops", "FP8 matmul", "TFLOP/s"),
        )
        if (value := results.ceilings.get(key)) is not None
    ]
    if ceilings:
        lines.append("measured ceilings: " + ", ".join(ceilings))
    if results.host:
        lines.append("host: " + ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in results.host.items()))
    errors = {m.implementation: m for m in reversed(results.measurements) if m.exact_error is not None}
    if errors:
        said = ", ".join(f"{name} {m.exact_error:.2%}" for name, m in reversed(errors.items()))
        (tokens,) = {m.tokens for m in errors.values()}
        lines.append(f"relative error against float64 with unquantized activations, {tokens} tokens: {said}")
    lines += [f"{name}, {words}" for name, words in results.rivals.items()]
    alike: dict[tuple[str, str], list[int | None]] = {}  # an implementation that fails once mostly fails at every size
    for failure in results.failures:
        alike.setdefault((failure.implementation, failure.reason), []).append(failure.tokens)
    for (implementation, reason), sizes in alike.items():
        where = "" if None in sizes else f" at {', '.join(map(str, sizes))} tokens"
        lines.append(f"{implementation}{where} is left out: {reason}")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Lines of a table: the columns of `left` start together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if place in left else c.rjust(w) for place, (c, w) in cells).rstrip())
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%"
