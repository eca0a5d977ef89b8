"""The drop-in's bf16 x MXFP4 on a GPU: FlashInfer's layout made and undone there, the result, graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mixed_gemm_cases as cases
import pytest
import torch
from mixed_gemm_cases import INTER, OAI, E

from mxfp4_moe import activation_formats
from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import weight_cache
from mxfp4_moe.formats import word_order_of

TOLERANCE = 5e-4  # relative norm, as of CPU tensors


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    weight_cache._layers.clear()
    weight_cache._full.clear()
    yield
    weight_cache._layers.clear()
    weight_cache._full.clear()


@pytest.fixture(autouse=True)
def has_kernels(device: torch.device) -> None:
    """Where the wheel has none, the refusal is all there is to see."""
    if "bf16" not in activation_formats(device):
        with pytest.raises(NotImplementedError, match="^use_w4_group_scaling: quantization 'mxfp4_bf16'"):
            fi.cutlass_fused_moe(**call_on(device, cases.make_call()))
        dtypes: dict[str, Any] = {"x_dtype": torch.bfloat16, "weight_dtype": torch.uint8, "use_w4_group_scaling": True}
        with pytest.raises(NotImplementedError, match="^use_w4_group_scaling: quantization 'mxfp4_bf16'"):
            fi.cutlass_fused_moe_workspace_size(8, 128, 128, 4, 2, **dtypes, device=device)
        pytest.skip("the wheel has no bf16 kernels for this GPU")


def call_on(device: torch.device, call: dict[str, Any]) -> dict[str, Any]:
    def on(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor.to(device) for tensor in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: on(value) for name, value in call.items()}


def test_layouts_are_those_of_cpu_tensors(device: torch.device) -> None:
    layer = cases.checkpoint()
    expected = cases.weight_arguments(layer)
    made = cases.weight_arguments({name: tensor.to(device) for name, tensor in layer.items()})
    for name in ("fc1_expert_weights", "fc2_expert_weights"):
        assert torch.equal(made[name].cpu(), expected[name])
    for found, wanted in zip(made["quant_scales"], expected["quant_scales"], strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("tile_mn", [None, (8, 128), (16, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("numbers", [None, (0.5, 0.0, 7.0), OAI])
def test_is_flashinfers(
    numbers: tuple[float, float, float] | None, biased: bool, tile_mn: tuple[int, int] | None, device: torch.device
) -> None:
    layer = cases.checkpoint(seed=2)
    call = cases.make_call(layer, seed=2) | (cases.biases(layer) if biased else {})
    wanted = cases.expected(call, layer, numbers=numbers, biased=biased)
    given = call_on(device, call | cases.swiglu_numbers(numbers))  # kept: prepared weights live as long as the raw ones
    (found,) = fi.cutlass_fused_moe(
        **given,
        output=torch.full((cases.T, cases.H), torch.nan, dtype=torch.bfloat16, device=device),
        tile_mn=tile_mn,
    )
    assert cases.distance(found, wanted) < TOLERANCE
    (prepared,) = weight_cache._layers.values()
    assert prepared.weights.word_order is word_order_of(found.device, "bf16")


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_ranks(ep_rank: int, device: torch.device) -> None:
    layer, call = cases.checkpoint(), cases.make_call()
    part = {name: tensor[ep_rank * E // 2 : (ep_rank + 1) * E // 2] for name, tensor in layer.items()}
    own = call | cases.weight_arguments(part) | cases.biases(part) | {"ep_size": 2, "ep_rank": ep_rank}
    own |= {"tp_size": 2, "tp_rank": 1}  # the bias of fc2 is rank 0's to add
    wanted = cases.expected(call, part, biased=True, first=ep_rank * E // 2, down_bias=False)
    assert cases.distance(fi.cutlass_fused_moe(**call_on(device, own))[0], wanted) < TOLERANCE


def test_cuda_graph(device: torch.device) -> None:
    call = call_on(device, cases.make_call())
    expected = fi.cutlass_fused_moe(**call)[0]
    output, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fi.cutlass_fused_moe(**call, output=output)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


def test_released(device: torch.device) -> None:
    experts = 16
    layer = {name: tensor.to(device) for name, tensor in cases.checkpoint(experts=experts).items()}
    call = call_on(device, cases.make_call()) | cases.weight_arguments(layer)
    call["token_selected_experts"] += experts - E
    expected = fi.cutlass_fused_moe(**call)[0]
    weight_cache._layers.clear()
    fc1, fc2, (fc1_scale, fc2_scale) = call["fc1_expert_weights"], call["fc2_expert_weights"], call["quant_scales"]
    raw = sum(tensor.nbytes for tensor in (fc1, fc1_scale, fc2, fc2_scale))
    assert raw > experts * 3 * INTER * cases.H // 2
    before = torch.cuda.memory_allocated(device) - raw
    assert torch.equal(fi.cutlass_fused_moe(**call, raw_weights="release")[0], expected)
    assert torch.cuda.memory_allocated(device) - before < 1.5 * raw
    for name, tensor in (("fc1_expert_weights", fc1), (r"quant_scales\[1\]", fc2_scale)):
        with pytest.raises(RuntimeError, match=f"{name}: expected raw weights, got a tensor of those that"):
            tensor.clone()
    assert torch.equal(fi.cutlass_fused_moe(**call)[0], expected)
