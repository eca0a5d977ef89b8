"""A layer of each model of docs/models.md in its own sizes: a checkpoint in the model's naming, read to the GPU, router
included, against float64.

Layers of more than MXFP4_MOE_LAYER_BYTES (4 GB by default) have fewer experts, no other size changed: the disk and the
time to write them are what is short. Two tokens are compared with float64, as one of a batch and alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import model_checkpoints as checkpoints
import numpy as np
import oracles
import pytest
import router_cases
import torch
from model_cases import ACTIVATIONS, ROUTERS, TOLERANCE, error, shrunk

from mxfp4_moe import MoEWeights, fused_moe_from_logits, load_router
from mxfp4_moe._checkpoints.models import MODELS, Model

BYTES = int(float(os.environ.get("MXFP4_MOE_LAYER_BYTES", "4e9")))
TOKENS, COMPARED = 64, 2
LAYER = 1  # Ling's layer 0 has no limit


def experts_of(model: Model) -> int:
    one = 3 * model.hidden_size * model.intermediate_size * 17 // 32
    groups = ROUTERS[model.name].get("num_expert_group", 1)
    return min(model.num_experts, max(model.top_k, BYTES // one) // groups * groups)


def layer_of(scheme: str, experts: int, hidden: int, inter: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`model_checkpoints.layer_of`, made on the GPU: gigabytes."""
    g = torch.Generator(device).manual_seed(experts)

    def some(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=device, generator=g).cpu()

    def bias(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device).mul(0.2).bfloat16().cpu()

    layer = {
        "w13": some(experts, 2 * inter, hidden // 2),
        "w13_scale": some(experts, 2 * inter, hidden // 32, low=118, high=124),
        "w2": some(experts, hidden, inter // 2),
        "w2_scale": some(experts, hidden, inter // 32, low=118, high=124),
    }
    biases = {"w13_bias": bias(experts, 2 * inter), "w2_bias": bias(experts, hidden)}
    return layer | (biases if scheme.startswith("gpt-oss") else {})


def expected_of(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: dict[str, torch.Tensor], model: Model, order: str
) -> np.ndarray:
    """An expert at a time: float64 of a whole layer is hundreds of gigabytes."""
    out = np.zeros(x.shape)
    for expert in ids.unique().tolist():
        one = {name: tensor[expert : expert + 1] for name, tensor in layer.items()}
        mine = torch.where(ids == expert, 0, -1)
        out += oracles.dense_moe(x, weights, mine, one, gate_up_order=order, **ACTIVATIONS[model.name])
    return out


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_layer_in_its_own_size(tmp_path: Path, model: Model, device: torch.device) -> None:
    scheme, experts = next(name for name in model.schemes if name not in checkpoints.FLOATS), experts_of(model)
    layer = layer_of(scheme, experts, model.hidden_size, model.intermediate_size, device)
    bias = router_cases.bias_of(experts, seed=0)
    tensors = checkpoints.other_tensors(model.prefix)
    tensors |= checkpoints.tensors_of(scheme, layer, LAYER, model.prefix)
    checkpoints.write(tmp_path, tensors | checkpoints.bias_tensors(model.config, model.prefix, LAYER, bias))
    sizes = {
        "num_experts": experts,
        "top_k": model.top_k,
        "hidden": model.hidden_size,
        "inter": model.intermediate_size,
    }
    checkpoints.write_config(tmp_path, shrunk(model.config, sizes))
    on_cpu, router = load_router(tmp_path, layer=LAYER), load_router(tmp_path, layer=LAYER, device=device)
    weights = MoEWeights.from_pretrained(tmp_path, layer=LAYER, device=device)
    assert (weights.num_experts, weights.hidden_size) == (experts, model.hidden_size)
    assert weights.intermediate_size == model.intermediate_size

    g = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, model.hidden_size, generator=g).bfloat16()
    logits = router_cases.logits_of(TOKENS, experts, torch.float32)
    chosen = [router_cases.by_definition(row, on_cpu) for row in logits[:COMPARED].double().tolist()]
    assert min(choice.margin for choice in chosen) > router_cases.LEAST_MARGIN
    topk_weights = torch.tensor([choice.weights for choice in chosen]).double()
    topk_ids = torch.tensor([choice.ids for choice in chosen])
    order = checkpoints.ORDER_OF[scheme]
    expected = expected_of(x[:COMPARED], topk_weights, topk_ids, layer, model, order)

    out = fused_moe_from_logits(x.to(device), logits.to(device), router, weights)
    alone = fused_moe_from_logits(x[:COMPARED].to(device), logits[:COMPARED].to(device), router, weights)
    assert torch.equal(out[:COMPARED].view(torch.int16), alone.view(torch.int16))
    assert error(alone.cpu(), expected) <= TOLERANCE
