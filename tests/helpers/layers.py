"""One small layer and its calls, for every test that needs some weights and tokens on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.weights import MoEWeights

E, T, K, H, INTER = 4, 6, 2, 64, 96


def make_weights(*, bias: bool = True, seed: int = 0, **options: Any) -> MoEWeights:
    g = torch.Generator().manual_seed(seed)
    w13, w13_scale = formats.quantize_mxfp4(torch.randn(E, 2 * INTER, H, generator=g) / H**0.5)
    w2, w2_scale = formats.quantize_mxfp4(torch.randn(E, H, INTER, generator=g) / INTER**0.5)
    return MoEWeights.from_mxfp4(
        w13,
        w13_scale,
        w2,
        w2_scale,
        w13_bias=torch.randn(E, 2 * INTER, generator=g) if bias else None,
        w2_bias=torch.randn(E, H, generator=g) if bias else None,
        **options,
    )


def make_call(*, dtype: torch.dtype = torch.bfloat16, tokens: int = T, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(tokens, H, generator=g).to(dtype),
        "topk_weights": torch.rand(tokens, K, generator=g),
        "topk_ids": torch.randint(0, E, (tokens, K), generator=g),
        "weights": make_weights(),
    }


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def mxfp8(call: dict[str, Any], scale_layout: str = "linear") -> dict[str, Any]:
    """The hidden states of a call as the layer would quantize them."""
    codes, scales = formats.quantize_mxfp8(call["hidden_states"])
    if scale_layout == "swizzled":
        scales = formats.swizzle_scales(scales).flatten()
    return {"hidden_states": codes, "hidden_states_scale": scales, "scale_layout": scale_layout}
