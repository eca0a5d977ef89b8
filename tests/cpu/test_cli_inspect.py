"""`mxfp4-moe inspect`: what it prints loads layers and routers, and what is no checkpoint is said to be none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import pytest
import torch
from safetensors.torch import load_file

from mxfp4_moe import MoEWeights, Router, load_router, select_experts
from mxfp4_moe._checkpoints import router as router_table
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
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
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


# One row for each family: naming, its config.json beside the sizes, the bias's name and dtype, and the router in words.
ROUTERS: dict[str, tuple[str, dict[str, Any], str, torch.dtype, str]] = {
    "gpt_oss": ("gpt-oss", {"swiglu_limit": 7.0}, "", torch.float32, "softmax, top-2, renormalized"),
    "qwen3_moe": ("float", {"norm_topk_prob": False}, "", torch.float32, "softmax, top-2, not renormalized"),
    "deepseek_v4": (
        "deepseek-v4",
        {"swiglu_limit": 10.0, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        "ffn.gate.bias",
        torch.float32,
        "sqrtsoftplus, correction bias (F32), top-2, renormalized, times 2.5",
    ),
    "minimax_m3_text": (
        "weight-scale-w1",
        {"hidden_act": "swigluoai", "use_routing_bias": True, "routed_scaling_factor": 2.0},
        "block_sparse_moe.e_score_correction_bias",
        torch.bfloat16,
        "sigmoid, correction bias (BF16), top-2, renormalized, times 2",
    ),
    "mimo_v2_flash": (
        "compressed-tensors",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": None},
        "mlp.gate.e_score_correction_bias",
        torch.float16,
        "sigmoid, correction bias (F16), top-2, renormalized",
    ),
    "bailing_hybrid": (
        "weight-scale-inv",
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        "mlp.gate.expert_bias",
        torch.float32,
        "sigmoid, correction bias (F32), top-2, the best 2 of 4 groups, each by its two highest added, renormalized, "
        "times 2.5",
    ),
    "kimi_linear": (
        "compressed-tensors-w1",
        {
            **{"moe_router_activation_func": "sigmoid", "num_expert_group": 1, "topk_group": 1},
            **{"moe_renormalize": True, "routed_scaling_factor": 1.0},
        },
        "block_sparse_moe.gate.e_score_correction_bias",
        torch.float32,
        "sigmoid, correction bias (F32), top-2, renormalized",
    ),
}


def write_with_router(folder: Path, model_type: str, layers: tuple[int, ...] = (0, 1)) -> tuple[Path, torch.Tensor]:
    """Layers of eight experts, each with a bias that ends in the layer's number; and the first one's bias."""
    scheme, config, name, dtype, _ = ROUTERS[model_type]
    tensors, biases = {}, []
    for number in layers:
        tensors |= checkpoints.tensors_of(scheme, checkpoints.layer_of(scheme, 8, 64, 32, seed=number), number)
        biases.append(torch.linspace(-1, number, 8).to(dtype))
        tensors |= {f"model.layers.{number}.{name}": biases[-1]} if name else {}
    checkpoints.write(folder, tensors, shards=2)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    checkpoints.write_config(folder, {"model_type": model_type, "hidden_act": "silu", **sizes, **config})
    return folder, biases[0]


def test_a_row_for_each_router() -> None:
    assert all(any(name.startswith(row.model_types) for name in ROUTERS) for row in router_table.ROUTERS)


@pytest.mark.parametrize("model_type", ROUTERS)
def test_the_router_in_words_and_the_call_that_loads_it(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bias = write_with_router(tmp_path, model_type)
    status, rows = inspect(path, capsys)
    assert (status, rows["router"]) == (0, ROUTERS[model_type][-1])
    router = eval(rows["load router"], {"load_router": load_router})
    has_bias = bool(ROUTERS[model_type][2])
    assert has_bias == (router.e_score_correction_bias is not None)
    assert not has_bias or torch.equal(router.e_score_correction_bias, bias.float())

    _, found = data(path, capsys)
    (group,) = found["groups"]
    stated = group["router"]
    assert (stated.pop("e_score_correction_bias") is not None) == has_bias
    assert stated.pop("table") is None
    assert stated == {name: getattr(router, name) for name in Router.__dataclass_fields__ if "bias" not in name}


def test_layers_that_choose_otherwise_are_a_group_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first layers go by token id, as DeepSeek-V4's; one has its bias in another dtype."""
    path, bias = write_with_router(tmp_path / "all", "deepseek_v4", layers=(0, 1, 2, 3, 4))
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for number in (0, 1):
        del tensors[f"model.layers.{number}.ffn.gate.bias"]
        tensors[f"model.layers.{number}.ffn.gate.tid2eid"] = torch.zeros(5, 2, dtype=torch.int64)
    tensors["model.layers.3.ffn.gate.bias"] = bias.bfloat16()
    checkpoints.write(tmp_path / "few", tensors)
    (tmp_path / "few" / "config.json").write_bytes((path / "config.json").read_bytes())
    status, found = data(tmp_path / "few", capsys)
    assert status == 0
    groups = {tuple(group["layers"]): group for group in found["groups"]}
    assert set(groups) == {(0, 1), (2, 4), (3,)}
    by_id = groups[0, 1]
    assert by_id["router"]["table"] == "model.layers.0.ffn.gate.tid2eid"
    logits, tid2eid, input_ids = torch.randn(3, 8), tensors["model.layers.0.ffn.gate.tid2eid"], torch.arange(3)
    names = {"select_experts": select_experts, "Router": Router, "router_logits": logits}
    weights, ids = eval(by_id["router_call"], {**names, "tid2eid": tid2eid, "input_ids": input_ids})
    assert torch.equal(ids, tid2eid[input_ids].to(ids.dtype))
    assert torch.allclose(weights.sum(1), torch.tensor(2.5))
    assert groups[2, 4]["router"]["e_score_correction_bias"]["dtype"] == "F32"
    assert groups[3,]["router"]["e_score_correction_bias"]["dtype"] == "BF16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mystery"}, "has model_type 'mystery', whose router is not known here"),
        ({"moe_renormalize": None}, "expected moe_renormalize to be of type bool, got None"),
        ({"moe_router_activation_func": "noaux"}, "scoring_func: expected one of 'softmax', 'sigmoid', 'sqrtsoftplus'"),
        ({"num_experts_per_tok": 33}, "expected at most 8 experts per token, got 33"),
        ({"num_expert_group": 2, "topk_group": 3}, "topk_group: expected 1 to 2, got 3"),
        ({"num_experts": 9}, "expected 8 as number of experts"),
    ],
)
def test_a_router_that_is_not_known_is_said_and_never_called(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_with_router(tmp_path, "kimi_linear")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    checkpoints.write_config(path, config | change)
    status, rows = inspect(path, capsys)
    assert "load router" not in rows
    if "router" in rows:  # the experts can be loaded all the same
        assert (status, rows["load"][:10]) == (0, "MoEWeights")
        assert rows["router"].startswith("not known: ")
        assert message in rows["router"]
    else:
        assert status == 1
        assert message in rows["problem"]


def test_without_a_bias_of_its_own_or_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer's missing bias has its own name, and they are one group nevertheless."""
    path, _ = write_with_router(tmp_path, "kimi_linear")
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in path.glob("model*"):
        file.unlink()
    checkpoints.write(path, {name: tensor for name, tensor in tensors.items() if "correction" not in name})
    status, rows = inspect(path, capsys)
    assert (status, rows["layers"]) == (0, "model.layers.{0 to 1} (2)")
    assert rows["router"].startswith("not known: router: expected model.layers.0.block_sparse_moe.gate.e_score_")
    (path / "config.json").unlink()
    status, rows = inspect(path, capsys)
    assert status == 0
    assert "expected config.json" in rows["router"]


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
    assert "experts 3 sizes" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1] == "False"
