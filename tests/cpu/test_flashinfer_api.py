"""The drop-in's calls: shapes, what changes nothing, and what it refuses.

What it computes: test_flashinfer_semantics.py. The weights that it keeps prepared: test_flashinfer_weights.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from flashinfer_cases import BF16, E, H, K, T, make_call

from mxfp4_moe import MoEWeights, fused_moe
from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import ActivationType, modes

BYTES = (torch.uint8, torch.int8)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    fi.forget_weights()
    yield
    fi.forget_weights()


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
        changes: list[dict[str, Any]] = [
            {"tune_max_num_tokens": 1, "enable_pdl": True, "profile_ids": [-1, -1], "backend": "cutlass"},
            {"use_fused_finalize": True},
            {"use_fused_finalize": False},
            {"tile_mn": (16, 128)},
            {"auto_tile_select": False},
            *({"workspace_buffer": torch.empty(size, dtype=dtype)} for size in (0, 64) for dtype in BYTES),
        ]
        for change in changes:
            assert torch.equal(fi.cutlass_fused_moe(**call, **change)[0], expected), change

    def test_fp8_without_scales(self) -> None:
        """FP8 x MXFP4: activations under scales of one, five quant_scales of which three are ones."""
        call = make_call()
        fc1, _, fc2, _ = call["quant_scales"]
        ones = torch.full((T, H // 32), 127, dtype=torch.uint8)
        expected = fi.cutlass_fused_moe(**{**call, "input_sf": ones, "swizzled_input_sf": False})[0]
        plain = {**call, "input_sf": None, "use_mxfp8_act_scaling": False}
        for act in (torch.ones(()), torch.ones(E)):
            five = [fc1, torch.ones(E), act, fc2, torch.ones(E)]
            assert torch.equal(fi.cutlass_fused_moe(**{**plain, "quant_scales": five})[0], expected)
        cancel = [fc1, torch.ones(E), torch.tensor(8.0), fc2, torch.full((E,), 0.125)]
        assert torch.equal(fi.cutlass_fused_moe(**{**plain, "quant_scales": cancel})[0], expected)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {2: torch.tensor(2.0)},
                NotImplementedError,
                r"quant_scales\[2\], quant_scales\[4\]: this library has glo",
            ),
            (
                {1: torch.full((E,), 0.5)},
                NotImplementedError,
                r"quant_scales\[1\]: this library has a global scale of 1",
            ),
            ({1: torch.ones(3)}, ValueError, r"quant_scales\[1\]: expected float32 \[4\], got float32 \[3\]"),
            ({2: torch.ones(3)}, ValueError, r"quant_scales\[2\]: expected float32 \[4\], got float32 \[3\]"),
            ({4: [1.0]}, TypeError, r"quant_scales\[4\]: expected a tensor, got list"),
            ({3: torch.ones(3)}, TypeError, r"quant_scales\[3\]: expected int32 \[4, 128, 2\], got float32 \[3\]"),
        ],
    )
    def test_fp8_without_scales_refuses(self, change: dict[int, Any], error: type[Exception], message: str) -> None:
        call = make_call()
        fc1, _, fc2, _ = call["quant_scales"]
        five = [fc1, torch.ones(E), torch.ones(()), fc2, torch.ones(E)]
        for i, value in change.items():
            five[i] = value
        call |= {"input_sf": None, "use_mxfp8_act_scaling": False, "quant_scales": five}
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe(**call)

    @pytest.mark.parametrize(
        "asking", ["token_final_scales", "fc1_expert_biases", "fc2_expert_biases", "swiglu_limit", "input"]
    )
    def test_gradients_are_refused(self, asking: str) -> None:
        call = make_call()
        if asking == "input":
            call |= {"input": torch.randn(T, H).to(BF16), "input_sf": None}
        if asking == "swiglu_limit":
            call[asking] = torch.full((E,), 7.0)
        call[asking] = call[asking].clone().requires_grad_()
        result = fi.cutlass_fused_moe(**call)[0]
        with pytest.raises(RuntimeError, match="^cutlass_fused_moe: no gradient can be computed through it"):
            result.float().sum().backward()
        with torch.no_grad():
            assert not fi.cutlass_fused_moe(**call)[0].requires_grad

    @pytest.mark.parametrize(
        ("argument", "value", "words"),
        [
            ("enable_alltoall", True, "all-to-all communication"),
            ("use_deepseek_fp8_block_scale", True, "DeepSeek FP8 block scales"),
            ("min_latency_mode", True, "minimum-latency mode"),
            ("use_packed_weights", True, "INT4"),
            ("use_wfp4afp8_humming", True, "folded weight scales"),
            ("backend", "cake", "'cake', the SiTU layer"),
            ("cluster_size", 2, "clusters of ranks"),
            ("profile_ids", [3, -1], "FlashInfer kernel profiles"),
        ],
    )
    def test_refuses_modes_by_name(self, argument: str, value: Any, words: str) -> None:
        modes = "MXFP8 x MXFP4, FP8 x MXFP4, bf16 x MXFP4, and NVFP4 x NVFP4 of CPU tensors"
        with pytest.raises(NotImplementedError, match=f"^{argument}: this library has no .*{words}.*; it has {modes}$"):
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
            ({"input": torch.zeros(T, 64, dtype=torch.uint8)}, "quant_scales", "nvfp4_nvfp4"),
            ({"quant_scales": [torch.ones(1)] * 6}, "quant_scales", "nvfp4_nvfp4"),
        ],
    )
    def test_refuses_quantizations_that_the_profile_lacks(
        self, change: dict[str, Any], argument: str, quantization: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(modes.wheel, "read_report", lambda: {"profile": "mxfp4_minimal"})
        message = rf"^{argument}.*: quantization '{quantization}.*' is not in this wheel's profile 'mxfp4_minimal' "
        with pytest.raises(NotImplementedError, match=message + r"\(it has mxfp4_mxfp8\)"):
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
            ({"input_sf": torch.zeros(5, dtype=torch.uint8)}, ValueError, r"input_sf: expected uint8 \[512\], got"),
            (
                {"input_sf": torch.zeros(T, 5, dtype=torch.uint8), "swizzled_input_sf": False},
                ValueError,
                r"input_sf: expected uint8 \[10, 4\], got uint8 \[10, 5\]",
            ),
            (
                {"input": torch.zeros(H).to(torch.float8_e4m3fn)},
                ValueError,
                r"input: expected float8_e4m3fn \[T, H\], g",
            ),
            (
                {"input": torch.zeros(T, 64).to(torch.float8_e4m3fn)},
                ValueError,
                r"input: expected uint8 or float8_e4m3fn \[T, 128\], got float8_e4m3fn \[10, 64\]",
            ),
            ({"input": torch.zeros(T, H), "input_sf": None}, TypeError, "input: expected torch.float8_e4m3fn, torch.b"),
            (
                {"token_final_scales": torch.ones(T, 3)},
                ValueError,
                r"token_final_scales: expected float32 \[10, 2\], g",
            ),
            (
                {"token_selected_experts": torch.zeros(T, 0, dtype=torch.int32)},
                ValueError,
                r"token_selected_experts: expected \[10, k\] with k at least 1",
            ),
            ({"output": torch.zeros(T, H)}, TypeError, r"output: expected bfloat16 \[10, 128\], got float32"),
            ({"tile_mn": (8, 8)}, ValueError, "tile_mn: expected a tile of the manifest"),
            ({"backend": "trtllm"}, ValueError, "backend: expected 'cutlass', got 'trtllm'"),
            ({"raw_weights": "free"}, ValueError, "raw_weights: expected one of 'auto', 'release', 'keep', got 'free'"),
            ({"raw_weights": "release"}, RuntimeError, "raw_weights: 'release' needs a CUDA build of torch"),
            ({"profile_ids": [-1]}, ValueError, "profile_ids: expected two"),
            (
                {"clamped_relu2_limit": torch.ones(1)},
                ValueError,
                "clamped_relu2_limit: expected None without Activatio",
            ),
            (
                {"use_mxfp8_act_scaling": False},
                ValueError,
                r"quant_scales: expected 5 tensors \[fc1 scales, .*\], got 4; with use_mxfp8_act_scaling=True and",
            ),
            (
                {"use_mxfp8_act_scaling": False, "quant_scales": [torch.ones(1)] * 5},
                ValueError,
                "input_sf: expected None for FP8 x MXFP4, got it with float8_e4m3fn",
            ),
            ({"input_sf": torch.zeros(512)}, TypeError, "input_sf: expected uint8 tensor, got float32"),
            ({"quant_scales": None}, ValueError, "quant_scales: expected 4 tensors .*, got 0"),
            ({"quant_scales": [torch.ones(1)] * 2}, ValueError, "quant_scales: expected 4 tensors .*, got 2"),
            ({"quant_scales": [None] * 4}, TypeError, r"quant_scales\[0\]: expected a tensor, got NoneType"),
            (
                {"quant_scales": [torch.ones(1)] * 4},
                TypeError,
                r"quant_scales\[0\]: expected int32 \[4, 384, 1\], got f",
            ),
            (
                {"token_selected_experts": torch.zeros(T, K, dtype=torch.int64)},
                TypeError,
                r"token_selected_experts: expected int32 \[T, k\], got int64",
            ),
            ({"output_dtype": torch.float32}, ValueError, "output_dtype: expected torch.bfloat16 or torch.float16"),
            ({"swiglu_limit": torch.ones(3)}, ValueError, r"swiglu_limit: expected float32 \[4\], got float32 \[3\]"),
            ({"swiglu_alpha": 1.702}, TypeError, "swiglu_alpha: expected a tensor, got float"),
            (
                {"swiglu_alpha": torch.full((E,), torch.nan)},
                ValueError,
                "swiglu_alpha: expected finite numbers, got nan",
            ),
            (
                {"swiglu_limit": torch.zeros(E)},
                ValueError,
                "swiglu_limit: expected finite numbers above 0, got 0.0 for",
            ),
            (
                {"activation_type": 10, "situ_beta": torch.zeros(E)},
                ValueError,
                "situ_beta: expected finite numbers above 0 with activation 'situ', got 0.0 for expert 0",
            ),
            (
                {"activation_type": 10, "situ_linear_beta": torch.full((E,), torch.inf)},
                ValueError,
                "situ_linear_beta: expected finite numbers above 0, got inf for expert 0",
            ),
            (
                {"fc1_expert_biases": torch.ones(E, 9)},
                ValueError,
                r"fc1_expert_biases: expected .* \[4, 320\], got float32",
            ),
            (
                {"fc2_expert_biases": torch.ones(E, H).int()},
                TypeError,
                "fc2_expert_biases: expected bfloat16 or float16 o",
            ),
            ({"situ_beta": torch.ones(E)}, ValueError, "situ_beta: expected None without ActivationType.Situ, got a v"),
            (
                {"activation_type": 10, "situ_linear_beta": torch.ones(3)},
                ValueError,
                r"situ_linear_beta: expected float32 \[4\], got float32 \[3\]",
            ),
            (
                {"activation_type": 10, "swiglu_limit": torch.ones(E)},
                ValueError,
                "swiglu_limit: expected None with an activation that has other numbers, got a value",
            ),
            ({"activation_type": 11}, NotImplementedError, "activation_type: InvalidType is not in this library"),
            (
                {"activation_type": 12},
                ValueError,
                r"clamped_relu2_limit: expected float32 \[1\] with ActivationType.Cla",
            ),
            ({"activation_type": 13}, ValueError, "activation_type: expected an ActivationType, got 13"),
            (
                {"workspace_buffer": "64"},
                TypeError,
                "workspace_buffer: expected a uint8 or int8 tensor, or None, got str",
            ),
            (
                {"workspace_buffer": torch.empty(64)},
                TypeError,
                r"workspace_buffer: expected uint8 or int8, got float32",
            ),
            (
                {"workspace_buffer": torch.empty(8, 8, dtype=torch.uint8)},
                ValueError,
                r"workspace_buffer: expected one dimension, got uint8 \[8, 8\]",
            ),
            (
                {"workspace_buffer": torch.empty(64, dtype=torch.uint8, device="meta")},
                ValueError,
                "workspace_buffer: expected a tensor on cpu, where input is, got one on meta",
            ),
            (
                {"workspace_buffer": torch.empty(64, dtype=torch.uint8)[::2]},
                ValueError,
                r"workspace_buffer: expected a contiguous tensor, got strides \[2\]",
            ),
            ({"activation_type": ActivationType.Relu}, ValueError, "fc2_expert_weights: expected int64"),
            ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0 to 1, got 2"),
            ({"tp_size": 2, "tp_rank": -1}, ValueError, "tp_rank: expected 0 to 1, got -1"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe(**{**make_call(), **change})


class TestActivationType:
    def test_numbers(self) -> None:
        names = (
            "Gelu Relu Silu Swiglu Geglu SwigluBias Relu2 SwigluStep GegluTanh Identity Situ InvalidType ClampedRelu2"
        )
        assert [kind.name for kind in sorted(ActivationType)] == names.split()
        assert [kind.value for kind in sorted(ActivationType)] == list(range(13))
        gated = {kind.name for kind in ActivationType if kind.is_gated}
        assert gated == {"Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ"}


class TestWorkspace:
    SIZES = (128, 2880, 2880, 32, 4)
    DTYPES: ClassVar[dict[str, Any]] = {"x_dtype": torch.float8_e4m3fn, "weight_dtype": torch.int64}

    def test_none_is_needed(self) -> None:
        for change in ({}, {"use_mxfp8_act_scaling": True}, {"x_dtype": BF16}, {"device": "cuda"}, {"ep_size": 4}):
            assert fi.cutlass_fused_moe_workspace_size(*self.SIZES, **(self.DTYPES | change)) == 0

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"min_latency_mode": True}, NotImplementedError, "min_latency_mode: this library has no"),
            ({"use_wfp4afp8_humming": True}, NotImplementedError, "use_wfp4afp8_humming: this library has no"),
            ({"backend": "cake"}, NotImplementedError, "backend: this library has no 'cake'"),
            ({"backend": "x"}, ValueError, "backend: expected 'cutlass', got 'x'"),
            ({"x_dtype": torch.uint8}, NotImplementedError, "x_dtype: quantization 'nvfp4_nvfp4'"),
            ({"x_dtype": torch.float32}, TypeError, "x_dtype: expected torch.float8_e4m3fn"),
            ({"x_dtype": "bf16"}, TypeError, "x_dtype: expected a torch.dtype, got str"),
            ({"weight_dtype": BF16}, NotImplementedError, "weight_dtype: quantization 'float8_e4m3fn_unquantized'"),
            ({"weight_dtype": torch.uint8}, ValueError, "use_w4_group_scaling: expected True with uint8 weight_dtype"),
            ({"use_w4_group_scaling": True}, TypeError, "weight_dtype: expected torch.uint8 for bf16 x MXFP4"),
            ({"weight_dtype": torch.int32}, TypeError, "weight_dtype: expected torch.int64"),
            ({"output_dtype": torch.float32}, ValueError, "output_dtype: expected torch.bfloat16 or torch.float16"),
            ({"tp_size": 0}, ValueError, "tp_size: expected at least 1, got 0"),
            ({"tp_rank": "0"}, TypeError, "tp_rank: expected an integer, got str"),
            ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0 to 1, got 2"),
            ({"ep_size": 3}, ValueError, "num_experts_total: expected a multiple of ep_size = 3, got 32"),
            ({"activation_type": 11}, NotImplementedError, "activation_type: InvalidType"),
            ({"device": "meta"}, ValueError, "device: expected a CUDA or CPU device, got meta"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe_workspace_size(*self.SIZES, **(self.DTYPES | change))

    @pytest.mark.parametrize(
        ("sizes", "error", "message"),
        [
            ((128, 2890, 2880, 32, 4), ValueError, "hidden_size: expected a multiple of 32, got 2890"),
            ((128, 2880, 2890, 32, 4), ValueError, "intermediate_size: expected a multiple of 32, got 2890"),
            ((128, 2880, 2880, 2048, 4), ValueError, "num_experts_total: expected at most 1024 experts on a rank"),
            ((2**30, 2880, 2880, 32, 4), ValueError, "max_num_tokens: expected at most"),
            ((0, 2880, 2880, 32, 4), ValueError, "max_num_tokens: expected at least 1, got 0"),
            ((True, 2880, 2880, 32, 4), TypeError, "max_num_tokens: expected an integer, got bool"),
        ],
    )
    def test_refuses_sizes(self, sizes: tuple[int, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            fi.cutlass_fused_moe_workspace_size(*sizes, **self.DTYPES)
