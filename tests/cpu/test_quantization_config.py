"""What hf_quant_config.json and config.json say of the quantization, beside the formats that tensors can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoints import write, write_config
from nvfp4_cases import E, random_nvfp4
from safetensors.torch import save_file

from mxfp4_moe import MoEWeights
from mxfp4_moe.cli import main

H, I = 64, 96  # noqa: E741  (the formulas' names)
CONFIG = {
    **{"model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": H, "moe_intermediate_size": I},
    **{"num_experts": E, "num_experts_per_tok": 2},
}
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}
PACKED = "nvfp4-pack-quantized"


def group(size: int, **more: str) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": size}, **more}}}


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    """A layer in the naming that NVFP4 and MXFP4 have in common, or in bfloat16."""
    g = torch.Generator().manual_seed(3)
    layer = random_nvfp4(hidden=H, inter=I, inputs=False)
    tensors = {}
    for e in range(E):
        parts = {
            "gate_proj": ("w13", slice(0, I)),
            "up_proj": ("w13", slice(I, 2 * I)),
            "down_proj": ("w2", slice(None)),
        }
        for i, (projection, (name, rows)) in enumerate(parts.items()):
            path, codes = f"model.layers.0.mlp.experts.{e}.{projection}.weight", layer[name][e, rows].clone()
            n, k = codes.shape[0], 2 * codes.shape[1]
            if kind == "float":
                tensors[path] = torch.randn(n, k, generator=g).bfloat16()
                continue
            tensors[path] = codes
            if kind == "mxfp4":
                tensors[f"{path}_scale"] = torch.randint(118, 124, (n, k // 32), generator=g).to(torch.uint8)
                continue
            tensors[f"{path}_scale"] = layer[f"{name}_scale"][e, rows].clone().view(torch.float8_e4m3fn)
            scale_2 = layer[f"{name}_scale_2"][e]
            tensors[f"{path}_scale_2"] = (scale_2 if name == "w2" else scale_2[i]).clone()
    return tensors


def checkpoint(folder: Path, kind: str, said: dict[str, Any]) -> Path:
    """A checkpoint of that kind with these files beside it; of config.json, more of it."""
    folder.mkdir()
    write(folder, tensors_of(kind))
    write_config(folder, CONFIG | said.get("config.json", {}))
    if "hf_quant_config.json" in said:
        (folder / "hf_quant_config.json").write_text(json.dumps(said["hf_quant_config.json"]), encoding="utf-8")
    return folder


def hf(stated: Any) -> dict[str, Any]:
    return {"hf_quant_config.json": {"quantization": stated}}


def config(**stated: Any) -> dict[str, Any]:
    return {"config.json": {"quantization_config": stated}}


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "FP8": ("nvfp4", hf({"quant_algo": "FP8"}), "hf_quant_config.json: expected NVFP4 as quant_algo, .* got 'FP8'"),
    "blocks of 32": ("nvfp4", hf(NVFP4 | {"group_size": 32}), "hf_quant.*expected a group_size of 16, .* got 32"),
    "no object": ("nvfp4", {"hf_quant_config.json": []}, "hf_quant_config.json: expected an object, got list"),
    "mxfp4": ("nvfp4", config(quant_method="mxfp4"), "config.json: expected NVFP4 as quant_method, .* got 'mxfp4'"),
    "group": ("nvfp4", config(format=PACKED, **group(32)), "config.json: expected a group_size of 16, .* got 32"),
    "its own": ("nvfp4", config(format="mixed-precision", **group(32, format=PACKED)), "a group_size of 16, .* got 32"),
    "inside": (
        *("nvfp4", {"config.json": {"text_config": {"quantization_config": {"quant_algo": "FP8"}}}}),
        "config.json: expected NVFP4 as quant_algo, .* got 'FP8'",
    ),
    "older": (
        *("nvfp4", {"config.json": {"compression_config": {"format": "float-quantized"}}}),
        "config.json: expected NVFP4 as format, .* got 'float-quantized'",
    ),
    "NVFP4": ("mxfp4", hf(NVFP4), "hf_quant_config.json: expected MXFP4 as quant_algo, .* got 'NVFP4'"),
    "NVFP4 in config": ("mxfp4", config(quant_method="modelopt", quant_algo="NVFP4"), "config.json: .* got 'NVFP4'"),
    "packed": ("mxfp4", config(format=PACKED), "config.json: expected MXFP4 as format, .* got 'nvfp4-pack-quantized'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_and_inspected(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, said, words = CONTRADICTIONS[case]
    path = checkpoint(tmp_path / "said", kind, said)
    with pytest.raises(ValueError, match=words) as refused:
        MoEWeights.from_pretrained(path, layer=0)
    assert main(["inspect", str(path)]) == 1
    assert str(refused.value) in capsys.readouterr().out, "what would not load is not called loadable"
    silent = checkpoint(tmp_path / "silent", kind, {})
    MoEWeights.from_pretrained(silent, layer=0)
    assert main(["inspect", str(silent)]) == 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nvfp4", hf(NVFP4 | {"exclude_modules": ["lm_head"]})),
        ("nvfp4", config(quant_method="modelopt", quant_algo="NVFP4", config_groups={"group_0": {"weights": None}})),
        ("nvfp4", config(format=PACKED, **group(16))),
        ("nvfp4", config(format="mixed-precision", **group(128, format="pack-quantized"))),
        ("nvfp4", hf({"quant_algo": "MIXED_PRECISION", "group_size": None})),
        ("mxfp4", config(quant_method="quark")),
        ("mxfp4", config(quant_method="fp8", routed_experts_quant_method="mxfp4")),
        ("mxfp4", config(format="mxfp4-pack-quantized", **group(32))),
        ("mxfp4", hf({"quant_algo": "W4A8_MXFP4_FP8", "group_size": 32})),
        ("float", hf(NVFP4 | {"exclude_modules": ["model.layers.0*"]})),
    ],
)
def test_what_is_no_contradiction(tmp_path: Path, kind: str, said: dict[str, Any]) -> None:
    path = checkpoint(tmp_path / "said", kind, said)
    MoEWeights.from_pretrained(path, layer=0)
    assert main(["inspect", str(path)]) == 0


@pytest.mark.parametrize("lacking", ["0.down_proj", "1.gate_proj", "2.up_proj", "all down"])
def test_scales_of_some_inputs_alone(tmp_path: Path, lacking: str) -> None:
    """The one that is missing is named, and not those that are there."""
    tensors = tensors_of("nvfp4")
    for name in [name for name in tensors if name.endswith("_scale_2")]:
        path = name.removesuffix("weight_scale_2")
        if not path.endswith(f"{lacking}.") and not (lacking == "all down" and "down_proj" in path):
            tensors[f"{path}input_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, CONFIG)
    missing = "0.down_proj" if lacking == "all down" else lacking
    with pytest.raises(ValueError, match=rf"^model.layers.0.mlp.experts.{missing}.input_scale: no such tensor in "):
        MoEWeights.from_pretrained(tmp_path, layer=0)


def test_scales_of_inputs_in_another_writers_name(tmp_path: Path) -> None:
    tensors = tensors_of("nvfp4") | {"model.layers.0.mlp.experts.1.up_proj.input_global_scale": torch.tensor([0.5])}
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="experts.1.up_proj.input_global_scale: expected nothing but .input_scale, "):
        MoEWeights.from_pretrained(tmp_path, layer=0)
