"""`mxfp4-moe inspect`: what it prints loads what it says, and what is no checkpoint is said to be none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch

from mxfp4_moe import MoEWeights
from mxfp4_moe.cli import main

E, H, INTER = 3, 96, 160
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "hidden_size": H,
    "moe_intermediate_size": INTER,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
}


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Exit status and the rows of the only group."""
    status = main(["inspect", str(path)])
    lines = [line.strip().partition("  ") for line in capsys.readouterr().out.split("\n\n", 1)[-1].splitlines()]
    return status, {name: text.strip() for name, _, text in lines if text}


def data(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["inspect", "--json", str(path)])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("scheme", checkpoints.SCHEMES)
def test_the_call_that_it_prints_loads_the_layer(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = checkpoints.other_tensors("model.layers.")
    for number in (2, 3, 5):
        tensors |= checkpoints.tensors_of(scheme, checkpoints.layer_of(scheme, E, H, INTER, seed=number), number)
    checkpoints.write(tmp_path, tensors, shards=2)
    if not scheme.startswith("gpt-oss"):
        checkpoints.write_config(tmp_path, CONFIG)
    status, rows = inspect(tmp_path, capsys)
    assert status == 0
    prefix = "block." if scheme == "gpt-oss-original" else "model.layers."
    assert rows["layers"] == f"{prefix}{{2 to 3, 5}} (3)"
    assert rows["naming"].startswith(f"{scheme}: ")
    assert rows["sizes"] == f"hidden {H}, intermediate {INTER}"
    assert ("quantized to MXFP4" in rows["stored as"]) == (scheme in checkpoints.FLOATS)
    assert ("biases" in rows["stored as"]) == scheme.startswith("gpt-oss")
    expected = "alpha 1.702, beta 1.0, limit 7.0" if scheme.startswith("gpt-oss") else "alpha 1.0, beta 0.0, limit 10.0"
    assert rows["activation"] == f"swiglu_oai, {expected}"
    weights = eval(rows["load"], {"MoEWeights": MoEWeights})
    assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (E, H, INTER)
    assert weights.activation.value == "swiglu_oai"


def test_a_draft_model_and_layers_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = "deepseek-v4"
    tensors = {}
    for prefix, number, experts in (("layers.", 0, E), ("layers.", 1, E), ("layers.", 2, 2), ("mtp.", 0, E)):
        layer = checkpoints.layer_of(scheme, experts, H, INTER)
        tensors |= checkpoints.tensors_of(scheme, layer, number, prefix)
    checkpoints.write(tmp_path, tensors)
    status, found = data(tmp_path, capsys)
    assert (status, found["schema"], found["model_type"]) == (0, 1, None)
    groups = {(g["prefix"], *g["layers"]): g for g in found["groups"]}
    assert set(groups) == {("layers.", 0, 1), ("layers.", 2), ("mtp.", 0)}
    assert groups["mtp.", 0]["call"].endswith("layer=0, prefix='mtp.', activation=...)")
    assert groups["layers.", 2]["sizes"]["num_experts"] == 2
    assert "expected config.json" in groups["layers.", 2]["unknown"]

    checkpoints.write_config(tmp_path, CONFIG)
    status, found = data(tmp_path, capsys)
    assert status == 1, "a layer that the config contradicts cannot be loaded"
    (group,) = [g for g in found["groups"] if g["problem"]]
    assert group["layers"] == [2]
    assert "expected 2 as number of experts" in group["problem"]
    assert group["call"] == ""


def test_formats_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoints.tensors_of("weight-scale", checkpoints.layer_of("weight-scale", E, H, INTER), 0)
    fp8 = {n: t.float().to(torch.float8_e4m3fn) if n.endswith("weight") else t for n, t in tensors.items()}
    checkpoints.write(tmp_path, fp8)
    status, rows = inspect(tmp_path, capsys)
    assert status == 1
    assert "FP8 or MXFP8 weights, which this library has no kernels for" in rows["problem"]
    assert "load" not in rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "a GGUF file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
        (lambda path: checkpoints.write(path.parent, {"x": torch.zeros(2)}), "no experts in a naming that is known"),
        (lambda path: None, "expected model.safetensors or model.safetensors.index.json in the directory"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, make: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    status, found = data(tmp_path, capsys)
    assert status == 1
    assert message in found["problem"]


def test_reads_no_weights_and_needs_no_torch(tmp_path: Path) -> None:
    """Every byte behind the header is cut away but for the file's length; and torch is not imported."""
    tensors = checkpoints.tensors_of("gpt-oss", checkpoints.layer_of("gpt-oss", E, H, INTER), 0)
    file = checkpoints.write(tmp_path, tensors) / "model.safetensors"
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    with file.open("r+b") as stream:
        stream.truncate(begin)
        stream.truncate(len(whole))  # a hole
    program = "import sys; from mxfp4_moe.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "inspect", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "experts     3" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"
