"""docs/performance.md: its tables come from the package's own functions and from committed results.

`PYTHONPATH=python python -m wheelbuild.docs.performance` writes the parts between `<!-- generated: NAME -->` and
`<!-- end -->`, and the pictures beside each file of results in docs/performance; `--check` says whether they are
current. Everything else on the page is written by hand and left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

from mxfp4_moe._choice import cost_model
from mxfp4_moe._choice.facts import PUBLISHED, DeviceFacts, Layer
from mxfp4_moe.bench import floors, picture, report
from mxfp4_moe.bench.shapes import DEFAULT_TOKENS, PRESETS, MoEShape
from mxfp4_moe.tiles import MXFP4_MXFP8, PAIRS, Tile, load_manifest
from wheelbuild import ROOT

DOCUMENT = Path("docs/performance.md")
RESULTS = Path("docs/performance")
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
_KERNELS_AT = (1, 64, 1024)
_MODEL_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_HALF_RATE = 1024.0  # flops a clock and SM: what SM12x's MMA would do if FP4 operands took it twice as long
_RATE_GPUS = ("NVIDIA GeForce RTX 5090", "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GB10")
_RATE_LAYERS = (
    (32, 4, 2880, 2880),
    (128, 4, 2880, 2880),
    (128, 8, 2048, 768),
    (256, 8, 7168, 256),
    (256, 8, 3072, 1536),
)
_RATE_TOKENS = (64, 256, 512, 1024, 2048, 4096, 16384)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Markdown; columns to the right but for those of `left`."""
    rule = [":--" if place in left else "--:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)) + "\n"


def floors_block() -> str:
    """Bytes, flops and memory floors of the presets."""
    devices = [
        device for device in PUBLISHED if device.name in ("NVIDIA H200", "NVIDIA GeForce RTX 5090", "NVIDIA GB10")
    ]
    parts = []
    for shape in PRESETS.values():
        head = ["tokens", "experts hit", "weights read (MB)", "GFLOP", "flops per byte"]
        head += [f"{device.name.removeprefix('NVIDIA ')} (us)" for device in devices]
        parts.append(f"**{shape.words}**; one expert has {floors.expert_bytes(shape):,} bytes.\n")
        parts.append(table(head, [_floor_row(shape, tokens, devices) for tokens in DEFAULT_TOKENS]))
    return "\n".join(parts)


def _floor_row(shape: MoEShape, tokens: int, devices: Sequence[DeviceFacts]) -> list[str]:
    active = floors.expected_active_experts(shape, tokens)
    read, work = floors.weight_bytes(shape, active), floors.flops(shape, tokens)
    return [
        *(str(tokens), f"{active:.1f}", f"{read / 1e6:,.1f}", f"{work / 1e9:,.1f}", f"{work / read:.1f}"),
        *(f"{read / device.gb_per_s / 1e3:,.0f}" for device in devices),
    ]


def _gpt_oss() -> Layer:
    shape = PRESETS["gpt-oss-120b"]
    return Layer(experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, intermediate=shape.intermediate)


def _modelled(device: DeviceFacts, pair: str) -> list[tuple[Tile, float]]:
    """The tile that the model chooses at each of `_MODEL_TOKENS`, and its microseconds."""
    manifest, layer, chosen = load_manifest(), _gpt_oss(), []
    tiles = [tile for tile in manifest.tiles if pair in manifest.narrowed.get(tile, (pair,))]
    for count in _MODEL_TOKENS:
        tile = cost_model.choose(count, layer, device, tiles, pair=pair)
        chosen.append((tile, cost_model.layer_us(tile, device, layer, count, pair=pair)))
    return chosen


def model_block() -> str:
    """What the cost model chooses for gpt-oss-120b on GPUs that were never measured."""
    rows = []
    for device in (facts for facts in PUBLISHED if facts.capability[0] == 12):
        about = f"{device.sms} SMs, {device.gb_per_s:,.0f} GB/s, {device.ghz} GHz"
        cells = [f"{tile.m} x {tile.n}: {us:,.0f}" for tile, us in _modelled(device, MXFP4_MXFP8)]
        rows.append([device.name.removeprefix("NVIDIA "), about, *cells])
    return table(["GPU", "published", *(f"T = {count}" for count in _MODEL_TOKENS)], rows, left=range(9))


def pairs_block() -> str:
    """The same of every other pair of formats, beside the first's: tile, microseconds, and how many times its."""
    rows = []
    for device in (facts for facts in PUBLISHED if facts.capability[0] == 12):
        first = _modelled(device, MXFP4_MXFP8)
        for pair in PAIRS[1:]:
            cells = [
                f"{tile.m} x {tile.n}: {us:,.0f} ({us / usual:.2f})"
                for (tile, us), (_, usual) in zip(_modelled(device, pair), first, strict=True)
            ]
            rows.append([device.name.removeprefix("NVIDIA "), f"`{pair}`", *cells])
    return table(["GPU", "pair", *(f"T = {count}" for count in _MODEL_TOKENS)], rows, left=range(9))


def rates_block() -> str:
    """What the cost model chooses at half of the MMA's rate and at the rate, times at the rate, and what either choice
    costs where the other is right.
    """
    tiles = load_manifest().tiles
    half = dataclasses.replace(cost_model.ARCH_MODELS[12], mma_flops_per_clock=_HALF_RATE)
    rows = []
    excess, excess_at_half = 0.0, 0.0
    for device in (facts for facts in PUBLISHED if facts.name in _RATE_GPUS):
        for experts, top_k, hidden, intermediate in _RATE_LAYERS:
            layer = Layer(experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)
            cells = []
            for count in _RATE_TOKENS:
                after = cost_model.choose(count, layer, device, tiles)
                with mock.patch.dict(cost_model.ARCH_MODELS, {12: half}):
                    before = cost_model.choose(count, layer, device, tiles)
                    slow = [cost_model.layer_us(tile, device, layer, count) for tile in (before, after)]
                us = [cost_model.layer_us(tile, device, layer, count) for tile in (before, after)]
                excess, excess_at_half = max(excess, us[0] / us[1] - 1), max(excess_at_half, slow[1] / slow[0] - 1)
                words = [f"{tile.m} x {tile.n}: {time:,.0f}" for tile, time in zip((before, after), us, strict=True)]
                cells.append(" -> ".join(words[before == after :]))
            rows.append([device.name.removeprefix("NVIDIA "), f"{experts}, {top_k}, {hidden}, {intermediate}", *cells])
    head = ["GPU", "E, k, H, I", *(f"T = {count}" for count in _RATE_TOKENS)]
    costs = (
        f"At the full rate the choices for half of it are up to {excess:.0%} slower; at half of it the others are up "
        f"to {excess_at_half:.0%} slower."
    )
    return f"{table(head, rows, left=range(len(head)))}\n{costs}\n"


def results_block(runs: Mapping[str, report.Results]) -> str:
    """Every committed run: where, the table, the pictures, and the kernels of a few calls."""
    if not runs:
        return "No run is committed yet.\n"
    parts = []
    for name, run in runs.items():
        activations = run.environment.get("activation_format", "mxfp8")  # older files have none and are of MXFP8
        words = run.shape.name or run.shape.words
        parts.append(f"### {words}, {activations}, on {run.environment.get('device', 'an unknown GPU')}\n")
        parts.append("\n".join(f"- {line}" for line in report.summary(run).splitlines()[1:]) + "\n")
        parts.append(f"- {run.environment.get('method', '')}\n- `{run.environment.get('command', '')}`\n")
        parts.append(report.markdown(run))
        folder = RESULTS.name
        parts.append(f"![Time against tokens]({folder}/{name}.svg)\n\n![Roofline]({folder}/{name}-roofline.svg)\n")
        kernels = _kernel_rows(run)
        if kernels:
            parts.append("Kernels of a call; `own` is by how much a kernel moved the end on, see `mxfp4-moe bench`.\n")
            parts.append(table(["tokens", "#", "kernel", "us", "own us"], kernels, left=(2,)))
    return "\n".join(parts)


def _kernel_rows(run: report.Results) -> list[list[str]]:
    rows = []
    for tokens in _KERNELS_AT:
        mine = run.automatic(tokens)
        for place, kernel in enumerate(mine.kernels if mine else (), start=1):
            times = (f"{kernel.duration_us:.1f}", f"{kernel.own_us:.1f}")
            rows.append([str(tokens), str(place), f"`{kernel.name}`", *times])
    return rows


def committed(root: Path) -> dict[str, report.Results]:
    """The results in the repository by name, in order.

    Raises:
        report.ResultsError: a file of results that cannot be read.
    """
    return {path.stem: report.read(path) for path in sorted((root / RESULTS).glob("*.json"))}


def rendered(page: str, runs: Mapping[str, report.Results]) -> str:
    """The page with its generated parts as they should be.

    Raises:
        ValueError: a part that nobody knows how to generate, or one that is missing.
    """
    blocks: dict[str, Callable[[], str]] = {
        "floors": floors_block,
        "model": model_block,
        "model_pairs": pairs_block,
        "rates": rates_block,
        "results": lambda: results_block(runs),
    }
    names = [match[2] for match in _BLOCK.finditer(page)]
    if sorted(names) != sorted(blocks):
        raise ValueError(
            f"{DOCUMENT}: expected the generated parts {', '.join(sorted(blocks))}, got {', '.join(names)}"
        )
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match[2]]()}\n{match[3]}", page)


def pictures(runs: Mapping[str, report.Results]) -> dict[str, str]:
    """File name -> SVG, two for each run."""
    drawn = {}
    for name, run in runs.items():
        drawn[f"{name}.svg"] = picture.time_picture(run)
        drawn[f"{name}-roofline.svg"] = picture.roofline_picture(run)
    return drawn


def stale(root: Path) -> list[str]:
    """The files that are not as they should be."""
    runs = committed(root)
    files = {DOCUMENT: rendered((root / DOCUMENT).read_text(encoding="utf-8"), runs)}
    files |= {RESULTS / name: text for name, text in pictures(runs).items()}
    return [
        str(path)
        for path, text in files.items()
        if not (root / path).exists() or (root / path).read_text(encoding="utf-8") != text
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is not current")
    if parser.parse_args().check:
        for path in stale(ROOT):
            print(f"{path} is not current: PYTHONPATH=python python -m wheelbuild.docs.performance", file=sys.stderr)
        return 1 if stale(ROOT) else 0
    runs = committed(ROOT)
    page = ROOT / DOCUMENT
    page.write_text(rendered(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    for name, text in pictures(runs).items():
        (ROOT / RESULTS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
