"""NVFP4's float32 scales: values under which a layer is not what its checkpoint says, wherever they come in."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from nvfp4_cases import E, random_nvfp4, same
from torch._subclasses.fake_tensor import FakeTensorMode

import mxfp4_moe
from mxfp4_moe import engines
from mxfp4_moe.weights import MoEWeights

WEIGHTS, INPUTS = ("w13", "w2"), ("w13_input", "w2_input")
SMALL = 2.0**-128  # its reciprocal is an infinity in float32, that of the next larger number is not
NEVER = (math.nan, math.inf, -1.0)


def named(kind: str, name: str) -> str:
    if kind == "divide":
        return f"{name}_global_scale"
    return f"{name}_scale_2" if name in WEIGHTS else f"{name}_scale"


def refused_values(kind: str, name: str) -> tuple[float, ...]:
    return NEVER if kind == "multiply" and name in WEIGHTS else (*NEVER, 0.0, 1e-45, SMALL)


@pytest.mark.parametrize("kind", ["multiply", "divide"])
@pytest.mark.parametrize("name", [*WEIGHTS, *INPUTS])
def test_values_are_refused_on_every_way_in(kind: str, name: str) -> None:
    """As tensors, and as a field of MoEWeights: with the name, what was expected, the value and the expert."""
    layer = random_nvfp4(kind)
    weights, label = MoEWeights.from_nvfp4(**layer), named(kind, name)
    scales = weights.tensor_scales
    assert scales is not None
    for value in refused_values(kind, name):
        wrong = layer[label].clone()
        wrong[1] = value
        words = rf"expected finite numbers .*, got {float(wrong[1].flatten()[0]):g} for expert 1$".replace("+", r"\+")
        with pytest.raises(ValueError, match=f"^{label}: {words}"):
            MoEWeights.from_nvfp4(**layer | {label: wrong})
        with pytest.raises(ValueError, match=f"^tensor_scales.{name}: {words}"):
            replace(weights, tensor_scales=replace(scales, **{name: wrong}))
    for value in (2.0**-126, SMALL * (1 + 2.0**-20), 1e30):
        right = layer[label].clone()
        right[1] = value
        given = MoEWeights.from_nvfp4(**layer | {label: right})
        assert all(
            bool(made.isfinite().all()) for made in given.operator_arguments[1].values() if torch.is_tensor(made)
        )


def test_a_weight_scale_that_multiplies_may_be_zero() -> None:
    """An expert that no token of the calibration saw; its sums are 0."""
    layer = random_nvfp4()
    layer["w2_scale_2"][1] = 0.0
    weights = MoEWeights.from_nvfp4(**layer)
    hidden, ids = torch.randn(4, weights.hidden_size).bfloat16(), torch.ones(4, 1, dtype=torch.int32)
    for activation_format in ("nvfp4", "bf16"):
        out = mxfp4_moe.fused_moe(hidden, torch.ones(4, 1), ids, weights, activation_format=activation_format)
        assert (out == 0).all()


def test_divide_is_a_bool() -> None:
    weights = MoEWeights.from_nvfp4(**random_nvfp4())
    assert weights.tensor_scales is not None
    with pytest.raises(TypeError, match="^tensor_scales.divide: expected a bool, got 'yes'$"):
        replace(weights, tensor_scales=replace(weights.tensor_scales, divide="yes"))


@pytest.mark.parametrize("kind", ["multiply", "divide"])
def test_an_engines_own_tensors(kind: str) -> None:
    weights = MoEWeights.from_nvfp4(**random_nvfp4(kind))
    own = weights.w13.clone(), weights.w2.clone()
    wrapped = engines.wrap_layer(weights, *own, None, None)
    assert wrapped.w13 is own[0]
    assert same(wrapped, weights)


@pytest.mark.parametrize("name", ["wrap_layer", "update_fp16_factors"])
def test_no_weights(name: str) -> None:
    rest: tuple[Any, ...] = (None,) * 4 if name == "wrap_layer" else ()
    with pytest.raises(TypeError, match="^weights: expected MoEWeights, got dict$"):
        getattr(engines, name)({}, *rest)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_values_that_are_not_there_are_not_looked_at(kind: str) -> None:
    def floats(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = (E, 64, 96), (E, 96, 32)
        return tuple(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)  # type: ignore[return-value]

    if kind == "fake":
        with FakeTensorMode():
            weights = MoEWeights.from_float(*floats("cpu"), format="nvfp4")
            factors = weights.fp16_factors()
    else:
        weights = MoEWeights.from_float(*floats("meta"), format="nvfp4")
        factors = weights.fp16_factors()
    assert [tuple(one.shape) for one in factors] == [(E, 2), (E, 2)]
    assert weights.w13.is_meta == (kind == "meta")
