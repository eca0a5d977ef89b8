"""NVFP4 weights in `MoEWeights`: in and out bit for bit, parts of layers, copies, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fp4_oracles
import numpy as np
import oracles
import pytest
import torch
from nvfp4_cases import E, H, I, random_nvfp4, same, with_biases
from storage_meter import StorageMeter
from weight_cases import ORDERS

from mxfp4_moe import formats, join_shared_experts
from mxfp4_moe._checkpoints import nvfp4_layers
from mxfp4_moe._install import wheel
from mxfp4_moe.weights import Activation, MoEWeights, WeightFormat

KINDS = ("multiply", "divide")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inputs", [True, False])
def test_tensors_come_back_bit_for_bit(kind: str, order: str, inputs: bool) -> None:
    layer = with_biases(random_nvfp4(kind, inputs=inputs))
    weights = MoEWeights.from_nvfp4(**layer, gate_up_order=order)
    assert weights.weight_format is WeightFormat.NVFP4
    given_back = weights.to_nvfp4()._asdict()
    assert {name for name, value in given_back.items() if value is not None} == layer.keys()
    assert all(torch.equal(given_back[name], layer[name]) for name in layer)
    again = MoEWeights.from_nvfp4(**given_back, gate_up_order=order)
    assert same(weights, again)
    layer["w2"][1, 2, 3] ^= 1
    assert not same(weights, MoEWeights.from_nvfp4(**layer, gate_up_order=order)), "nor are tensors shared"


def test_not_gated() -> None:
    layer = random_nvfp4(gated=False)
    weights = MoEWeights.from_nvfp4(**layer, activation="relu2")
    assert (weights.w13_rows, weights.intermediate_size) == (I, I)
    assert torch.equal(weights.to_nvfp4().w13, layer["w13"])


def test_swizzled_block_scales_and_other_dtypes() -> None:
    layer = random_nvfp4(experts=2, hidden=160, inter=144)
    expected = MoEWeights.from_nvfp4(**layer)
    for name in ("w13", "w2"):
        scales = formats.swizzle_scales(layer[f"{name}_scale"])
        padded = -(-layer[name].shape[1] // 128) * 128
        layer[f"{name}_scale"] = scales.view(2, padded, -1).view(torch.float8_e4m3fn)
        layer[name] = layer[name].view(torch.float4_e2m1fn_x2)
    assert same(MoEWeights.from_nvfp4(**layer, scale_layout="swizzled"), expected)


def test_one_scale_stands_for_all() -> None:
    layer = random_nvfp4(inputs=False)
    whole = layer | {"w13_scale_2": torch.tensor(0.3), "w2_scale_2": torch.tensor([0.2])}
    each = layer | {"w13_scale_2": torch.full((E, 2), 0.3), "w2_scale_2": torch.full((E,), 0.2)}
    of_expert = each | {"w13_scale_2": torch.full((E,), 0.3)}
    expected = MoEWeights.from_nvfp4(**each)
    assert same(MoEWeights.from_nvfp4(**whole), expected)
    assert same(MoEWeights.from_nvfp4(**of_expert), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_expert_parallel(kind: str) -> None:
    layer = with_biases(random_nvfp4(kind))
    whole = MoEWeights.from_nvfp4(**layer)
    for rank in range(2):
        part = whole.expert_parallel(rank, 2)
        assert same(part, MoEWeights.from_nvfp4(**layer, ep_rank=rank, ep_size=2))
        own = slice(part.first_expert, part.first_expert + part.num_experts)
        for name, value in part.to_nvfp4()._asdict().items():
            assert value is None or torch.equal(value, layer[name][own]), name
    assert whole.expert_parallel(0, 1) is whole


@pytest.mark.parametrize("size", [2, 3, 5])
def test_tensor_parallel_cuts_between_blocks_of_16(size: int) -> None:
    layer = with_biases(random_nvfp4())
    whole = MoEWeights.from_nvfp4(**layer)
    begin = 0
    for rank in range(size):
        part = whole.tensor_parallel(rank, size)
        assert same(part, MoEWeights.from_nvfp4(**layer, tp_rank=rank, tp_size=size))
        end = begin + part.intermediate_size
        back = part.to_nvfp4()
        assert part.intermediate_size % 16 == 0
        assert torch.equal(back.w2, layer["w2"][..., begin // 2 : end // 2])
        assert torch.equal(back.w2_scale, layer["w2_scale"][..., begin // 16 : end // 16])
        rows = torch.cat([torch.arange(begin, end), torch.arange(I + begin, I + end)])
        assert torch.equal(back.w13, layer["w13"][:, rows])
        assert torch.equal(back.w13_scale_2, layer["w13_scale_2"])
        assert (back.w2_bias is None) == (rank > 0)
        begin = end
    assert begin == I


def test_copies_and_files() -> None:
    weights = MoEWeights.from_nvfp4(**with_biases(random_nvfp4()))
    part = weights.expert_parallel(1, 2)
    for one in (weights, part):
        assert same(copy.deepcopy(one), one)
        assert same(pickle.loads(pickle.dumps(one)), one)
        stored = io.BytesIO()
        torch.save(one, stored)
        stored.seek(0)
        assert same(torch.load(stored, weights_only=False), one)
        assert one.to("cpu").w13 is one.w13
    assert weights.to("meta").tensor_scales.w2.is_meta  # type: ignore[union-attr]
    assert repr(weights).startswith(f"MoEWeights(weight_format=nvfp4, num_experts={E}, hidden_size={H}, ")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_float(order: str, dtype: torch.dtype) -> None:
    """One scale for each projection, and the quantizer's bytes under it."""
    g = torch.Generator().manual_seed(3)
    w13, w2 = (torch.randn(E, n, k, generator=g).to(dtype) for n, k in ((2 * I, H), (H, I)))
    gate, up = oracles.gate_up_rows(order, I)
    w13[:, gate] *= 7
    w2[2] = 0
    back = MoEWeights.from_float(w13, w2, format="nvfp4", gate_up_order=order).to_nvfp4()
    for e in range(E):
        rows = {"gate": (w13[e, gate], back.w13[e, gate], back.w13_scale[e, gate], back.w13_scale_2[e, 0])}
        rows["up"] = (w13[e, up], back.w13[e, up], back.w13_scale[e, up], back.w13_scale_2[e, 1])
        rows["down"] = (w2[e], back.w2[e], back.w2_scale[e], back.w2_scale_2[e])
        for values, packed, scales, scale in rows.values():
            amax = values.float().abs().max()
            assert scale == (amax / 2688 if amax else 1)
            encode = np.full(len(values), (1 / scale).item(), np.float32)
            expected = fp4_oracles.nvfp4_quantize(values.float().numpy(), encode)
            assert np.array_equal(packed.numpy(), expected[0])
            assert np.array_equal(scales.numpy(), expected[1])
    assert back.w13_input_scale is None


@pytest.mark.parametrize("source", ["from_nvfp4", "from_float"])
def test_memory(source: str) -> None:
    """Beyond the result, less than two experts as they came in."""
    experts, hidden, inter = 6, 256, 512
    layer = random_nvfp4(experts=experts, hidden=hidden, inter=inter)
    floats = [torch.randn(experts, n, k).bfloat16() for n, k in ((2 * inter, hidden), (hidden, inter))]
    given = [layer[name] for name in ("w13", "w13_scale", "w2", "w2_scale")] if source == "from_nvfp4" else floats
    with StorageMeter() as meter:
        if source == "from_nvfp4":
            weights = MoEWeights.from_nvfp4(**layer)
        else:
            weights = MoEWeights.from_float(*floats, format="nvfp4")
    size = weights.w13.nbytes + weights.w2.nbytes
    assert meter.peak - size < 2 * sum(tensor[0].nbytes for tensor in given)


def test_shared_experts_are_joined_with_their_scales() -> None:
    layer, other = random_nvfp4(), random_nvfp4(experts=1, seed=9)
    routed, shared = MoEWeights.from_nvfp4(**layer), MoEWeights.from_nvfp4(**other)
    joined = join_shared_experts(routed, shared).weights
    both = MoEWeights.from_nvfp4(**{name: torch.cat([layer[name], other[name]]) for name in layer})
    assert same(joined, both)
    mxfp4 = MoEWeights.from_float(torch.randn(1, 2 * 96, H), torch.randn(1, H, 96), activation="swiglu", limit=None)
    with pytest.raises(ValueError, match="shared: expected weight_format nvfp4, as routed has, got mxfp4"):
        join_shared_experts(routed, mxfp4)
    for kind, inputs in (("divide", True), ("multiply", False)):
        unlike = MoEWeights.from_nvfp4(**random_nvfp4(kind, experts=1, inputs=inputs))
        with pytest.raises(ValueError, match="shared: expected float32 scales of the same kind as routed has"):
            join_shared_experts(routed, unlike)


# ---- refusals --------------------------------------------------------------------------------------------------------


def changed(**change: Any) -> dict[str, Any]:
    return {**random_nvfp4(), **change}


_BYTES = torch.uint8
_NONE = dict.fromkeys(["w13_scale_2", "w2_scale_2", "w13_input_scale", "w2_input_scale"])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (changed(w13_scale_2=None), ValueError, r"w13_scale_2: expected float32 \[3\], since w2_scale_2 is given, got"),
        (changed(w2_input_scale=None), ValueError, "w2_input_scale: expected .* since w13_input_scale is given"),
        (changed(w2_global_scale=torch.ones(3)), ValueError, "w2_global_scale: expected .* got both, with w13_scale_2"),
        (
            changed(**_NONE),
            ValueError,
            "w13_scale_2, w13_global_scale: expected the scales of one kind, .* got neither",
        ),
        (changed(w2_scale_2=torch.ones(4)), ValueError, r"w2_scale_2: expected float32 \[\] or \[3\], got "),
        (changed(w13_scale_2=torch.ones(3, 3)), ValueError, r"w13_scale_2: expected .*, \[3\] or \[3, 2\], got .*3, 3"),
        (changed(w2_scale_2=torch.ones(3).double()), TypeError, "w2_scale_2: expected float32 tensor, got float64"),
        (
            changed(w2_scale_2=torch.tensor([1.0, math.nan, 1])),
            ValueError,
            "w2_scale_2: expected finite .* got nan for expert 1$",
        ),
        (changed(w2_input_scale=torch.zeros(3)), ValueError, "w2_input_scale: expected finite numbers above 2\\^-128"),
        (changed(w13_scale=torch.zeros(E, 2 * I, 3, dtype=_BYTES)), ValueError, r"w13_scale: .*uint8 \[3, 160, 6\]"),
        (changed(w2_scale=torch.full((E, H, 5), 0x7F, dtype=_BYTES)), ValueError, r"w2_scale: .*0..126.* got 127 at"),
        (changed(w2=torch.zeros(E, H, 32, dtype=_BYTES)), ValueError, r"w2: expected uint8 \[3, 96, 40\]"),
        (changed(w13=torch.zeros(E, 2 * I, 44, dtype=_BYTES)), ValueError, "w13: expected H .* of 16, got 88"),
        (changed(scale_layout="blocked"), ValueError, "scale_layout: expected 'linear' or 'swizzled', got 'blocked'"),
        (changed(scale_layout="swizzled"), ValueError, r"w13_scale: expected uint8 \[3, \.\.\.\] with 2048 bytes for"),
    ],
)
def test_refusals(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MoEWeights.from_nvfp4(**given)


def test_refusals_of_other_formats() -> None:
    nvfp4 = MoEWeights.from_nvfp4(**random_nvfp4())
    mxfp4 = MoEWeights.from_float(torch.randn(1, 64, 32), torch.randn(1, 32, 32))
    with pytest.raises(ValueError, match=r"weights: expected MXFP4, got MoEWeights\(weight_format=nvfp4.*to_nvfp4\(\)"):
        nvfp4.to_mxfp4()
    with pytest.raises(
        ValueError, match=r"weights: expected NVFP4, got MoEWeights\(num.*to_mxfp4\(\) gives its tensors"
    ):
        mxfp4.to_nvfp4()
    with pytest.raises(ValueError, match="format: expected one of 'mxfp4', 'nvfp4', got 'fp4'"):
        MoEWeights.from_float(torch.randn(1, 64, 32), torch.randn(1, 32, 32), format="fp4")
    with pytest.raises(ValueError, match="w2: expected finite values, got NaN or infinity in expert 0"):
        MoEWeights.from_float(torch.randn(1, 64, 32), torch.full((1, 32, 32), math.inf), format="nvfp4")
    with pytest.raises(TypeError, match="tensor_scales: expected TensorScales with weight_format nvfp4, got NoneType"):
        MoEWeights(**nvfp4.__getstate__() | {"tensor_scales": None})
    with pytest.raises(ValueError, match=r"tensor_scales.w13: expected float32 \[3, 2\], got .*\[2, 2\]"):
        MoEWeights(**nvfp4.__getstate__() | {"tensor_scales": nvfp4.tensor_scales.map(lambda t: t[:2])})  # type: ignore[union-attr]


def test_gpus_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wheel without kernels, before torch is asked for a GPU: the sentence is the same where there is none."""
    monkeypatch.setattr(wheel, "profile", lambda: "mxfp4_minimal")
    weights = MoEWeights.from_nvfp4(**random_nvfp4(), activation=Activation.SWIGLU)
    words = "^device: expected the CPU for NVFP4 weights, which this wheel has no kernels for .*_PROFILE=full.*keep"
    for device in ("cuda", "cuda:1", 0):
        with pytest.raises(ValueError, match=words):
            weights.to(device)


GPUS = {0: (9, 0), 1: (12, 0), 2: (8, 9)}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A wheel of profile full, and three GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: GPUS[device.index])
    monkeypatch.setattr(wheel, "built_archs", lambda: ("90a", "120f"))
    monkeypatch.setattr(wheel, "emulated_on", lambda: None)
    monkeypatch.setattr(wheel, "profile", lambda: "full")
    nvfp4_layers._has_kernels.cache_clear()
    yield
    nvfp4_layers._has_kernels.cache_clear()


@pytest.mark.usefixtures("full")
def test_gpus_that_the_wheel_has_kernels_for() -> None:
    for index in (0, 1):
        nvfp4_layers.refuse_gpu("w13", torch.device("cuda", index), (H, 64))
        with pytest.raises(ValueError, match=f"^w13: .*multiples of 32 .* on cuda:{index}, .* take no others, got 80;"):
            nvfp4_layers.refuse_gpu("w13", torch.device("cuda", index), (H, I))
    with pytest.raises(ValueError, match=r"^w13: .* such as cuda:2 \(no kernel of this wheel runs there\)"):
        nvfp4_layers.refuse_gpu("w13", torch.device("cuda", 2), (H, 64))


# ---- what kernels read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word_order", formats.WordOrder)
def test_sizes_of_32_are_kept_in_the_blocks_of_the_kernels(word_order: formats.WordOrder) -> None:
    """Codes and block scales where csrc/shared/weight_layout.cuh has them, in any order; others plainly."""
    layer = random_nvfp4(hidden=96, inter=160)
    weights = MoEWeights.from_nvfp4(**layer)
    w13, w2 = weights.w13, weights.w2
    assert w13.shape == (E, formats.weight_bytes(320, 96, 2))
    assert w2.shape == (E, formats.weight_bytes(96, 160, 2))
    kind, old = WeightFormat.NVFP4, weights.word_order
    reordered = torch.stack([kind.reorder(one, 96, 160, old, word_order) for one in w2])
    for e in range(E):
        expected = formats.arrange_weights(layer["w2"][e], layer["w2_scale"][e], word_order, 2)
        assert torch.equal(reordered[e], expected)
        packed, scales = kind.read_rows(reordered[e], 96, 160, slice(0, 96), word_order)
        assert torch.equal(packed, layer["w2"][e])
        assert torch.equal(scales, layer["w2_scale"][e])
    assert kind.weight_bytes(96, 80) == 96 * (40 + 5)


@pytest.mark.parametrize("size", [2, 3])
def test_tensor_parallel_cuts_between_blocks_of_32_where_there_are(size: int) -> None:
    """Kernels take no others, so a rank's part may go to a GPU whenever the whole may."""
    layer = random_nvfp4(inter=160)
    whole = MoEWeights.from_nvfp4(**layer)
    parts = [whole.tensor_parallel(rank, size) for rank in range(size)]
    assert [part.intermediate_size for part in parts] == {2: [96, 64], 3: [64, 64, 32]}[size]
    for rank, part in enumerate(parts):
        assert same(part, MoEWeights.from_nvfp4(**layer, tp_rank=rank, tp_size=size))
    assert torch.equal(torch.cat([part.to_nvfp4().w2 for part in parts], 2), layer["w2"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gated", "inputs"), [(True, True), (True, False), (False, True)])
def test_what_the_operator_is_given(kind: str, gated: bool, inputs: bool) -> None:
    """Factors multiply; of two scales of one input the larger factor, the smaller global scale."""
    layer = random_nvfp4(kind, gated=gated, inputs=inputs)
    weights = MoEWeights.from_nvfp4(**layer, activation="swiglu" if gated else "relu2")
    _, rare = weights.operator_arguments
    divides = kind == "divide"
    of_weights, of_inputs = ("global_scale", "input_global_scale") if divides else ("scale_2", "input_scale")

    def factor(name: str) -> torch.Tensor:
        return 1 / layer[name] if divides else layer[name]

    assert rare["weight_format"] == 1
    assert torch.equal(rare["w13_factors"], factor(f"w13_{of_weights}").expand(E, 2))
    assert torch.equal(rare["w2_factors"], factor(f"w2_{of_weights}")[:, None].expand(E, 2))
    assert all(value.is_contiguous() for value in rare.values() if isinstance(value, torch.Tensor))
    names = {"w13_input_factors", "w2_input_factors", "w13_input_global_scales", "w2_input_global_scales"}
    assert names & rare.keys() == (names if inputs else set())
    if inputs:
        given = layer[f"w13_{of_inputs}"]
        assert torch.equal(rare["w13_input_factors"], factor(f"w13_{of_inputs}").amax(1))
        expected = given.amin(1) if divides else 1 / given.amax(1)
        assert torch.equal(rare["w13_input_global_scales"], expected)
        assert torch.equal(rare["w2_input_factors"], factor(f"w2_{of_inputs}"))
    again = pickle.loads(pickle.dumps(weights))
    assert "operator_arguments" in vars(again), "made with the weights, not in a stream's first call"
    mxfp4 = MoEWeights.from_float(torch.randn(1, 64, 32), torch.randn(1, 32, 32))
    assert mxfp4.operator_arguments[1] == {}


def test_formats_have_the_kernels_numbers() -> None:
    text = (Path(__file__).resolve().parents[2] / "csrc" / "tile_abi.h").read_text(encoding="utf-8")
    numbers = {name.lower(): int(number) for name, number in re.findall(r"MXFP4_MOE_WEIGHT_(\w+) = (\d+),", text)}
    assert numbers == {kind.value: kind.code for kind in WeightFormat}
