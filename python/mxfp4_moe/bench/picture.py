"""Pictures of one run as SVG, written by hand: a roofline, and time against tokens. Pure; no plotting library.

Both have logarithmic axes and one line for each implementation. The roofline's x is flops per weight byte read, its y
flops per second; the roofs are the measured copy bandwidth and matmul rates. The other's grey line is the floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .floors import flops, weight_bytes
from .report import Results

_COLORS = ("#d1242f", "#0969da", "#1a7f37", "#8250df", "#bf8700", "#0a7ea4", "#57606a")
_WIDTH, _HEIGHT = 880, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 210, 56, 60
_FONT = "font-family='system-ui, sans-serif'"

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in the data's units, with a name for the legend; `guide` for roofs and floors, which have no marks."""

    name: str
    points: Sequence[Point]
    guide: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A logarithmic axis from `low` to `high`, with ticks at `marks`, or at round numbers."""

    title: str
    low: float
    high: float
    marks: Sequence[float] = ()

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"axis {self.title!r}: expected 0 < low < high, got {self.low} and {self.high}")

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """The marks; else 1, 2 and 5 times powers of ten that lie on the axis, of a long one the powers alone."""
        if self.marks:
            return list(self.marks)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if self.high / self.low < 1e4 else (1,)
        return [v for d in decades for f in factors if self.low <= (v := f * 10.0**d) <= self.high]


def time_picture(results: Results) -> str:
    """Microseconds against tokens."""
    lines = []
    for name in results.implementations:
        measured = [m for tokens in results.tokens if (m := results.of(name, tokens)) is not None]
        lines.append(Line(name=name, points=[(m.tokens, m.us.median) for m in measured]))
    floors = []
    for tokens in results.tokens:
        mine = results.of(results.implementations[0], tokens)
        bound = results.figures(mine).floor if mine else None
        if bound:
            floors.append((float(tokens), bound.us))
    if floors:
        lines.append(Line(name="floor", points=floors, guide=True))
    return _draw("Time of one MoE layer", _subtitle(results), "tokens", "microseconds", lines, results.tokens)


def roofline_picture(results: Results) -> str:
    """Achieved flops per second against flops per byte, under the measured ceilings."""
    lines = []
    for name in results.implementations:
        points = []
        for tokens in results.tokens:
            if m := results.of(name, tokens):
                work, read = flops(results.shape, tokens), weight_bytes(results.shape, m.active_experts)
                points.append((work / read, results.figures(m).tflops))
        lines.append(Line(name=name, points=points))
    intensities = [x for line in lines for x, _ in line.points]
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    copy = results.ceilings.get("copy_gb_per_s")
    for key, name in (("bf16_tflops", "bf16 matmul"), ("fp8_tflops", "FP8 matmul")):
        rate = results.ceilings.get(key)
        if copy and rate:
            ridge = rate / copy * 1e3
            corners = [low, *([ridge] if low < ridge < high else []), high]
            roof = [(x, min(x * copy / 1e3, rate)) for x in corners]
            lines.append(Line(name=f"copy, {name}", points=roof, guide=True))
    title = "flops per weight byte of the experts that are hit"
    return _draw("Roofline", _subtitle(results), title, "TFLOP/s", lines)


def _subtitle(results: Results) -> str:
    about = [results.shape.words, results.environment.get("device"), results.environment.get("date")]
    return ", ".join(str(part) for part in about if part)


def _axis(title: str, values: Sequence[float], marks: Sequence[float] = ()) -> Axis:
    return Axis(title=title, low=min(values) / 1.25, high=max(values) * 1.25, marks=marks)


def _draw(
    title: str, subtitle: str, x_title: str, y_title: str, lines: Sequence[Line], x_marks: Sequence[float] = ()
) -> str:
    lines = [line for line in lines if line.points]
    if not lines:
        raise ValueError("lines: expected at least one with a point, got none")
    x_axis = _axis(x_title, [x for line in lines for x, _ in line.points], x_marks)
    y_axis = _axis(y_title, [y for line in lines for _, y in line.points])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(point: Point) -> Point:
        x = _LEFT + (right - _LEFT) * x_axis.place(point[0])
        return x, bottom - (bottom - _TOP) * y_axis.place(point[1])

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' {_FONT} font-size='13'>",
        f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#ffffff'/>",
        _text(_LEFT, 24, title, "font-size='17' font-weight='600'"),
        _text(_LEFT, 42, subtitle, "fill='#57606a' font-size='12'"),
    ]
    for value in x_axis.ticks():
        x, _ = at((value, y_axis.low))
        parts.append(_stroke([(x, _TOP), (x, bottom)], "#eaeef2", 1))
        parts.append(_text(x, bottom + 18, f"{value:g}", "text-anchor='middle'"))
    for value in y_axis.ticks():
        _, y = at((x_axis.low, value))
        parts.append(_stroke([(_LEFT, y), (right, y)], "#eaeef2", 1))
        parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", "text-anchor='end'"))
    parts.append(_stroke([(_LEFT, _TOP), (_LEFT, bottom), (right, bottom)], "#24292f", 1))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 16, x_title, "text-anchor='middle'"))
    middle = (_TOP + bottom) / 2
    parts.append(_text(20, middle, y_title, f"text-anchor='middle' transform='rotate(-90 20 {middle:.1f})'"))

    shown = 0
    for place, line in enumerate(lines):
        color = "#8c959f" if line.guide else _COLORS[shown % len(_COLORS)]
        shown += not line.guide
        points = [at(point) for point in line.points]
        parts.append(_stroke(points, color, 1.5 if line.guide else 2, dashed=line.guide))
        if not line.guide:
            parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='{color}'/>" for x, y in points]
        y = _TOP + 10 + 20 * place
        parts.append(_stroke([(right + 14, y), (right + 38, y)], color, 2, dashed=line.guide))
        parts.append(_text(right + 44, y + 4, line.name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, attributes: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {attributes}>{escape(words)}</text>"


def _stroke(points: Sequence[Point], color: str, width: float, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = " stroke-dasharray='6 4'" if dashed else ""
    return f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='{width}'{dash}/>"
