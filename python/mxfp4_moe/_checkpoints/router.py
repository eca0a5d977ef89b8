"""A layer's router, from config.json and the checkpoint: which models have which, data alone, and how it is read.

Nothing is guessed: what a model's config.json must say of its router and does not is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._router_rules import RouterRule
from .config import NAME, ExpertConfig, read_config
from .contents import FoundLayer, choose_layer
from .files import Checkpoint
from .headers import Entry

if TYPE_CHECKING:
    import torch

_FLOATS = ("F32", "BF16", "F16")
_GROUPS, _GROUPS_KEPT = ("n_group", "num_expert_group"), ("topk_group",)
_RENORMALIZE = ("norm_topk_prob", "moe_renormalize")  # most; Kimi
_SCALING = ("routed_scaling_factor",)


@dataclass(frozen=True, kw_only=True)
class RouterScheme:
    """How a family of models chooses experts.

    Attributes:
        model_types: config.json's model_type, or how it begins.
        scoring_func: a `routers.ScoringFunc`.
        scoring_keys: where config.json may say it.
        bias: what its correction bias may be called, behind the layer's number; none where there is no bias.
        bias_key: where config.json says whether there is one; "" where there always is.
        groups: whether config.json says n_group and topk_group.
        renormalize: what is done where config.json has no say; None where it must say it.
        scaling: whether config.json says routed_scaling_factor.
        by_token_id: what the table is called of layers whose experts are fixed by token id, behind the layer's number.
        sources: where it was read.
    """

    model_types: tuple[str, ...]
    scoring_func: str
    scoring_keys: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    bias_key: str = ""
    groups: bool = False
    renormalize: bool | None = None
    scaling: bool = False
    by_token_id: str = ""
    sources: tuple[str, ...]


_NOAUX_BIAS = ("mlp.gate.e_score_correction_bias", "block_sparse_moe.gate.e_score_correction_bias")

ROUTERS = (
    RouterScheme(
        model_types=("gpt_oss",),
        scoring_func="softmax",
        renormalize=True,
        sources=("transformers 5.24, models/gpt_oss (GptOssTopKRouter)",),
    ),
    RouterScheme(
        model_types=("qwen3_moe",),
        scoring_func="softmax",
        sources=("transformers 5.24, models/qwen3_moe (Qwen3MoeTopKRouter)",),
    ),
    RouterScheme(
        model_types=("deepseek_v4",),
        scoring_func="sqrtsoftplus",
        scoring_keys=("scoring_func",),
        bias=("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
        scaling=True,
        by_token_id="ffn.gate.tid2eid",
        sources=(
            "transformers 5.24, models/deepseek_v4 (DeepseekV4TopKRouter, DeepseekV4HashRouter) and "
            "conversion_mapping.py (.gate.bias)",
            "vLLM 0.33, fused_moe/router/fused_topk_bias_router.py",
        ),
    ),
    RouterScheme(
        model_types=("minimax_m3",),
        scoring_func="sigmoid",
        scoring_keys=("scoring_func",),
        bias=("block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
        bias_key="use_routing_bias",
        renormalize=True,
        scaling=True,
        sources=(
            "transformers 5.24, models/minimax_m3_vl (MiniMaxM3VLTopKRouter, MiniMaxM3VLSparseMoeBlock) and "
            "conversion_mapping.py",
            "vLLM 0.33, models/minimax_m3/amd/model.py (MiniMaxM3MoE)",
        ),
    ),
    RouterScheme(
        model_types=("mimo_v2",),
        scoring_func="sigmoid",
        scoring_keys=("scoring_func",),
        bias=_NOAUX_BIAS,
        groups=True,
        scaling=True,
        sources=(
            "transformers 5.24, models/mimo_v2_flash (MiMoV2FlashTopkRouter; a routed_scaling_factor of null is 1)",
            "vLLM 0.33, model_executor/models/mimo_v2.py (MiMoV2MoE)",
        ),
    ),
    RouterScheme(
        model_types=("bailing",),
        scoring_func="sigmoid",
        scoring_keys=("score_function", "scoring_func"),
        bias=("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
        groups=True,
        renormalize=True,
        scaling=True,
        sources=(
            "transformers 5.24, models/bailing_hybrid (BailingHybridTopkRouter), conversion_mapping.py (expert_bias)",
            "vLLM 0.33, model_executor/models/bailing_moe_v3.py (BailingMoeV3MoE)",
        ),
    ),
    RouterScheme(
        model_types=("kimi_linear", "kimi_k3"),
        scoring_func="sigmoid",
        scoring_keys=("moe_router_activation_func",),
        bias=_NOAUX_BIAS[::-1],
        groups=True,
        scaling=True,
        sources=(
            "transformers 5.24, models/kimi_linear (KimiLinearTopkRouter)",
            "SGLang 0.5.23, srt/configs/kimi_linear.py and srt/models/kimi_k3.py (KimiK3MoE)",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class FoundRouter:
    """The router of one layer, as config.json and headers show it.

    Attributes:
        rule: everything but the correction bias.
        bias: the tensor of its correction bias, or None.
        table: the name of the table where experts go by token id, or "" where the layer chooses.
    """

    rule: RouterRule
    bias: Entry | None
    table: str


def find_router(checkpoint: Checkpoint, config: ExpertConfig | None, found: FoundLayer) -> FoundRouter:
    """The router of a layer that the checkpoint has.

    Raises:
        ValueError: as `routing.load_router`, but for layers whose experts are fixed by token id.
    """
    if config is None:
        raise ValueError(
            f"router: expected {NAME} in {checkpoint.folder}, which says how experts are chosen, got none; make a "
            "mxfp4_moe.Router"
        )
    if found.num_experts is not None and config.num_experts != found.num_experts:
        raise ValueError(
            f"{config.file}: expected {found.num_experts} experts, which layer {found.layer} has, got "
            f"{config.num_experts}: the config is another model's, or tensors are missing"
        )
    scheme = router_scheme(config)
    rule = RouterRule(**config_fields(config, scheme))
    table = _behind(found, scheme.by_token_id) if scheme.by_token_id else ""
    if table not in checkpoint:
        table = ""
    bias = _bias(checkpoint, config, scheme, found) if has_bias(config, scheme) and not table else None
    return FoundRouter(rule=rule, bias=bias, table=table)


def router_fields(
    path: str | Path, *, layer: int, prefix: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What `routers.Router` takes, of one layer of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: as `routing.load_router`.
    """
    import torch

    with Checkpoint(path) as checkpoint:
        found = choose_layer(checkpoint, layer, prefix=prefix)
        router = find_router(checkpoint, read_config(checkpoint.folder), found)
        if router.table:
            raise ValueError(
                f"router: expected a layer that chooses, got layer {layer}, whose experts go by token id "
                f"({router.table}); {weigh_call(router.rule)} weighs them"
            )
        fields = vars(router.rule).copy()
        if router.bias is not None:
            bias = checkpoint.read([router.bias], "cpu")
            fields["e_score_correction_bias"] = bias.to(device=device, dtype=torch.float32)
    return fields


def weigh_call(rule: RouterRule) -> str:
    """The call that weighs experts which are fixed by token id."""
    fields = ((field.name, getattr(rule, field.name), field.default) for field in dataclasses.fields(rule))
    said = (
        (name, value.value if isinstance(value, Enum) else value) for name, value, usual in fields if value != usual
    )
    shown = ", ".join(f"{name}={value!r}" for name, value in said)
    return f"select_experts(router_logits, Router({shown}), topk_ids=tid2eid[input_ids])"


def router_scheme(config: ExpertConfig) -> RouterScheme:
    """The row that a config belongs to.

    Raises:
        ValueError: there is none.
    """
    kind = config.model_type
    if not kind and "experts_per_token" in config.raw:
        kind = "gpt_oss"  # OpenAI's own config.json
    for row in ROUTERS:
        if kind.startswith(row.model_types):
            return row
    raise ValueError(
        f"router: {config.file} has model_type {config.model_type!r}, whose router is not known here; make a "
        "mxfp4_moe.Router of what its code does"
    )


def config_fields(config: ExpertConfig, scheme: RouterScheme) -> dict[str, Any]:
    """What `routers.Router` takes, but for the bias; only what is not its default.

    Raises:
        ValueError: config.json does not say what it must, or says something that is not known.
    """
    if config.top_k is None:
        raise ValueError(f"{config.file}: expected num_experts_per_tok, got none")
    scoring = _stated(config, scheme.scoring_keys, str, scheme.scoring_func)
    fields: dict[str, Any] = {"top_k": config.top_k, "scoring_func": scoring}
    if not _stated(config, _RENORMALIZE, bool, scheme.renormalize):
        fields["renormalize"] = False
    if scheme.groups:
        groups = _stated(config, _GROUPS, int, None)
        kept = _stated(config, _GROUPS_KEPT, int, 1 if groups == 1 else None)
        if groups != kept:  # else every group is kept
            fields |= {"num_expert_group": groups, "topk_group": kept}
    if scheme.scaling:
        factor = float(_stated(config, _SCALING, float, None))
        fields |= {"routed_scaling_factor": factor} if factor != 1.0 else {}
    return fields


def has_bias(config: ExpertConfig, scheme: RouterScheme) -> bool:
    """Whether the model's choices have a correction bias."""
    return bool(scheme.bias) and (not scheme.bias_key or bool(_stated(config, (scheme.bias_key,), bool, True)))


def _stated(config: ExpertConfig, keys: tuple[str, ...], kind: type, otherwise: Any) -> Any:
    """What config.json says under one of the keys; `otherwise` where it says nothing, and None is an error then."""
    for key in keys:
        if key not in config.raw:
            continue
        value = config.raw[key]
        if value is None and key in _SCALING:
            return 1.0  # MiMo-V2
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{config.file}: expected {key} to be of type {kind.__name__}, got {value!r}")
        return value
    if otherwise is None:
        raise ValueError(
            f"{config.file}: expected {' or '.join(keys)}, which the router of {config.model_type!r} needs, got none; "
            "make a mxfp4_moe.Router"
        )
    return otherwise


def _behind(found: FoundLayer, name: str) -> str:
    return f"{found.prefix}{found.layer}.{name}"


def _bias(checkpoint: Checkpoint, config: ExpertConfig, scheme: RouterScheme, found: FoundLayer) -> Entry:
    names = [_behind(found, name) for name in scheme.bias]
    name = next((name for name in names if name in checkpoint), None)
    if name is None:
        raise ValueError(f"router: expected {' or '.join(names)} in {checkpoint.listing}, got neither")
    entry = checkpoint.entry(name)
    if entry.dtype not in _FLOATS or entry.shape != (config.num_experts,):
        raise ValueError(
            f"{name}: expected F32, BF16 or F16 [{config.num_experts}], got {entry.dtype} {list(entry.shape)}"
        )
    return entry
