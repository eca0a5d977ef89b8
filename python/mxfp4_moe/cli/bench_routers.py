"""Times the routers of the models in docs/models.md on this machine's GPU, from logits to topk_weights and topk_ids.

Beside ours: torch's operations as models write them, the same under torch.compile, and vLLM's kernels where its library
is found. The layer with its router inside is timed by `mxfp4-moe bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..bench import shapes
from .bench import Stopwatch, gpu_refusal, without_folder

HELP = "time the routers of known models on this GPU, beside torch's code and vLLM's kernels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tokens = ",".join(map(str, shapes.DEFAULT_TOKENS))
    parser.add_argument("--tokens", default=tokens, help=f"numbers of tokens, {tokens} by default")
    parser.add_argument("--models", default="all", help="all, or names of docs/models.md with semicolons between")
    parser.add_argument("--rivals", default="all", help="all (torch, torch.compile, vllm), none, or some of them")
    parser.add_argument(
        "--rivals-path", type=Path, action="append", default=[], metavar="DIR", help="a folder with vLLM's library"
    )
    parser.add_argument("--replays", type=int, default=24, help="timed replays per number, 24 by default")
    parser.add_argument("--inputs", type=int, default=4, help="different inputs that take turns, 4 by default")
    parser.add_argument("--device", type=int, default=0, help="the GPU's number, 0 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")


def run(arguments: argparse.Namespace) -> int:
    refusal = gpu_refusal(arguments.device)
    if refusal:
        print(f"mxfp4-moe bench-routers: {refusal}", file=sys.stderr)
        return 2
    import torch

    from ..bench import routers
    from ..bench.run import about

    device = torch.device("cuda", arguments.device)
    try:
        for name in ("replays", "inputs"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(arguments, name)}")
        names = None if arguments.models == "all" else [name.strip() for name in arguments.models.split(";")]
        method = f"CUDA-graph replay behind a flushed L2 cache, {arguments.inputs} inputs in turn"
        command = ["mxfp4-moe", *map(without_folder, sys.argv[1:])]
        plan = routers.Plan(
            rules=routers.rules(device, names),
            tokens=shapes.parse_tokens(arguments.tokens),
            rivals=routers.choose(arguments.rivals),
            rival_folders=[folder.resolve() for folder in arguments.rivals_path],
            replays=arguments.replays,
            inputs=arguments.inputs,
            environment={**about(device, command), "method": f"{method}, median of {arguments.replays}"},
        )
        with torch.cuda.device(device):
            results = routers.run(plan, device, Stopwatch())
        if arguments.json:
            routers.write(results, arguments.json)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mxfp4-moe bench-routers: {error}", file=sys.stderr)
        return 2
    print(results.table())
    return 0
