"""Models with mixtures of experts that are published in MXFP4, or quantized to it: one row each, data alone.

docs/models.md is written from these rows, and the tests have a small checkpoint of each. `config` is what the model's
own config.json says of its experts and its router, in its own keys; `config.py` and `router.py` read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model.

    Attributes:
        hidden_size, intermediate_size, num_experts, top_k: of its routed experts.
        schemes: names of the rows of `schemes.py` in which its checkpoints come.
        prefix: what stands before a layer's number in its own checkpoint.
        config: the part of config.json that says its sizes, activation and router.
        note: what else it needs.
        sources: where the config's keys were read; of the router's, `router.py` says it.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    schemes: tuple[str, ...]
    prefix: str = "model.layers."
    config: Mapping[str, object]
    note: str = ""
    sources: tuple[str, ...]


def _gpt_oss(name: str, experts: int) -> Model:
    return Model(
        name=name,
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=experts,
        top_k=4,
        schemes=("gpt-oss", "gpt-oss-original", "gpt-oss-bf16", "gpt-oss-quark"),
        config={
            "model_type": "gpt_oss",
            "hidden_act": "silu",
            "swiglu_limit": 7.0,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": experts,
            "num_experts_per_tok": 4,
        },
        sources=("transformers 5.24, models/gpt_oss", "openai/gpt-oss, gpt_oss/torch/model.py"),
    )


def _deepseek_v4(name: str, hidden: int, inter: int, experts: int, scaling: float) -> Model:
    return Model(
        name=name,
        hidden_size=hidden,
        intermediate_size=inter,
        num_experts=experts,
        top_k=6,
        schemes=("deepseek-v4",),
        prefix="layers.",
        config={
            "model_type": "deepseek_v4",
            "hidden_act": "silu",
            "swiglu_limit": 10.0,
            "hidden_size": hidden,
            "moe_intermediate_size": inter,
            "n_routed_experts": experts,
            "num_experts_per_tok": 6,
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "routed_scaling_factor": scaling,
        },
        note="experts of the first three layers by token id; one shared expert, in FP8",
        sources=("transformers 5.24, models/deepseek_v4 (DeepseekV4Experts, its routers and config)",),
    )


MODELS = (
    _gpt_oss("gpt-oss-20b", 32),
    _gpt_oss("gpt-oss-120b", 128),
    _deepseek_v4("DeepSeek-V4-Flash", 4096, 2048, 256, 1.5),
    _deepseek_v4("DeepSeek-V4-Pro", 7168, 3072, 384, 2.5),
    Model(
        name="MiniMax-M3",
        hidden_size=6144,
        intermediate_size=3072,
        num_experts=128,
        top_k=4,
        schemes=("weight-scale-w1", "compressed-tensors-w1", "float-w1"),
        prefix="language_model.model.layers.",
        config={
            "model_type": "minimax_m3_vl",
            "text_config": {
                "model_type": "minimax_m3_text",
                "hidden_act": "swigluoai",
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
                "hidden_size": 6144,
                "intermediate_size": 3072,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "routed_scaling_factor": 2.0,
            },
        },
        note="one shared expert",
        sources=("vLLM 0.33, transformers_utils/configs/minimax_m3.py", "transformers 5.24, minimax_m3_vl"),
    ),
    Model(
        name="MiMo-V2",
        hidden_size=4096,
        intermediate_size=2048,
        num_experts=256,
        top_k=8,
        schemes=("weight-scale", "compressed-tensors", "float"),
        config={
            "model_type": "mimo_v2_flash",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": None,
        },
        sources=("SGLang 0.5.23, srt/models/mimo_v2.py", "vLLM 0.33, model_executor/models/mimo_v2.py"),
    ),
    Model(
        name="Ling / Bailing V3",
        hidden_size=2560,
        intermediate_size=768,
        num_experts=512,
        top_k=8,
        schemes=("weight-scale-inv", "weight-scale", "float"),
        config={
            "model_type": "bailing_hybrid",
            "hidden_act": "silu",
            "expert_swiglu_limit_list": [0, 7.0, 0, 7.0],
            "hidden_size": 2560,
            "moe_intermediate_size": 768,
            "num_experts": 512,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        note="shared experts in FP8; a limit for each layer",
        sources=("vLLM 0.33, model_executor/models/bailing_moe_v3.py (expert_swiglu_limit_list)",),
    ),
    Model(
        name="Kimi-K3",
        hidden_size=3584,
        intermediate_size=3072,
        num_experts=896,
        top_k=16,
        schemes=("compressed-tensors-w1",),
        prefix="language_model.model.layers.",
        config={
            "model_type": "kimi_k3",
            "text_config": {
                "model_type": "kimi_linear",
                "hidden_act": "situ",
                "activation_situ_beta": 4.0,
                "activation_situ_linear_beta": 25.0,
                "routed_expert_hidden_size": 3584,
                "moe_intermediate_size": 3072,
                "num_experts": 896,
                "num_experts_per_token": 16,
                "moe_router_activation_func": "sigmoid",
                "num_expert_group": 1,
                "topk_group": 1,
                "moe_renormalize": True,
                "routed_scaling_factor": 1.0,
            },
        },
        note="experts work on 3584 values (routed_expert_hidden_size); projections to and from them are the model's",
        sources=(
            "vLLM 0.33, transformers_utils/configs/kimi_k3.py and kimi_linear.py",
            "SGLang 0.5.23, srt/models/kimi_k3.py (SiTU, latent experts)",
        ),
    ),
    Model(
        name="Qwen3-MoE, quantized here",
        hidden_size=2048,
        intermediate_size=768,
        num_experts=128,
        top_k=8,
        schemes=("float", "compressed-tensors", "weight-scale", "nvfp4-modelopt", "nvfp4-compressed-tensors"),
        config={
            "model_type": "qwen3_moe",
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        sources=("transformers 5.24, models/qwen3_moe", "vLLM 0.33, model_executor/models/qwen3_moe.py"),
    ),
)
