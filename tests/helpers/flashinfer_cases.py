"""Calls of the drop-in: raw weights as FlashInfer has them, and everything else for a layer on the CPU."""

from __future__ import annotations

from typing import Any

import oracles
import torch

from mxfp4_moe import flashinfer_api as fi

E, T, K, H, INTER = 4, 10, 2, 128, 160
BF16 = torch.bfloat16


def raw_weights(seed: int = 0) -> dict[str, Any]:
    checkpoint = oracles.random_checkpoint(E, H, INTER, seed=seed)
    unused = torch.ones(E)
    return {
        "fc1_expert_weights": checkpoint["w13"].view(torch.int64),
        "fc2_expert_weights": checkpoint["w2"].view(torch.int64),
        "quant_scales": [
            fi.block_scale_interleave(checkpoint["w13_scale"]).view(torch.int32).view(E, 384, 1),
            unused,
            fi.block_scale_interleave(checkpoint["w2_scale"]).view(torch.int32).view(E, 128, 2),
            unused,
        ],
        "fc1_expert_biases": checkpoint["w13_bias"],
        "fc2_expert_biases": checkpoint["w2_bias"],
    }


def make_call(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    codes, scales = fi.mxfp8_quantize(torch.randn(T, H, generator=g).to(BF16))
    return {
        "input": codes,
        "token_selected_experts": torch.randint(0, E, (T, K), generator=g, dtype=torch.int32),
        "token_final_scales": torch.rand(T, K, generator=g),
        "output_dtype": BF16,
        "input_sf": scales,
        "use_mxfp8_act_scaling": True,
        **raw_weights(),
    }
