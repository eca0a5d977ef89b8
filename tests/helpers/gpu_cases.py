"""Layers and calls that several files of tests/gpu use."""

from __future__ import annotations

import functools
from typing import Any

import gpu_problems
import torch
from gpu_problems import Call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe._install import loading
from mxfp4_moe.tiles import load_manifest
from mxfp4_moe.weights import MoEWeights

TILES = load_manifest().tiles
HALVES = (torch.bfloat16, torch.float16)
TOP_K = 4


@functools.cache
def small() -> MoEWeights:
    return random_weights(8, 160, 96, gpu_problems.gpu())


def ops() -> Any:
    return loading.moe_ops()


def run(call: Call, weights: MoEWeights, **options: Any) -> Tensor:
    return mxfp4_moe.fused_moe(*call.args(), weights, **options)


NUMBERS: dict[str, dict[str, Any]] = {
    "one for all": {"limit": 7.0},
    "no limit": {"limit": None},
    "per expert": {
        "alpha": [1.702, 1.0, 0.5, 2.0, 1.0],
        "beta": [1.0, 0.0, -2.0, 1.0, 0.5],
        "limit": [7, 1, 3, 0.5, 9],
    },
}


def layer_of(
    experts: int, inter: int, activation: str, numbers: str, *, bias: bool, device: torch.device
) -> MoEWeights:
    each = {
        n: torch.tensor(v, device=device).float() if isinstance(v, list) else v for n, v in NUMBERS[numbers].items()
    }
    return random_weights(experts, 32, inter, device, bias=bias, activation=activation, **each)
