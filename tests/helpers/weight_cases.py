"""Checkpoints and comparisons for the tests of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mxfp4_moe.weights import MoEWeights

ORDERS = ["interleaved", "gate_up", "up_gate"]
E, H, I = 3, 96, 160  # noqa: E741  (the formulas' names)


def random_floats(dtype: torch.dtype, rows: int, seed: int = 11) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w13": torch.randn(E, rows, H, generator=g).to(dtype),
        "w2": torch.randn(E, H, I, generator=g).to(dtype),
        "w13_bias": torch.randn(E, rows, generator=g).to(dtype),
        "w2_bias": torch.randn(E, H, generator=g).to(dtype),
    }


def same(a: MoEWeights, b: MoEWeights) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MoEWeights))
