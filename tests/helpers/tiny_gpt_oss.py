"""A whole gpt-oss in small, with random weights, as its MXFP4 checkpoint: what engines load in tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mxfp4_moe.bench.engine import random_model

# An intermediate size of eleven blocks, so that two ranks get 6 and 5.
LAYERS, EXPERTS, TOP_K, HIDDEN, INTER, VOCAB = 2, 8, 4, 288, 352, 512


def write_gpt_oss(folder: Path, *, seed: int = 0, unlike: bool = False) -> Path:
    """The checkpoint, in a file for each layer.

    Args:
        unlike: expert e's weights are 2^(e % 8 - 4) times what they are without it, so that no two are of one size.
    """
    sizes = random_model.Sizes(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        intermediate=INTER,
        vocabulary=VOCAB,
        heads=4,
        kv_heads=2,
    )
    random_model.write_gpt_oss(folder, sizes, seed=seed)
    for file in folder.glob("model-layer-*.safetensors") if unlike else ():
        tensors = load_file(file)
        for name in (name for name in tensors if name.endswith("_scales")):
            tensors[name] += (torch.arange(EXPERTS, dtype=torch.int32) % 8 - 4).to(torch.uint8)[:, None, None]
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
