"""What loading an MXFP4 gpt-oss in transformers costs, by each way: python -m mxfp4_moe.bench.transformers_load

Each way loads in a process of its own: `enable()`, transformers' own path for this machine, transformers' dequantized
weights, and these with `replace_experts` behind them. Seconds are those of `from_pretrained` (with a model whose files
were read before, so that the disk is not what is measured); memory is the most that the process had of its own
(anonymous pages: files that are mapped do not count) and, on a GPU, that torch had allocated there. Without --model a
gpt-oss with random weights is written first, of gpt-oss-20b's sizes in all but --layers and --vocabulary. Without a GPU
the weights are prepared for the CPU (MXFP4_MOE_CPU=1 is set): it is loading that is measured, no layer runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..integrations._engines.settings import CPU_VARIABLE
from ..integrations.transformers import MoEExperts, enable, replace_experts
from .engine.random_model import Sizes, write_gpt_oss
from .memory import Peak, in_a_process

WAYS = {
    "enable": "`enable()`",
    "own": "transformers' own path",
    "dequantize": "`Mxfp4Config(dequantize=True)`",
    "replace": "the same, and `replace_experts`",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs all ways one after the other, and prints a table; or, as the child, one way."""
    parser = argparse.ArgumentParser(prog="python -m mxfp4_moe.bench.transformers_load", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder with an MXFP4 gpt-oss")
    parser.add_argument("--layers", type=int, default=4, help="of the model that is written where there is none")
    parser.add_argument("--vocabulary", type=int, default=1024, help="of the same")
    parser.add_argument("--device-map", default="auto", help="as from_pretrained has it")
    parser.add_argument("--way", choices=WAYS, action="append", help="these alone, in this order")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(load(given.child, given.model, given.device_map)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or write_gpt_oss(Path(folder), Sizes(layers=given.layers, vocabulary=given.vocabulary))
        found = [_in_a_process(way, model, given.device_map) for way in given.way or WAYS]
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    result = {"checkpoint_bytes": size, "device_map": given.device_map, "ways": found}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


def load(way: str, model: Path, device_map: str) -> dict[str, Any]:
    """One way, in this process.

    Returns:
        seconds, those of processors (which others on the machine change little), the peaks in bytes, and the class of
        the experts, by which one sees which path it was.

    Raises:
        RuntimeError: experts are not ours where they should be, or are where they should not.
    """
    import transformers

    if not torch.accelerator.is_available():
        os.environ[CPU_VARIABLE] = "1"
    for file in model.glob("*.safetensors"):
        file.read_bytes()  # so that every way finds the files in memory
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": device_map}
    if way in ("dequantize", "replace"):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    with Peak() as peak:
        start, begin = time.perf_counter(), time.process_time()
        if way == "enable":
            enable(activation_format="mxfp8")
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
        if way == "replace":
            replace_experts(loaded, activation_format="mxfp8")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - begin
    experts = {type(layer.mlp.experts) for layer in loaded.model.layers}
    if any(issubclass(kind, MoEExperts) is not (way in ("enable", "replace")) for kind in experts):
        raise RuntimeError(f"{WAYS[way]}: got experts of {', '.join(sorted(kind.__name__ for kind in experts))}")
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    return {
        "way": way,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak.most,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "model_bytes": held,
        "experts": sorted(kind.__name__ for kind in experts),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _in_a_process(way: str, model: Path, device_map: str) -> dict[str, Any]:
    print(f"loading by {way} ...", file=sys.stderr, flush=True)
    found = in_a_process(__spec__.name, ["--child", way, "--model", str(model), "--device-map", device_map])
    print(
        f"... {found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of processors, {found['peak_bytes'] / 1e9:.2f} GB",
        file=sys.stderr,
        flush=True,
    )
    return found


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    gpu = any(row["peak_gpu_bytes"] for row in result["ways"])
    titles = ["way", "experts", "seconds", "CPU seconds", "peak memory, GB"]
    titles += [*(["peak GPU memory, GB"] if gpu else []), "model, GB"]
    lines = [f"| {' | '.join(titles)} |", f"|---|---|{'---:|' * (len(titles) - 2)}"]
    for row in result["ways"]:
        peaks = [row["peak_bytes"], *([row["peak_gpu_bytes"]] if gpu else []), row["model_bytes"]]
        cpu = f"{row['cpu_seconds']:.1f}"
        figures = " | ".join(f"{size / 1e9:.2f}" for size in peaks)
        lines.append(f"| {WAYS[row['way']]} | {', '.join(row['experts'])} | {row['seconds']:.1f} | {cpu} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
