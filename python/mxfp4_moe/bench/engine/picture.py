"""The comparison as SVG: bars of tokens a second, ours above the engine's own, each pair on its own scale. Pure."""

from __future__ import annotations

from xml.sax.saxutils import escape

from .compare import Comparison

_WIDTH, _LEFT, _RIGHT, _ROW, _BAR = 760, 170, 140, 50, 16
_COLORS = ("#d1242f", "#57606a")
_FONT = "font-family='system-ui, sans-serif'"


def picture(comparison: Comparison) -> str:
    """Decode and prefill of both arms."""
    ours, own = comparison.arms
    run = ours.runs[0]
    pairs = [
        (what, a.median, b.median)
        for kind in ("decode", "prefill")
        for (what, a), (_, b) in zip(ours.rates(kind), own.rates(kind), strict=True)
    ]
    height = 84 + _ROW * len(pairs)
    names = (comparison.arms[0].name, f"vLLM {run['vllm']}")
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' {_FONT} font-size='13'>",
        f"<rect width='{_WIDTH}' height='{height}' fill='white'/>",
        _text(16, 26, f"Tokens a second in vLLM: {comparison.model} on {run['device']}", "font-size='16'"),
    ]
    for i, (name, color) in enumerate(zip(names, _COLORS, strict=True)):
        parts.append(f"<rect x='{16 + 150 * i}' y='40' width='12' height='12' fill='{color}'/>")
        parts.append(_text(34 + 150 * i, 51, name))
    room = _WIDTH - _LEFT - _RIGHT
    for row, (what, *rates) in enumerate(pairs):
        top = 68 + _ROW * row
        parts.append(_text(16, top + _BAR + 4, what))
        for i, (rate, color) in enumerate(zip(rates, _COLORS, strict=True)):
            y, width = top + i * (_BAR + 2), room * rate / max(rates)
            parts.append(f"<rect x='{_LEFT}' y='{y}' width='{width:.1f}' height='{_BAR}' fill='{color}'/>")
            parts.append(_text(_LEFT + width + 6, y + 13, f"{rate:,.0f}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, attributes: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' fill='#1f2328' {attributes}>{escape(words)}</text>"
