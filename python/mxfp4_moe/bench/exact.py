"""The layer of a benchmark in float64, from its weights and from activations as they come: how accurate each one is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import dequantize_mxfp4
from .inputs import CallInputs, LayerTensors

ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0  # gpt-oss's SwiGLU, which every layer of the benchmark has
MOST_TOKENS = 64  # beyond them float64 takes longer than what is measured


def exact_layer(tensors: LayerTensors, inputs: CallInputs) -> Tensor:
    """Float64 [T, H], nothing quantized but the weights; one expert's weights at a time are float64."""
    scores = inputs.logits.double().topk(tensors.shape.top_k, dim=-1)
    shares, x = scores.values.softmax(-1), inputs.hidden_states.double()
    out = torch.zeros_like(x)
    for expert in sorted({*scores.indices.flatten().tolist()}):
        token, slot = (scores.indices == expert).nonzero(as_tuple=True)
        w13 = dequantize_mxfp4(tensors.w13[expert], tensors.w13_scale[expert]).double()
        sums = x[token] @ w13.T + tensors.w13_bias[expert].double()
        gate, up = sums[:, 0::2].clamp(max=LIMIT), sums[:, 1::2].clamp(-LIMIT, LIMIT)
        between = gate * torch.sigmoid(ALPHA * gate) * (up + BETA)
        w2 = dequantize_mxfp4(tensors.w2[expert], tensors.w2_scale[expert]).double()
        rows = between @ w2.T + tensors.w2_bias[expert].double()
        out.index_add_(0, token, shares[token, slot].unsqueeze(-1) * rows)
    return out
