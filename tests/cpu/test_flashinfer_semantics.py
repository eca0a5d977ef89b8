"""The drop-in against FlashInfer's published semantics: its pipeline in float64, rounding where and when it does.

Per token and expert on this rank: GEMM1, rounded to the output dtype; biases (of the output dtype) added and the
activation in float32; rounded to the output dtype; MXFP8; GEMM2, rounded to the output dtype; bias added on tp_rank 0;
times the router scale, summed over the experts, rounded to the output dtype.

The drop-in rounds in the same places. What is left is fp32 arithmetic and its rare consequences: a value that it puts
on the other side of a rounding moves by one step of the output dtype, and in MXFP8 by up to 1/8.

The reference shares no code with the library (oracles.py: numpy and ml_dtypes).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import ActivationType

E, T, K, H, INTER = 8, 64, 3, 256, 128
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = 1e-2  # relative norm, for everything
OAI = (1.702, 1.0, 7.0)
ACTIVATIONS = [  # type, (alpha, beta, limit)
    (ActivationType.Swiglu, None),
    (ActivationType.Swiglu, OAI),
    (ActivationType.SwigluBias, OAI),
    (ActivationType.SwigluBias, (0.5, 0.0, 1.5)),
    (ActivationType.SwigluStep, None),
    (ActivationType.SwigluStep, (1.0, 0.0, 0.8)),
    (ActivationType.Geglu, None),
    (ActivationType.GegluTanh, None),
    (ActivationType.Silu, None),
    (ActivationType.Gelu, None),
    (ActivationType.Relu, None),
    (ActivationType.Relu2, None),
    (ActivationType.Identity, None),
    (ActivationType.Situ, None),
    (ActivationType.Situ, (0.0, 1.5, 0.7)),
    (ActivationType.ClampedRelu2, (0.0, 0.0, 0.8)),
]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def erf(x: np.ndarray) -> np.ndarray:
    return torch.special.erf(torch.from_numpy(x)).numpy()


ONE_INPUT = {
    ActivationType.Silu: lambda x: x * sigmoid(x),
    ActivationType.Gelu: lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    ActivationType.Relu: lambda x: np.maximum(x, 0),
    ActivationType.Relu2: lambda x: np.maximum(x, 0) ** 2,
    ActivationType.Identity: lambda x: x,
}


def activate(kind: ActivationType, x: np.ndarray, numbers: tuple[float, float, float] | None) -> np.ndarray:
    """x: [W], [up; gate] for gated kinds; numbers as swiglu_alpha, swiglu_beta, swiglu_limit, or `given_numbers`."""
    if kind in ONE_INPUT:
        return ONE_INPUT[kind](x)
    if kind is ActivationType.ClampedRelu2:
        assert numbers is not None
        return (numbers[2] * np.tanh(np.maximum(x, 0) / numbers[2])) ** 2
    up, gate = np.split(x, 2)
    if kind is ActivationType.Situ:
        _, beta, linear = numbers or (0.0, 4.0, 25.0)
        return beta * np.tanh(gate / beta) * sigmoid(gate) * linear * np.tanh(up / linear)
    if kind is ActivationType.Geglu:
        return ONE_INPUT[ActivationType.Gelu](gate) * up
    if kind is ActivationType.GegluTanh:
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if kind is ActivationType.SwigluStep:
        limit = 7.0 if numbers is None else numbers[2]
        return np.minimum(gate * sigmoid(gate), limit) * np.clip(up, -limit, limit)
    alpha, beta, limit = numbers or (1.0, 0.0, np.inf)
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + beta)


def given_numbers(
    kind: ActivationType, numbers: tuple[float, float, float] | None, experts: int, device: str
) -> dict[str, Tensor]:
    """The call's arguments that an activation's numbers are."""
    names: tuple[str | None, ...] = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    if kind is ActivationType.Situ:
        names = (None, "situ_beta", "situ_linear_beta")
    if kind is ActivationType.ClampedRelu2:
        names, experts = (None, None, "clamped_relu2_limit"), 1
    named = zip(names, numbers or (), strict=False)
    return {name: torch.full((experts,), number, device=device) for name, number in named if name is not None}


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).double().numpy()


def their_pipeline(
    x: np.ndarray,
    ids: np.ndarray,
    scales: np.ndarray,
    layer: dict[str, Any],
    kind: ActivationType,
    numbers: tuple[float, float, float] | None,
    dtype: torch.dtype,
) -> np.ndarray:
    """x: the dequantized input; layer: float64 w1 [E, W, H], w2 [E, H, I], b1, b2 (or None), first expert's id."""
    out = np.zeros_like(x)
    for t, row in enumerate(ids):
        for j, expert in enumerate(row - layer["first"]):
            if not 0 <= expert < len(layer["w1"]):
                continue
            h = rounded(layer["w1"][expert] @ x[t], dtype)
            if layer["b1"] is not None:
                h = h + layer["b1"][expert]
            act = rounded(activate(kind, h, numbers), dtype).astype(np.float32)
            y = rounded(layer["w2"][expert] @ oracles.mxfp8_values(*oracles.mxfp8_quantize(act)), dtype)
            if layer["b2"] is not None:
                y = y + layer["b2"][expert]
            out[t] += scales[t, j] * y
    return rounded(out, dtype)


@functools.cache
def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(T, H, generator=g).to(dtype)
    logits = torch.randn(T, E, generator=g)
    scales, ids = logits.softmax(-1).topk(K)
    return {"x": x, "ids": ids.int(), "scales": scales / scales.sum(-1, keepdim=True)}


@functools.cache
def weights(gated: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer of all ranks, as floats that MXFP4 holds."""
    g = torch.Generator().manual_seed(6)
    rows = 2 * INTER if gated else INTER
    w1 = torch.randn(E, rows, H, generator=g) * (2 / H**0.5)
    w2 = torch.randn(E, H, INTER, generator=g) * (2 / INTER**0.5)
    b1 = (0.3 * torch.randn(E, rows, generator=g)).to(dtype)
    b2 = (0.3 * torch.randn(E, H, generator=g)).to(dtype)
    return {"w1": w1.to(dtype), "w2": w2.to(dtype), "b1": b1, "b2": b2}


def rank_part(layer: dict[str, Tensor], gated: bool, ranks: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """What one rank passes in: its experts, its rows of fc1 in both halves, its columns of fc2."""
    ep_rank, ep_size, tp_rank, tp_size = ranks
    experts = slice(ep_rank * E // ep_size, (ep_rank + 1) * E // ep_size)
    inter = torch.arange(tp_rank * INTER // tp_size, (tp_rank + 1) * INTER // tp_size)
    rows = torch.cat((inter, INTER + inter)) if gated else inter
    return {
        "w1": layer["w1"][experts][:, rows],
        "b1": layer["b1"][experts][:, rows],
        "w2": layer["w2"][experts][:, :, inter],
        "b2": layer["b2"][experts],
    }


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
    """FlashInfer's own way to make MXFP4 weights: packed, swizzled scales, and the values that they stand for."""
    packed, scales = zip(*(fi.mxfp4_quantize(expert) for expert in weight), strict=True)
    values = [fi.mxfp4_dequantize(p, s).double().numpy() for p, s in zip(packed, scales, strict=True)]
    return torch.stack(packed), torch.stack(scales), np.stack(values)


def both(
    kind: ActivationType,
    numbers: tuple[float, float, float] | None,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    ranks: tuple[int, int, int, int] = (0, 1, 0, 1),
    swizzled: bool = True,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """One rank's output by the drop-in and by `their_pipeline`."""
    ep_rank, ep_size, tp_rank, tp_size = ranks
    part = rank_part(weights(kind.is_gated, dtype), kind.is_gated, ranks)
    w1, w1_scale, w1_values = quantized(part["w1"])
    w2, w2_scale, w2_values = quantized(part["w2"])
    given = inputs(dtype)
    codes, input_sf = fi.mxfp8_quantize(given["x"], swizzled, 32)
    local = len(w1)
    unused = torch.ones(local, device=device)
    (ours,) = fi.cutlass_fused_moe(
        codes.to(device),
        given["ids"].to(device),
        given["scales"].to(device),
        w1.view(torch.int64).to(device),
        w2.view(torch.int64).to(device),
        dtype,
        [w1_scale.view(torch.int32).to(device), unused, w2_scale.view(torch.int32).to(device), unused],
        fc1_expert_biases=part["b1"].to(device) if bias else None,
        fc2_expert_biases=part["b2"].to(device) if bias else None,
        input_sf=input_sf.to(device),
        tp_size=tp_size,
        tp_rank=tp_rank,
        ep_size=ep_size,
        ep_rank=ep_rank,
        use_mxfp8_act_scaling=True,
        activation_type=kind,
        swizzled_input_sf=swizzled,
        **given_numbers(kind, numbers, local, device),
    )
    assert ours.dtype == dtype
    layer = {
        "w1": w1_values,
        "w2": w2_values,
        "b1": part["b1"].double().numpy() if bias else None,
        "b2": part["b2"].double().numpy() if bias and tp_rank == 0 else None,
        "first": ep_rank * local,
    }
    x = fi.mxfp8_dequantize_host(codes, input_sf, swizzled).double().numpy()
    theirs = their_pipeline(x, given["ids"].numpy(), given["scales"].numpy(), layer, kind, numbers, dtype)
    return ours.double().cpu().numpy(), theirs


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "numbers"), ACTIVATIONS, ids=str)
def test_activations(
    kind: ActivationType, numbers: tuple[float, float, float] | None, bias: bool, dtype: torch.dtype
) -> None:
    assert distance(*both(kind, numbers, dtype, bias=bias)) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_input_scales(dtype: torch.dtype) -> None:
    linear, theirs = both(ActivationType.Swiglu, OAI, dtype, swizzled=False)
    assert distance(linear, theirs) < TOLERANCE
    assert (linear == both(ActivationType.Swiglu, OAI, dtype)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "numbers"), [(ActivationType.Swiglu, OAI), (ActivationType.Relu2, None)], ids=str)
@pytest.mark.parametrize(("ep_size", "tp_size"), [(4, 1), (1, 4), (2, 2)])
def test_ranks(
    kind: ActivationType,
    numbers: tuple[float, float, float] | None,
    ep_size: int,
    tp_size: int,
    dtype: torch.dtype,
) -> None:
    """Every rank agrees, and the sum of the ranks is the layer's output but for the rounding of each rank's own."""
    total = np.zeros((T, H))
    for ep_rank in range(ep_size):
        for tp_rank in range(tp_size):
            ours, theirs = both(kind, numbers, dtype, ranks=(ep_rank, ep_size, tp_rank, tp_size))
            assert distance(ours, theirs) < TOLERANCE
            total += ours
    assert distance(total, both(kind, numbers, dtype)[0]) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(0, 1, 0, 1), (1, 2, 1, 2)])
@pytest.mark.parametrize(("kind", "numbers"), ACTIVATIONS, ids=str)
def test_on_the_gpu(
    kind: ActivationType,
    numbers: tuple[float, float, float] | None,
    ranks: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    assert distance(*both(kind, numbers, dtype, ranks=ranks, device="cuda")) < TOLERANCE


def test_a_token_without_an_expert_here_is_zero() -> None:
    outputs = both(ActivationType.Swiglu, None, torch.bfloat16, ranks=(1, 8, 0, 1))
    absent = ~(inputs(torch.bfloat16)["ids"] == 1).any(-1).numpy()
    assert 0 < absent.sum() < T
    for output in outputs:
        assert not output[absent].any()
        assert output[~absent].any()
