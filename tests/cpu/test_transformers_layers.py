"""replace_experts: every layer gets its own weights, all or none, and what was replaced is saved as what it is."""

from __future__ import annotations

import copy
import json
import pickle
import types
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

from mxfp4_moe.integrations import transformers as integration
from mxfp4_moe.integrations.transformers import MoEExperts, replace_experts

EXPERTS, HIDDEN, INTER, LAYERS = 4, 64, 96, 5


def make_model(**changes: Any) -> GptOssForCausalLM:
    sizes = {
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
    }
    config = GptOssConfig(
        **{**sizes, **changes},
        vocab_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return GptOssForCausalLM(config).bfloat16().eval()


def layer_checkpoints(layers: int = LAYERS, experts: int = EXPERTS, hidden: int = HIDDEN, inter: int = INTER) -> Any:
    return [oracles.random_checkpoint(experts, hidden, inter, seed=layer) for layer in range(layers)]


def write(folder: Path, layers: int = LAYERS, **sizes: int) -> Path:
    tensors = {}
    for layer, checkpoint in enumerate(layer_checkpoints(layers, **sizes)):
        tensors |= oracles.gpt_oss_tensors(checkpoint, layer)
    save_file(tensors, folder / "model.safetensors")
    return folder


def number_of(experts: MoEExperts) -> int:
    """Which of the checkpoint's layers this is."""
    w13 = experts.weights.to_mxfp4().w13
    (number,) = [n for n, checkpoint in enumerate(layer_checkpoints()) if torch.equal(w13, checkpoint["w13"])]
    return number


def kinds(model: Any) -> list[str]:
    return [type(layer.mlp.experts).__name__ for layer in model.model.layers]


class TestLayersHaveTheirOwnNumber:
    @pytest.mark.parametrize(
        "part", [slice(2, None), slice(1, 4), slice(4, None), slice(None, None, -1), slice(0, 5, 2)]
    )
    def test_of_a_slice(self, tmp_path: Path, part: slice) -> None:
        model = make_model()
        layers = model.model.layers[part]
        expected = list(range(LAYERS))[part]
        assert replace_experts(layers, checkpoint=write(tmp_path)) == len(expected)
        assert [number_of(layer.mlp.experts) for layer in layers] == expected
        others = [n for n in range(LAYERS) if n not in expected]
        assert all(kinds(model)[n] == "GptOssExperts" for n in others)

    def test_of_one_decoder_layer_and_of_the_rest_afterwards(self, tmp_path: Path) -> None:
        model, path = make_model(), write(tmp_path)
        assert replace_experts(model.model.layers[3], checkpoint=path) == 1
        assert replace_experts(nn.Sequential(model.model.layers[1]), checkpoint=path) == 1
        assert replace_experts(model, checkpoint=path) == LAYERS - 2
        assert replace_experts(model, checkpoint=path) == 0, "all are there already"
        assert [number_of(layer.mlp.experts) for layer in model.model.layers] == list(range(LAYERS))

    def test_of_a_pruned_model(self, tmp_path: Path) -> None:
        """Layers that were taken out leave the others' numbers as they are."""
        model = make_model()
        del model.model.layers[1]
        replace_experts(model, checkpoint=write(tmp_path))
        assert [number_of(layer.mlp.experts) for layer in model.model.layers] == [0, 2, 3, 4]

    def test_a_part_that_does_not_know_its_number(self, tmp_path: Path) -> None:
        model, path = make_model(), write(tmp_path)
        for part in (model.model.layers[2].mlp, nn.ModuleList([model.model.layers[2].mlp])):
            with pytest.raises(ValueError, match=r"experts: expected a part of a model that tells its layer's number"):
                replace_experts(part, checkpoint=path)
        assert replace_experts(model.model.layers[2].mlp) == 1, "its own weights need no number"

    def test_two_layers_of_one_number(self, tmp_path: Path) -> None:
        model = make_model()
        model.model.layers[3].self_attn.layer_idx = 2
        with pytest.raises(ValueError, match=r"got layer 2 more than once: model\.layers\.2\.mlp.*layers\.3\.mlp"):
            replace_experts(model, checkpoint=write(tmp_path))
        assert set(kinds(model)) == {"GptOssExperts"}


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
    def test_a_call_that_breaks_off(
        self, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, path = make_model(), write(tmp_path)
        before = model.state_dict()
        read, calls = integration.MoEWeights.from_safetensors, []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise error
            return read(*args, **kwargs)

        monkeypatch.setattr(integration.MoEWeights, "from_safetensors", interrupted)
        with pytest.raises(error):
            replace_experts(model, checkpoint=path)
        assert len(calls) == 4
        assert set(kinds(model)) == {"GptOssExperts"}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        monkeypatch.undo()
        assert replace_experts(model, checkpoint=path) == LAYERS
        assert [number_of(layer.mlp.experts) for layer in model.model.layers] == list(range(LAYERS))

    def test_weights_that_are_not_finite(self) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[3].mlp.experts.down_proj[2, 5, 7] = torch.inf
        with pytest.raises(
            ValueError, match=r"^model\.layers\.3\.mlp\.experts: w2: expected finite values, .* expert 2"
        ):
            replace_experts(model)
        assert set(kinds(model)) == {"GptOssExperts"}
        assert getattr(model.config, "quantization_config", None) is None

    def test_a_damaged_scale_in_the_last_layer(self, tmp_path: Path) -> None:
        checkpoints = layer_checkpoints()
        checkpoints[-1]["w2_scale"][1, 2, 0] = 255
        tensors = {}
        for layer, checkpoint in enumerate(checkpoints):
            tensors |= oracles.gpt_oss_tensors(checkpoint, layer)
        save_file(tensors, tmp_path / "model.safetensors")
        model = make_model()
        with pytest.raises(
            ValueError, match=r"^model\.layers\.4\.mlp\.experts: .*down_proj_scales: expected E8M0 bytes"
        ):
            replace_experts(model, checkpoint=tmp_path)
        assert set(kinds(model)) == {"GptOssExperts"}


class TestAnotherModelsCheckpoint:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"experts": 8}, "expected 4 experts, .* got 8 experts"),
            ({"experts": 3}, "expected 4 experts, .* got 3 experts"),
            ({"inter": 64}, "intermediate size 96, .* intermediate size 64 in layer 0"),
            ({"hidden": 96}, "hidden size 64, .* hidden size 96"),
            ({"layers": 3}, r"model\.layers\.3\.mlp\.experts\.gate_up_proj_blocks: no such .* in layers 0 to 2"),
        ],
    )
    def test_sizes(self, tmp_path: Path, sizes: dict[str, int], message: str) -> None:
        model = make_model()
        with pytest.raises(ValueError, match=message):
            replace_experts(model, checkpoint=write(tmp_path, **sizes))
        assert set(kinds(model)) == {"GptOssExperts"}

    def test_one_layer_of_other_sizes(self, tmp_path: Path) -> None:
        """A checkpoint of which experts were pruned in one layer."""
        checkpoints = layer_checkpoints()
        checkpoints[2] = oracles.random_checkpoint(EXPERTS - 1, HIDDEN, INTER, seed=2)
        tensors = {}
        for layer, checkpoint in enumerate(checkpoints):
            tensors |= oracles.gpt_oss_tensors(checkpoint, layer)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"^model\.layers\.2\.mlp\.experts: .* got 3 experts"):
            replace_experts(make_model(), checkpoint=tmp_path)

    def test_another_limit(self, tmp_path: Path) -> None:
        path = write(tmp_path)
        (path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "swiglu_limit": 10.0}))
        with pytest.raises(ValueError, match=r"swiglu_limit 7\.0, as the model has, got 10\.0"):
            replace_experts(make_model(), checkpoint=path)
        assert replace_experts(make_model(swiglu_limit=10.0), checkpoint=path) == LAYERS


class TestWeightsThatAreElsewhere:
    def test_are_refused_by_name_without_a_checkpoint(self) -> None:
        model = make_model()
        for layer in (1, 3):
            model.model.layers[layer].to("meta")
        with pytest.raises(
            ValueError, match=r"^model\.layers\.1\.mlp\.experts, model\.layers\.3\.mlp\.experts: .*checkpoint="
        ):
            replace_experts(model)
        assert set(kinds(model)) == {"GptOssExperts"}

    @pytest.mark.parametrize("away", [[1], [0, 4], range(LAYERS)])
    def test_are_read_from_the_checkpoint(self, tmp_path: Path, away: Any) -> None:
        model = make_model()
        for layer in away:
            model.model.layers[layer].mlp.experts.to("meta")
        assert replace_experts(model, checkpoint=write(tmp_path)) == LAYERS
        assert [number_of(layer.mlp.experts) for layer in model.model.layers] == list(range(LAYERS))
        with torch.no_grad():
            assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()

    def test_a_model_that_was_never_loaded(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = GptOssForCausalLM(make_model().config)
        with pytest.raises(
            ValueError, match="model.layers.0.mlp.experts, .* and 1 more: expected experts with weights"
        ):
            replace_experts(model)
        assert replace_experts(model, checkpoint=write(tmp_path)) == LAYERS
        assert model.model.layers[3].mlp.experts.weights.device == torch.device("cpu")

    def test_where_inputs_come_the_hook_says(self, tmp_path: Path) -> None:
        """accelerate's hook (AlignDevicesHook) on offloaded experts has an execution device."""
        model = make_model()
        experts = model.model.layers[2].mlp.experts.to("meta")
        experts._hf_hook = types.SimpleNamespace(offload=True, place_submodules=False, execution_device="cpu")
        assert replace_experts(model, checkpoint=write(tmp_path)) == LAYERS
        assert number_of(model.model.layers[2].mlp.experts) == 2

    def test_a_layer_that_moves_as_a_whole(self, tmp_path: Path) -> None:
        model = make_model()
        model.model.layers[1]._hf_hook = types.SimpleNamespace(offload=True, place_submodules=True)
        with pytest.raises(ValueError, match=r"^model\.layers\.1: expected .* placed one by one"):
            replace_experts(model, checkpoint=write(tmp_path))
        assert set(kinds(model)) == {"GptOssExperts"}


class TestOtherVersions:
    @staticmethod
    def experts_called(arguments: str) -> nn.Module:
        body = f"class GptOssExperts(nn.Module):\n    def forward(self, {arguments}): ..."
        scope: dict[str, Any] = {"nn": nn}
        exec(body, scope)
        module: nn.Module = scope["GptOssExperts"]()
        real = make_model(num_hidden_layers=1).model.layers[0].mlp.experts
        for name, parameter in real.named_parameters():
            setattr(module, name, parameter)
        module.alpha, module.limit = 1.702, 7.0
        return nn.Sequential(module)

    @pytest.mark.parametrize("names", ["router_indices=None, routing_weights=None", "top_k_index, top_k_weights"])
    def test_names_that_versions_have_for_the_same(self, names: str) -> None:
        assert replace_experts(self.experts_called(f"hidden_states, {names}")) == 1

    @pytest.mark.parametrize(
        "arguments", ["hidden_states", "hidden_states, routing_weights, router_indices", "hidden_states, router_logits"]
    )
    def test_experts_that_are_called_otherwise(self, arguments: str) -> None:
        with pytest.raises(
            TypeError, match=r"^0: expected experts that are called with .* update the older of the two"
        ):
            replace_experts(self.experts_called(arguments))

    @pytest.mark.parametrize("version", ["4.57.1", "4.55.0.dev0"])
    def test_before_version_5(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformers, "__version__", version)
        model = make_model()
        with pytest.raises(TypeError, match=rf"expected transformers 5 or newer, .* got {version}"):
            replace_experts(model)
        assert set(kinds(model)) == {"GptOssExperts"}

    def test_weights_for_every_expert(self) -> None:
        """Version 4 calls its experts with [T, E] weights."""
        model = make_model(num_hidden_layers=1)
        replace_experts(model)
        with pytest.raises(
            ValueError, match=r"routing_weights: expected \[3, 2\], a weight for each chosen expert, got"
        ):
            model.model.layers[0].mlp.experts(
                torch.zeros(3, HIDDEN), torch.zeros(3, 2, dtype=int), torch.zeros(3, EXPERTS)
            )

    def test_a_model_with_other_experts(self) -> None:
        class OtherExperts(nn.Module):
            pass

        with pytest.raises(ValueError, match="expected a model with GptOssExperts, got Sequential with OtherExperts"):
            replace_experts(nn.Sequential(OtherExperts()))


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.as_tensor(model(ids).logits).float()


def load(folder: Path) -> Any:
    dequantized = Mxfp4Config(dequantize=True)  # without it transformers wants its own kernels, or accelerate
    return GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=dequantized).eval()


class TestSaving:
    @pytest.mark.parametrize("part", [slice(None), slice(2, None), slice(1, 2)])
    def test_what_is_saved_is_a_checkpoint_of_the_model(self, tmp_path: Path, part: slice) -> None:
        model = make_model()
        replace_experts(model if part == slice(None) else model.model.layers[part])
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert set(kinds(again)) == {"GptOssExperts"}
        for was, layer in zip(model.model.layers, again.model.layers, strict=True):
            if isinstance(was.mlp.experts, MoEExperts):
                stored = was.mlp.experts.weights.to_mxfp4()
                values = oracles.mxfp4_values(stored.w2.numpy(), stored.w2_scale.numpy())
                assert torch.equal(layer.mlp.experts.down_proj.mT.double(), torch.from_numpy(values))
            else:
                assert torch.equal(layer.mlp.experts.down_proj, was.mlp.experts.down_proj)
        numbers = list(range(LAYERS))[part]
        assert replace_experts(again.model.layers[part], checkpoint=tmp_path) == len(numbers)
        for was, layer in zip(model.model.layers[part], again.model.layers[part], strict=True):
            before, after = was.mlp.experts.state_dict(), layer.mlp.experts.state_dict()
            assert set(before) == set(after)
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        if part == slice(None):
            assert torch.equal(logits(again), logits(model)), "the same bytes, so the same bits"

    def test_the_bytes_of_a_checkpoint_come_back(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        source = write(tmp_path / "in")
        model = make_model()
        replace_experts(model, checkpoint=source)
        model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        with safe_open(source / "model.safetensors", "pt") as before:
            for name in before.keys():  # noqa: SIM118  (no dict)
                with safe_open(tmp_path / "out" / index[name], "pt") as after:
                    assert torch.equal(after.get_tensor(name), before.get_tensor(name))
                    assert after.get_tensor(name).dtype is before.get_tensor(name).dtype

    def test_a_part_without_configuration_refuses(self) -> None:
        model = make_model()
        replace_experts(model.model.layers[2].mlp)
        with pytest.raises(
            RuntimeError, match="experts: cannot be saved, because it was replaced in a part of a model"
        ):
            model.state_dict()

    def test_copies_and_pickles(self) -> None:
        model = make_model()
        replace_experts(model)
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
        other = make_model()
        replace_experts(other, checkpoint=None)
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), expected)
