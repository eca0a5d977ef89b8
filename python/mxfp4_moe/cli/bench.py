"""Times the layer on this machine's GPU beside the rivals that are installed, and what the GPU could do at best.

The layer is called through the public API, captured into CUDA graphs and replayed behind an emptied L2 cache. GB/s
count the weight bytes of the experts that are hit; "of copy" is a part of the measured device-to-device copy bandwidth,
"of bf16" of the measured rate of a large bfloat16 matmul.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .._install.troubles import DOCTOR, words
from ..bench import picture, report, shapes
from ..bench.rivals import choose
from ..tiles import load_manifest
from . import bench_engine

if TYPE_CHECKING:
    from ..bench.run import Plan, TileMN

HELP = "time the layer on this GPU, beside its rivals and the GPU's own limits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    parser.add_argument(
        "--tile", default="auto", help="auto (the package's choice), all, or M,N; several: auto;8,128;64,128"
    )
    parser.add_argument(
        "--activation-format", default="mxfp8", metavar="F", help="of our calls: mxfp8 (default), bf16, ... (fused_moe)"
    )
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel of our calls")
    parser.add_argument(
        "--rivals", default="all", help="all (those that are found), none, or names with commas between"
    )
    parser.add_argument(
        "--rivals-path", type=Path, action="append", default=[], metavar="DIR", help="a folder with rivals' packages"
    )
    parser.add_argument(
        "--include-routing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time from the router's logits on (default), or without the router and without rivals",
    )
    parser.add_argument("--host", action=argparse.BooleanOptionalAction, default=True, help="host time and first call")
    parser.add_argument("--replays", type=int, default=24, help="timed replays per number, 24 by default")
    parser.add_argument("--inputs", type=int, default=4, help="different inputs that take turns, 4 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write FILE (time) and FILE with -roofline in its name, as SVG"
    )
    bench_engine.add_arguments(parser)


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """What bench and tune share."""
    tokens = ",".join(map(str, shapes.DEFAULT_TOKENS))
    parser.add_argument("--tokens", default=tokens, help=f"numbers of tokens, {tokens} by default")
    parser.add_argument(
        "--preset",
        choices=list(shapes.PRESETS),
        default=shapes.DEFAULT_PRESET,
        help=f"the layer's shape, {shapes.DEFAULT_PRESET} by default; the sizes below take the place of its own",
    )
    for name in ("experts", "top-k", "hidden", "intermediate"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", type=int, default=0, help="the GPU's number, 0 by default")


def run(arguments: argparse.Namespace) -> int:
    if arguments.engine:
        return bench_engine.run(arguments, Stopwatch())
    refusal = gpu_refusal(arguments.device)
    if refusal:
        print(f"mxfp4-moe bench: {refusal}", file=sys.stderr)
        return 2
    import torch

    from ..bench import run as bench_run

    def save(results: report.Results) -> None:
        if arguments.json:
            report.write(results, arguments.json)

    try:
        plan = _plan(arguments)
        results = bench_run.run(plan, torch.device("cuda", arguments.device), Stopwatch(), save)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mxfp4-moe bench: {error}", file=sys.stderr)
        return 2
    print(report.summary(results), report.table(results), sep="\n\n")
    if lost := report.losses(results):
        print(f"\n{lost}")
    if plan.kernels:
        print(f"\n{report.kernel_table(results)}")
    try:
        if arguments.picture:
            arguments.picture.write_text(picture.time_picture(results), encoding="utf-8")
            roofline_path(arguments.picture).write_text(picture.roofline_picture(results), encoding="utf-8")
    except OSError as error:
        print(f"mxfp4-moe bench: {error}", file=sys.stderr)
        return 2
    return 0


def roofline_path(picture: Path) -> Path:
    """Beside the picture: layer.svg has layer-roofline.svg."""
    return picture.with_name(f"{picture.stem}-roofline{picture.suffix}")


def without_folder(argument: str) -> str:
    """An argument as the results keep it: results are shared, and folders tell of the machine."""
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if "/" in value else argument


def gpu_refusal(index: int) -> str:
    """Why nothing can be timed here, in one sentence; empty when it can."""
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever it likes
        return f"a GPU is timed through torch, which cannot be imported: {words(error)}; {DOCTOR}"
    if torch.version.cuda is None:
        return f"a GPU is needed, and torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "a GPU is needed, and torch sees none on this machine; `mxfp4-moe doctor` says more"
    if not 0 <= index < torch.cuda.device_count():
        return f"--device: expected 0 to {torch.cuda.device_count() - 1}, got {index}"
    return ""


class Stopwatch:
    """Progress on stderr, each line with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {line}", file=sys.stderr, flush=True)


def tiles_of(text: str) -> list[TileMN | None]:
    """The tiles that the option names; None stands for the package's own choice, which "all" has too.

    Raises:
        ValueError: no tile, or one that is not in the manifest.
    """
    manifest = [tile.mn for tile in load_manifest().tiles]
    if text == "all":
        return [None, *manifest]
    tiles: list[TileMN | None] = []
    for part in text.split(";"):
        if part.strip() == "auto":
            tiles.append(None)
            continue
        sizes = part.split(",")
        if len(sizes) != 2 or not all(size.strip().isdecimal() for size in sizes):
            raise ValueError(f"tile: expected auto, all, or M,N such as 64,128, got {text!r}")
        pair = (int(sizes[0]), int(sizes[1]))
        if pair not in manifest:
            raise ValueError(f"tile: expected one of {'; '.join(f'{m},{n}' for m, n in manifest)}, got {part!r}")
        tiles.append(pair)
    return list(dict.fromkeys(tiles))


def shape_of(arguments: argparse.Namespace) -> shapes.MoEShape:
    """The shape that the options name."""
    return shapes.shape_from(
        arguments.preset, arguments.experts, arguments.top_k, arguments.hidden, arguments.intermediate
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    from ..bench.run import Plan

    rivals = choose(arguments.rivals)
    if not arguments.include_routing:
        if arguments.rivals not in ("all", "none"):
            raise ValueError("rivals: they start at the logits, so --no-include-routing goes with --rivals none only")
        rivals = ()
    for name in ("replays", "inputs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(arguments, name)}")
    for folder in arguments.rivals_path:
        if not folder.is_dir():
            raise ValueError(f"rivals-path: {folder} is no folder")
    for name, file in (("json", arguments.json), ("picture", arguments.picture)):
        if file and not file.absolute().parent.is_dir():
            raise ValueError(f"{name}: {file} would lie in a folder that does not exist")
    return Plan(
        shape=shape_of(arguments),
        tokens=shapes.parse_tokens(arguments.tokens),
        tiles=tiles_of(arguments.tile),
        rivals=rivals,
        rival_folders=[folder.resolve() for folder in arguments.rivals_path],
        kernels=arguments.kernels,
        include_routing=arguments.include_routing,
        host=arguments.host,
        replays=arguments.replays,
        inputs=arguments.inputs,
        command=["mxfp4-moe", *map(without_folder, sys.argv[1:])],
        activation_format=arguments.activation_format,
    )
