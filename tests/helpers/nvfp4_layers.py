"""NVFP4 layers in float64, token by token, with what a quantizer leaves of what each GEMM reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fp4_oracles
import numpy as np
import oracles
import torch
from nvfp4_cases import E, H, float64_weights

T, K = 7, 2

Quantizer = Callable[[np.ndarray, int, int], np.ndarray]  # (values [k], which GEMM, expert) -> what it multiplies with


def inputs(dtype: torch.dtype = torch.bfloat16, hidden: int = H, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(T, hidden, generator=g).to(dtype),
        "topk_weights": torch.rand(T, K, generator=g),
        "topk_ids": torch.randint(0, E, (T, K), generator=g),
    }


def float64_layer(call: dict[str, Any], expert: Callable[[np.ndarray, int], np.ndarray]) -> torch.Tensor:
    out = np.zeros(call["hidden_states"].shape)
    for t, x in enumerate(call["hidden_states"].double().numpy()):
        for weight, e in zip(call["topk_weights"][t].tolist(), call["topk_ids"][t].tolist(), strict=True):
            out[t] += weight * expert(x, e)
    return torch.from_numpy(out)


def gated_expert(layer: dict[str, torch.Tensor], order: str, quantize: Quantizer) -> Callable[..., np.ndarray]:
    """Of one token, in float64: a SwiGLU layer, whose GEMMs read what `quantize` leaves."""
    gate, up, down = float64_weights(layer, order)
    rows = oracles.gate_up_rows(order, gate.shape[1])

    def expert(x: np.ndarray, e: int) -> np.ndarray:
        bias = layer["w13_bias"][e].double().numpy() if "w13_bias" in layer else np.zeros(2 * gate.shape[1])
        x = quantize(x, 0, e)
        gates, ups = gate[e] @ x + bias[rows[0]], up[e] @ x + bias[rows[1]]
        middle = quantize(gates / (1 + np.exp(-gates)) * ups, 1, e)
        return down[e] @ middle + (layer["w2_bias"][e].double().numpy() if "w2_bias" in layer else 0)

    return expert


def ungated_expert(layer: dict[str, torch.Tensor], quantize: Quantizer) -> Callable[..., np.ndarray]:
    """The same of a layer without gates, with the square of relu between its GEMMs."""
    up, down = float64_weights(layer, "", gated=False)

    def expert(x: np.ndarray, e: int) -> np.ndarray:
        return down[e] @ quantize(np.maximum(up[e] @ quantize(x, 0, e), 0) ** 2, 1, e)

    return expert


def exactly(x: np.ndarray, which: int, e: int) -> np.ndarray:
    return x


def in_bf16(x: np.ndarray, which: int, e: int) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


def in_nvfp4(layer: dict[str, torch.Tensor]) -> Quantizer:
    """Under the layer's input scales, the larger of gate's and up's; or under that of each row."""

    def quantize(x: np.ndarray, which: int, e: int) -> np.ndarray:
        row = x.astype(np.float32)[None]
        name = ("w13", "w2")[which]
        if f"{name}_input_scale" in layer:
            decode = layer[f"{name}_input_scale"][e].max().numpy()
            scale = np.float32(1) / decode
        elif f"{name}_input_global_scale" in layer:
            scale = layer[f"{name}_input_global_scale"][e].min().numpy()
            decode = np.float32(1) / scale
        else:
            scale = np.float32(2688) / np.abs(row).max()
            decode = np.float32(1) / scale
        values = fp4_oracles.nvfp4_values(*fp4_oracles.nvfp4_quantize(row, np.array([scale])))
        return values[0] * np.float64(decode)

    return quantize


def in_mxfp4(x: np.ndarray, which: int, e: int) -> np.ndarray:
    return oracles.mxfp4_values(*fp4_oracles.mxfp4_quantize(x.astype(np.float32)[None]))[0]


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())
