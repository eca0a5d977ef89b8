"""A router read from a checkpoint: what config.json says, what it must say, and the correction bias in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from torch import Tensor

from mxfp4_moe import Router, load_router
from mxfp4_moe._checkpoints.models import MODELS
from mxfp4_moe._checkpoints.router import ROUTERS, router_scheme

BIAS = torch.linspace(-1, 1, 8)
MIMO = {
    "model_type": "mimo_v2_flash",
    "hidden_act": "silu",
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "scoring_func": "sigmoid",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
NAME = "model.layers.0.mlp.gate.e_score_correction_bias"


def write(
    folder: Path,
    change: dict[str, Any] | None = None,
    *,
    bias: Tensor | None = BIAS,
    name: str = NAME,
) -> Path:
    """A layer with MiMo's names; a key that is changed to ... is left out of config.json."""
    layer = checkpoints.layer_of("weight-scale", 8, 64, 32)
    own = {} if bias is None else {name: bias}
    checkpoints.write(folder, checkpoints.tensors_of("weight-scale", layer, 0) | own)
    config = {**MIMO, **(change or {})}
    checkpoints.write_config(folder, {key: value for key, value in config.items() if value is not ...})
    return folder


def fields(router: Router) -> dict[str, Any]:
    return {name: value for name, value in vars(router).items() if name in Router.__dataclass_fields__ and name != "e"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_that_config_and_files_say(tmp_path: Path, dtype: torch.dtype) -> None:
    router = load_router(write(tmp_path, bias=BIAS.to(dtype)), layer=0)
    found = fields(router)
    bias = found.pop("e_score_correction_bias")
    assert bias.dtype is torch.float32
    assert torch.equal(bias, BIAS.to(dtype).float())
    assert found == {
        "top_k": 2,
        "scoring_func": "sigmoid",
        "renormalize": True,
        "num_expert_group": 4,
        "topk_group": 2,
        "group_score": "top2_sum",
        "routed_scaling_factor": 2.5,
    }


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"routed_scaling_factor": None}, "routed_scaling_factor", 1.0),
        ({"routed_scaling_factor": 3}, "routed_scaling_factor", 3.0),
        ({"n_group": 1, "topk_group": 1}, "num_expert_group", 1),
        ({"n_group": 1, "topk_group": ...}, "num_expert_group", 1),
        ({"n_group": 8, "topk_group": 8}, "num_expert_group", 1),  # all are kept
        ({"norm_topk_prob": False}, "renormalize", False),
        ({"scoring_func": ...}, "scoring_func", "sigmoid"),
        ({"scoring_func": "softmax"}, "scoring_func", "softmax"),
    ],
)
def test_what_config_may_say(tmp_path: Path, change: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(load_router(write(tmp_path, change), layer=0), name) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mystery"}, r"router: .*config\.json has model_type 'mystery', whose router is not known here"),
        ({"n_routed_experts": 9}, r".*: expected 8 experts, which layer 0 has, got 9: the config is another model's"),
        ({"num_experts_per_tok": ...}, r".*config\.json: expected num_experts_per_tok, got none"),
        (
            {"norm_topk_prob": ...},
            r".*: expected norm_topk_prob or moe_renormalize, which the router of 'mimo_v2_flash'",
        ),
        ({"n_group": ...}, r".*: expected n_group or num_expert_group, which the router of 'mimo_v2_flash' needs"),
        ({"topk_group": ...}, r".*: expected topk_group, which the router of"),
        ({"routed_scaling_factor": ...}, r".*: expected routed_scaling_factor, which the router of"),
        ({"routed_scaling_factor": "2.5"}, r".*: expected routed_scaling_factor to be of type float, got '2\.5'"),
        ({"n_group": True}, r".*: expected n_group to be of type int, got True"),
        ({"norm_topk_prob": 1}, r".*: expected norm_topk_prob to be of type bool, got 1"),
        ({"scoring_func": "noaux"}, r"scoring_func: expected one of 'softmax', 'sigmoid', 'sqrtsoftplus', got 'noaux'"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group: expected 1 to 4, got 5"),
    ],
)
def test_what_config_must_say(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load_router(write(tmp_path, change), layer=0)
    assert "\n" not in str(caught.value)


def test_a_bias_must_be_there_and_fit(tmp_path: Path) -> None:
    for folder, options, message in (
        (
            "none",
            {"bias": None},
            r"router: expected model\.layers\.0\.mlp\.gate\.e_score_correction_bias or .*, got nei",
        ),
        (
            "short",
            {"bias": BIAS[:7].clone()},
            r"e_score_correction_bias: expected F32, BF16 or F16 \[8\], got F32 \[7\]",
        ),
        ("ints", {"bias": BIAS.int()}, r"e_score_correction_bias: expected F32, BF16 or F16 \[8\], got I32 \[8\]"),
        ("wide", {"bias": BIAS[None].clone()}, r"e_score_correction_bias: expected .*, got F32 \[1, 8\]"),
        ("next", {"name": NAME.replace(".0.", ".1.")}, r"router: expected model\.layers\.0\..*, got neither"),
    ):
        with pytest.raises(ValueError, match=message):
            load_router(write(tmp_path / folder, **options), layer=0)  # type: ignore[arg-type]


def test_no_config_no_layer_no_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.layers\.3\..*: no such tensor"):
        load_router(path, layer=3)
    with pytest.raises(FileNotFoundError):
        load_router(tmp_path / "nowhere", layer=0)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"router: expected config\.json in .*, got none; make a mxfp4_moe\.Router"):
        load_router(path, layer=0)


@pytest.mark.parametrize("used", [True, False])
def test_minimax_says_whether_it_has_a_bias(tmp_path: Path, used: bool) -> None:
    (model,) = [model for model in MODELS if model.name == "MiniMax-M3"]
    layer = checkpoints.layer_of("weight-scale-w1", 8, 64, 32)
    text: Any = {**model.config["text_config"], "num_local_experts": 8, "hidden_size": 64, "intermediate_size": 32}  # type: ignore[dict-item]
    name = f"{model.prefix}0.block_sparse_moe.e_score_correction_bias"
    checkpoints.write(tmp_path, checkpoints.tensors_of("weight-scale-w1", layer, 0, model.prefix) | {name: BIAS})
    checkpoints.write_config(tmp_path, {**model.config, "text_config": {**text, "use_routing_bias": used}})
    bias = load_router(tmp_path, layer=0).e_score_correction_bias
    assert torch.equal(bias, BIAS) if used and bias is not None else bias is None


def test_openai_has_another_config(tmp_path: Path) -> None:
    layer = checkpoints.layer_of("gpt-oss-original", 4, 64, 32)
    checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss-original", layer, 0))
    config = {"num_experts": 4, "experts_per_token": 2, "hidden_size": 64, "intermediate_size": 32, "swiglu_limit": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_router(tmp_path, layer=0).is_topk_softmax


def test_a_row_for_each_model_and_sources_for_each_row() -> None:
    from mxfp4_moe._checkpoints.config import expert_config

    used = {router_scheme(expert_config(Path("config.json"), model.config)) for model in MODELS}
    assert used == set(ROUTERS)
    assert all(row.sources for row in ROUTERS)
