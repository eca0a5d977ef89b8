"""How a layer is found in files: names, shards, prefixes, dtypes, shapes; and how much is read of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from model_checkpoints import same_bytes

from mxfp4_moe import MoEWeights
from mxfp4_moe._checkpoints.files import Checkpoint
from mxfp4_moe._checkpoints.load import open_layer

E, H, INTER = 3, 96, 160


def layer_of(scheme: str, seed: int = 0) -> checkpoints.Layer:
    return checkpoints.layer_of(scheme, E, H, INTER, seed=seed)


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
            ValueError, match=r"^prefix: expected one of 'audio\.layers\.', 'text\.layers\.', since each"
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

    @pytest.mark.parametrize("others", ["mtp.layers.", "audio.layers."])
    def test_another_model_that_alone_has_the_number(self, tmp_path: Path, others: str) -> None:
        """The first layers of many models are dense, and those of a part of them are not."""
        scheme = "weight-scale"
        tensors = checkpoints.tensors_of(scheme, layer_of(scheme), 3)
        tensors |= checkpoints.tensors_of(scheme, layer_of(scheme, 1), 0, others)
        checkpoints.write(tmp_path, tensors)
        with pytest.raises(ValueError, match=r"(layers\.0\..*: no such tensor|^prefix: expected one of 'audio)"):
            load(tmp_path, 0)
        assert same_bytes(load(tmp_path, 0, prefix=others), layer_of(scheme, 1))
        assert same_bytes(load(tmp_path, 3, prefix="model.layers."), layer_of(scheme))

    def test_a_draft_model_alone(self, tmp_path: Path) -> None:
        checkpoints.write(tmp_path, checkpoints.tensors_of("deepseek-v4", layer_of("deepseek-v4"), 0, "mtp."))
        with pytest.raises(ValueError, match=r"^prefix: expected one of 'mtp\.', since they are a draft model's"):
            load(tmp_path)
        assert same_bytes(load(tmp_path, prefix="mtp."), layer_of("deepseek-v4"))

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
            checkpoints.write_config(tmp_path, {"num_experts": E, "hidden_act": "silu"})
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
