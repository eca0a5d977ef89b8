"""A whole gpt-oss in small, with random weights, as its MXFP4 checkpoint: what engines load.

Its embeddings are large and its layers' outputs are of their size, so each layer matters to the logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import oracles
import torch
from model_checkpoints import tensors_of
from safetensors.torch import save_file

LAYERS, EXPERTS, TOP_K, HIDDEN, INTER, VOCAB = 2, 8, 4, 288, 352, 512  # 352: eleven blocks, so two ranks get 6 and 5
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
_ROPE = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}


def write_gpt_oss(folder: Path, *, seed: int = 0) -> Path:
    """The checkpoint, in one file."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * std).bfloat16()

    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, std=1.0),
        "lm_head.weight": normal(VOCAB, HIDDEN, std=0.2),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            tensors[f"{layer}self_attn.{name}.weight"] = normal(heads * HEAD_DIM, HIDDEN, std=0.05)
            tensors[f"{layer}self_attn.{name}.bias"] = normal(heads * HEAD_DIM, std=0.05)
        tensors[f"{layer}self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * HEAD_DIM, std=0.05)
        tensors[f"{layer}self_attn.o_proj.bias"] = normal(HIDDEN, std=0.05)
        tensors[f"{layer}self_attn.sinks"] = normal(HEADS, std=1.0)
        tensors[f"{layer}mlp.router.weight"] = normal(EXPERTS, HIDDEN, std=0.2)
        tensors[f"{layer}mlp.router.bias"] = normal(EXPERTS, std=0.1)
        experts = oracles.random_checkpoint(EXPERTS, HIDDEN, INTER, seed=seed + 1 + number)
        tensors |= tensors_of("gpt-oss", experts, number)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config()), encoding="utf-8")
    generation = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def _config() -> dict[str, object]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "experts_per_token": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "sliding_window": 128,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(LAYERS)],
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
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
            ],
        },
    }
