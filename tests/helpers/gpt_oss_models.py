"""Whole gpt-oss models in small, as Hugging Face stores them: MXFP4 experts, the rest in bfloat16, config.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracles
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

EXPERTS, TOP_K, HIDDEN, INTER, LAYERS, VOCABULARY = 8, 4, 64, 96, 3, 64
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def write_model(folder: Path, *, shards: int = 1, not_converted: tuple[int, ...] = (), **changes: Any) -> Path:
    """Writes a random model.

    Args:
        shards: files, with an index where there are several.
        not_converted: layers whose experts are in bfloat16, as `modules_to_not_convert` then says.
        changes: in place of the configuration's sizes.
    """
    config = GptOssConfig(
        **{
            "num_hidden_layers": LAYERS,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "hidden_size": HIDDEN,
            "intermediate_size": INTER,
            "vocab_size": VOCABULARY,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "sliding_window": 32,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.2,
            **changes,
        }
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).bfloat16()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        if layer in not_converted:
            prefix = f"model.layers.{layer}.mlp.experts."
            tensors |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
            continue
        checkpoint = oracles.random_checkpoint(
            config.num_local_experts, config.hidden_size, config.intermediate_size, seed=layer
        )
        tensors |= oracles.gpt_oss_tensors(checkpoint, layer)
    _write(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, shards)
    stated = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": NOT_CONVERTED + [f"model.layers.{layer}.mlp.experts" for layer in not_converted],
        },
    }
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def _write(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files by its name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def run_ranks(program: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program in several processes, as torchrun starts them; they meet in a port of this machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MXFP4_MOE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*start, str(program), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
