"""The drop-in's calls: shapes, quantizers, what it refuses, and the weights that it keeps prepared.

What it computes: test_flashinfer_semantics.py."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import MoEWeights, fused_moe
from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import ActivationType, weight_cache

E, T, K, H, INTER = 4, 10, 2, 128, 160
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    fi.forget_weights()
    yield
    fi.forget_weights()


def raw_weights(seed: int = 0) -> dict[str, Any]:
    checkpoint = oracles.random_checkpoint(E, H, INTER, seed=seed)
    unused = torch.ones(E)
    return {
        "fc1_expert_weights": checkpoint["w13"].view(torch.int64),
        "fc2_expert_weights": checkpoint["w2"].view(torch.int64),
        "quant_scales": [
            fi.block_scale_interleave(checkpoint["w13_scale"]).view(torch.int32).view(E, 384, 1),
            unused,
            fi.block_scale_interleave(checkpoint["w2_scale"]).view(torch.int32).view(E, 128, 2),
            unused,
        ],
        "fc1_expert_biases": checkpoint["w13_bias"],
        "fc2_expert_biases": checkpoint["w2_bias"],
    }


def make_call(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    codes, scales = fi.mxfp8_quantize(torch.randn(T, H, generator=g).to(BF16))
    return {
        "input": codes,
        "token_selected_experts": torch.randint(0, E, (T, K), generator=g, dtype=torch.int32),
        "token_final_scales": torch.rand(T, K, generator=g),
        "output_dtype": BF16,
        "input_sf": scales,
        "use_mxfp8_act_scaling": True,
        **raw_weights(),
    }


class TestCall:
    def test_is_fused_moe_of_the_same_weights(self) -> None:
        call = make_call()
        weights = MoEWeights.from_flashinfer(
            call["fc1_expert_weights"],
            call["quant_scales"][0],
            call["fc2_expert_weights"],
            call["quant_scales"][2],
            fc1_expert_biases=call["fc1_expert_biases"],
            fc2_expert_biases=call["fc2_expert_biases"],
        )
        for dtype in (BF16, torch.float16):
            expected = fused_moe(
                call["input"],
                call["token_final_scales"],
                call["token_selected_experts"],
                weights,
                hidden_states_scale=call["input_sf"],
                scale_layout="swizzled",
                output_dtype=dtype,
                intermediate_rounding=True,
            )
            result = fi.cutlass_fused_moe(**{**call, "output_dtype": dtype})
            assert isinstance(result, list)
            assert len(result) == 1
            assert torch.equal(result[0], expected)

    def test_positions(self) -> None:
        call = make_call()
        names = list(inspect.signature(fi.cutlass_fused_moe).parameters)
        assert names[:20] == [
            *("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights"),
            *("output_dtype", "quant_scales", "fc1_expert_biases", "fc2_expert_biases", "input_sf"),
            *("swiglu_alpha", "swiglu_beta", "swiglu_limit", "tp_size", "tp_rank", "ep_size", "ep_rank"),
            *("cluster_size", "cluster_rank", "output"),
        ]
        positional = [call[name] for name in names[:10]]
        (by_position,) = fi.cutlass_fused_moe(*positional, use_mxfp8_act_scaling=True)
        assert torch.equal(by_position, fi.cutlass_fused_moe(**call)[0])

    def test_output_and_scales_of_one(self) -> None:
        call = make_call()
        output = torch.empty(T, H, dtype=BF16)
        (result,) = fi.cutlass_fused_moe(**{**call, "output": output, "token_final_scales": None})
        assert result is output
        (expected,) = fi.cutlass_fused_moe(**{**call, "token_final_scales": torch.ones(T, K)})
        assert torch.equal(output, expected)

    def test_float_input_is_quantized_on_the_way(self) -> None:
        call = make_call()
        x = torch.randn(T, H, generator=torch.Generator().manual_seed(0)).to(BF16)
        (result,) = fi.cutlass_fused_moe(**{**call, "input": x, "input_sf": None})
        assert torch.equal(result, fi.cutlass_fused_moe(**call)[0])

    def test_what_changes_nothing(self) -> None:
        call = make_call()
        (expected,) = fi.cutlass_fused_moe(**call)
        more = {"tune_max_num_tokens": 1, "enable_pdl": True, "profile_ids": [-1, -1]}
        workspace = torch.empty(64, dtype=torch.uint8)
        assert torch.equal(fi.cutlass_fused_moe(**call, **more, workspace_buffer=workspace)[0], expected)

    @pytest.mark.parametrize(
        ("argument", "value", "words"),
        [
            ("enable_alltoall", True, "all-to-all communication"),
            ("use_deepseek_fp8_block_scale", True, "DeepSeek FP8 block scales"),
            ("use_w4_group_scaling", True, "INT4"),
            ("min_latency_mode", True, "minimum-latency mode"),
            ("use_packed_weights", True, "INT4"),
            ("use_wfp4afp8_humming", True, "folded weight scales"),
            ("use_fused_finalize", True, "sums by atomics"),
            ("cluster_size", 2, "clusters of ranks"),
            ("profile_ids", [3, -1], "FlashInfer kernel profiles"),
            ("situ_beta", torch.ones(E), "SiTU activation"),
        ],
    )
    def test_refuses_modes_by_name(self, argument: str, value: Any, words: str) -> None:
        with pytest.raises(NotImplementedError, match=f"^{argument}: this library has no .*{words}.*; it has MXFP8 x"):
            fi.cutlass_fused_moe(**{**make_call(), argument: value})

    @pytest.mark.parametrize(
        ("change", "argument", "quantization"),
        [
            ({"fc1_expert_weights": torch.zeros(E, 320, H, dtype=BF16)}, "fc1_expert_weights", "float8_e4m3fn_unq"),
            (
                {"fc1_expert_weights": torch.zeros(E, 320, H).to(torch.float8_e4m3fn)},
                "fc1_expert_weights",
                "mxfp8_mxfp8",
            ),
            ({"fc1_expert_weights": torch.zeros(E, 320, 64, dtype=torch.uint8)}, "fc1_expert_weights", "bfloat16_int4"),
            ({"input": torch.zeros(T, 64, dtype=torch.uint8)}, "quant_scales", "nvfp4_nvfp4"),
            ({"quant_scales": [torch.ones(1)] * 6}, "quant_scales", "nvfp4_nvfp4"),
            ({"use_mxfp8_act_scaling": False}, "use_mxfp8_act_scaling", "fp8_mxfp4"),
        ],
    )
    def test_refuses_quantizations_that_the_profile_lacks(
        self, change: dict[str, Any], argument: str, quantization: str
    ) -> None:
        message = rf"^{argument}.*: quantization '{quantization}.*' is not in this wheel's profile 'mxfp4_minimal' "
        with pytest.raises(NotImplementedError, match=message + r"\(it has mxfp8_mxfp4\)"):
            fi.cutlass_fused_moe(**{**make_call(), **change})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"input": [1.0]}, TypeError, "input: expected a tensor, got list"),
            ({"input_sf": None}, ValueError, "input_sf: expected the scales of float8_e4m3fn input, got None"),
            (
                {"input": torch.zeros(T, H, dtype=BF16)},
                ValueError,
                r"input_sf: expected None for input that is not float8_e4m3fn, got it with bfloat16 \[10, 128\]",
            ),
            ({"input_sf": torch.zeros(5, dtype=torch.uint8)}, ValueError, "hidden_states_scale: expected"),
            ({"input_sf": torch.zeros(512)}, TypeError, "input_sf: expected uint8 tensor, got float32"),
            ({"quant_scales": None}, ValueError, "quant_scales: expected 4 tensors .*, got 0"),
            ({"quant_scales": [torch.ones(1)] * 2}, ValueError, "quant_scales: expected 4 tensors .*, got 2"),
            ({"quant_scales": [None] * 4}, TypeError, "fc1_scale: expected int32 .*, got NoneType"),
            (
                {"token_selected_experts": torch.zeros(T, K, dtype=torch.int64)},
                TypeError,
                r"token_selected_experts: expected int32 \[T, k\], got int64",
            ),
            ({"output_dtype": torch.float32}, ValueError, "output_dtype: expected torch.bfloat16 or torch.float16"),
            ({"swiglu_limit": torch.ones(3)}, ValueError, r"swiglu_limit: expected float32 \[4\], got float32 \[3\]"),
            ({"swiglu_alpha": 1.702}, TypeError, ".*swiglu numbers: expected tensors, got float"),
            ({"activation_type": 10}, NotImplementedError, "activation_type: Situ is not in this library, which has G"),
            ({"activation_type": 11}, NotImplementedError, "activation_type: InvalidType is not in this library"),
            ({"activation_type": 12}, ValueError, "activation_type: expected an ActivationType, got 12"),
            ({"activation_type": ActivationType.Relu}, ValueError, "fc2_expert_weights: expected int64"),
            ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0 to 1, got 2"),
            ({"tp_size": 2, "tp_rank": -1}, ValueError, "tp_rank: expected 0 to 1, got -1"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe(**{**make_call(), **change})


class TestKeptWeights:
    """Prepared once, never stale, gone with their tensors."""

    @pytest.fixture
    def prepared(self, monkeypatch: pytest.MonkeyPatch) -> list[MoEWeights]:
        """What was prepared, in order."""
        made: list[MoEWeights] = []
        prepare = weight_cache._prepare

        def count(*args: Any) -> MoEWeights:
            made.append(prepare(*args))
            return made[-1]

        monkeypatch.setattr(weight_cache, "_prepare", count)
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
        assert len(weight_cache._entries) == 2

    def test_again_after_writes_that_torch_does_not_count(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call)
        call["fc2_expert_biases"].data.zero_()
        fi.forget_weights()
        without = fi.cutlass_fused_moe(**{**call, "fc2_expert_biases": None})[0]
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], without)

    def test_apart_for_what_differs(self, prepared: list[MoEWeights]) -> None:
        call = make_call()
        variants: list[dict[str, Any]] = [
            {},
            {"swiglu_limit": torch.full((E,), 7.0)},
            {"activation_type": ActivationType.Geglu},
            {"ep_size": 2, "ep_rank": 1},
            {"tp_size": 2, "tp_rank": 1},
            {"fc1_expert_biases": None},
        ]
        for _ in range(2):
            for variant in variants:
                fi.cutlass_fused_moe(**{**call, **variant})
        assert len(prepared) == len(variants)

    def test_freed_with_their_tensors(self) -> None:
        call = make_call()
        fi.cutlass_fused_moe(**call)
        (entry,) = weight_cache._entries.values()
        kept = weakref.ref(entry.weights)
        del entry, call["quant_scales"]
        gc.collect()
        assert kept() is None
        assert not weight_cache._entries

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
            call["fc2_expert_biases"].zero_()
        assert len(prepared) == 2


@pytest.mark.gpu
def test_cuda_graphs() -> None:
    """New weights are refused during a capture; those of an earlier call are captured, and the graph replays."""

    def on_gpu(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor.cuda() for tensor in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    call = {name: on_gpu(value) for name, value in make_call().items()}
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


class TestActivationType:
    def test_numbers(self) -> None:
        names = "Gelu Relu Silu Swiglu Geglu SwigluBias Relu2 SwigluStep GegluTanh Identity Situ InvalidType"
        assert [kind.name for kind in sorted(ActivationType)] == names.split()
        assert [kind.value for kind in sorted(ActivationType)] == list(range(12))
        gated = {kind.name for kind in ActivationType if kind.is_gated}
        assert gated == {"Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ"}


class TestWorkspace:
    SIZES = (128, 2880, 2880, 32, 4)

    def test_none_is_needed(self) -> None:
        assert (
            fi.cutlass_fused_moe_workspace_size(*self.SIZES, x_dtype=torch.float8_e4m3fn, weight_dtype=torch.int64) == 0
        )

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"min_latency_mode": True}, NotImplementedError, "min_latency_mode: this library has no"),
            ({"tp_size": 0}, ValueError, "tp_size: expected at least 1, got 0"),
            ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0 to 1, got 2"),
            ({"ep_size": 3}, ValueError, "num_experts_total: expected a multiple of ep_size = 3, got 32"),
            ({"activation_type": 10}, NotImplementedError, "activation_type: Situ"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe_workspace_size(*self.SIZES, x_dtype=BF16, weight_dtype=torch.int64, **change)
