"""vLLM as a program, and what is checked of its answers: shared by the tests on the CPU and the program for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mxfp4_moe

PROGRAM = Path(__file__).parents[1] / "engines" / "vllm_program.py"


NEEDED = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def start(
    model: Path, out: Path, keywords: dict[str, Any], program: Path = PROGRAM, **environment: str
) -> tuple[Any, str]:
    """What a program that runs vLLM wrote to `out` (vLLM's answers), and what it printed.

    Raises:
        RuntimeError: vLLM ended badly; with what it said last.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MXFP4_MOE_")}
    path = os.pathsep.join([str(PROGRAM.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(program), str(model), str(out), json.dumps(keywords)],
        env=kept | NEEDED | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with exit status {done.returncode}:\n{done.stdout[-6000:]}")
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def first_call(out: Path, rank: int) -> dict[str, Any]:
    """The first layer's first call in one rank, as vllm_program.py kept it."""
    kept: dict[str, Any] = torch.load(f"{out}.rank{rank}.pt")
    return kept


def computed_again(model: Path, kept: dict[str, Any], rank: int, ranks: int, split: str, device: str) -> torch.Tensor:
    """That call, from the checkpoint's bytes and without anything of vLLM.

    Args:
        split: "tp" or "ep".
    """
    place = {f"{split}_rank": rank, f"{split}_size": ranks}
    weights = mxfp4_moe.MoEWeights.from_safetensors(model, layer=0, device=device, **place)
    hidden, topk_weights, local_ids = (kept[name].to(device) for name in ("hidden", "topk_weights", "local_ids"))
    ids = local_ids + weights.first_expert
    return mxfp4_moe.fused_moe(hidden, topk_weights, ids, weights, **kept["keywords"]).cpu()
