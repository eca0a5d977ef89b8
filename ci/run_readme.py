"""Runs the README's example with the installed wheel, on the CPU, with a small checkpoint of random weights.

    python ci/run_readme.py

The code is the README's own; only "cuda" becomes "cpu", and the checkpoint's folder is made here.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from run_layer import save

README = Path(__file__).resolve().parents[1] / "README.md"
EXPERTS, HIDDEN, INTERMEDIATE = 8, 128, 96


def example() -> str:
    """The first Python block of the README, for the CPU."""
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        sys.exit(f"error: {README} has no Python example")
    return block[1].replace('"cuda"', '"cpu"')


def write_checkpoint(folder: Path) -> None:
    """Layer 0 of a small gpt-oss, in the README's folder."""
    g = torch.Generator().manual_seed(0)
    prefix = "model.layers.0.mlp.experts."
    tensors = {}
    for name, rows, k in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
        blocks, scales = (EXPERTS, rows, k // 32, 16), (EXPERTS, rows, k // 32)
        tensors[f"{prefix}{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=g)
        tensors[f"{prefix}{name}_scales"] = torch.randint(118, 123, scales, dtype=torch.uint8, generator=g)
        tensors[f"{prefix}{name}_bias"] = torch.randn(EXPERTS, rows, generator=g).bfloat16()
    folder.mkdir()
    save(folder / "model.safetensors", tensors)


def main() -> None:
    code = example()
    checkpoint = re.search(r'from_safetensors\("([^"]+)"', code)
    if checkpoint is None:
        sys.exit("error: the README's example does not load a checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_checkpoint(Path(checkpoint[1]))
        names: dict[str, object] = {}
        exec(compile(code, str(README), "exec"), names)
        os.chdir("/")
    out, hidden_states = names["out"], names["hidden_states"]
    assert isinstance(out, torch.Tensor)
    assert isinstance(hidden_states, torch.Tensor)
    if out.shape != hidden_states.shape or out.dtype != torch.bfloat16 or not out.isfinite().all():
        sys.exit(f"error: the README's example gave {out.dtype} {list(out.shape)}")
    print(f"out: {out.dtype} {list(out.shape)}, {out.float().norm():.4f} in norm")


if __name__ == "__main__":
    main()
