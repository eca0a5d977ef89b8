"""What tests of models share: what each computes and how it chooses, from its own sources; its config, resized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

TOLERANCE = 2.0**-8  # as test_reference.py has it for bfloat16, with the reason
# What each model computes between its GEMMs, from its own sources (the rows of _checkpoints/models.py name them).
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"activation": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0},
    "gpt-oss-120b": {"activation": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0},
    "DeepSeek-V4-Flash": {"activation": "swiglu_oai", "alpha": 1.0, "beta": 0.0, "limit": 10.0},
    "DeepSeek-V4-Pro": {"activation": "swiglu_oai", "alpha": 1.0, "beta": 0.0, "limit": 10.0},
    "MiniMax-M3": {"activation": "swiglu_oai", "alpha": 1.702, "beta": 1.0, "limit": 7.0},
    "MiMo-V2": {"activation": "swiglu"},
    "Ling / Bailing V3": {"activation": "swiglu_step", "limit": 7.0},  # layer 1; layer 0 has no limit
    "Kimi-K3": {"activation": "situ", "beta": 4.0, "limit": 25.0},
    "Qwen3-MoE, quantized here": {"activation": "swiglu"},
}
# How each model chooses and weighs, from its own sources; top_k is cut down with the experts (`write_model`).
ROUTERS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"scoring_func": "softmax"},
    "gpt-oss-120b": {"scoring_func": "softmax"},
    "DeepSeek-V4-Flash": {"scoring_func": "sqrtsoftplus", "bias": True, "routed_scaling_factor": 1.5},
    "DeepSeek-V4-Pro": {"scoring_func": "sqrtsoftplus", "bias": True, "routed_scaling_factor": 2.5},
    "MiniMax-M3": {"scoring_func": "sigmoid", "bias": True, "routed_scaling_factor": 2.0},
    "MiMo-V2": {"scoring_func": "sigmoid", "bias": True},
    "Ling / Bailing V3": {
        **{"scoring_func": "sigmoid", "bias": True, "routed_scaling_factor": 2.5},
        **{"num_expert_group": 8, "topk_group": 4},
    },
    "Kimi-K3": {"scoring_func": "sigmoid", "bias": True},
    "Qwen3-MoE, quantized here": {"scoring_func": "softmax"},
}


def shrunk(config: Mapping[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The model's config.json with the small layer's sizes in the model's own keys."""
    keys = {
        "num_experts": ("num_local_experts", "n_routed_experts", "num_experts"),
        "top_k": ("num_experts_per_tok", "num_experts_per_token"),
        "hidden": ("hidden_size", "routed_expert_hidden_size"),
        "inter": ("moe_intermediate_size",) if "moe_intermediate_size" in str(config) else ("intermediate_size",),
    }
    of_key = {key: sizes[what] for what, names in keys.items() for key in names}
    return {
        key: shrunk(value, sizes) if isinstance(value, Mapping) else of_key.get(key, value)
        for key, value in config.items()
    }


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected))
