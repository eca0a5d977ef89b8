"""Calls of bf16 x MXFP4 as FlashInfer's callers make them, and what FlashInfer computes of them, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import torch
from torch import Tensor

from mxfp4_moe import flashinfer_api as fi

BF16 = torch.bfloat16
E, T, K, H, INTER = 4, 12, 2, 128, 256
OAI = (1.702, 1.0, 7.0)


def checkpoint(*, gated: bool = True, experts: int = E, seed: int = 0) -> dict[str, Tensor]:
    """Rows [up; gate]: packed codes, every one of them, and scales from 2^-9 to 2^-5, as FlashInfer's test has them."""
    g = torch.Generator().manual_seed(seed)
    width = 2 * INTER if gated else INTER

    def some(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    return {
        "fc1": some(experts, width, H // 2),
        "fc2": some(experts, H, INTER // 2),
        "fc1_scale": some(experts, width, H // 32, low=118, high=123),
        "fc2_scale": some(experts, H, INTER // 32, low=118, high=123),
        "fc1_bias": (0.5 * torch.randn(experts, width, generator=g)).to(BF16),
        "fc2_bias": (0.5 * torch.randn(experts, H, generator=g)).to(BF16),
    }


def weight_arguments(layer: dict[str, Tensor]) -> dict[str, Any]:
    weights, scales = fi.interleave_moe_weights_for_sm90_mixed_gemm, fi.interleave_moe_scales_for_sm90_mixed_gemm
    return {
        "fc1_expert_weights": weights(layer["fc1"], "fp4"),
        "fc2_expert_weights": weights(layer["fc2"], "fp4"),
        "quant_scales": [scales(layer[f"{fc}_scale"]).view(torch.int32) for fc in ("fc1", "fc2")],
    }


def make_call(layer: dict[str, Tensor] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Without biases."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g)
    scales, ids = logits.softmax(-1).topk(K)
    return {
        "input": torch.randn(T, H, generator=g).to(BF16),
        "token_selected_experts": ids.int(),
        "token_final_scales": scales / scales.sum(-1, keepdim=True),
        "output_dtype": BF16,
        "use_w4_group_scaling": True,
        **weight_arguments(checkpoint() if layer is None else layer),
    }


def biases(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"fc1_expert_biases": layer["fc1_bias"], "fc2_expert_biases": layer["fc2_bias"]}


def swiglu_numbers(numbers: tuple[float, float, float] | None, experts: int = E) -> dict[str, Tensor]:
    names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
    return {name: torch.full((experts,), number) for name, number in zip(names, numbers or (), strict=False)}


def expected(
    call: dict[str, Any],
    layer: dict[str, Tensor],
    *,
    gated: bool = True,
    numbers: tuple[float, float, float] | None = None,
    biased: bool = False,
    first: int = 0,
    down_bias: bool = True,
) -> np.ndarray:
    """GEMM1 rounded to bfloat16; bias and activation; rounded; GEMM2 rounded; bias; times the router scale, summed.

    Args:
        gated: SwiGLU with numbers, alpha, beta and limit; else the square of ReLU.
        first: id of the rank's first expert.
        down_bias: whether fc2's bias is this rank's to add.
    """
    fc1 = oracles.mxfp4_values(layer["fc1"].numpy(), layer["fc1_scale"].numpy())
    fc2 = oracles.mxfp4_values(layer["fc2"].numpy(), layer["fc2_scale"].numpy())
    x, out = call["input"].double().numpy(), np.zeros((T, H))
    alpha, beta, limit = numbers or (1.0, 0.0, np.inf)
    for t in range(T):
        for j in range(K):
            expert = int(call["token_selected_experts"][t, j]) - first
            if not 0 <= expert < len(fc1):
                continue
            sums = _rounded(fc1[expert] @ x[t])
            if biased:
                sums = sums + layer["fc1_bias"][expert].double().numpy()
            if gated:
                up, gate = np.split(sums, 2)
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                between = gate / (1 + np.exp(-alpha * gate)) * (up + beta)
            else:
                between = np.maximum(sums, 0) ** 2
            row = _rounded(fc2[expert] @ _rounded(between))
            if biased and down_bias:
                row = row + layer["fc2_bias"][expert].double().numpy()
            out[t] += float(call["token_final_scales"][t, j]) * row
    return _rounded(out)


def _rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(BF16).double().numpy()


def distance(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().cpu().numpy() - wanted) / np.linalg.norm(wanted))
