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
