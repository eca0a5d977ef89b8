"""How a layer is found in files: names, shards, prefixes, config.json; what is read of them; and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from safetensors.torch import save_file

from mxfp4_moe import MoEWeights
from mxfp4_moe._checkpoints.files import Checkpoint
from mxfp4_moe._checkpoints.headers import read_header
from mxfp4_moe._checkpoints.load import open_layer

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


def same_bytes(weights: MoEWeights, layer: checkpoints.Layer) -> bool:
    stored = weights.to_mxfp4()._asdict()
    return all(
        stored[name] is layer.get(name) is None or torch.equal(stored[name], layer[name].to(stored[name].dtype))
        for name in stored
    )


def load(path: Path, layer: int = 0, **options: Any) -> MoEWeights:
    return MoEWeights.from_pretrained(path, layer=layer, **{"activation": "swiglu", **options})


class TestFindsTheLayer:
    @pytest.mark.parametrize("scheme", [s for s in checkpoints.SCHEMES if s not in checkpoints.FLOATS])
    @pytest.mark.parametrize(("shards", "index"), [(1, True), (2, True), (3, False)])
    def test_in_one_file_or_shards(self, tmp_path: Path, scheme: str, shards: int, index: bool) -> None:
        layers = [layer_of(scheme, seed) for seed in range(2)]
        tensors = checkpoints.other_tensors("model.layers.")
        for number, layer in enumerate(layers):
            tensors |= checkpoints.tensors_of(scheme, layer, number)
        checkpoints.write(tmp_path, tensors, shards=shards, index=index)
        activation = "swiglu_oai" if scheme.startswith("gpt-oss") else "swiglu"
        for number, layer in enumerate(layers):
            assert same_bytes(load(tmp_path, number, activation=activation), layer)

    @pytest.mark.parametrize("scheme", ["gpt-oss", "weight-scale", "deepseek-v4", "compressed-tensors-w1"])
    @pytest.mark.parametrize(
        "prefix",
        ["layers.", "model.layers.", "language_model.model.layers.", "model.language_model.layers.", "a.b.c.layers."],
    )
    @pytest.mark.parametrize("number", [0, 7, 60, 104])
    def test_behind_any_prefix_with_any_number(self, tmp_path: Path, scheme: str, prefix: str, number: int) -> None:
        layer = layer_of(scheme)
        checkpoints.write(tmp_path, checkpoints.tensors_of(scheme, layer, number, prefix))
        activation = "swiglu_oai" if scheme == "gpt-oss" else "swiglu"
        assert same_bytes(load(tmp_path, number, activation=activation), layer)

    @pytest.mark.parametrize("scheme", ["gpt-oss", "gpt-oss-original", "gpt-oss-quark"])
    def test_without_biases(self, tmp_path: Path, scheme: str) -> None:
        layer = {name: tensor for name, tensor in layer_of(scheme).items() if not name.endswith("bias")}
        checkpoints.write(tmp_path, checkpoints.tensors_of(scheme, layer, 0))
        weights = MoEWeights.from_pretrained(tmp_path, layer=0)
        assert weights.w13_bias is weights.w2_bias is None
        assert same_bytes(weights, layer)
        assert same_bytes(MoEWeights.from_safetensors(tmp_path, layer=0), layer)

    @pytest.mark.parametrize("scheme", ["compressed-tensors", "weight-scale-w1", "deepseek-v4", "weight-scale-inv"])
    def test_with_biases_of_each_expert(self, tmp_path: Path, scheme: str) -> None:
        layer = checkpoints.layer_of("gpt-oss", E, H, INTER)
        tensors = checkpoints.tensors_of(scheme, layer, 0)
        checkpoints.write(tmp_path, tensors)
        assert same_bytes(load(tmp_path), layer)
        for lacking in (name for name in tensors if name.endswith("bias")):
            checkpoints.write(tmp_path, {name: t for name, t in tensors.items() if name != lacking})
            with pytest.raises(ValueError, match=rf"^{re.escape(lacking)}: no such tensor"):
                load(tmp_path)

    def test_a_file_an_index_or_a_directory(self, tmp_path: Path) -> None:
        layer = layer_of("weight-scale")
        tensors = checkpoints.tensors_of("weight-scale", layer, 0)
        checkpoints.write(tmp_path / "one", tensors)
        checkpoints.write(tmp_path / "two", tensors, shards=2)
        for path in (tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors.index.json"):
            assert same_bytes(load(path), layer)
            assert same_bytes(load(Path(str(path))), layer)

    def test_two_models_in_one_checkpoint(self, tmp_path: Path) -> None:
        layers = {"text.layers.": layer_of("weight-scale"), "audio.layers.": layer_of("weight-scale", 1)}
        tensors = {}
        for prefix, layer in layers.items():
            tensors |= checkpoints.tensors_of("weight-scale", layer, 0, prefix)
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(
            ValueError, match=r"^prefix: expected one of 'audio\.layers\.', 'text\.layers\.', since layer 0"
        ):
            load(tmp_path)
        for prefix, layer in layers.items():
            assert same_bytes(load(tmp_path, prefix=prefix), layer)

    @pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.layers."])
    def test_a_draft_model_is_not_taken_for_the_model(self, tmp_path: Path, prefix: str) -> None:
        main, draft = layer_of("deepseek-v4"), layer_of("deepseek-v4", 1)
        tensors = checkpoints.tensors_of("deepseek-v4", main, 0, "layers.")
        tensors |= checkpoints.tensors_of("deepseek-v4", draft, 0, prefix)
        checkpoints.write(tmp_path, tensors)
        assert same_bytes(load(tmp_path), main)
        assert same_bytes(load(tmp_path, prefix=prefix), draft)

    def test_names_of_another_layer_or_model_do_not_match(self, tmp_path: Path) -> None:
        layer = layer_of("weight-scale")
        tensors = checkpoints.tensors_of("weight-scale", layer, 12)
        checkpoints.write(tmp_path, tensors)
        for number in (1, 2, 120):
            with pytest.raises(ValueError, match=rf"layers\.{number}\..* it has experts in layers 12 \(weight-scale\)"):
                load(tmp_path, number)


class TestStoredDtypes:
    """What codes and scales are called changes no byte of them."""

    @pytest.mark.parametrize("codes", [torch.uint8, torch.int8, torch.float4_e2m1fn_x2])
    @pytest.mark.parametrize("scales", [torch.uint8, torch.float8_e8m0fnu])
    def test_in_files_and_in_memory(self, tmp_path: Path, codes: torch.dtype, scales: torch.dtype) -> None:
        layer = layer_of("gpt-oss")
        given = {
            n: t.view(scales if n.endswith("scale") else codes) if t.dtype == torch.uint8 else t
            for n, t in layer.items()
        }
        assert same_bytes(MoEWeights.from_mxfp4(**given), layer)
        strided = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in layer.items() if t.dim() == 3}
        views = {n: t.view(scales if n.endswith("scale") else codes) for n, t in strided.items()}
        assert same_bytes(MoEWeights.from_mxfp4(**{**given, **views}), layer)

        def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(scales if "scales" in name else codes) if tensor.dtype == torch.uint8 else tensor

        tensors = {name: stored(name, t) for name, t in checkpoints.tensors_of("gpt-oss", layer, 0).items()}
        checkpoints.write(tmp_path, tensors)
        assert same_bytes(MoEWeights.from_pretrained(tmp_path, layer=0), layer)

    @pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
    def test_signed_scales_are_no_e8m0(self, name: str) -> None:
        layer = layer_of("gpt-oss")
        with pytest.raises(TypeError, match=rf"^{name}: expected uint8 .*, got int8"):
            MoEWeights.from_mxfp4(**{**layer, name: layer[name].view(torch.int8)})

    @pytest.mark.parametrize(
        ("codes", "scales", "says"),
        [
            (torch.float8_e4m3fn, torch.float8_e8m0fnu, "FP8 or MXFP8 weights"),
            (torch.uint8, torch.float8_e4m3fn, "NVFP4, whose blocks of 16 have E4M3 scales"),
            (torch.int32, torch.bfloat16, "integer weights packed in words"),
            (torch.bfloat16, torch.uint8, "floating point weights under the names of quantized ones"),
        ],
    )
    def test_formats_that_are_named_alike(
        self, tmp_path: Path, codes: torch.dtype, scales: torch.dtype, says: str
    ) -> None:
        tensors = checkpoints.tensors_of("compressed-tensors", layer_of("compressed-tensors"), 0)
        for name, tensor in tensors.items():
            tensors[name] = tensor.float().to(scales if name.endswith("scale") else codes)
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(ValueError, match=rf"weight_packed: expected MXFP4, .*: {says}"):
            load(tmp_path)

    def test_fp8_of_a_model_that_has_mxfp4_too(self, tmp_path: Path) -> None:
        """DeepSeek-V4 converted to FP8 has the same names."""
        tensors = checkpoints.tensors_of("deepseek-v4", layer_of("deepseek-v4"), 0, "layers.")
        fp8 = {
            n: torch.zeros(t.shape[0], 2 * t.shape[1]).to(torch.float8_e4m3fn) if n.endswith("weight") else t
            for n, t in tensors.items()
        }
        checkpoints.write(tmp_path, fp8)
        with pytest.raises(ValueError, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight: expected MXFP4.*FP8"):
            load(tmp_path)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("expert", [0, 1, 2])
    @pytest.mark.parametrize("part", ["gate_proj.weight_packed", "up_proj.weight_scale", "down_proj.weight_packed"])
    def test_a_tensor_that_is_missing(self, tmp_path: Path, expert: int, part: str) -> None:
        tensors = checkpoints.tensors_of("compressed-tensors", layer_of("compressed-tensors"), 0)
        del tensors[f"model.layers.0.mlp.experts.{expert}.{part}"]
        if expert == E - 1 and part == "gate_proj.weight_packed":  # as if the layer had one expert less
            checkpoints.write_config(tmp_path, CONFIG)
            expected = r"config\.json: expected 2 as number of experts, .*, got 3: .* or tensors are missing"
        else:
            expected = rf"experts\.{expert}\.{re.escape(part)}: no such tensor in .*model\.safetensors"
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(ValueError, match=expected):
            load(tmp_path)

    @pytest.mark.parametrize("suffix", ["gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"])
    def test_a_stacked_tensor_that_is_missing(self, tmp_path: Path, suffix: str) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        del tensors[f"model.layers.0.mlp.experts.{suffix}"]
        checkpoints.write(tmp_path, tensors)
        for read in (MoEWeights.from_pretrained, MoEWeights.from_safetensors):
            with pytest.raises(ValueError, match=rf"^model\.layers\.0\.mlp\.experts\.{suffix}: no such tensor in"):
                read(tmp_path, layer=0)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("1.up_proj.weight_scale", lambda t: t[:, :2], r"expected U8 \[160, 3\], got U8 \[160, 2\]"),
            (
                "2.gate_proj.weight_packed",
                lambda t: t[:96],
                r"expected U8 \[160, 48\] or \[160, 3, 16\], got U8 \[96, 48\]",
            ),
            ("0.down_proj.weight_packed", lambda t: t[:, :64], "got U8 .160, 48., which is 160 rows of 96"),
            ("1.down_proj.weight_packed", lambda t: t.to(torch.int16), r"expected U8 .*, got I16"),
            ("2.down_proj.weight_scale", lambda t: t.view(torch.float8_e8m0fnu), r"expected U8 .*, got F8_E8M0"),
        ],
    )
    def test_another_shape_or_dtype(self, tmp_path: Path, name: str, change: Any, message: str) -> None:
        tensors = checkpoints.tensors_of("compressed-tensors", layer_of("compressed-tensors"), 0)
        full = f"model.layers.0.mlp.experts.{name}"
        tensors[full] = change(tensors[full]).contiguous()
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)

    def test_gpt_oss_stored_as_out_in(self, tmp_path: Path) -> None:
        """The same names with the other layout; sizes that differ give it away, and biases do where they do not."""
        tensors = checkpoints.tensors_of("gpt-oss-bf16", layer_of("gpt-oss-bf16"), 0)
        turned = {n: t.mT.contiguous() if t.dim() == 3 else t for n, t in tensors.items()}
        checkpoints.write(tmp_path, turned)
        with pytest.raises(ValueError, match=r"gate_up_proj: expected .* rows"):
            MoEWeights.from_pretrained(tmp_path, layer=0)
        square = checkpoints.tensors_of("gpt-oss-bf16", checkpoints.layer_of("gpt-oss-bf16", E, 96, 96), 0)
        checkpoints.write(tmp_path, {n: t.mT.contiguous() if t.dim() == 3 else t for n, t in square.items()})
        with pytest.raises(ValueError, match=r"gate_up_proj: expected 192 rows"):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    def test_stacked_names_without_biases_are_several_models(self, tmp_path: Path) -> None:
        """Qwen3-VL-MoE and Llama 4 have gpt-oss's names without biases, and gates before ups."""
        layer = {n: t for n, t in layer_of("gpt-oss-bf16").items() if not n.endswith("bias")}
        checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss-bf16", layer, 0))
        message = r"gate_up_proj_bias: no such tensor in .*other models have the other names.*scheme='gpt-oss-bf16'"
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_pretrained(tmp_path, layer=0)
        named = MoEWeights.from_pretrained(tmp_path, layer=0, scheme="gpt-oss-bf16")
        assert named.w2_bias is None

    @pytest.mark.parametrize("scheme", ["compressed-tensors", "weight-scale", "gpt-oss", "float"])
    @pytest.mark.parametrize(
        "suffix", ["weight_zero_point", "weight_global_scale", "weight_scale_2", "pre_quant_scale", "lora_A.weight"]
    )
    def test_tensors_that_have_a_say_in_the_values(self, tmp_path: Path, scheme: str, suffix: str) -> None:
        tensors = checkpoints.tensors_of(scheme, layer_of(scheme), 0)
        projection = "down_proj" if scheme == "gpt-oss" else "1.up_proj"
        other = f"model.layers.0.mlp.experts.{projection}.{suffix}"
        checkpoints.write(tmp_path, tensors | {other: torch.ones(1)})
        with pytest.raises(ValueError, match=rf"^{re.escape(other)}: expected nothing but .* is not known here"):
            load(tmp_path, activation="swiglu_oai")

    @pytest.mark.parametrize("suffix", ["input_scale", "input_global_scale", "weight_shape"])
    def test_tensors_that_have_none(self, tmp_path: Path, suffix: str) -> None:
        """Activations are quantized as they come, whatever scale another engine would take for them."""
        layer = layer_of("weight-scale")
        tensors = checkpoints.tensors_of("weight-scale", layer, 0)
        tensors |= {f"model.layers.0.mlp.experts.{e}.up_proj.{suffix}": torch.ones(1) for e in range(E)}
        tensors["model.layers.0.mlp.experts.e_score_correction_bias"] = torch.ones(E)
        checkpoints.write(tmp_path, tensors)
        assert same_bytes(load(tmp_path), layer)

    def test_another_naming_than_from_safetensors_reads(self, tmp_path: Path) -> None:
        checkpoints.write(tmp_path, checkpoints.tensors_of("deepseek-v4", layer_of("deepseek-v4"), 4, "layers."))
        message = r"it has experts in the naming of deepseek-v4: MoEWeights\.from_pretrained\('.*', layer=4\)"
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_safetensors(tmp_path, layer=4)

    def test_no_experts_at_all(self, tmp_path: Path) -> None:
        checkpoints.write(tmp_path, {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)})
        with pytest.raises(
            ValueError, match=r"no experts in a naming that is known .* model\.layers\.0\.mlp\.gate_proj"
        ):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layer": -1}, "layer: expected 0 or more, got -1"),
            ({"scheme": "gguf"}, "scheme: expected one of 'gpt-oss', .*, got 'gguf'"),
            ({"prefix": "decoder."}, "it has experts under the prefixes 'model.layers.'"),
            ({"scheme": "gpt-oss"}, "it has experts in the naming of weight-scale"),
            ({"limit": "7"}, "limit: expected a number, None or 'stated', got '7'"),
            ({"activation": "mish"}, "activation: expected one of"),
            ({"gate_up_order": "gates"}, "gate_up_order: expected one of"),
            ({"ep_size": 4}, "ep_size: expected 1 to 3 ranks"),
        ],
    )
    def test_arguments(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        checkpoints.write(tmp_path, checkpoints.tensors_of("weight-scale", layer_of("weight-scale"), 0))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **options)


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
            ({"hidden_act": "situ"}, "has hidden_act 'situ', which this version has no kernels for"),
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


class TestReads:
    def test_no_more_than_a_rank_needs(self, tmp_path: Path) -> None:
        scheme = "compressed-tensors"
        layers = [layer_of(scheme, seed) for seed in range(3)]
        tensors = checkpoints.other_tensors("model.layers.")
        for number, layer in enumerate(layers):
            tensors |= checkpoints.tensors_of(scheme, layer, number)
        checkpoints.write(tmp_path, tensors, shards=3)
        own = sum(tensor.nbytes for tensor in layers[1].values())
        for size, share in ((1, own), (3, own // 3)):
            with Checkpoint(tmp_path) as checkpoint:
                opened = open_layer(checkpoint, 1, device="cpu")
                for expert in range(E // size):
                    opened.raw.w13(expert, 0, H)
                    opened.raw.w2(expert, 0, INTER)
                assert checkpoint.bytes_read == share

    @pytest.mark.parametrize("scheme", ["weight-scale", "gpt-oss", "deepseek-v4"])
    @pytest.mark.parametrize("ranks", [(1, 2, 0, 1), (0, 1, 3, 4), (2, 3, 1, 2)])
    def test_one_rank(self, tmp_path: Path, scheme: str, ranks: tuple[int, int, int, int]) -> None:
        layer = layer_of(scheme)
        checkpoints.write(tmp_path, checkpoints.tensors_of(scheme, layer, 0), shards=2)
        names = dict(zip(("ep_rank", "ep_size", "tp_rank", "tp_size"), ranks, strict=True))
        activation = "swiglu_oai" if scheme == "gpt-oss" else "swiglu"
        weights = load(tmp_path, **names, activation=activation)
        whole = MoEWeights.from_mxfp4(**layer, gate_up_order=checkpoints.ORDER_OF[scheme], activation=activation)
        part = whole.expert_parallel(*ranks[:2]).tensor_parallel(*ranks[2:])
        assert torch.equal(weights.w13, part.w13)
        assert torch.equal(weights.w2, part.w2)
        assert (weights.first_expert, weights.num_global_experts) == (part.first_expert, E)

    def test_a_scale_that_is_no_number_by_its_name(self, tmp_path: Path) -> None:
        layer = layer_of("deepseek-v4")
        layer["w2_scale"][1, 5, 2] = 255
        checkpoints.write(tmp_path, checkpoints.tensors_of("deepseek-v4", layer, 0, "layers."))
        with pytest.raises(
            ValueError, match=r"^layers\.0\.ffn\.experts\.\*\.w2\.scale: expected E8M0 .* at \[1, 5, 2\]"
        ):
            load(tmp_path)

    def test_a_float_that_is_not_finite(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("float", layer_of("float"), 0)
        tensors["model.layers.0.mlp.experts.2.up_proj.weight"][3, 4] = math.nan
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(ValueError, match=r"gate_proj\.weight: expected finite values, .* in expert 2"):
            load(tmp_path)


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4792272488\n")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1, 2, 3]}, protocol=2))


def torch_saved(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def header_too_long(path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes()[:40])


def half(path: Path) -> None:
    save_file({"a": torch.zeros(64, 64)}, path)
    path.write_bytes(path.read_bytes()[:9000])


def raw(header: bytes, data: int = 0, length: int | None = None) -> Callable[[Path], None]:
    return lambda path: (
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)) and None
    )


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", "x")


NOT_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "git lfs": (lfs, "a Git LFS pointer, in place of the file; run `git lfs pull`"),
    "html": (
        lambda path: path.write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>"),
        "a web page; the address",
    ),
    "html, late": (lambda path: path.write_text("\n\n  <HTML lang='en'>404"), "a web page"),
    "gguf": (lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 291, 25) + bytes(200)), "a GGUF file"),
    "pickle": (pickled, "a Python pickle, as torch.save writes; use the model's safetensors files"),
    "torch.save": (torch_saved, "a zip archive, as torch.save writes"),
    "zip": (zipped, "a zip archive"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(100)), "a compressed or tar archive; unpack it"),
    "tar": (lambda path: path.write_bytes(b"n" * 257 + b"ustar" + bytes(300)), "a compressed or tar archive"),
    "numpy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(100)), "a NumPy file"),
    "json": (lambda path: path.write_text('{"error": "Repository not found"}'), "JSON text; give the directory"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty; download it again"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "no safetensors file, and nothing else that is known"),
    "text": (lambda path: path.write_text("Access to model openai/gpt-oss-20b is restricted."), "no safetensors file"),
    "five bytes": (lambda path: path.write_bytes(b"\x05\x00\x00\x00\x00"), "no safetensors file"),
    "header cut off": (
        header_too_long,
        r"its header alone takes \d+ bytes, and the file has 40 .*: it was not written or",
    ),
    "data cut off": (half, r"its header speaks of 16,\d+ bytes, and the file has 9,000 \(54 %\)"),
    "header no JSON": (raw(b"{" + b"x" * 99), "its header is not JSON"),
    "header too large": (raw(b"{}", length=1 << 60), "no safetensors file"),
    "entry malformed": (raw(b'{"a":{"dtype":"U8","shape":[4]}}   ', 4), "a: cannot be read from .*malformed entry"),
    "entry too short": (raw(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', 4), r"4 bytes for F32 \[4\]"),
    "entry backwards": (raw(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[8,4]}}', 8), "malformed entry"),
}


class TestNotACheckpoint:
    @pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
    @pytest.mark.parametrize("where", ["a file", "a directory", "a shard"])
    def test_is_said_with_what_to_do(self, tmp_path: Path, kind: str, where: str) -> None:
        make, message = NOT_CHECKPOINTS[kind]
        name = "model-00001-of-00001.safetensors" if where == "a shard" else "model.safetensors"
        make(tmp_path / name)
        if where == "a shard":
            names = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
            index = {"weight_map": dict.fromkeys(names, name)}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (MoEWeights.from_pretrained, MoEWeights.from_safetensors):
            with pytest.raises(ValueError, match=message) as caught:
                read(tmp_path / name if where == "a file" else tmp_path, layer=0)
            assert name in str(caught.value)

    def test_what_was_cut_off_anywhere_is_never_read(self, tmp_path: Path) -> None:
        """A download that stopped, at every tenth byte."""
        layer = checkpoints.layer_of("gpt-oss", 1, 32, 32)
        file = checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss", layer, 0)) / "model.safetensors"
        whole = file.read_bytes()
        for size in range(0, len(whole), 10):
            file.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cannot be read"):
                MoEWeights.from_pretrained(file, layer=0)
        file.write_bytes(whole)
        assert same_bytes(MoEWeights.from_pretrained(file, layer=0), layer)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "other.safetensors"])
    def test_a_link_that_leads_nowhere(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "4d7a")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(
                FileNotFoundError, match=r"is a link to .*4d7a, and there is no such file: the cache was"
            ):
                MoEWeights.from_pretrained(path, layer=0)

    def test_a_folder_whose_link_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "model").symlink_to(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=r"model is a link to .*gone, and there is no such folder"):
            MoEWeights.from_pretrained(tmp_path / "model" / "model.safetensors", layer=0)

    def test_a_shard_that_is_a_link_to_nowhere(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        checkpoints.write(tmp_path, tensors, shards=2)
        shard = tmp_path / "model-00002-of-00002.safetensors"
        shard.unlink()
        shard.symlink_to("nowhere")
        message = (
            r"index\.json says model-00002-of-00002\.safetensors, and there is no such file; .* is a link to nowhere"
        )
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            (["model-Q4_K_M.gguf"], r"it holds GGUF \(\*\.gguf\); use the model's safetensors files"),
            (["pytorch_model.bin", "config.json"], "it holds PyTorch pickles"),
            (["consolidated.00.pth"], "it holds PyTorch pickles"),
            (["model.safetensors.incomplete"], "a download that did not end"),
            (
                ["snapshots/4d7a/model.safetensors", "refs/main"],
                "it is the folder of a Hub cache; give .*snapshots/4d7a",
            ),
            (["original/model.safetensors", "config.json"], "there are safetensors files in .*original"),
            (["config.json"], "or model.safetensors.index.json in the directory, got"),
        ],
    )
    def test_a_folder_of_something_else(self, tmp_path: Path, files: list[str], message: str) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=message):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    def test_a_models_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="`hf download openai/gpt-oss-20b` prints where it put it"):
            MoEWeights.from_pretrained("openai/gpt-oss-20b", layer=0)
        with pytest.raises(FileNotFoundError, match="path: expected a file or directory, got .*nowhere"):
            MoEWeights.from_pretrained(tmp_path / "nowhere", layer=0)

    def test_a_shard_that_is_missing_without_an_index(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        checkpoints.write(tmp_path, tensors, shards=3, index=False)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"expected the 3 files of model, got 2: number 00002 is missing; download it"
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    def test_one_tensor_twice(self, tmp_path: Path) -> None:
        tensors = checkpoints.tensors_of("gpt-oss", layer_of("gpt-oss"), 0)
        for name in ("a.safetensors", "b.safetensors"):
            save_file(tensors, tmp_path / name)
        with pytest.raises(
            ValueError, match=r"expected one tensor of this name, got one in .*a\.safetensors and in .*b\."
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)

    @pytest.mark.parametrize("text", ["<html></html>", "version https://git-lfs.github.com/spec/v1\n"])
    def test_an_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(
            ValueError, match=r'expected JSON with a "weight_map" object, got (a web page|a Git LFS pointer)'
        ):
            MoEWeights.from_pretrained(tmp_path, layer=0)


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    """Every dtype, empty tensors and scalars, beside what safetensors itself reads."""
    from safetensors import safe_open

    dtypes = (torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
    tensors = {str(dtype): torch.ones(3, 4).to(dtype) for dtype in dtypes}
    tensors |= {str(d): torch.ones(3, 4).to(d) for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
    tensors["e8m0"] = torch.zeros(5, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors["fp4"] = torch.zeros(2, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    tensors |= {"none": torch.empty(0, 7), "scalar": torch.tensor(3.0)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(file)
    assert set(header) == set(tensors)
    with safe_open(file, "pt") as stored:
        for name, tensor in tensors.items():
            assert header[name].shape == tuple(tensor.shape)
            assert header[name].nbytes == tensor.nbytes
            assert header[name].dtype == stored.get_slice(name).get_dtype()
