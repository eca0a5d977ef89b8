"""A gpt-oss of any size with random weights, as its MXFP4 checkpoint: speed does not depend on what a model knows.

Its answers are noise, and its residual stream amplifies small differences, so tokens of two kernels part soon; compare
layers bit by bit, and log-probabilities by teacher forcing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_ROPE = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A gpt-oss; the defaults are gpt-oss-20b's, but for fewer layers and words."""

    layers: int = 8
    experts: int = 32
    top_k: int = 4
    hidden: int = 2880
    intermediate: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 1024


def write_gpt_oss(folder: Path, sizes: Sizes, *, seed: int = 0) -> Path:
    """Writes config.json, generation_config.json and a file of weights for each layer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    total = 0
    for number in range(-1, sizes.layers):
        file = "model-others.safetensors" if number < 0 else f"model-layer-{number:03}.safetensors"
        tensors = _others(sizes, g) if number < 0 else _layer(sizes, number, g)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write(folder / "model.safetensors.index.json", index)
    _write(folder / "config.json", _config(sizes))
    special = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
    _write(folder / "generation_config.json", {**special, "do_sample": False})
    return folder


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _normal(g: torch.Generator, *shape: int, std: float) -> Tensor:
    return (torch.randn(*shape, generator=g, dtype=torch.float32, device="cpu") * std).bfloat16()


def _others(sizes: Sizes, g: torch.Generator) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": _normal(g, sizes.vocabulary, sizes.hidden, std=1.0),
        "lm_head.weight": _normal(g, sizes.vocabulary, sizes.hidden, std=0.2),
        "model.norm.weight": torch.ones(sizes.hidden, dtype=torch.bfloat16, device="cpu"),
    }


def _layer(sizes: Sizes, number: int, g: torch.Generator) -> dict[str, Tensor]:
    layer, hidden, inter = f"model.layers.{number}.", sizes.hidden, sizes.intermediate
    tensors = {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16, device="cpu")
    attention = f"{layer}self_attn."
    for name, heads in (("q_proj", sizes.heads), ("k_proj", sizes.kv_heads), ("v_proj", sizes.kv_heads)):
        tensors[f"{attention}{name}.weight"] = _normal(g, heads * sizes.head_dim, hidden, std=0.05)
        tensors[f"{attention}{name}.bias"] = _normal(g, heads * sizes.head_dim, std=0.05)
    tensors[f"{attention}o_proj.weight"] = _normal(g, hidden, sizes.heads * sizes.head_dim, std=0.05)
    tensors[f"{attention}o_proj.bias"] = _normal(g, hidden, std=0.05)
    tensors[f"{attention}sinks"] = _normal(g, sizes.heads, std=1.0)
    tensors[f"{layer}mlp.router.weight"] = _normal(g, sizes.experts, hidden, std=0.2)
    tensors[f"{layer}mlp.router.bias"] = _normal(g, sizes.experts, std=0.1)
    for name, rows, k in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
        path, blocks = f"{layer}mlp.experts.{name}", (sizes.experts, rows, k // 32)
        tensors[f"{path}_blocks"] = torch.randint(0, 256, (*blocks, 16), generator=g, dtype=torch.uint8, device="cpu")
        tensors[f"{path}_scales"] = torch.randint(118, 123, blocks, generator=g, dtype=torch.uint8, device="cpu")
        tensors[f"{path}_bias"] = _normal(g, sizes.experts, rows, std=0.1)
    return tensors


def _config(sizes: Sizes) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": sizes.layers,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "experts_per_token": sizes.top_k,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "sliding_window": 128,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "layer_types": [kinds[number % 2] for number in range(sizes.layers)],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {**_ROPE, "rope_type": "yarn", "truncate": False},
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "use_cache": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": list(_NOT_CONVERTED)},
    }
