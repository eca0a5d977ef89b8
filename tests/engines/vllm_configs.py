"""MXFP4 experts of other quantization configs of vLLM: layers that vLLM makes and loads; prints what became of each.

vllm_configs.py MODEL

A layer that ours runs is compared with `fused_moe` on the same bytes, bit by bit, and with the layer in float64 that
vLLM's own activation stands in.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.activation import SiluAndMulWithClamp
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config
from vllm.models.deepseek_v41.quant_config import DeepseekV4FP8Config as DeepseekV41FP8Config
from vllm.plugins import load_general_plugins

import mxfp4_moe

EXPERTS, TOP_K, HIDDEN, INTER, LIMIT, TOKENS = 6, 2, 128, 96, 1.5, 19
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIGS: dict[str, Any] = {
    "DeepSeek-V4": lambda: DeepseekV4FP8Config.from_config(FP8),
    "DeepSeek-V4.1": lambda: DeepseekV41FP8Config.from_config(FP8),
    "stored as MXFP4": lambda: Fp8Config.from_config({**FP8, "store_dtype": "mxfp4"}),
    "left out": lambda: DeepseekV4FP8Config.from_config({**FP8, "ignored_layers": ["model.layers.0.ffn.experts"]}),
    "other activations": lambda: DeepseekV4FP8Config.from_config(FP8),
}


def main() -> None:
    load_general_plugins()
    config = EngineArgs(sys.argv[1], skip_tokenizer_init=True).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29683", 0, "gloo")
        initialize_model_parallel(1, 1)
        for seed, (name, quantization) in enumerate(CONFIGS.items()):
            others = Mxfp4MoeBackend.DEEPGEMM_MXFP4 if name == "other activations" else Mxfp4MoeBackend.CPU
            choose = "vllm.model_executor.layers.quantization.mxfp4.select_deepseek_v4_mxfp4_moe_backend"
            with mock.patch(choose, return_value=(others, None)):
                layer = made(quantization(), seed)
            method = type(layer.quant_method)
            said = "" if method.__module__.startswith("vllm") else compared(layer, seed)
            print(f"{name}: {method.__module__.partition('.')[0]} {method.__name__} {said}")
            config.compilation_config.static_forward_context.clear()  # where vLLM knows layers by name


def made(quantization: Any, seed: int) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    runner = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        params_dtype=torch.bfloat16,
        quant_config=quantization,
        prefix="model.layers.0.ffn.experts",
        scoring_func="sqrtsoftplus",
        e_score_correction_bias=torch.zeros(EXPERTS, dtype=torch.float32),
        swiglu_limit=LIMIT,
        routed_scaling_factor=1.5,
        router_logits_dtype=torch.float32,
    )
    torch.set_default_dtype(torch.float32)
    return runner.routed_experts


def checkpoint(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """w1 (gates), w2 and w3 (ups) with their scales, as files have them: codes and E8M0."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, k: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 256, (EXPERTS, rows, k // 2), generator=g, dtype=torch.uint8)
        scales = torch.randint(118, 124, (EXPERTS, rows, k // 32), generator=g, dtype=torch.uint8)
        return codes, scales.view(torch.float8_e8m0fnu)

    return {"w1": matrix(INTER, HIDDEN), "w2": matrix(HIDDEN, INTER), "w3": matrix(INTER, HIDDEN)}


def compared(layer: Any, seed: int) -> str:
    """Loads the layer as vLLM does, and calls it."""
    files = checkpoint(seed)
    for shard, tensors in files.items():
        target = "w2" if shard == "w2" else "w13"
        for name, tensor in zip(("weight", "weight_scale"), tensors, strict=True):
            parameter = getattr(layer, f"{target}_{name}")
            for expert in range(EXPERTS):
                parameter.weight_loader(parameter, tensor[expert], f"experts.{target}_{name}", shard, expert)
    layer.quant_method.process_weights_after_loading(layer)
    g = torch.Generator().manual_seed(seed + 100)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(TOKENS)]).to(torch.int32)
    weights = torch.rand(TOKENS, TOP_K, generator=g)
    got = layer.forward_modular(hidden.clone(), weights, ids)

    w13, w13_scale = (torch.cat([a, b.view(a.dtype)], 1) for a, b in zip(files["w1"], files["w3"], strict=True))
    numbers = {"gate_up_order": "gate_up", "activation": "swiglu_oai", "alpha": 1.0, "beta": 0.0, "limit": LIMIT}
    ours = mxfp4_moe.MoEWeights.from_mxfp4(w13, w13_scale, *files["w2"], **numbers)
    taken = layer.quant_method.decision.activation_format
    expected = mxfp4_moe.fused_moe(hidden, weights, ids, ours, activation_format=taken)
    exact = in_float64(files, hidden, weights, ids)
    error = float((got.double() - exact).norm() / exact.norm())
    return f"{layer.quant_method.experts_cls.__name__} bits {torch.equal(got, expected)} error {error:.4f}"


def in_float64(files: dict[str, tuple[Tensor, Tensor]], hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer without a rounding."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    dense = {}
    for name, (codes, scales) in files.items():
        pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
        powers = torch.exp2(scales.view(torch.uint8).double() - 127).repeat_interleave(32, -1)
        dense[name] = values[pairs] * powers
    activate, x = SiluAndMulWithClamp(LIMIT).forward_native, hidden.double()
    out = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            sums = torch.cat([dense["w1"][expert] @ x[token], dense["w3"][expert] @ x[token]])
            out[token] += weight * (dense["w2"][expert] @ activate(sums[None])[0])
    return out


if __name__ == "__main__":
    main()
