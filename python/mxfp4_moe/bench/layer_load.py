"""What loading one layer from files costs: python -m mxfp4_moe.bench.layer_load

A gpt-oss layer with random weights is written, of gpt-oss-120b's sizes or another preset's, and read by
`MoEWeights.from_pretrained`, whole and as the part of one rank, each in a process of its own: seconds (with files that
were read before, so that the disk is not what is measured), the bytes that it read of files, headers included, the
layer's bytes once it is prepared, and the most memory at once beyond these, which the bytes of two experts in the files
bound. Memory is the process's own (anonymous pages).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._checkpoints.headers import read_header
from ..weights import MoEWeights
from .engine.random_model import Sizes, write_gpt_oss
from .memory import Peak, bytes_read, in_a_process
from .report import aligned
from .shapes import DEFAULT_PRESET, PRESETS, MoEShape

PARTS: dict[str, dict[str, Any]] = {
    "the layer": {},
    "rank 1 of 4, experts": {"ep_rank": 1, "ep_size": 4},
    "rank 1 of 4, tensors": {"tp_rank": 1, "tp_size": 4},
}
_SMALL = ((1, 64, 16), (1, 64, 1), (1, 32, 16), (1, 32, 1))  # a layer of one expert


def main(arguments: Sequence[str]) -> int:
    """The command; see this module."""
    parser = argparse.ArgumentParser(prog="python -m mxfp4_moe.bench.layer_load", description=__doc__)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=sorted(PRESETS), help="the layer")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(load(Path(given.child), given.part)))
        return 0
    shape = PRESETS[given.preset]
    with tempfile.TemporaryDirectory() as folder:
        model = write_layer(Path(folder), shape)
        found = [in_a_process(__spec__.name, ["--child", str(model), "--part", part]) for part in PARTS]
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"torch {torch.__version__}; {shape.words}")
    print(table(found))
    return 0


def write_layer(folder: Path, shape: MoEShape) -> Path:
    """A checkpoint whose layer 0 has the experts of a shape; what is around them is small."""
    sizes = {"experts": shape.experts, "top_k": shape.top_k}
    sizes |= {"hidden": shape.hidden, "intermediate": shape.intermediate}
    return write_gpt_oss(folder, Sizes(layers=1, vocabulary=32, heads=2, kv_heads=1, **sizes))


def load(model: Path, part: str) -> dict[str, Any]:
    """One part, in this process."""
    raw = 0
    for file in model.glob("*.safetensors"):
        file.read_bytes()
        raw += sum(entry.nbytes for name, entry in read_header(file).items() if ".experts." in name)
    MoEWeights.from_mxfp4(*(torch.zeros(size, dtype=torch.uint8, device="cpu") for size in _SMALL))  # starts torch
    with Peak() as peak:
        before, start, begin = bytes_read(), time.perf_counter(), time.process_time()
        weights = MoEWeights.from_pretrained(model, layer=0, **PARTS[part])
        seconds, cpu_seconds, read = time.perf_counter() - start, time.process_time() - begin, bytes_read() - before
    tensors = [tensor for tensor in vars(weights).values() if isinstance(tensor, torch.Tensor)]
    layer = sum(tensor.nbytes for tensor in tensors)
    return {
        "part": part,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes_read": read,
        "layer_bytes": layer,
        "beyond_bytes": peak.most - layer,
        "two_experts_bytes": 2 * raw // (weights.num_global_experts or weights.num_experts),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The figures in columns."""
    lines = [["part", "seconds", "CPU seconds", "read MB", "layer MB", "beyond it MB", "two experts MB"]]
    names = ("bytes_read", "layer_bytes", "beyond_bytes", "two_experts_bytes")
    for row in found:
        sizes = (f"{row[name] / 1e6:.1f}" for name in names)
        lines.append([row["part"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", *sizes])
    return "\n".join(aligned(lines, left=(0,)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
