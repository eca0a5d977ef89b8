"""Layers and calls that several files of tests/gpu use."""

from __future__ import annotations

import functools
from typing import Any

import gpu_problems
import pytest
import torch
from gpu_problems import Call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe._install import loading, wheel
from mxfp4_moe.tiles import load_manifest
from mxfp4_moe.weights import MoEWeights

TILES = load_manifest().tiles
HALVES = (torch.bfloat16, torch.float16)
TOP_K = 4


@functools.cache
def small() -> MoEWeights:
    return random_weights(8, 160, 96, gpu_problems.gpu())


def require_pair(pair: str) -> None:
    """Skips the test where the wheel's profile has no kernels of a pair of formats, and fails where they should be."""
    weights, activations = pair.split("_")
    if activations in mxfp4_moe.activation_formats(gpu_problems.gpu(), weights):
        return
    lacks = load_manifest().refusal(wheel.profile(), pair)
    assert lacks, f"a wheel of profile {wheel.profile()!r} has {pair}, and this GPU is offered none"
    pytest.skip(lacks)


def ops() -> Any:
    return loading.moe_ops()


def run(call: Call, weights: MoEWeights, **options: Any) -> Tensor:
    return mxfp4_moe.fused_moe(*call.args(), weights, **options)
