"""Weights are prepared for activations that go with them, and for no others."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from layers import INTER, E, H, T, make_call, make_weights
from nvfp4_cases import random_nvfp4

import mxfp4_moe
from mxfp4_moe import engines, formats
from mxfp4_moe.weights import MoEWeights

PREPARING: dict[str, Any] = {
    "to": lambda name: make_weights().to("cpu", activation_format=name),
    "prepare_layer": lambda name: engines.prepare_layer(**random_checkpoint(), activation_format=name),
    "prepare_matrix": lambda name: engines.prepare_matrix(
        *(random_checkpoint()[tensor] for tensor in ("w2", "w2_scale")), activation_format=name
    ),
}


def random_checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, INTER)


@pytest.mark.parametrize("name", PREPARING)
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("nvfp4", ValueError, "expected 'mxfp8' or 'bf16' or 'mxfp4' or 'fp16' with mxfp4 weights, got 'nvfp4'; "),
        ("", ValueError, "expected 'mxfp8', 'bf16', 'mxfp4', 'nvfp4' or 'fp16', got ''$"),
        (0, TypeError, "expected a name such as 'bf16', got 0$"),
        (False, TypeError, "expected a name such as 'bf16', got False$"),
        ([], TypeError, r"expected a name such as 'bf16', got \[\]$"),
    ],
)
def test_weights_are_not_prepared_for_what_they_are_never_called_with(
    name: str, given: Any, error: type[Exception], words: str
) -> None:
    PREPARING[name](None)
    with pytest.raises(error, match=f"^activation_format: {words}"):
        PREPARING[name](given)


def test_nvfp4_weights_are_not_prepared_for_formats_of_mxfp4() -> None:
    weights = MoEWeights.from_nvfp4(**random_nvfp4())
    for name in ("mxfp8", "mxfp4"):
        with pytest.raises(ValueError, match=f"^activation_format: expected 'nvfp4' or .* weights, got '{name}'"):
            weights.to("cpu", activation_format=name)


def test_a_member_of_an_enum_stands_for_its_name() -> None:
    """WeightFormat's members are strings, and their names those of formats of activations."""
    call = make_call()
    expected = mxfp4_moe.fused_moe(**call, activation_format="mxfp4")
    assert torch.equal(mxfp4_moe.fused_moe(**call, activation_format=formats.WeightFormat.MXFP4), expected)
    weights = MoEWeights.from_nvfp4(**random_nvfp4())
    assert weights.to("cpu", activation_format=formats.WeightFormat.NVFP4).word_order is weights.word_order
    call["hidden_states"] = torch.randn(T, weights.hidden_size).bfloat16()
    call["weights"] = weights
    expected = mxfp4_moe.fused_moe(**call)
    assert torch.equal(mxfp4_moe.fused_moe(**call, activation_format=formats.WeightFormat.NVFP4), expected)
