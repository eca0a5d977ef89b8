"""config.json beside a checkpoint: the sizes of its experts, and what stands between their GEMMs.

Models name these things each in their own way; the tables here are those ways, with who has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contents import FoundLayer, LayerSizes
from .files import Checkpoint
from .refusals import HEAD_BYTES, what_is
from .schemes import Between

NAME = "config.json"

_EXPERTS = (
    "num_local_experts",  # gpt-oss, MiniMax-M3, Mixtral
    "n_routed_experts",  # DeepSeek, MiMo
    "num_experts",  # Qwen, Ling, Kimi-K3, OpenAI's original/
)
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")  # most; Kimi-K3; OpenAI's original/
# Kimi-K3's experts are narrower than the model, and Nemotron 3's may be.
_HIDDEN = ("routed_expert_hidden_size", "moe_latent_size", "hidden_size")
_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size")  # the second where no dense layers have it
# Experts without gates (Nemotron-H: mlp_hidden_act), by transformers' names of activations.
_UNGATED = {
    **{"relu2": "relu2", "relu": "relu", "silu": "silu", "swish": "silu"},
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"},
}
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")  # where others hold a language model


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What a config says of the experts; None where it says nothing."""

    file: Path
    model_type: str
    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    raw: Mapping[str, Any]

    def between(self, layer: int) -> Between:
        """What stands between the GEMMs of a layer.

        Raises:
            ValueError: the config does not say, or says something that is not known here.
        """
        return _between(self, layer)


def read_config(folder: Path) -> ExpertConfig | None:
    """The config in a folder; None where there is none.

    Raises:
        ValueError: it is not JSON, or a size in it is no number.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    text = file.read_bytes()
    try:
        raw = json.loads(text)
    except ValueError as error:
        kind = what_is(text[:HEAD_BYTES])
        got = f"{kind[0]}; {kind[1]}" if kind and kind[0] != "JSON text" else f"{error}"
        raise ValueError(f"{file}: expected JSON, got {got}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected an object, got {type(raw).__name__}")
    return expert_config(file, raw)


def expert_config(file: Path, raw: Mapping[str, Any]) -> ExpertConfig:
    """What a config says of the experts; file is for messages.

    Raises:
        ValueError: a size in it is no number.
    """
    inner = raw
    if not any(key in raw for key in _EXPERTS):
        inner = next((raw[key] for key in NESTED if isinstance(raw.get(key), dict)), raw)
        inner = next((inner[key] for key in NESTED if isinstance(inner.get(key), dict)), inner)
    return ExpertConfig(
        file=file,
        model_type=str(inner.get("model_type") or raw.get("model_type") or ""),
        num_experts=_integer(file, inner, _EXPERTS),
        top_k=_integer(file, inner, _TOP_K),
        hidden_size=_integer(file, inner, _HIDDEN),
        intermediate_size=_integer(file, inner, _INTERMEDIATE),
        raw=inner,
    )


def stated_activation(
    checkpoint: Checkpoint, config: ExpertConfig | None, found: FoundLayer, *, named: bool
) -> tuple[Between | None, str]:
    """What the checkpoint says of the activation, and where it says that; config.json first, else the naming.

    Args:
        named: the caller names an activation, so that nothing has to be said.

    Raises:
        ValueError: nobody says it.
    """
    own = found.scheme.activation
    if not found.scheme.gated and config is not None and (act := config.raw.get("mlp_hidden_act")) is not None:
        if act in _UNGATED:
            return Between(activation=_UNGATED[act]), str(config.file)
        if named:
            return None, ""
        raise ValueError(
            f"activation: {config.file} has mlp_hidden_act {act!r}, which this version has no kernels for; name "
            "activation and its numbers to use another"
        )
    if own is not None:
        where = f"the naming ({found.scheme.name})"
        if config is not None and "swiglu_limit" in config.raw:
            try:
                return config.between(found.layer), str(config.file)
            except ValueError:
                return own, where
        return own, where
    if config is None:
        if named:
            return None, ""
        raise ValueError(
            f"activation: expected config.json in {checkpoint.folder}, or a name, since several models have the naming "
            f"{found.scheme.name}; got neither: pass activation=, and alpha=, beta=, limit= where it has them"
        )
    try:
        return config.between(found.layer), str(config.file)
    except ValueError:
        if named:
            return None, ""
        raise


def compare_sizes(config: ExpertConfig, found: FoundLayer, sizes: LayerSizes) -> None:
    """Refuses a config of other sizes than a layer's tensors have.

    Raises:
        ValueError: names both.
    """
    for what, stated, actual in (
        ("number of experts", config.num_experts, sizes.num_experts),
        ("hidden size", config.hidden_size, sizes.hidden_size),
        ("intermediate size", config.intermediate_size, sizes.intermediate_size),
    ):
        if stated is not None and stated != actual:
            raise ValueError(
                f"{config.file}: expected {actual} as {what}, which layer {found.layer} has ({sizes}), got "
                f"{stated}: the config is another model's, or tensors are missing"
            )
    if config.top_k is not None and config.top_k > sizes.num_experts:
        raise ValueError(f"{config.file}: expected at most {sizes.num_experts} experts per token, got {config.top_k}")


def _between(config: ExpertConfig, layer: int) -> Between:
    """Who says what, the most particular first:

    gpt-oss: "silu" with a limit, and means swiglu_oai (transformers, models/gpt_oss; OpenAI's own has no hidden_act).
    MiniMax-M3: "swigluoai" (vLLM, transformers_utils/configs/minimax_m3.py: beta is 1 where it is not there).
    Ling V3: a limit per layer for silu(g) and u (vLLM, bailing_moe_v3.py: SwigluStepAndMul).
    DeepSeek-V4: a limit for g before silu, and for u (transformers, models/deepseek_v4: _apply_gate).
    Kimi-K3: "situ", with two numbers, 1 and none where they are not there (vLLM, layers/activation.py: SituAndMul, and
    transformers_utils/configs/kimi_linear.py).
    """
    raw, act = config.raw, str(config.raw.get("hidden_act") or config.raw.get("hidden_activation") or "")
    limit = _number(config, "swiglu_limit")
    if config.model_type == "gpt_oss" or (not config.model_type and "experts_per_token" in raw and limit is not None):
        alpha = _number(config, "swiglu_alpha")
        return Between(activation="swiglu_oai", alpha=1.702 if alpha is None else alpha, limit=limit)
    if act == "swigluoai":
        alpha, beta = _number(config, "swiglu_alpha"), _number(config, "swiglu_beta")
        return Between(
            activation="swiglu_oai",
            alpha=1.702 if alpha is None else alpha,
            beta=1.0 if beta is None else beta,
            limit=limit,
        )
    if isinstance(limits := raw.get("expert_swiglu_limit_list"), list) and act == "silu":
        here = limits[layer] if layer < len(limits) else None
        return Between(activation="swiglu_step", limit=float(here)) if here else Between(activation="swiglu")
    if limit is not None and config.model_type.startswith("deepseek_v4") and act == "silu":
        return Between(activation="swiglu_oai", alpha=1.0, beta=0.0, limit=limit)  # silu(g) is g * sigmoid(1 * g)
    if act == "situ" and limit is None:
        gate, linear = _number(config, "activation_situ_beta"), _number(config, "activation_situ_linear_beta")
        return Between(activation="situ", beta=1.0 if gate is None else gate, limit=linear)
    if limit is not None:
        raise ValueError(
            f"activation: {config.file} has swiglu_limit {limit}, and what it limits in model_type "
            f"{config.model_type!r} is not known; name activation, alpha, beta and limit"
        )
    names = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
    if act not in names:
        said = f"hidden_act {act!r}, which this version has no kernels for" if act else "no hidden_act"
        raise ValueError(f"activation: {config.file} has {said}; name activation and its numbers to use another")
    return Between(activation=names[act])


def _integer(file: Path, raw: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = raw.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, list) and value and len(set(map(str, value))) == 1 and isinstance(value[0], int):
            return value[0]  # one for each layer, all the same
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{file}: expected {key} to be an integer, got {value!r}")
    return None


def _number(config: ExpertConfig, key: str) -> float | None:
    value = config.raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{config.file}: expected {key} to be a number, got {value!r}")
    return float(value)
