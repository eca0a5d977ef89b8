"""SM12x's kernels of bf16 activations: on an SM12x GPU with a wheel of profile `full`, or in its emulated build.

On any other there is nothing to ask, and each test says so.
"""

from __future__ import annotations

import gpu_problems
import pytest
import torch

import mxfp4_moe
from mxfp4_moe import reference
from mxfp4_moe._call.activation_format import tiles_of
from mxfp4_moe._call.launch import layer_operator_for
from mxfp4_moe.arithmetic import SM12X_BF16
from mxfp4_moe.formats import word_order_of
from mxfp4_moe.problems import (
    bits,
    integer_problem,
    layout_problem,
    random_call,
    random_problem,
    random_weights,
    relative_error,
    sparse_problem,
)

TOLERANCE = 5e-3  # what is left is the last bits of exp and of sums


@pytest.fixture(autouse=True)
def device() -> torch.device:
    gpu = gpu_problems.gpu()
    if "bf16" not in mxfp4_moe.activation_formats(gpu) or word_order_of(gpu, "bf16") is word_order_of(gpu):
        pytest.skip("no kernels of their own for bf16 activations here")
    return gpu


def test_every_tile_has_the_published_rules_bits(device: torch.device) -> None:
    problems = [
        random_problem(k, n, device, arithmetic=SM12X_BF16).in_bf16(SM12X_BF16) for k, n in ((96, 80), (640, 272))
    ]
    problems += [make.in_bf16(None) for make in (layout_problem(device), sparse_problem(2880, 512, device))]
    problems.append(integer_problem(2880, 272, device).in_bf16(None))
    for tile in tiles_of("bf16", device.index):
        for problem in problems:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert not problem.check(tile, dtype), f"{tile.name}, {dtype}"


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_layers(tokens: int, device: torch.device) -> None:
    """Close to the reference, the same bits from every tile, and of a token alone."""
    weights = random_weights(16, 160, 96, device)
    call = random_call(tokens, 4, weights)
    expected = reference.fused_moe(*call.args(), weights, activation_format="bf16", arithmetic=SM12X_BF16)
    quantized = mxfp4_moe.fused_moe(*call.args(), weights)
    prepared = weights.to(device, activation_format="bf16")
    outs = []
    for tile in tiles_of("bf16", device.index):
        assert layer_operator_for("bf16", device.index, tile)[1] == tile
        outs.append(mxfp4_moe.fused_moe(*call.args(), prepared, activation_format="bf16", tile_mn=tile.mn))
        assert relative_error(outs[-1], expected) <= TOLERANCE, tile.name
        assert torch.equal(bits(outs[-1]), bits(outs[0])), tile.name
    one = call.token(tokens // 2)
    alone = mxfp4_moe.fused_moe(*one.args(), prepared, activation_format="bf16")
    assert torch.equal(bits(alone[0]), bits(outs[0][tokens // 2]))
    assert 1e-2 < relative_error(outs[0], quantized) < 0.2, "MXFP8 activations are another result"


def test_weights_in_the_other_order_are_refused(device: torch.device) -> None:
    weights = random_weights(4, 64, 64, device)
    call = random_call(3, 2, weights)
    with pytest.raises(ValueError, match=r"weights.to\('cuda:\d+', activation_format='bf16'\) converts them"):
        mxfp4_moe.fused_moe(*call.args(), weights, activation_format="bf16")
    prepared = weights.to(device, activation_format="bf16")
    with pytest.raises(ValueError, match=r"weights.to\('cuda:\d+'\) converts them"):
        mxfp4_moe.fused_moe(*call.args(), prepared)
    assert torch.equal(prepared.to(device).w13, weights.w13), "there and back"
