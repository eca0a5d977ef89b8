"""A gpt-oss in float16 in transformers: float16 activations by default, and never with factors of other weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_models import LAYERS, VOCABULARY, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from mxfp4_moe.integrations import transformers as integration
from mxfp4_moe.integrations._engines.register import forget
from mxfp4_moe.integrations._transformers_experts import LoadedExperts, MoEExperts
from mxfp4_moe.integrations.transformers import disable, enable, replace_experts


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MXFP4_MOE_CPU", "1")
    monkeypatch.setenv("MXFP4_MOE_VERIFY", "1")
    forget()
    assert enable()
    yield
    disable()
    forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float16, **options})


def replaced(folder: Path, **options: Any) -> Any:
    model = load(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert replace_experts(model, checkpoint=folder, **options) == LAYERS
    return model


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(1, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits)


def layers(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def factors(model: Any) -> list[Any]:
    """What a GPU's kernels are given beside the weights; a CPU finds them by itself, so logits do not tell."""
    return [found.tolist() for layer in layers(model) for found in layer.weights.fp16_factors()]


def other_scales(folder: Path, into: Path) -> Path:
    """The same model, whose experts' weights are powers of two times what they were, each expert by its own."""
    into.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name in (name for name in tensors if name.endswith("_scales")):
        tensors[name] = tensors[name] - torch.arange(len(tensors[name]), dtype=torch.uint8)[:, None, None]
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_text((folder / "config.json").read_text())
    return into


def test_both_ways_compute_in_float16(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, other = load(folder), replaced(folder)
    said = capfd.readouterr().err
    assert said.count("float16 activations (W4A16), as transformers computes") == 2
    assert "the bits of fused_moe" in said
    assert {type(layer) for layer in layers(model)} == {LoadedExperts}
    assert {layer.activation_format for layer in (*layers(model), *layers(other))} == {"fp16"}
    expected = logits(other)
    assert torch.equal(logits(model), expected)
    bf16 = replaced(folder, activation_format="bf16")
    assert not torch.equal(logits(bf16), expected), "float16 keeps three bits more"


def test_other_weights_in_the_same_tensors_have_their_own_factors(folder: Path, tmp_path: Path) -> None:
    new = other_scales(folder, tmp_path / "new")
    expected = logits(replaced(new))
    for make in (load, replaced):
        model = make(folder)
        assert not torch.equal(logits(model), expected)
        old = factors(model)
        model.load_state_dict(load(new).state_dict())
        assert torch.equal(logits(model), expected)
        assert factors(model) == factors(load(new)) != old
    with torch.inference_mode():  # whose tensors do not count writes
        model = replaced(folder)
        assert factors(model) == old
        model.load_state_dict(load(new).state_dict())
        assert torch.equal(logits(model), expected)
        assert factors(model) == factors(load(new))


def test_layers_that_wait_elsewhere(folder: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in (1, 2)}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    expected = logits(replaced(folder))
    for _ in range(2):
        assert torch.equal(logits(model), expected)


def test_what_does_not_fit_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    enable(activation_format="fp16")
    model = load(folder, dtype=torch.bfloat16)
    assert not any(isinstance(layer, MoEExperts) for layer in layers(model))
    assert "transformers' own path does: float16 activations (W4A16), as enable() was asked, take a float16 model" in (
        capfd.readouterr().err
    )
    with pytest.raises(ValueError, match="expected 'bf16' or 'mxfp8' for a model not in float16, got 'fp16'"):
        replace_experts(model, activation_format="fp16")
    rounded = replaced(folder).to(torch.bfloat16)
    with pytest.raises(TypeError, match="hidden_states: expected float16 for activation_format 'fp16', got bfloat16"):
        logits(rounded)
    monkeypatch.setattr(integration, "formats_on", lambda device: ("mxfp8", "bf16"))
    capfd.readouterr()
    assert {layer.activation_format for layer in layers(replaced(folder))} == {"bf16"}
    assert "bfloat16 activations (W4A16), for want of float16 ones on this device" in capfd.readouterr().err


def test_a_float16_model_whose_matrices_came_in_bfloat16(folder: Path) -> None:
    """As transformers 5.19 dequantizes them."""
    model = load(folder, quantization_config=Mxfp4Config(dequantize=True))
    for layer in layers(model):
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().bfloat16()))
    assert replace_experts(model, checkpoint=folder) == LAYERS
    assert torch.equal(logits(model), logits(replaced(folder)))
    assert {layer.activation_format for layer in layers(model)} == {"fp16"}


def test_a_traced_model(folder: Path) -> None:
    model = load(folder)
    layer, hidden = layers(model)[0], torch.randn(3, model.config.hidden_size).half()
    routed = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(hidden, *routed), layer(hidden, *routed))
