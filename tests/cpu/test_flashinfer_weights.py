"""The weights that the drop-in keeps prepared, and what becomes of the raw ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flashinfer_cases import E, make_call, raw_weights
from storage_meter import StorageMeter

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import ActivationType, raw_memory, weight_cache
from mxfp4_moe.flashinfer_api.given_weights import GivenWeights
from mxfp4_moe.weights import Activation, MoEWeights

RAW = ("fc1_expert_weights", "fc2_expert_weights")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    weight_cache._layers.clear()
    yield
    weight_cache._layers.clear()


class TestKeptWeights:
    """Prepared once, never stale, gone with their tensors."""

    @pytest.fixture
    def prepared(self, monkeypatch: pytest.MonkeyPatch) -> list[MoEWeights]:
        """What was prepared, in order."""
        made: list[MoEWeights] = []
        prepare = weight_cache.prepare_layer

        def count(*args: Any) -> MoEWeights:
            made.append(prepare(*args))
            return made[-1]

        monkeypatch.setattr(weight_cache, "prepare_layer", count)
        return made

    def test_once_for_many_calls_and_views(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        packed = call["fc1_expert_weights"].view(torch.uint8)
        for i in range(3):
            call |= {k: v for k, v in make_call(seed=i).items() if k in ("input", "input_sf")}
            call["fc1_expert_weights"] = packed.view(torch.int64)  # another tensor of the same memory
            fi.cutlass_fused_moe(**call)
        with torch.inference_mode():
            assert packed.view(torch.int64).is_inference()
        assert len(prepared) == 1

    def test_again_after_a_write(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        before = fi.cutlass_fused_moe(**call)[0]
        other = raw_weights(seed=1)
        for name in ("fc1_expert_weights", "fc2_expert_weights", "fc1_expert_biases", "fc2_expert_biases"):
            call[name].copy_(other[name])
        for i in (0, 2):
            call["quant_scales"][i].copy_(other["quant_scales"][i])
        after = fi.cutlass_fused_moe(**call)[0]
        assert len(prepared) == 2
        assert not torch.equal(before, after)
        assert torch.equal(after, fi.cutlass_fused_moe(**{**call, **other})[0])
        assert len(weight_cache._layers) == 2

    def test_again_after_writes_that_torch_does_not_count(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call)
        call["fc2_expert_biases"].data.zero_()
        fi.forget_weights()
        without = fi.cutlass_fused_moe(**{**call, "fc2_expert_biases": None})[0]
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], without)

    def test_shared_by_what_does_not_change_them(self, prepared: list[MoEWeights]) -> None:
        """Numbers, activations, ranks and biases are a call's own; the layer behind them is prepared once."""
        call = make_call()
        variants: list[dict[str, Any]] = [
            {},
            {"swiglu_limit": torch.full((E,), 0.5)},
            {"activation_type": ActivationType.Geglu},
            {"ep_size": 2, "ep_rank": 1},
            {"tp_size": 2, "tp_rank": 1},
            {"fc1_expert_biases": None},
        ]
        results = [fi.cutlass_fused_moe(**{**call, **variant})[0] for variant in variants]
        for i, result in enumerate(results):
            assert torch.equal(result, fi.cutlass_fused_moe(**{**call, **variants[i]})[0])
            assert not any(torch.equal(result, other) for other in results[:i])
        assert len(prepared) == 1
        (layer,) = weight_cache._layers.values()
        assert len(layer.calls) == len(variants)
        for variant in variants:
            fi.forget_weights()
            assert torch.equal(results.pop(0), fi.cutlass_fused_moe(**{**call, **variant})[0])

    def test_what_a_call_adds_is_freed_with_its_tensors(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        for limit in (1.0, 2.0):
            fi.cutlass_fused_moe(**call, swiglu_limit=torch.full((E,), limit))
        gc.collect()
        (layer,) = weight_cache._layers.values()
        assert not layer.calls
        limit = torch.full((E,), 1.0)
        first = fi.cutlass_fused_moe(**call, swiglu_limit=limit)[0]
        limit.fill_(0.01)
        assert not torch.equal(first, fi.cutlass_fused_moe(**call, swiglu_limit=limit)[0])
        assert len(layer.calls) == 1
        assert len(prepared) == 1

    def test_freed_with_their_tensors(self) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call)
        (layer,) = weight_cache._layers.values()
        kept = weakref.ref(layer.weights)
        del layer, call["quant_scales"]
        gc.collect()
        assert kept() is None
        assert not weight_cache._layers

    def test_memory_that_is_used_again(self, prepared: list[MoEWeights]) -> None:
        """A new tensor at the place of a dead one is not mistaken for it."""
        call = make_call()
        memory = np.zeros(call["fc2_expert_weights"].nbytes, np.uint8)

        def place(values: torch.Tensor) -> torch.Tensor:
            memory[:] = values.view(torch.uint8).numpy().ravel()
            return torch.from_numpy(memory).view(torch.int64).view(values.shape)

        first = place(call["fc2_expert_weights"])
        address = first.data_ptr()
        fi.cutlass_fused_moe(**{**call, "fc2_expert_weights": first})
        del first
        other = raw_weights(seed=1)["fc2_expert_weights"]
        second = place(other)
        assert second.data_ptr() == address
        result = fi.cutlass_fused_moe(**{**call, "fc2_expert_weights": second})[0]
        assert torch.equal(result, fi.cutlass_fused_moe(**{**call, "fc2_expert_weights": other})[0])

    def test_under_inference_mode(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        expected = fi.cutlass_fused_moe(**call)[0]
        fi.forget_weights()
        packed = call["fc1_expert_weights"].view(torch.uint8)
        with torch.inference_mode():
            for _ in range(3):
                result = fi.cutlass_fused_moe(**{**call, "fc1_expert_weights": packed.view(torch.int64)})[0]
                assert torch.equal(result, expected)
        assert len(prepared) == 2

    def test_threads(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        expected = fi.cutlass_fused_moe(**call)[0]
        fi.forget_weights()
        results: list[torch.Tensor] = []
        threads = [threading.Thread(target=lambda: results.append(fi.cutlass_fused_moe(**call)[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 4
        assert all(torch.equal(result, expected) for result in results)
        assert len(prepared) == 2

    def test_under_torch_compile(self, prepared: list[MoEWeights]) -> None:
        """A graph break, and never a graph that takes the weights for constant."""
        call = make_call()
        compiled = torch.compile(lambda **kwargs: fi.cutlass_fused_moe(**kwargs)[0], backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(**call), fi.cutlass_fused_moe(**call)[0])
            call["fc2_expert_weights"].zero_()
        assert len(prepared) == 2


def raw_tensors(call: dict[str, Any]) -> list[torch.Tensor]:
    return [call["fc1_expert_weights"], call["quant_scales"][0], call["fc2_expert_weights"], call["quant_scales"][2]]


class TestReleasedWeights:
    """As on a GPU, but that reads of freed memory are not refused: that needs a CUDA build (tests/gpu)."""

    @pytest.fixture(autouse=True)
    def frees(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
        words: dict[int, str] = {}
        monkeypatch.setattr(raw_memory, "_REFUSE_READS", words.__setitem__)
        return words

    def test_calls_go_on(self, frees: dict[int, str]) -> None:
        call = make_call()
        variants: list[dict[str, Any]] = [{}, {"ep_size": 2}, {"activation_type": ActivationType.Geglu}]
        expected = [fi.cutlass_fused_moe(**{**call, **variant})[0] for variant in variants]
        fi.forget_weights()
        names = ("fc1_expert_weights", "quant_scales[0]", "fc2_expert_weights", "quant_scales[2]")
        for variant, result in zip(variants, expected, strict=True):
            assert torch.equal(fi.cutlass_fused_moe(**{**call, **variant}, raw_weights="release")[0], result)
            assert [tensor.untyped_storage().nbytes() for tensor in raw_tensors(call)] == [0, 0, 0, 0]
            fi.forget_weights()
        assert sorted(text.partition(": expected raw weights")[0] for text in frees.values()) == sorted(names)

    def test_views_of_freed_tensors_are_the_same_weights(self) -> None:
        call = make_call()
        packed = call["fc1_expert_weights"].view(torch.uint8)
        expected = fi.cutlass_fused_moe(**call, raw_weights="release")[0]
        call["fc1_expert_weights"] = packed.view(torch.int64)
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], expected)

    def test_refused_to_who_needs_other_weights_of_them(self) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call, raw_weights="release")
        fc1, fc1_scale, fc2, fc2_scale = raw_tensors(call)
        with pytest.raises(ValueError, match="^fc1_expert_weights: expected a tensor with memory"):
            MoEWeights.from_flashinfer(fc1, fc1_scale, fc2, fc2_scale)
        other = raw_weights(seed=1)
        call["fc2_expert_weights"] = other["fc2_expert_weights"]
        with pytest.raises(
            RuntimeError, match="^fc1_expert_weights: expected raw weights, got a tensor of those that cu"
        ):
            fi.cutlass_fused_moe(**call)

    def test_nothing_is_lost_by_an_error(self) -> None:
        call = make_call()
        before = [tensor.clone() for tensor in raw_tensors(call)]
        bad = raw_weights()["quant_scales"]
        bad[2].view(torch.uint8)[-1, :32] = 254  # an E8M0 byte that is refused, in the last expert
        tensors = {**call, "quant_scales": bad}
        kept = bad[2].clone()
        with pytest.raises(ValueError, match=r"^quant_scales\[2\]: expected E8M0 bytes 0..253"):
            fi.cutlass_fused_moe(**tensors, raw_weights="release")
        for tensor, copy in zip(raw_tensors(tensors), [before[0], before[1], before[2], kept], strict=True):
            assert torch.equal(tensor, copy)
        assert not weight_cache._layers
        with pytest.raises(ValueError, match="^fc1_expert_biases"):
            fi.cutlass_fused_moe(**{**call, "fc1_expert_biases": torch.ones(1)}, raw_weights="release")

    def test_storages_that_hold_more_are_not_freed(self) -> None:
        call = make_call()
        stacked = torch.stack([call["fc1_expert_weights"]] * 2)
        call["fc1_expert_weights"] = stacked[1]
        with pytest.raises(ValueError, match="^fc1_expert_weights: expected a tensor with a storage of its own"):
            fi.cutlass_fused_moe(**call, raw_weights="release")
        assert torch.equal(stacked[0], stacked[1])

    def test_choice(self) -> None:
        assert fi.set_raw_weights("release") == "auto"
        try:
            call = make_call()
            fi.cutlass_fused_moe(**call)
            assert raw_memory.is_freed(call["fc1_expert_weights"])
            other = make_call(seed=1)
            fi.cutlass_fused_moe(**other, raw_weights="keep")
            assert not raw_memory.is_freed(other["fc1_expert_weights"])
            with pytest.raises(ValueError, match="^raw_weights: expected one of 'auto', 'release', 'keep', got 'drop'"):
                fi.set_raw_weights("drop")
        finally:
            assert fi.set_raw_weights("auto") == "release"

    def test_auto_keeps_on_the_cpu(self) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call)
        assert not any(raw_memory.is_freed(tensor) for tensor in raw_tensors(call))

    def test_auto_frees_where_it_is_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The third layer is one too many: it loses its raw weights, the others theirs when they are called again."""
        calls = [make_call() | raw_weights(seed=i) for i in range(3)]
        a_layer = sum(tensor.nbytes for tensor in raw_tensors(calls[0]))
        real = weight_cache._is_full

        def is_full(device: torch.device, more: int) -> bool:
            kept = sum(layer.raw_bytes for layer in weight_cache._layers.values())
            if kept + more > 2 * a_layer:
                weight_cache._full.add(device)
            return device in weight_cache._full

        monkeypatch.setattr(weight_cache, "_is_full", is_full)
        monkeypatch.setattr(weight_cache, "_full", set())
        expected = [fi.cutlass_fused_moe(**call)[0] for call in calls]
        freed = [raw_memory.is_freed(call["fc1_expert_weights"]) for call in calls]
        assert freed == [False, False, True]
        for call, result in zip(calls, expected, strict=True):
            assert torch.equal(fi.cutlass_fused_moe(**call)[0], result)
            assert all(raw_memory.is_freed(tensor) for tensor in raw_tensors(call))
            assert torch.equal(fi.cutlass_fused_moe(**call)[0], result)
        assert not real(torch.device("cpu"), 1 << 60)

    @pytest.mark.parametrize("choice", ["keep", "release"])
    def test_peak_of_memory(self, choice: str) -> None:
        """At most the layer and two experts; beside the raw one it is two layers."""
        call = make_call()
        layer = sum(tensor.nbytes for tensor in raw_tensors(call))
        with StorageMeter() as meter:
            # Made anew under the meter, as a caller's are.
            fresh = {**call, "quant_scales": [tensor.clone() for tensor in call["quant_scales"]]}
            fresh |= {name: call[name].clone() for name in RAW}
            del fresh["input_sf"]
            scales, nothing = fresh["quant_scales"], (None,) * 8
            weights = (fresh[RAW[0]], scales[0], fresh[RAW[1]], scales[2])
            weight_cache.prepared_weights(GivenWeights(*weights, *nothing, Activation.SWIGLU, (0, 1, 0, 1)), choice)
        assert (meter.peak <= layer + 2 * layer // E) == (choice == "release")
        assert meter.peak < 2 * layer + 2 * layer // E
