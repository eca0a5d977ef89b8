"""NVFP4 layers from checkpoints: names written out by hand, as ModelOpt and compressed-tensors have them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from nvfp4_cases import E, H, I, random_nvfp4, same
from nvfp4_layers import exactly, float64_layer, gated_expert, in_bf16, in_nvfp4, inputs, off, ungated_expert
from storage_meter import StorageMeter

import mxfp4_moe
from mxfp4_moe import MoEWeights
from mxfp4_moe._checkpoints.schemes import BY_NAME
from mxfp4_moe._install import wheel
from mxfp4_moe.cli import main

# Block, projections (gate, up, down, or up and down), and what belongs to each.
_MODELOPT = ("weight", "weight_scale", "weight_scale_2", "input_scale")
NAMINGS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "nvfp4-modelopt": ("mlp", ("gate_proj", "up_proj", "down_proj"), _MODELOPT),
    "nvfp4-modelopt-w1": ("block_sparse_moe", ("w1", "w3", "w2"), _MODELOPT),
    "nvfp4-modelopt-mixer": ("mixer", ("up_proj", "down_proj"), _MODELOPT),
    "nvfp4-compressed-tensors": (
        *("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    ),
}
CONFIG = {
    **{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": H, "moe_intermediate_size": I},
    **{"num_experts": E, "num_experts_per_tok": 2},
}
NEMOTRON = {
    **{"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "hidden_size": 4 * H, "moe_latent_size": H},
    **{"moe_intermediate_size": I, "n_routed_experts": E, "num_experts_per_tok": 2},
}


def layer_of(naming: str, **options: Any) -> dict[str, torch.Tensor]:
    kind = "divide" if naming == "nvfp4-compressed-tensors" else "multiply"
    return random_nvfp4(kind, gated=naming != "nvfp4-modelopt-mixer", **options)


def tensors_of(
    naming: str, layer: dict[str, torch.Tensor], number: int, prefix: str = "model.layers."
) -> dict[str, torch.Tensor]:
    block, projections, (codes, scales, scale_2, of_input) = NAMINGS[naming]
    shape = (1,) if naming == "nvfp4-compressed-tensors" else ()
    inter = layer["w2"].shape[2] * 2
    tensors = {}
    for e in range(len(layer["w13"])):
        for i, projection in enumerate(projections):
            name = "w2" if projection == projections[-1] else "w13"
            rows = slice(None) if name == "w2" else slice(i * inter, (i + 1) * inter)
            path = f"{prefix}{number}.{block}.experts.{e}.{projection}."
            tensors[path + codes] = layer[name][e, rows].clone()
            tensors[path + scales] = layer[f"{name}_scale"][e, rows].clone().view(torch.float8_e4m3fn)
            for suffix, end in ((scale_2, scale_2.removeprefix("weight")), (of_input, f"_{of_input}")):
                given = layer.get(f"{name}{end}")
                if given is not None:
                    tensors[path + suffix] = (given[e] if name == "w2" else given[e, i]).reshape(shape).clone()
    return tensors


def write(folder: Path, naming: str, layers: list[dict[str, torch.Tensor]], *, said: bool = True) -> Path:
    tensors = checkpoints.other_tensors("model.layers.")
    for number, layer in enumerate(layers):
        tensors |= tensors_of(naming, layer, number)
    checkpoints.write(folder, tensors, shards=2)
    config: dict[str, Any] = dict(NEMOTRON if naming == "nvfp4-modelopt-mixer" else CONFIG)
    if said and naming == "nvfp4-compressed-tensors":
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    elif said:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        text = json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}})
        (folder / "hf_quant_config.json").write_text(text, encoding="utf-8")
    checkpoints.write_config(folder, config)
    return folder


def test_the_table_is_what_is_written_here() -> None:
    assert set(NAMINGS) == {name for name, scheme in BY_NAME.items() if scheme.is_nvfp4}


@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_layer_from_its_own_files(tmp_path: Path, naming: str, inputs_too: bool) -> None:
    layers = [layer_of(naming, inputs=inputs_too, seed=seed) for seed in range(2)]
    path = write(tmp_path, naming, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = MoEWeights.from_pretrained(path, layer=1)
    stored = weights.to_nvfp4()._asdict()
    assert {name for name, tensor in stored.items() if tensor is not None} == layers[1].keys()
    assert all(torch.equal(stored[name], layers[1][name]) for name in layers[1])
    gated = naming != "nvfp4-modelopt-mixer"
    assert weights.activation.value == ("swiglu" if gated else "relu2")

    call = inputs()

    def expected(layer: dict[str, torch.Tensor], quantize: Callable[..., Any]) -> torch.Tensor:
        expert = gated_expert(layer, "gate_up", quantize) if gated else ungated_expert(layer, quantize)
        return float64_layer(call, expert)

    out = mxfp4_moe.fused_moe(**call, weights=weights)
    assert off(out, expected(layers[1], in_nvfp4(layers[1]))) < 4e-3, "tolerance: test_nvfp4_layer.py, CLOSE"
    assert off(out, expected(layers[0], in_nvfp4(layers[0]))) > 0.1
    out = mxfp4_moe.fused_moe(**call, weights=weights, activation_format="bf16")
    assert off(out, expected(layers[1], in_bf16)) < 4e-3
    assert off(out, expected(layers[1], exactly)) < 6e-3


@pytest.mark.parametrize("naming", NAMINGS)
def test_parts(tmp_path: Path, naming: str) -> None:
    path = write(tmp_path, naming, [layer_of(naming)])
    whole = MoEWeights.from_pretrained(path, layer=0)
    assert same(MoEWeights.from_pretrained(path, layer=0, ep_rank=1, ep_size=2), whole.expert_parallel(1, 2))
    assert same(MoEWeights.from_pretrained(path, layer=0, tp_rank=1, tp_size=3), whole.tensor_parallel(1, 3))


@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_inspect(tmp_path: Path, naming: str, inputs_too: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, naming, [layer_of(naming, inputs=inputs_too)] * 2)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{naming}: " in said
    assert f"U8, scales F8_E4M3{', scales of inputs' if inputs_too else ''}\n" in said
    assert "NVFP4" in said
    assert f"{E}, 2 for each token" in said
    assert f"MoEWeights.from_pretrained({str(path)!r}, layer=0)" in said


def test_a_layer_of_the_size_of_qwen3(tmp_path: Path) -> None:
    """(2048, 768), 128 experts: beyond the layer, less than two experts as they come."""
    experts, hidden, inter = 128, 2048, 768
    layer = layer_of("nvfp4-modelopt", experts=experts, hidden=hidden, inter=inter)
    checkpoints.write(tmp_path, tensors_of("nvfp4-modelopt", layer, 0))
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": inter, "num_experts_per_tok": 8}
    checkpoints.write_config(tmp_path, CONFIG | sizes)
    with StorageMeter() as meter:
        weights = MoEWeights.from_pretrained(tmp_path, layer=0)
    two_experts = 2 * sum(layer[name][0].nbytes for name in ("w13", "w13_scale", "w2", "w2_scale"))
    assert meter.peak - weights.w13.nbytes - weights.w2.nbytes < two_experts
    assert weights.w13.nbytes + weights.w2.nbytes == experts * two_experts // 2, "as many bytes as in the file"
    last = weights.expert_parallel(127, 128).to_nvfp4()
    assert all(torch.equal(getattr(last, name), layer[name][-1:]) for name in ("w13", "w13_scale", "w2", "w2_scale"))


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(path: Path, words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=words):
        MoEWeights.from_pretrained(path, layer=0, **options)


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_gpus_are_refused_before_a_weight_is_read(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "profile", lambda: "mxfp4_minimal")
    path = write(tmp_path, "nvfp4-modelopt", [layer_of("nvfp4-modelopt")])
    refused(
        path, "^device: expected the CPU for NVFP4 weights, which this wheel has no kernels for on GPUs", device=device
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "NVFP4 as quant_algo, .* got 'FP8'"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 32}}, "group_size of 16.* 32"),
        (
            "config.json",
            CONFIG | {"quantization_config": {"format": "mxfp4-pack-quantized"}},
            "NVFP4 as format, .*mxfp4",
        ),
    ],
)
def test_another_checkpoints_config_is_refused(tmp_path: Path, name: str, text: Any, words: str) -> None:
    path = write(tmp_path, "nvfp4-modelopt", [layer_of("nvfp4-modelopt")])
    (path / name).write_text(json.dumps(text), encoding="utf-8")
    refused(path, f"{name}: expected .*{words}")
    (path / name).write_text("{", encoding="utf-8")
    refused(path, f"{name}: expected JSON")


def test_mixed_precision_and_silence_are_no_contradiction(tmp_path: Path) -> None:
    layer = layer_of("nvfp4-modelopt")
    path = write(tmp_path, "nvfp4-modelopt", [layer], said=False)
    expected = MoEWeights.from_pretrained(path, layer=0)
    text = json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "group_size": None}})
    (path / "hf_quant_config.json").write_text(text, encoding="utf-8")
    assert same(MoEWeights.from_pretrained(path, layer=0), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.up_proj.weight_scale_2": None}, r"experts.0.up_proj.weight_scale_2: no such tensor"),
        ({"1.down_proj.input_scale": None}, r"experts.1.down_proj.input_scale: no such tensor"),
        ({"0.down_proj.input_scale": None}, r"experts.0.down_proj.input_scale: no such tensor"),
        ({"2.up_proj.weight_scale_2": torch.ones(2)}, r"weight_scale_2: expected F32 \[\] or \[1\], got F32 \[2\]"),
        ({"2.up_proj.weight_scale_2": torch.ones((), dtype=torch.bfloat16)}, r"expected F32 .* got BF16 \[\]"),
        ({"2.up_proj.weight_scale": torch.zeros(I, H // 16, dtype=torch.uint8)}, r"expected F8_E4M3 .* got U8"),
        ({"0.gate_proj.weight_scale": torch.zeros(I, H // 16, dtype=torch.half)}, "a format that is not known here"),
        ({"2.gate_proj.weight_zero_point": torch.ones(())}, "weight_zero_point: expected nothing but"),
        (
            {"0.down_proj.weight_scale_2": torch.tensor(float("nan"))},
            r"0.mlp.experts.\*.down_proj.weight_scale_2: expected finite numbers of 0 or more, got nan for expert 0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, torch.Tensor | None], words: str) -> None:
    tensors = tensors_of("nvfp4-modelopt", layer_of("nvfp4-modelopt"), 0)
    for name, tensor in change.items():
        full = f"model.layers.0.mlp.experts.{name}"
        tensors.pop(full, None)
        if tensor is not None:
            tensors[full] = tensor
    checkpoints.write(tmp_path, tensors)
    checkpoints.write_config(tmp_path, CONFIG)
    refused(tmp_path, words)


def test_an_activation_that_does_not_fit_the_projections(tmp_path: Path) -> None:
    for naming, activation in (("nvfp4-modelopt", "relu2"), ("nvfp4-modelopt-mixer", "swiglu")):
        path = write(tmp_path / naming, naming, [layer_of(naming)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that it is used
            refused(path, f"activation: expected one for .*{naming}, got '{activation}'", activation=activation)


@pytest.mark.parametrize(
    ("act", "activation"), [("relu2", "relu2"), ("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), (None, "relu2")]
)
def test_what_a_config_says_of_experts_without_gates(tmp_path: Path, act: str | None, activation: str) -> None:
    """mlp_hidden_act, not what the only published models with the naming have."""
    naming = "nvfp4-modelopt-mixer"
    path = write(tmp_path, naming, [layer_of(naming)])
    checkpoints.write_config(path, NEMOTRON | {"mlp_hidden_act": act})
    assert MoEWeights.from_pretrained(path, layer=0).activation.value == activation
    checkpoints.write_config(path, NEMOTRON | {"mlp_hidden_act": "tanh"})
    refused(path, "^activation: .*config.json has mlp_hidden_act 'tanh', which this version has no kernels for; name")
    assert MoEWeights.from_pretrained(path, layer=0, activation="relu").activation.value == "relu"
