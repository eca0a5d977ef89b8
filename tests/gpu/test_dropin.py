"""The drop-in on a GPU: CUDA graphs, scripts for the SM120 fork, and the memory of raw weights."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import fork_scripts
import pytest
import torch
from flashinfer_cases import make_call, raw_weights

from mxfp4_moe import MoEWeights
from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.bench import dropin
from mxfp4_moe.bench.shapes import PRESETS, MoEShape
from mxfp4_moe.flashinfer_api import weight_cache


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    weight_cache._layers.clear()
    weight_cache._full.clear()
    yield
    weight_cache._layers.clear()
    weight_cache._full.clear()


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [tensor.to(device) for tensor in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def call_on(device: torch.device, seed: int = 0) -> dict[str, Any]:
    return {name: on(device, value) for name, value in (make_call(seed) | raw_weights(seed)).items()}


def raw_tensors(call: dict[str, Any]) -> list[torch.Tensor]:
    return [call["fc1_expert_weights"], call["quant_scales"][0], call["fc2_expert_weights"], call["quant_scales"][2]]


def test_cuda_graphs(device: torch.device) -> None:
    """New weights are refused during a capture; those of an earlier call are captured, and the graph replays."""
    call = call_on(device)
    expected = fi.cutlass_fused_moe(**call)[0]
    output, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fi.cutlass_fused_moe(**call, output=output)
        with pytest.raises(
            RuntimeError, match="fc1_expert_weights: expected weights that an earlier call has prepared"
        ):
            fi.cutlass_fused_moe(**{**call, "ep_size": 2})
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    "script",
    [fork_scripts.tile_expansion, fork_scripts.smoke, fork_scripts.fp4_smem_correctness],
    ids=lambda f: f.__name__,
)
def test_fork_scripts(script: Any, device: torch.device) -> None:
    script(device)


def test_benchmark_sm120_tiles(device: torch.device) -> None:
    found = fork_scripts.benchmark_sm120_tiles(device, (1, 2, 4, 8, 16, 32))
    assert len(found) == 6 * len(fi.SM120_SUPPORTED_TILE_MN)


def test_workspace_is_aligned(device: torch.device) -> None:
    call = call_on(device)
    buffer = torch.empty(512, dtype=torch.uint8, device=device)
    fi.cutlass_fused_moe(**call, workspace_buffer=buffer)
    with pytest.raises(
        ValueError, match="^workspace_buffer: expected data aligned to 128 bytes, got 1 bytes past that"
    ):
        fi.cutlass_fused_moe(**call, workspace_buffer=buffer[1:])
    with pytest.raises(ValueError, match="^workspace_buffer: expected a tensor on cuda"):
        fi.cutlass_fused_moe(**call, workspace_buffer=torch.empty(64, dtype=torch.uint8))


class TestReleasedWeights:
    def test_reads_are_refused_by_name(self, device: torch.device) -> None:
        call = call_on(device)
        packed = call["fc1_expert_weights"].view(torch.uint8)
        expected = fi.cutlass_fused_moe(**call)[0]
        weight_cache._layers.clear()
        assert torch.equal(fi.cutlass_fused_moe(**call, raw_weights="release")[0], expected)
        names = ("fc1_expert_weights", r"quant_scales\[0\]", "fc2_expert_weights", r"quant_scales\[2\]")
        for name, tensor in zip(names, raw_tensors(call), strict=True):
            for read in (torch.clone, torch.Tensor.cpu, lambda t: t + 1, lambda t: t.view(torch.uint8).sum()):
                with pytest.raises(RuntimeError, match=f"{name}: expected raw weights, got a tensor of those that"):
                    read(tensor)
        with pytest.raises(RuntimeError, match="fc1_expert_weights: expected raw weights"):
            packed.zero_()
        fc1, fc1_scale, fc2, fc2_scale = raw_tensors(call)
        with pytest.raises(ValueError, match="^fc1_expert_weights: expected a tensor with memory"):
            MoEWeights.from_flashinfer(fc1, fc1_scale, fc2, fc2_scale)
        call["fc1_expert_weights"] = packed.view(torch.int64)
        fi.forget_weights()
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], expected)
        graph, output = torch.cuda.CUDAGraph(), torch.zeros_like(expected)
        with torch.cuda.graph(graph):
            fi.cutlass_fused_moe(**call, output=output)
        graph.replay()
        assert torch.equal(output, expected)

    @pytest.mark.parametrize("choice", ["keep", "release"])
    def test_peak_of_a_layer_of_gpt_oss_120b(self, choice: str, device: torch.device) -> None:
        shape = PRESETS["gpt-oss-120b"]
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        tensors = dropin.raw_layer(shape, device)
        layer = sum(tensor.nbytes for tensor in tensors)
        torch.cuda.reset_peak_memory_stats(device)
        dropin.first_call(tensors, device, choice)
        peak = torch.cuda.max_memory_allocated(device) - before
        after = torch.cuda.memory_allocated(device) - before
        assert (peak <= layer + 2 * layer / shape.experts) == (choice == "release")
        assert (after <= 1.01 * layer) == (choice == "release")

    def test_auto_frees_beyond_its_part(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = [call_on(device, seed) for seed in range(3)]
        a_layer = sum(tensor.nbytes for tensor in raw_tensors(calls[0]))
        total = torch.cuda.get_device_properties(device).total_memory
        monkeypatch.setattr(weight_cache, "_KEPT_PART", total / (2.5 * a_layer))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expected = [fi.cutlass_fused_moe(**call)[0] for call in calls]
            again = [fi.cutlass_fused_moe(**call)[0] for call in calls]
        assert all(map(torch.equal, expected, again))
        assert [str(one.message).partition(" and ")[0] for one in caught] == ["cutlass_fused_moe: raw weights"]
        for call in calls:
            assert not any(tensor.untyped_storage().nbytes() for tensor in raw_tensors(call))


def test_gradient_and_compile(device: torch.device) -> None:
    x = torch.randn(9, 96, device=device)
    call = torch.compile(lambda x: fi.mxfp8_quantize(x), fullgraph=True, backend="aot_eager")
    for a, b in zip(call(x), fi.mxfp8_quantize(x), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    with pytest.raises(RuntimeError, match="^mxfp8_quantize: no gradient"):
        fi.mxfp8_quantize(x.requires_grad_())[0].float().sum().backward()


def test_bench_of_the_drop_in(device: torch.device) -> None:
    """It runs, and both ways of quantizing agree. No time is asserted."""
    table = dropin.quantizer_table(96, (1, 33), device).splitlines()
    assert len(table) == 7
    for line in table[1:]:
        words = line.split()
        assert int(words[2]) > 10
        assert int(words[5]) == 1
    memory = dropin.memory_table(MoEShape(name="", experts=8, top_k=2, hidden=256, intermediate=256), device)
    assert [line.split()[0] for line in memory.splitlines()[1:]] == ["keep", "release"]
