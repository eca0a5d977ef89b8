"""config.json beside a checkpoint: what it says of activation and sizes, and arguments that say otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch

from mxfp4_moe import MoEWeights

E, H, INTER = 3, 96, 160

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": 4096,
    "moe_intermediate_size": INTER,
    "num_experts": E,
    "num_experts_per_tok": 2,
}


def layer_of(scheme: str, seed: int = 0) -> checkpoints.Layer:
    return checkpoints.layer_of(scheme, E, H, INTER, seed=seed)


class TestConfig:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        checkpoints.write(tmp_path, checkpoints.tensors_of("weight-scale", layer_of("weight-scale"), 0))
        return tmp_path

    def read(self, path: Path, config: Any, **options: Any) -> MoEWeights:
        checkpoints.write_config(path, config)
        return MoEWeights.from_pretrained(path, layer=0, **options)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({}, ("swiglu", None)),
            ({"hidden_act": "gelu"}, ("geglu", None)),
            ({"hidden_act": "gelu_pytorch_tanh"}, ("geglu_tanh", None)),
            ({"expert_swiglu_limit_list": [2.5, 0]}, ("swiglu_step", 2.5)),
            ({"expert_swiglu_limit_list": [None, 2.5]}, ("swiglu", None)),
            ({"model_type": "deepseek_v4", "swiglu_limit": 10.0}, ("swiglu_oai", 10.0)),
            ({"hidden_act": "swigluoai", "swiglu_limit": 5}, ("swiglu_oai", 5.0)),
            ({"hidden_act": "situ", "activation_situ_beta": 4.0}, ("situ", None)),
            ({"hidden_act": "situ", "activation_situ_linear_beta": 25}, ("situ", 25.0)),
        ],
    )
    def test_says_the_activation(self, path: Path, change: dict[str, Any], expected: tuple[str, float | None]) -> None:
        for config in (CONFIG | change, {"model_type": "vl", "hidden_size": 7, "text_config": CONFIG | change}):
            weights = self.read(path, config)
            assert (weights.activation.value, weights.limit) == expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"num_experts": 4},
                r"config\.json: expected 3 as number of experts, .*, got 4: the config is another model's",
            ),
            ({"hidden_size": 64}, "expected 96 as hidden size, .*, got 64"),
            ({"moe_intermediate_size": 128}, "expected 160 as intermediate size, .*, got 128"),
            ({"moe_intermediate_size": None}, "expected 160 as intermediate size, .*, got 4096"),
            ({"num_experts_per_tok": 4}, "expected at most 3 experts per token, got 4"),
            ({"num_experts": "three"}, "expected num_experts to be an integer, got 'three'"),
            ({"hidden_act": "xielu"}, "has hidden_act 'xielu', which this version has no kernels for"),
            ({"hidden_act": "situ", "swiglu_limit": 7.0}, "has swiglu_limit 7.0, and what it limits in model_type"),
            (
                {"hidden_act": "situ", "activation_situ_beta": "4"},
                "expected activation_situ_beta to be a number, got '4'",
            ),
            (
                {"hidden_act": "situ", "activation_situ_beta": 0},
                "beta: expected a finite number above 0 with activation 'situ', got 0",
            ),
            ({"hidden_act": None}, "has no hidden_act"),
            ({"swiglu_limit": 7.0}, "has swiglu_limit 7.0, and what it limits in model_type 'qwen3_moe' is not known"),
            ({"swiglu_limit": "7"}, "expected swiglu_limit to be a number, got '7'"),
        ],
    )
    def test_is_refused(self, path: Path, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.read(path, CONFIG | change)

    @pytest.mark.parametrize(
        "text", ["{", "[1]", "<!DOCTYPE html><html>", "version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_that_is_none(self, path: Path, text: str) -> None:
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: expected (JSON|an object), got"):
            MoEWeights.from_pretrained(path, layer=0)

    def test_is_needed_where_the_naming_is_of_several_models(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"^activation: expected config\.json in .*; got neither: pass activation="
        ):
            MoEWeights.from_pretrained(path, layer=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weights = MoEWeights.from_pretrained(path, layer=0, activation="swiglu_step", limit=3.0)
        assert (weights.activation.value, weights.limit) == ("swiglu_step", 3.0)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"activation": "geglu"}, "activation: .*config.json says 'swiglu_oai', and 'geglu' was given and is used"),
            ({"alpha": 1.5}, "alpha: .*config.json says 1.702, and 1.5 was given and is used"),
            ({"beta": 0.0}, "beta: .* says 1.0, and 0.0 was given and is used"),
            ({"limit": 9.0}, "limit: .* says 7.0, and 9.0 was given and is used"),
            ({"limit": None}, "limit: .* says 7.0, and None was given and is used"),
            ({"limit": torch.tensor([7.0, 7.0, 8.0])}, "limit: .* says 7.0, and one for each expert was given"),
            ({"gate_up_order": "up_gate"}, r"gate_up_order: the naming \(weight-scale\) says 'gate_up', and 'up_gate'"),
        ],
    )
    def test_arguments_win_and_say_so(self, path: Path, given: dict[str, Any], message: str) -> None:
        config = CONFIG | {"hidden_act": "swigluoai", "swiglu_limit": 7.0}
        with pytest.warns(UserWarning, match=message) as caught:
            weights = self.read(path, config, **given)
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name], "it points at the caller"
        for name, value in given.items():
            taken = getattr(weights, name)
            assert torch.equal(taken, value) if isinstance(value, torch.Tensor) else taken == value

    def test_arguments_that_agree_say_nothing(self, path: Path) -> None:
        config = CONFIG | {"hidden_act": "swigluoai", "swiglu_limit": 7.0}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            agree = {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7, "gate_up_order": "gate_up"}
            assert self.read(path, config, **agree).limit == 7
            assert self.read(path, config, limit=torch.full((E,), 7.0)).alpha == 1.702

    def test_of_gpt_oss_changes_its_numbers(self, tmp_path: Path) -> None:
        checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0))
        config = {"model_type": "gpt_oss", "swiglu_limit": 5.0, "swiglu_alpha": 1.5, "num_local_experts": E}
        weights = self.read(tmp_path, config)
        assert (weights.alpha, weights.beta, weights.limit) == (1.5, 1.0, 5.0)
        original = {"num_experts": E, "experts_per_token": 2, "swiglu_limit": 6.0, "hidden_size": H}
        assert self.read(tmp_path, original).limit == 6.0
        assert MoEWeights.from_safetensors(tmp_path, layer=0).limit == 7.0, "which looks at its arguments alone"
