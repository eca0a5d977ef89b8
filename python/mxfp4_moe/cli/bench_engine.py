"""`mxfp4-moe bench --engine vllm`: a whole engine with our kernels and with its own."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..bench.engine import picture
from ..bench.engine.compare import ArmError, Load, compare, table

_RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("an engine in place of the layer")
    group.add_argument("--engine", choices=["vllm"], help="time this engine with our kernels and with its own")
    group.add_argument(
        "--model",
        default=_RANDOM,
        help="the model's folder; random (default) writes a gpt-oss-20b of 8 layers with random weights",
    )
    group.add_argument(
        "--engine-arguments", default="{}", metavar="JSON", help="""for vLLM's LLM: '{"tensor_parallel_size": 2}'"""
    )
    group.add_argument(
        "--rounds", type=int, help="runs of each arm, in turn: A B, then B A, and so on (default: 2; with --dry 1)"
    )
    group.add_argument("--dry", action="store_true", help="so little that a CPU does it: whether it runs, not how fast")


def run(arguments: argparse.Namespace, progress: Callable[[str], None]) -> int:
    """Measures both, prints the table, writes what was asked for."""
    try:
        keywords = json.loads(arguments.engine_arguments)
        if not isinstance(keywords, dict):
            raise ValueError(f"engine-arguments: expected a JSON object, got {arguments.engine_arguments}")
        load = Load.dry() if arguments.dry else Load()
        if arguments.rounds is not None:
            if arguments.rounds < 1:
                raise ValueError(f"rounds: expected at least 1, got {arguments.rounds}")
            load = replace(load, rounds=arguments.rounds)
        with _model(arguments.model, arguments.dry, progress) as model:
            result = compare(model, load, keywords, progress)
        print(table(result))
        if arguments.json:
            arguments.json.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
        if arguments.picture:
            arguments.picture.write_text(picture.picture(result), encoding="utf-8")
    except (ValueError, ArmError, OSError) as error:
        print(f"mxfp4-moe bench: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _model(name: str, small: bool, progress: Callable[[str], None]) -> Iterator[Path]:
    if name != _RANDOM:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: expected a folder with config.json, got {name}")
        yield folder.resolve()
        return
    from ..bench.engine.random_model import Sizes, write_gpt_oss

    sizes = Sizes()
    if small:
        sizes = Sizes(layers=2, experts=8, hidden=128, intermediate=96, heads=4, kv_heads=2, vocabulary=512)
    with tempfile.TemporaryDirectory() as temporary:
        progress(f"writing a random gpt-oss: {sizes}")
        yield write_gpt_oss(Path(temporary) / "random-gpt-oss", sizes)
