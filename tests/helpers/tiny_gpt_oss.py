"""A whole gpt-oss in small, with random weights, as its MXFP4 checkpoint: what engines load in tests."""

from __future__ import annotations

from pathlib import Path

from mxfp4_moe.bench.engine import random_model

# An intermediate size of eleven blocks, so that two ranks get 6 and 5.
LAYERS, EXPERTS, TOP_K, HIDDEN, INTER, VOCAB = 2, 8, 4, 288, 352, 512


def write_gpt_oss(folder: Path, *, seed: int = 0) -> Path:
    """The checkpoint, in a file for each layer."""
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
    return random_model.write_gpt_oss(folder, sizes, seed=seed)
