"""The drop-in's bf16 x MXFP4: what it computes, the weights that it keeps, and what it refuses.

FlashInfer's own test of this mode compares with a layer in bfloat16 and allows a tenth; here is the same call, held
against float64 with bfloat16 where FlashInfer's kernels round. What is left is float32 sums that fall on the other side
of a middle, now and then: a value of the activation then moves by 2^-8 of itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import mixed_gemm_cases as cases
import pytest
import torch
from mixed_gemm_cases import BF16, INTER, OAI, E, H, K, T
from storage_meter import StorageMeter

from mxfp4_moe import MoEWeights, fused_moe
from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import ActivationType, modes, raw_memory, weight_cache
from mxfp4_moe.flashinfer_api.given_weights import GivenWeights
from mxfp4_moe.weights import Activation

TOLERANCE = 5e-4  # relative norm; one value in 1500 that is a unit of bfloat16 off is 1e-4


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    weight_cache._layers.clear()
    yield
    weight_cache._layers.clear()


class TestResult:
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("numbers", [None, (0.5, 0.0, 7.0), OAI])
    def test_is_flashinfers(self, numbers: tuple[float, float, float] | None, biased: bool) -> None:
        layer = cases.checkpoint()
        call = cases.make_call(layer) | (cases.biases(layer) if biased else {})
        output = torch.full((T, H), torch.nan, dtype=BF16)
        (found,) = fi.cutlass_fused_moe(**call, **cases.swiglu_numbers(numbers), output=output)
        assert found is output
        assert cases.distance(found, cases.expected(call, layer, numbers=numbers, biased=biased)) < TOLERANCE

    def test_not_gated(self) -> None:
        layer = cases.checkpoint(gated=False)
        call = cases.make_call(layer) | {"activation_type": ActivationType.Relu2} | cases.biases(layer)
        wanted = cases.expected(call, layer, gated=False, biased=True)
        assert cases.distance(fi.cutlass_fused_moe(**call)[0], wanted) < TOLERANCE

    @pytest.mark.parametrize("wrong", ["rows exchanged", "codes in rows", "scales in rows", "scales of other rows"])
    def test_mistakes_are_seen(self, wrong: str) -> None:
        layer = cases.checkpoint()
        call, wanted = cases.make_call(layer), cases.expected(cases.make_call(layer), layer)
        if wrong == "rows exchanged":
            call |= cases.weight_arguments(layer | {"fc1": layer["fc1"].roll(INTER, 1)})
        elif wrong == "codes in rows":
            call["fc2_expert_weights"] = layer["fc2"]
        elif wrong == "scales in rows":
            call["quant_scales"][0] = layer["fc1_scale"].view(call["quant_scales"][0].view(torch.uint8).shape)
        else:
            call |= cases.weight_arguments(layer | {"fc2_scale": layer["fc2_scale"].roll(16, 1)})
        assert cases.distance(fi.cutlass_fused_moe(**call)[0], wanted) > 10 * TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e8m0fnu])
    def test_is_fused_moe_of_the_same_weights(self, dtype: torch.dtype) -> None:
        layer = cases.checkpoint()
        call = cases.make_call(layer) | cases.biases(layer)
        call["quant_scales"] = [scales.view(dtype) for scales in call["quant_scales"]]
        weights = MoEWeights.from_mxfp4(
            layer["fc1"],
            layer["fc1_scale"],
            layer["fc2"],
            layer["fc2_scale"],
            w13_bias=layer["fc1_bias"],
            w2_bias=layer["fc2_bias"],
            gate_up_order="up_gate",
            activation="swiglu",
        )
        of_call = (call["input"], call["token_final_scales"], call["token_selected_experts"], weights)
        expected = fused_moe(*of_call, activation_format="bf16", intermediate_rounding=True)
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], expected)
        assert not torch.equal(fused_moe(*of_call, intermediate_rounding=True), expected), "not MXFP8"

    @pytest.mark.parametrize(("ep_size", "tp_size"), [(4, 1), (1, 2), (2, 2)])
    def test_ranks(self, ep_size: int, tp_size: int) -> None:
        layer, call = cases.checkpoint(), cases.make_call()
        total = torch.zeros(T, H)
        for ep_rank in range(ep_size):
            for tp_rank in range(tp_size):
                part = self.part(layer, (ep_rank, ep_size, tp_rank, tp_size))
                own = call | cases.weight_arguments(part) | cases.biases(part)
                own |= {"ep_rank": ep_rank, "ep_size": ep_size, "tp_rank": tp_rank, "tp_size": tp_size}
                (found,) = fi.cutlass_fused_moe(**own, **cases.swiglu_numbers(OAI, E // ep_size))
                wanted = cases.expected(
                    call, part, numbers=OAI, biased=True, first=ep_rank * E // ep_size, down_bias=tp_rank == 0
                )
                assert cases.distance(found, wanted) < TOLERANCE
                total += found.float()
        whole = cases.expected(call, layer, numbers=OAI, biased=True)
        assert cases.distance(total, whole) < 4e-3, "each rank rounds its own output to bfloat16"

    @staticmethod
    def part(layer: dict[str, torch.Tensor], ranks: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
        """Its experts, its rows of fc1 in both halves, its columns of fc2."""
        ep_rank, ep_size, tp_rank, tp_size = ranks
        own = slice(ep_rank * E // ep_size, (ep_rank + 1) * E // ep_size)
        inter = torch.arange(tp_rank * INTER // tp_size, (tp_rank + 1) * INTER // tp_size)
        made = {name: tensor[own] for name, tensor in layer.items()}
        for name in ("fc1", "fc1_scale", "fc1_bias"):
            made[name] = made[name][:, torch.cat((inter, INTER + inter))]
        for name, values in (("fc2", 2), ("fc2_scale", 32)):
            made[name] = made[name][:, :, int(inter[0]) // values : int(inter[-1] + 1) // values]
        return made

    def test_through_a_module_and_compiled(self) -> None:
        call = cases.make_call()
        (expected,) = fi.cutlass_fused_moe(**call)
        output = torch.empty(T, H, dtype=BF16)
        order = ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights")
        module = fi.get_cutlass_fused_moe_module("120", False, (16, 128))
        fc2, scales = call["fc2_expert_weights"], call["quant_scales"]
        rest = (None, fc2, None, BF16, scales)
        module.cutlass_fused_moe(output, *(call[name] for name in order), *rest, use_w4_group_scaling=True)
        assert torch.equal(output, expected)
        compiled = torch.compile(functools.partial(fi.cutlass_fused_moe, **call), backend="eager")
        assert torch.equal(compiled()[0], expected)

    def test_smallest_scale_counts(self) -> None:
        """FlashInfer's kernel reads 2^-127 as 0."""
        layer = cases.checkpoint()
        layer["fc2_scale"].fill_(0)
        call = cases.make_call(layer)
        assert fi.cutlass_fused_moe(**call)[0].any()
        assert cases.distance(fi.cutlass_fused_moe(**call)[0], cases.expected(call, layer)) < 0.02  # few bits are left


class TestWeights:
    def test_prepared_once_and_again_after_a_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[MoEWeights] = []
        prepare = weight_cache.prepare_layer
        monkeypatch.setattr(weight_cache, "prepare_layer", lambda *args: made.append(prepare(*args)) or made[-1])
        layer, call = cases.checkpoint(), cases.make_call()
        before = fi.cutlass_fused_moe(**call)[0]
        fi.cutlass_fused_moe(**call | cases.biases(layer))
        views = {name: call[name].view(torch.uint8) for name in ("fc1_expert_weights", "fc2_expert_weights")}
        assert torch.equal(fi.cutlass_fused_moe(**call | views)[0], before)
        assert len(made) == 1
        other = cases.weight_arguments(cases.checkpoint(seed=1))
        call["fc1_expert_weights"].copy_(other["fc1_expert_weights"])
        assert not torch.equal(fi.cutlass_fused_moe(**call)[0], before)
        assert len(made) == 2

    def test_released(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words: dict[int, str] = {}
        monkeypatch.setattr(raw_memory, "_REFUSE_READS", words.__setitem__)
        call = cases.make_call()
        before = fi.cutlass_fused_moe(**call)[0]
        weight_cache._layers.clear()
        assert torch.equal(fi.cutlass_fused_moe(**call, raw_weights="release")[0], before)
        raw = (call["fc1_expert_weights"], call["quant_scales"][0], call["fc2_expert_weights"], call["quant_scales"][1])
        assert [tensor.untyped_storage().nbytes() for tensor in raw] == [0] * 4
        names = {text.partition(": expected raw weights")[0] for text in words.values()}
        assert names == {"fc1_expert_weights", "fc2_expert_weights", "quant_scales[0]", "quant_scales[1]"}
        assert torch.equal(fi.cutlass_fused_moe(**call)[0], before)

    def test_nothing_is_lost_by_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(raw_memory, "_REFUSE_READS", {}.__setitem__)
        layer = cases.checkpoint()
        layer["fc2_scale"][-1, 0, 0] = 254
        call = cases.make_call(layer)
        kept = call["fc1_expert_weights"].clone()
        with pytest.raises(
            ValueError, match=r"^quant_scales\[1\]: expected E8M0 bytes 0..253 .*, got 254 at \[3, 0, 0\]"
        ):
            fi.cutlass_fused_moe(**call, raw_weights="release")
        assert torch.equal(call["fc1_expert_weights"], kept)

    @pytest.mark.parametrize("choice", ["keep", "release"])
    def test_peak_of_memory(self, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(raw_memory, "_REFUSE_READS", {}.__setitem__)
        experts = 8
        raw = cases.weight_arguments(cases.checkpoint(experts=experts))
        with StorageMeter() as meter:
            fc1, fc2 = raw["fc1_expert_weights"].clone(), raw["fc2_expert_weights"].clone()
            fc1_scale, fc2_scale = (scales.clone() for scales in raw["quant_scales"])
            layer = sum(tensor.nbytes for tensor in (fc1, fc1_scale, fc2, fc2_scale))
            given = GivenWeights(
                fc1, fc1_scale, fc2, fc2_scale, *(None,) * 8, Activation.SWIGLU, (0, 1, 0, 1), mode=modes.Mode.BF16
            )
            weight_cache.prepared_weights(given, choice)
        assert (meter.peak <= layer + 2 * layer // experts) == (choice == "release")
        assert meter.peak < 2 * layer + 2 * layer // experts


FLOAT8 = torch.float8_e4m3fn
REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"use_packed_weights": True}, NotImplementedError, "use_packed_weights: this library has no packed INT4 weights"),
    ({"use_wfp4afp8_humming": True}, NotImplementedError, "use_wfp4afp8_humming: this library has no folded weight sc"),
    ({"use_deepseek_fp8_block_scale": True}, NotImplementedError, "use_deepseek_fp8_block_scale: this library has no"),
    (
        {"use_w4_group_scaling": False},
        ValueError,
        "use_w4_group_scaling: expected True with uint8 {weights}, which are",
    ),
    ({"use_mxfp8_act_scaling": True}, ValueError, "use_mxfp8_act_scaling: expected False for bf16 x MXFP4"),
    ({"dtype": torch.float16}, TypeError, "{input}: expected torch.bfloat16 for bf16 x MXFP4 .*, got torch.float16"),
    ({"dtype": torch.float32}, TypeError, "{input}: expected torch.bfloat16 for bf16 x MXFP4 .*, got torch.float32"),
    ({"dtype": FLOAT8}, TypeError, "{input}: expected torch.bfloat16 for bf16 x MXFP4 .*, got torch.float8_e4m3fn"),
    ({"weights": torch.int64}, TypeError, "{weights}: expected torch.uint8 for bf16 x MXFP4 .*, got torch.int64"),
    ({"weights": torch.int8}, TypeError, "{weights}: expected torch.uint8 for bf16 x MXFP4 .*, got torch.int8"),
    (
        {"output_dtype": torch.float16},
        ValueError,
        "output_dtype: expected torch.bfloat16 with use_w4_group_scaling=Tru",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_call_and_query_refuse_alike(change: dict[str, Any], error: type[Exception], words: str) -> None:
    flags = {name: value for name, value in change.items() if name not in ("dtype", "weights")}
    call = cases.make_call() | flags
    call["input"] = call["input"].to(change.get("dtype", BF16))
    call["fc1_expert_weights"] = call["fc1_expert_weights"].view(change.get("weights", torch.uint8))
    with pytest.raises(error, match="^" + words.format(input="input", weights="fc1_expert_weights")):
        fi.cutlass_fused_moe(**call)
    query = {
        "x_dtype": change.get("dtype", BF16),
        "weight_dtype": change.get("weights", torch.uint8),
        "use_w4_group_scaling": True,
        **flags,
    }
    with pytest.raises(error, match="^" + words.format(input="x_dtype", weights="weight_dtype")):
        fi.cutlass_fused_moe_workspace_size(T, H, INTER, E, K, **query)


def test_query() -> None:
    dtypes = {"x_dtype": BF16, "weight_dtype": torch.uint8, "use_w4_group_scaling": True}
    assert fi.cutlass_fused_moe_workspace_size(T, H, INTER, E, K, **dtypes, device="cpu") == 0
    for sizes, name in (((H + 32, INTER), "hidden_size"), ((H, INTER + 64), "intermediate_size")):
        with pytest.raises(ValueError, match=f"^{name}: expected a multiple of 128"):
            fi.cutlass_fused_moe_workspace_size(T, *sizes, E, K, **dtypes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"quant_scales": [None]}, ValueError, r"quant_scales: expected 2 tensors \[fc1 scales, fc2 scales\], got 1"),
        (
            {"quant_scales": [None] * 4},
            ValueError,
            r"quant_scales: expected 2 tensors \[fc1 .*\], got 4; use_w4_group_s",
        ),
        ({0: None}, TypeError, r"quant_scales\[0\]: expected a tensor, got NoneType"),
        (
            {0: torch.zeros(E, 1, 2048, dtype=torch.uint8)},
            ValueError,
            r"quant_scales\[0\]: .* \[4, 8, 1, 16, 16\], got",
        ),
        (
            {1: torch.zeros(E, 2, 2, 16, 4)},
            TypeError,
            r"quant_scales\[1\]: expected int32 or uint8 or float8_e8m0fnu \[4, 2, 2, 16, 16\], got float32",
        ),
        (
            {1: torch.zeros(E, 2, 4, 16, 4, dtype=torch.int32)[:, :, ::2]},
            ValueError,
            r"quant_scales\[1\]: expected a contiguous tensor",
        ),
        (
            {"fc2_expert_weights": torch.zeros(E, H, 64, dtype=torch.uint8)},
            ValueError,
            r"fc2_expert_weights: expected uint8 \[4, 128, 128\], got uint8 \[4, 128, 64\]",
        ),
        (
            {"fc2_expert_weights": torch.zeros(E, H, 16, dtype=torch.int64)},
            TypeError,
            "fc2_expert_weights: expected uint8",
        ),
        (
            {"fc1_expert_weights": torch.zeros(E, 2 * INTER, 80, dtype=torch.uint8)},
            ValueError,
            r"fc1_expert_weights: expected experts, and H \(the last dimension, in values\) a multiple of 128, got 160",
        ),
        (
            {"fc1_expert_weights": torch.zeros(E, 2 * INTER + 64, 64, dtype=torch.uint8)},
            ValueError,
            "fc1_expert_weights: expected experts, and I a multiple of 128, got 288",
        ),
        (
            {"fc1_expert_weights": torch.zeros(8, 64, dtype=torch.uint8)},
            ValueError,
            "fc1_expert_weights: expected uint8",
        ),
        (
            {"input_sf": torch.zeros(T, 4, dtype=torch.uint8)},
            ValueError,
            "input_sf: expected None for input that is not",
        ),
        ({"input": torch.zeros(T, 2 * H, dtype=BF16)}, ValueError, r"input: expected bfloat16 or float16 \[T, 128\]"),
        ({"activation_type": ActivationType.Relu2}, ValueError, "fc2_expert_weights: expected uint8"),
        ({"ep_size": 2, "ep_rank": 2}, ValueError, "ep_rank: expected 0 to 1, got 2"),
    ],
)
def test_refusals(change: dict[Any, Any], error: type[Exception], words: str) -> None:
    call = cases.make_call()
    call["quant_scales"] = [change.get(i, scales) for i, scales in enumerate(call["quant_scales"])]
    call |= {name: value for name, value in change.items() if isinstance(name, str)}
    with pytest.raises(error, match=f"^{words}"):
        fi.cutlass_fused_moe(**call)


def test_gpu_without_kernels_is_refused_before_weights_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SM12x GPU with a wheel of the minimal profile, which has kernels for MXFP8 alone."""
    monkeypatch.setattr(modes, "tiles_of", lambda name, index: (1,) if name == "mxfp8" else ())
    monkeypatch.setattr(modes.wheel, "profile", lambda: "mxfp4_minimal")
    gpu = torch.device("cuda", 0)
    with pytest.raises(NotImplementedError, match="^use_w4_group_scaling: .*mxfp4_bf16"):
        modes.refuse_on(modes.Mode.BF16, gpu)
    modes.refuse_on(modes.Mode.MXFP8, gpu)
    modes.refuse_on(modes.Mode.BF16, torch.device("cpu"))
    monkeypatch.setattr(modes, "tiles_of", lambda name, index: ())  # a GPU without kernels: the launch says why
    modes.refuse_on(modes.Mode.BF16, gpu)
