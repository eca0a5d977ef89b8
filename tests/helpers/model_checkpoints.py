"""Checkpoints of published models in small, names and layouts written out by hand: the library's table is tested by it.

A layer is a dict as `oracles.random_checkpoint` makes it, rows of w13 in the order that `ORDER_OF` has for the scheme.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracles
import torch
from safetensors.torch import save_file
from torch import Tensor

from mxfp4_moe import MoEWeights

Layer = dict[str, Tensor]

# How projections and what belongs to them are called where each expert has its own; and the dtypes of codes and scales.
_LINEAR = {
    "compressed-tensors": ("mlp", ("gate_proj", "up_proj", "down_proj"), "weight_packed", "weight_scale"),
    "compressed-tensors-w1": ("block_sparse_moe", ("w1", "w3", "w2"), "weight_packed", "weight_scale"),
    "weight-scale": ("mlp", ("gate_proj", "up_proj", "down_proj"), "weight", "weight_scale"),
    "weight-scale-w1": ("block_sparse_moe", ("w1", "w3", "w2"), "weight", "weight_scale"),
    "weight-scale-inv": ("mlp", ("gate_proj", "up_proj", "down_proj"), "weight", "weight_scale_inv"),
    "deepseek-v4": ("ffn", ("w1", "w3", "w2"), "weight", "scale"),
    "float": ("mlp", ("gate_proj", "up_proj", "down_proj"), "weight", None),
    "float-w1": ("block_sparse_moe", ("w1", "w3", "w2"), "weight", None),
}
_DTYPES = {"deepseek-v4": (torch.int8, torch.float8_e8m0fnu), "weight-scale-inv": (torch.uint8, torch.float8_e8m0fnu)}

SCHEMES = ("gpt-oss", "gpt-oss-original", "gpt-oss-bf16", "gpt-oss-quark", *_LINEAR)
FLOATS = ("gpt-oss-bf16", "float", "float-w1")
ORDER_OF = {name: "interleaved" if name.startswith("gpt-oss") else "gate_up" for name in SCHEMES}


def values(layer: Layer, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Dequantized weights; bfloat16 holds them exactly."""
    numbers = oracles.mxfp4_values(layer[name].numpy(), layer[f"{name}_scale"].numpy())
    return torch.from_numpy(numbers).to(dtype)


def tensors_of(scheme: str, layer: Layer, number: int, prefix: str = "model.layers.") -> dict[str, Tensor]:
    """A layer's tensors under the names of a scheme; biases are left out where the scheme or the layer has none."""
    if scheme.startswith("gpt-oss"):
        return _gpt_oss(scheme, layer, number, prefix)
    block, (gate, up, down), codes, scales = _LINEAR[scheme]
    code_dtype, scale_dtype = _DTYPES.get(scheme, (torch.uint8, torch.uint8))
    inter = layer["w2"].shape[2] * 2
    rows = {gate: ("w13", slice(0, inter)), up: ("w13", slice(inter, None)), down: ("w2", slice(None))}
    tensors: dict[str, Tensor] = {}
    for expert in range(layer["w13"].shape[0]):
        for projection, (name, some) in rows.items():
            path = f"{prefix}{number}.{block}.experts.{expert}.{projection}."
            if scales is None:
                tensors[path + codes] = values(layer, name)[expert, some].contiguous()
            else:
                tensors[path + codes] = layer[name][expert, some].contiguous().view(code_dtype)
                tensors[path + scales] = layer[f"{name}_scale"][expert, some].contiguous().view(scale_dtype)
            if f"{name}_bias" in layer:
                tensors[path + "bias"] = layer[f"{name}_bias"][expert, some].clone()
    return tensors


def _gpt_oss(scheme: str, layer: Layer, number: int, prefix: str) -> dict[str, Tensor]:
    experts = f"{prefix}{number}.mlp.experts."
    tensors = {}
    for name, projection, original in (("w13", "gate_up_proj", "mlp1"), ("w2", "down_proj", "mlp2")):
        codes, scales, bias = layer[name], layer[f"{name}_scale"], layer.get(f"{name}_bias")
        blocks = codes.reshape(*codes.shape[:2], -1, 16)
        if scheme == "gpt-oss":
            tensors |= {f"{experts}{projection}_blocks": blocks, f"{experts}{projection}_scales": scales}
            biases = {f"{experts}{projection}_bias": bias}
        elif scheme == "gpt-oss-original":
            path = f"block.{number}.mlp.{original}"
            tensors |= {f"{path}_weight.blocks": blocks, f"{path}_weight.scales": scales}
            biases = {f"{path}_bias": bias}
        elif scheme == "gpt-oss-bf16":
            tensors |= {f"{experts}{projection}": values(layer, name).mT.contiguous()}
            biases = {f"{experts}{projection}_bias": bias}
        else:
            biases = {}
            for e in range(len(codes)):
                path = f"{experts}{e}.{projection}."
                tensors |= {f"{path}weight": codes[e].clone(), f"{path}weight_scale": scales[e].clone()}
                biases |= {f"{path}bias": None if bias is None else bias[e].clone()}
        tensors |= {name: tensor for name, tensor in biases.items() if tensor is not None}
    return tensors


# What stands behind a layer's number for its correction bias, by model_type in config.json; others have none.
BIAS_NAMES = {
    "deepseek_v4": "ffn.gate.bias",
    "minimax_m3_text": "block_sparse_moe.e_score_correction_bias",
    "mimo_v2_flash": "mlp.gate.e_score_correction_bias",
    "bailing_hybrid": "mlp.gate.expert_bias",
    "kimi_linear": "block_sparse_moe.gate.e_score_correction_bias",
}


def model_type_of(config: Any) -> str:
    return str(config.get("text_config", config)["model_type"])


def bias_tensors(config: Any, prefix: str, number: int, bias: Tensor) -> dict[str, Tensor]:
    """A layer's correction bias under the name that a model has for it."""
    name = BIAS_NAMES.get(model_type_of(config))
    return {} if name is None else {f"{prefix}{number}.{name}": bias}


def other_tensors(prefix: str) -> dict[str, Tensor]:
    """What else is in a checkpoint, some of it named much like experts."""
    names = ("0.input_layernorm.weight", "0.mlp.shared_experts.gate_proj.weight", "0.mlp.gate.weight")
    names += ("0.block_sparse_moe.gate.weight", "0.ffn.shared_experts.w1.weight", "0.mlp.router.weight")
    return {f"{prefix}{name}": torch.zeros(2, 2, dtype=torch.bfloat16) for name in names} | {
        "lm_head.weight": torch.zeros(2, 2, dtype=torch.bfloat16)
    }


def write(folder: Path, tensors: dict[str, Tensor], *, shards: int = 1, index: bool = True) -> Path:
    """One file, or shards with or without their index, neighbours in different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def write_config(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def layer_of(scheme: str, experts: int, hidden: int, inter: int, *, seed: int = 0) -> Layer:
    """Random weights of one layer, with biases where gpt-oss is meant."""
    layer = oracles.random_checkpoint(experts, hidden, inter, seed=seed)
    return layer if scheme.startswith("gpt-oss") else {n: t for n, t in layer.items() if not n.endswith("bias")}


def same_bytes(weights: MoEWeights, layer: Layer) -> bool:
    """Whether the weights are the layer's, byte for byte; biases by value."""
    stored = weights.to_mxfp4()._asdict()
    return all(
        stored[name] is layer.get(name) is None or torch.equal(stored[name], layer[name].to(stored[name].dtype))
        for name in stored
    )
