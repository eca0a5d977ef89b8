"""Measures which tile is fastest on this machine's GPU, and writes the table that the choice of a tile reads.

Every tile is timed at every number of tokens, as `mxfp4-moe bench` times the layer. The table goes to the cache
directory (MXFP4_MOE_CACHE_DIR moves it), beside what was tuned before for other layers, and counts from the next start
of a process. It is for this GPU and this version of the wheel. Every tile gives the same bits, so it changes nothing
but speed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from .._choice import tuned
from .._choice.facts import DeviceFacts, from_properties
from .._choice.tuned import TunedLayer
from ..bench import shapes
from .bench import Stopwatch, add_shape_arguments, gpu_refusal, shape_of

HELP = "measure the tiles on this GPU and keep a table of the fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    parser.add_argument("--replays", type=int, default=40, help="timed replays of the fastest tiles, 40 by default")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a file, or a folder in which the table gets the device's name"
    )


def run(arguments: argparse.Namespace) -> int:
    refusal = gpu_refusal(arguments.device)
    if refusal:
        return _refuse(refusal)
    import torch

    from ..bench import tune

    device = torch.device("cuda", arguments.device)
    facts = from_properties(torch.cuda.get_device_properties(device))
    try:
        shape, tokens = shape_of(arguments), shapes.parse_tokens(arguments.tokens)
        if arguments.replays < 1:
            raise ValueError(f"replays: expected at least 1, got {arguments.replays}")
        path = output_path(arguments.output, facts)
        old = layers_before(path, facts)
        measured = tune.run(shape, tokens, facts, device, arguments.replays, Stopwatch())
    except (ValueError, RuntimeError) as error:
        return _refuse(str(error).splitlines()[0])
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    layers = tune.merged(old, tune.tuned_layer(tune.layer_of(shape), measured))
    print(f"{shape.words}\n{facts.arch_words}\n\n{tune.table(measured)}")
    try:
        tuned.write(path, tuned.as_dict(facts, layers, date))
    except OSError as error:
        return _refuse(f"{path} cannot be written ({error.strerror}): name another place with --output")
    print(f"\nwritten to {path}")
    return 0


def output_path(given: Path | None, facts: DeviceFacts) -> Path:
    """Where the table goes: a file as it is named, a folder with the device's file in it, else the cache directory.

    Raises:
        ValueError: nothing was named, and the user has no home.
    """
    if given is None:
        path = tuned.user_path(facts)
        if path is None:
            raise ValueError("there is no cache directory: set MXFP4_MOE_CACHE_DIR, or name a file with --output")
        return path
    return given / tuned.file_name(facts) if given.is_dir() else given


def layers_before(path: Path, facts: DeviceFacts) -> list[TunedLayer]:
    """What the table has of other layers; one that cannot be used is replaced as a whole, which stderr says."""
    try:
        table = tuned.read(path, facts, same_wheel=True)
    except tuned.TunedError as error:
        print(f"mxfp4-moe tune: {error}; it will be replaced", file=sys.stderr)
        return []
    return list(table.layers) if table else []


def _refuse(sentence: str) -> int:
    print(f"mxfp4-moe tune: {sentence}", file=sys.stderr)
    return 2
