"""Every model of docs/models.md, in every naming it comes in: a small checkpoint, loaded, against float64.

Sizes are a model's own in small: as many blocks of 32 beyond whole K tiles of 128 as the model has, experts and experts
per token cut down.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import model_checkpoints as checkpoints
import numpy as np
import oracles
import pytest
import router_cases
import torch
from model_cases import ACTIVATIONS, ROUTERS, TOLERANCE, error, shrunk

from mxfp4_moe import MoEWeights, Router, fused_moe, fused_moe_from_logits, load_router, select_experts
from mxfp4_moe._checkpoints.models import MODELS, Model
from mxfp4_moe._checkpoints.schemes import BY_NAME, SCHEMES

TOKENS = 23
NVFP4 = {name for name, scheme in BY_NAME.items() if scheme.is_nvfp4}  # test_nvfp4_checkpoints.py has those
PAIRS = [(model, scheme) for model in MODELS for scheme in model.schemes if scheme not in NVFP4]
LAYER = 1


def small(size: int, tiles: int) -> int:
    return 32 * (4 * tiles + size // 32 % 4)


def experts_of(model: Model) -> int:
    return 16 if "num_expert_group" in ROUTERS[model.name] else 6  # groups of two


def write_model(folder: Path, model: Model, scheme: str, layers: int = 2) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    sizes = {
        "num_experts": experts_of(model),
        "top_k": min(model.top_k, 4),
        "hidden": small(model.hidden_size, 2),
        "inter": small(model.intermediate_size, 1),
    }
    made = [
        checkpoints.layer_of(scheme, sizes["num_experts"], sizes["hidden"], sizes["inter"], seed=seed)
        for seed in range(layers)
    ]
    tensors = checkpoints.other_tensors(model.prefix)
    for number, layer in enumerate(made):
        tensors |= checkpoints.tensors_of(scheme, layer, number, model.prefix)
        bias = router_cases.bias_of(sizes["num_experts"], seed=number)
        tensors |= checkpoints.bias_tensors(model.config, model.prefix, number, bias)
    checkpoints.write(folder, tensors, shards=2)
    checkpoints.write_config(folder, shrunk(model.config, sizes))
    return folder, made


def call(weights: MoEWeights, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(TOKENS, weights.num_experts, generator=g).softmax(-1).topk(top_k)
    x = torch.randn(TOKENS, weights.hidden_size, generator=g).bfloat16()
    return x, scores.values, scores.indices


def expected_router(model: Model) -> Router:
    options = dict(ROUTERS[model.name])
    bias = router_cases.bias_of(experts_of(model), seed=LAYER) if options.pop("bias", False) else None
    return Router(top_k=min(model.top_k, 4), e_score_correction_bias=bias, **options)


def test_the_tables_know_each_other() -> None:
    assert {scheme for _, scheme in PAIRS} == set(BY_NAME) - NVFP4 == set(checkpoints.SCHEMES)
    assert {scheme for model in MODELS for scheme in model.schemes} <= set(BY_NAME)
    assert set(ACTIVATIONS) == {model.name for model in MODELS}
    assert set(ROUTERS) == {model.name for model in MODELS}
    assert all(row.sources for row in (*SCHEMES, *MODELS))


@pytest.mark.parametrize(("model", "scheme"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_layer_from_its_own_files(tmp_path: Path, model: Model, scheme: str) -> None:
    path, layers = write_model(tmp_path, model, scheme)
    numbers = ACTIVATIONS[model.name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = MoEWeights.from_pretrained(path, layer=LAYER)
    order = checkpoints.ORDER_OF[scheme]
    assert weights.activation.value == numbers["activation"]
    assert weights.gate_up_order.value == order

    x, topk_weights, topk_ids = call(weights, min(model.top_k, 4))
    expected = oracles.dense_moe(x, topk_weights, topk_ids, layers[LAYER], gate_up_order=order, **numbers)
    assert error(fused_moe(x, topk_weights, topk_ids, weights), expected) <= TOLERANCE

    # What a wrong layer, order of rows or activation would give is far from that.
    others = [
        {"checkpoint": layers[1 - LAYER], "gate_up_order": order, **numbers},
        {"checkpoint": layers[LAYER], "gate_up_order": "up_gate" if order == "gate_up" else "gate_up", **numbers},
        {"checkpoint": layers[LAYER], "gate_up_order": order, **numbers, "activation": "geglu"},
    ]
    for other in others:
        assert (
            error(fused_moe(x, topk_weights, topk_ids, weights), oracles.dense_moe(x, topk_weights, topk_ids, **other))
            > 4 * TOLERANCE
        )

    if scheme not in checkpoints.FLOATS:
        for name, tensor in weights.to_mxfp4()._asdict().items():
            stored = layers[LAYER].get(name)
            assert tensor is stored is None or torch.equal(tensor, stored.to(tensor.dtype)), name


def assert_same_router(router: Router, expected: Router) -> None:
    fields = {name: value for name, value in vars(expected).items() if not isinstance(value, torch.Tensor)}
    assert {name: getattr(router, name) for name in fields} == fields
    bias, expected_bias = router.e_score_correction_bias, expected.e_score_correction_bias
    assert bias is expected_bias is None or torch.equal(bias, expected_bias)


@pytest.mark.parametrize(("model", "scheme"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_layer_with_its_router(tmp_path: Path, model: Model, scheme: str) -> None:
    """From logits to the output, all of it from the checkpoint's files, against float64."""
    path, layers = write_model(tmp_path, model, scheme)
    router, definition = load_router(path, layer=LAYER), expected_router(model)
    assert_same_router(router, definition)
    numbers = ACTIVATIONS.get(model.name, {"activation": "swiglu"})
    options: dict[str, Any] = {}
    weights = MoEWeights.from_pretrained(path, layer=LAYER, **options)
    x, *_ = call(weights, router.top_k)
    logits = router_cases.logits_of(TOKENS, weights.num_experts, torch.float32)
    chosen = [router_cases.by_definition(row, definition) for row in logits.double().tolist()]
    topk_weights = torch.tensor([choice.weights for choice in chosen]).double()
    topk_ids = torch.tensor([choice.ids for choice in chosen])
    assert min(choice.margin for choice in chosen) > router_cases.LEAST_MARGIN
    order = checkpoints.ORDER_OF[scheme]
    expected = oracles.dense_moe(x, topk_weights, topk_ids, layers[LAYER], gate_up_order=order, **numbers)
    out = fused_moe_from_logits(x, logits, router, weights)
    assert error(out, expected) <= TOLERANCE

    # Another layer's bias, no scaling factor, and softmax are far from that, where the model has them.
    if router.e_score_correction_bias is not None:
        other = load_router(path, layer=1 - LAYER)
        assert not torch.equal(select_experts(logits, other)[1], select_experts(logits, router)[1])
        plain = fused_moe_from_logits(x, logits, router.top_k, weights)
        assert error(plain, expected) > 4 * TOLERANCE


def test_experts_by_token_id_are_a_call_with_ids(tmp_path: Path) -> None:
    """DeepSeek-V4's first layers: the router has no bias and refuses to choose; the table's ids are weighed."""
    (model,) = [model for model in MODELS if model.name == "DeepSeek-V4-Flash"]
    path, layers = write_model(tmp_path / "moe", model, "deepseek-v4")
    tensors = checkpoints.tensors_of("deepseek-v4", layers[0], 0, model.prefix)
    table = torch.randint(0, 6, (50, 4), generator=torch.Generator().manual_seed(0))
    checkpoints.write(tmp_path / "hash", tensors | {"layers.0.ffn.gate.tid2eid": table})
    (tmp_path / "hash" / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"layers\.0\.ffn\.gate\.tid2eid\); select_experts\(router_logits, Router\(top_k=4"
    ):
        load_router(tmp_path / "hash", layer=0)

    router = Router(top_k=4, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
    weights = MoEWeights.from_pretrained(tmp_path / "hash", layer=0)
    x, *_ = call(weights, 4)
    logits = router_cases.logits_of(TOKENS, 6, torch.float32)
    ids = table[torch.arange(TOKENS) % 50]
    rows = zip(logits.double().tolist(), ids.tolist(), strict=True)
    chosen = [router_cases.by_definition(row, router, ids=given) for row, given in rows]
    topk_weights = torch.tensor([choice.weights for choice in chosen]).double()
    numbers = ACTIVATIONS[model.name]
    expected = oracles.dense_moe(x, topk_weights, ids, layers[0], gate_up_order="gate_up", **numbers)
    out = fused_moe(x, *select_experts(logits, router, topk_ids=ids), weights)
    assert error(out, expected) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "scheme"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_router_read_to_the_gpu(tmp_path: Path, model: Model, scheme: str) -> None:
    path, _ = write_model(tmp_path, model, scheme)
    options: dict[str, Any] = {}
    on_cpu, router_on_cpu = MoEWeights.from_pretrained(path, layer=LAYER, **options), load_router(path, layer=LAYER)
    weights, router = on_cpu.to("cuda"), load_router(path, layer=LAYER, device="cuda")
    x, *_ = call(on_cpu, router.top_k)
    logits = router_cases.logits_of(TOKENS, on_cpu.num_experts, torch.float32)
    expected = fused_moe_from_logits(x, logits, router_on_cpu, on_cpu).double().numpy()
    assert error(fused_moe_from_logits(x.cuda(), logits.cuda(), router, weights).cpu(), expected) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "scheme"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_layer_read_to_the_gpu(tmp_path: Path, model: Model, scheme: str) -> None:
    path, _ = write_model(tmp_path, model, scheme)
    on_cpu = MoEWeights.from_pretrained(path, layer=LAYER)
    weights = MoEWeights.from_pretrained(path, layer=LAYER, device="cuda")
    moved = on_cpu.to("cuda")
    assert torch.equal(weights.w13, moved.w13)
    assert torch.equal(weights.w2, moved.w2)
    x, topk_weights, topk_ids = (tensor.cuda() for tensor in call(on_cpu, min(model.top_k, 4)))
    expected = fused_moe(x.cpu(), topk_weights.cpu(), topk_ids.cpu(), on_cpu).double().numpy()
    assert error(fused_moe(x, topk_weights, topk_ids, weights).cpu(), expected) <= TOLERANCE


@pytest.mark.parametrize(("layer", "activation", "limit"), [(0, "swiglu", None), (1, "swiglu_step", 7.0)])
def test_ling_has_a_limit_for_each_layer(tmp_path: Path, layer: int, activation: str, limit: float | None) -> None:
    (model,) = [model for model in MODELS if model.name.startswith("Ling")]
    path, _ = write_model(tmp_path, model, "weight-scale-inv")
    weights = MoEWeights.from_pretrained(path, layer=layer)
    assert (weights.activation.value, weights.limit) == (activation, limit)


def test_a_square_down_projection_is_transposed_by_name(tmp_path: Path) -> None:
    """gpt-oss has H = I, so that no shape tells [in, out] from [out, in]."""
    layer = checkpoints.layer_of("gpt-oss-bf16", 4, 96, 96)
    checkpoints.write(tmp_path, checkpoints.tensors_of("gpt-oss-bf16", layer, 0))
    weights = MoEWeights.from_pretrained(tmp_path, layer=0)
    x, topk_weights, topk_ids = call(weights, 2)
    expected = oracles.dense_moe(x, topk_weights, topk_ids, layer)
    assert error(fused_moe(x, topk_weights, topk_ids, weights), expected) <= TOLERANCE
    wrong = {**layer, "w2": torch.from_numpy(np.ascontiguousarray(layer["w2"].numpy()[:, ::-1]))}
    assert (
        error(fused_moe(x, topk_weights, topk_ids, weights), oracles.dense_moe(x, topk_weights, topk_ids, wrong)) > 0.1
    )
