"""Checkpoint tensors -> prepared weights -> checkpoint tensors. All comparisons are bitwise."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mxfp4_moe import formats
from mxfp4_moe._checkpoints import layers, prepare
from mxfp4_moe.weights import Activation, GateUpOrder, MoEWeights

ORDERS = ["interleaved", "gate_up", "up_gate"]
E, H, I = 3, 96, 160  # noqa: E741  (the formulas' names)
PREFIX = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, I, seed=7)


def random_floats(dtype: torch.dtype, rows: int, seed: int = 11) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "w13": torch.randn(E, rows, H, generator=g).to(dtype),
        "w2": torch.randn(E, H, I, generator=g).to(dtype),
        "w13_bias": torch.randn(E, rows, generator=g).to(dtype),
        "w2_bias": torch.randn(E, H, generator=g).to(dtype),
    }


def same(a: MoEWeights, b: MoEWeights) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MoEWeights))


def restored(weights: MoEWeights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 or w2 of all experts with prepared rows: codes [E, N, K/2] in plain order, scales [E, N, K/32]."""
    hidden, inter = weights.hidden_size, weights.intermediate_size
    n, k = (weights.w13_rows, hidden) if name == "w13" else (hidden, inter)
    experts = [formats.restore_weights(expert, n, k, weights.word_order) for expert in getattr(weights, name)]
    packed, scales = zip(*experts, strict=True)
    return torch.stack(packed), torch.stack(scales)


def as_halves(weights: MoEWeights) -> MoEWeights:
    """The weights as SM90 has them."""
    old, new = formats.WordOrder.CONTAINERS, formats.WordOrder.HALVES
    assert weights.word_order is old
    hidden, inter = weights.hidden_size, weights.intermediate_size
    return dataclasses.replace(
        weights,
        w13=prepare.move(weights.w13, weights.device, weights.w13_rows, hidden, old, new),
        w2=prepare.move(weights.w2, weights.device, hidden, inter, old, new),
        word_order=new,
    )


class TestPrepare:
    @pytest.mark.parametrize("order", ORDERS)
    def test_every_row_lands_where_the_layout_says(self, checkpoint: dict[str, torch.Tensor], order: str) -> None:
        """test_formats.py has the places inside an expert; here it is about which row comes where."""
        weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order)
        gates, ups = oracles.gate_up_rows(order, I)
        packed, scales = restored(weights, "w13")
        assert weights.w13_bias is not None
        for j in range(I):
            for row, source in ((16 * (j // 8) + j % 8, gates[j]), (16 * (j // 8) + 8 + j % 8, ups[j])):
                assert torch.equal(packed[:, row], checkpoint["w13"][:, source])
                assert torch.equal(scales[:, row], checkpoint["w13_scale"][:, source])
                assert torch.equal(weights.w13_bias[:, row], checkpoint["w13_bias"][:, source].float())

    def test_w2_keeps_its_rows(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        packed, scales = restored(weights, "w2")
        assert torch.equal(packed, checkpoint["w2"])
        assert torch.equal(scales, checkpoint["w2_scale"])
        assert weights.w2_bias is not None
        assert torch.equal(weights.w2_bias, checkpoint["w2_bias"].float())

    def test_pieces_of_rows_are_no_part_of_the_result(self) -> None:
        """An expert of many blocks passes in pieces; it is arranged as it would be at once."""
        big = oracles.random_checkpoint(1, 1184, 672)
        weights = MoEWeights.from_mxfp4(**big)
        expected = formats.arrange_weights(big["w2"][0], big["w2_scale"][0], weights.word_order)
        assert torch.equal(weights.w2[0], expected)
        for name, tensor in weights.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, big[name].float() if name.endswith("bias") else big[name])

    def test_padding_is_zero(self, checkpoint: dict[str, torch.Tensor]) -> None:
        """H = 96 makes half a block of padding rows of w2, and a padding scale in each row of w13."""
        full = {n: torch.full_like(t, 255 if n in ("w13", "w2") else 1) for n, t in checkpoint.items()}
        weights = MoEWeights.from_mxfp4(**full)
        assert weights.w13.count_nonzero() == full["w13"].numel() + full["w13_scale"].numel()
        assert weights.w2.count_nonzero() == full["w2"].numel() + full["w2_scale"].numel()
        assert weights.w13.shape == (E, 5 * (256 + 3 * 1024))
        assert weights.w2.shape == (E, 2 * (256 + 4 * 1024 + 256 + 1024))

    def test_properties(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (E, H, I)
        assert (weights.device, weights.word_order) == (torch.device("cpu"), formats.WordOrder.CONTAINERS)
        assert weights.w13_rows == 2 * I
        assert (weights.activation, weights.gate_up_order) == (Activation.SWIGLU_OAI, GateUpOrder.INTERLEAVED)
        assert (weights.alpha, weights.beta, weights.limit) == (1.702, 1.0, 7.0)
        assert repr(weights) == (
            "MoEWeights(num_experts=3, hidden_size=96, intermediate_size=160, bias=yes, "
            "activation=swiglu_oai, device=cpu)"
        )
        with pytest.raises(dataclasses.FrozenInstanceError):
            weights.alpha = 2.0  # type: ignore[misc]


class TestRoundTrip:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_comes_back_bit_for_bit(self, checkpoint: dict[str, torch.Tensor], order: str, bias: bool) -> None:
        given = {name: t for name, t in checkpoint.items() if bias or not name.endswith("bias")}
        before = {name: t.clone() for name, t in given.items()}
        weights = MoEWeights.from_mxfp4(**given, gate_up_order=order)
        back = weights.to_mxfp4()._asdict()
        for name, tensor in given.items():
            assert torch.equal(tensor, before[name]), "the caller's tensors stay as they are"
            assert torch.equal(back[name], tensor.float() if name.endswith("bias") else tensor)
            assert back[name].is_contiguous()
        if not bias:
            assert back["w13_bias"] is None
            assert back["w2_bias"] is None
        assert same(MoEWeights.from_mxfp4(**back, gate_up_order=order), weights)

    def test_orders_of_the_same_layer_prepare_alike(self, checkpoint: dict[str, torch.Tensor]) -> None:
        interleaved = MoEWeights.from_mxfp4(**checkpoint)
        for order in ORDERS[1:]:
            gates, ups = oracles.gate_up_rows("interleaved", I)
            rows = gates + ups if order == "gate_up" else ups + gates
            other = {n: t[:, rows] if n.startswith("w13") else t for n, t in checkpoint.items()}
            prepared = MoEWeights.from_mxfp4(**other, gate_up_order=GateUpOrder(order))
            assert same(dataclasses.replace(prepared, gate_up_order=GateUpOrder.INTERLEAVED), interleaved)

    @pytest.mark.parametrize("order", ORDERS)
    def test_on_a_device_of_the_other_word_order(
        self, checkpoint: dict[str, torch.Tensor], order: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CPU plays an SM90: the words are made in its order at once, and are those that `to` would have made."""
        expected = as_halves(MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order))
        monkeypatch.setattr(layers, "word_order_of", lambda device: formats.WordOrder.HALVES)
        weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order)
        assert same(weights, expected)
        for name, tensor in weights.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, checkpoint[name].float() if name.endswith("bias") else checkpoint[name])

    def test_four_dimensional_blocks(self, checkpoint: dict[str, torch.Tensor]) -> None:
        blocks = {name: checkpoint[name].reshape(E, checkpoint[name].shape[1], -1, 16) for name in ("w13", "w2")}
        assert same(MoEWeights.from_mxfp4(**{**checkpoint, **blocks}), MoEWeights.from_mxfp4(**checkpoint))

    def test_strided_input(self, checkpoint: dict[str, torch.Tensor]) -> None:
        strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in checkpoint.items()}
        assert not strided["w13"].is_contiguous()
        assert same(MoEWeights.from_mxfp4(**strided), MoEWeights.from_mxfp4(**checkpoint))

    def test_the_result_shares_no_memory_with_the_input(self, checkpoint: dict[str, torch.Tensor]) -> None:
        given = {name: t.float() if name.endswith("bias") else t for name, t in checkpoint.items()}
        weights = MoEWeights.from_mxfp4(**given)
        theirs = {tensor.data_ptr() for tensor in given.values()}
        assert not theirs & {t.data_ptr() for t in vars(weights).values() if isinstance(t, torch.Tensor)}

    def test_to(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint, activation="swiglu", limit=None)
        assert same(weights.to("cpu"), weights)
        moved = weights.to("meta")
        assert moved.device == torch.device("meta")
        assert moved.w2_bias is not None
        assert moved.w2_bias.device == torch.device("meta")
        assert (moved.activation, moved.limit) == (Activation.SWIGLU, None)
        assert weights.to("cpu").w13 is weights.w13, "what is there already is shared"

    def test_to_converts_the_words(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint, limit=torch.tensor([1.0, 2.0, 3.0]))
        halves = as_halves(weights)
        assert not torch.equal(halves.w13, weights.w13)
        before = halves.w13.clone()
        assert same(halves.to("cpu"), weights)
        assert torch.equal(halves.w13, before), "what is converted is a copy"
        for part in (halves.tensor_parallel(3, 5), halves.expert_parallel(1, 3)):
            assert part.word_order is formats.WordOrder.HALVES
        assert same(halves.tensor_parallel(3, 5).to("cpu"), weights.tensor_parallel(3, 5))
        assert same(halves.expert_parallel(1, 3).to("cpu"), weights.expert_parallel(1, 3))
        for name, tensor in halves.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, checkpoint[name].float() if name.endswith("bias") else checkpoint[name])


class TestRefuses:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"w13": [[1]]}, TypeError, r"w13: expected uint8 \[E, 2I, H/2\], got list"),
            (
                {"w13": torch.zeros(3, 320, 48)},
                TypeError,
                r"w13: expected uint8 \[E, 2I, H/2\], got float32 \[3, 320, 48\]",
            ),
            ({"w13": (320, 48)}, ValueError, r"w13: expected uint8 \[E, 2I, H/2\], got uint8 \[320, 48\]"),
            (
                {"w13": (3, 320, 3, 8)},
                ValueError,
                r"w13: expected uint8 \[E, 2I, H/32, 16\], got uint8 \[3, 320, 3, 8\]",
            ),
            (
                {"w13": (3, 320, 40)},
                ValueError,
                r"w13: expected H .* a multiple of 32, got 80 from uint8 \[3, 320, 40\]",
            ),
            ({"w13": (3, 80, 48)}, ValueError, r"w13: expected I .* a multiple of 32, got 40 from uint8 \[3, 80, 48\]"),
            ({"w13": (3, 321, 48)}, ValueError, r"w13: expected .* an even number of rows, got uint8 \[3, 321, 48\]"),
            ({"w13": (0, 320, 48)}, ValueError, r"w13: expected at least one expert .*, got uint8 \[0, 320, 48\]"),
            ({"w13": (3, 0, 48)}, ValueError, r"w13: expected I .* a multiple of 32, got 0 from uint8 \[3, 0, 48\]"),
            (
                {"w13_scale": (3, 320, 2)},
                ValueError,
                r"w13_scale: expected uint8 \[3, 320, 3\], got uint8 \[3, 320, 2\]",
            ),
            ({"w2": (3, 96, 64)}, ValueError, r"w2: expected uint8 \[3, 96, 80\], got uint8 \[3, 96, 64\]"),
            ({"w2": (2, 96, 80)}, ValueError, r"w2: expected uint8 \[3, 96, 80\], got uint8 \[2, 96, 80\]"),
            (
                {"w2_scale": (3, 96, 160)},
                ValueError,
                r"w2_scale: expected uint8 \[3, 96, 5\], got uint8 \[3, 96, 160\]",
            ),
            (
                {"w2_scale": torch.zeros(3, 96, 5)},
                TypeError,
                r"w2_scale: expected uint8 \[3, 96, 5\], got float32 \[3, 96, 5\]",
            ),
            (
                {"w13_bias": torch.zeros(3, 320, dtype=torch.float64)},
                TypeError,
                r"w13_bias: expected bfloat16 or float16 or float32 \[3, 320\], got float64 \[3, 320\]",
            ),
            (
                {"w13_bias": torch.zeros(3, 160)},
                ValueError,
                r"w13_bias: expected .* \[3, 320\], got float32 \[3, 160\]",
            ),
            ({"w2_bias": torch.zeros(96)}, ValueError, r"w2_bias: expected .* \[3, 96\], got float32 \[96\]"),
            (
                {"w2": torch.zeros(3, 96, 80, dtype=torch.uint8, device="meta")},
                ValueError,
                r"w2: expected uint8 \[3, 96, 80\] on cpu, got uint8 \[3, 96, 80\] on meta",
            ),
            (
                {"gate_up_order": "gates"},
                ValueError,
                "gate_up_order: expected one of 'interleaved', 'gate_up', 'up_gate', got",
            ),
            ({"activation": "mish"}, ValueError, "activation: expected one of 'swiglu', 'swiglu_oai', .*, got 'mish'"),
            ({"activation": "relu2"}, ValueError, r"w2: expected uint8 \[3, 96, 160\], got uint8 \[3, 96, 80\]"),
            ({"alpha": "1"}, TypeError, r"alpha: expected a number, or float32 \[3\], got str"),
            ({"alpha": [1.0]}, TypeError, r"alpha: expected a number, or float32 \[3\], got list"),
            ({"beta": torch.zeros(2)}, ValueError, r"beta: expected float32 \[3\], got float32 \[2\]"),
            ({"limit": torch.zeros(3).double()}, TypeError, r"limit: expected float32 \[3\], got float64 \[3\]"),
            ({"beta": math.nan}, ValueError, "beta: expected a finite number, got nan"),
            ({"limit": math.inf}, ValueError, "limit: expected a finite number, got inf"),
            ({"limit": 0}, ValueError, "limit: expected a number above 0, or None, got 0"),
            ({"ep_size": 4}, ValueError, "ep_size: expected 1 to 3 ranks for 3 experts, got 4"),
            ({"ep_size": 0}, ValueError, "ep_size: expected 1 to 3 ranks for 3 experts, got 0"),
            ({"ep_size": 3, "ep_rank": 3}, ValueError, "ep_rank: expected 0 to 2, got 3"),
            ({"ep_rank": 0.0}, TypeError, "ep_rank: expected an integer, got float"),
            (
                {"tp_size": 6},
                ValueError,
                "tp_size: expected 1 to 5 ranks for 5 blocks of 32 of an intermediate size of 160, got 6",
            ),
            ({"tp_size": 5, "tp_rank": -1}, ValueError, "tp_rank: expected 0 to 4, got -1"),
        ],
    )
    def test_from_mxfp4(
        self, checkpoint: dict[str, torch.Tensor], change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        change = {n: torch.zeros(v, dtype=torch.uint8) if isinstance(v, tuple) else v for n, v in change.items()}
        with pytest.raises(error, match=f"^{message}"):
            MoEWeights.from_mxfp4(**{**checkpoint, **change})

    @pytest.mark.parametrize("name", ["w13_scale", "w2_scale"])
    def test_a_nan_scale(self, checkpoint: dict[str, torch.Tensor], name: str) -> None:
        scale = checkpoint[name].clone()
        scale[1, 17, 2] = 255
        message = rf"{name}: expected E8M0 bytes 0\.\.253 \(2\^126\), got 255 at \[1, 17, 2\]"
        with pytest.raises(ValueError, match=message):
            MoEWeights.from_mxfp4(**{**checkpoint, name: scale})
        scale[1, 17, 2] = 253
        MoEWeights.from_mxfp4(**{**checkpoint, name: scale})

    @pytest.mark.parametrize(
        ("name", "change", "error", "message"),
        [
            ("w13", lambda t: t.int(), TypeError, r"w13: expected uint8 \[E, 16640\], got int32 \[3, 16640\]"),
            ("w13", lambda t: t[:, :40], ValueError, r"w13: expected uint8 \[E, 16640\], got uint8 \[3, 40\]"),
            ("w13", lambda t: t[:0], ValueError, r"w13: expected at least one expert, got uint8 \[0, 16640\]"),
            (
                "w13",
                lambda t: t.mT.contiguous().mT,
                ValueError,
                r"w13: expected a contiguous tensor, got strides \[1, 3\]",
            ),
            ("w2", lambda t: t[:2], ValueError, r"w2: expected uint8 \[3, 11264\], got uint8 \[2, 11264\]"),
            ("w2", lambda t: None, TypeError, r"w2: expected uint8 \[3, 11264\], got NoneType"),
            ("w2", lambda t: t.to("meta"), ValueError, r"w2: expected .* on cpu, got .* on meta"),
            ("hidden_size", lambda h: 128, ValueError, r"w13: expected uint8 \[E, 21760\], got uint8 \[3, 16640\]"),
            ("hidden_size", lambda h: 90, ValueError, "hidden_size: expected a multiple of 32, got 90"),
            ("hidden_size", lambda h: 96.0, TypeError, "hidden_size: expected an integer, got float"),
            ("intermediate_size", lambda i: 0, ValueError, "intermediate_size: expected a multiple of 32, got 0"),
            ("intermediate_size", lambda i: 192, ValueError, r"w13: expected uint8 \[E, 19968\], got .*\[3, 16640\]"),
            ("word_order", lambda o: "halves", TypeError, "word_order: expected a WordOrder, got 'halves'"),
            (
                "w13_bias",
                lambda t: t.bfloat16(),
                TypeError,
                r"w13_bias: expected float32 \[3, 320\], got bfloat16 \[3, 320\]",
            ),
            ("w2_bias", lambda t: t[:, :32], ValueError, r"w2_bias: expected float32 \[3, 96\], got float32 \[3, 32\]"),
            ("activation", lambda a: "swiglu", TypeError, "activation: expected an Activation, got 'swiglu'"),
            ("gate_up_order", lambda o: "gate_up", TypeError, "gate_up_order: expected a GateUpOrder, got 'gate_up'"),
            ("alpha", lambda a: True, TypeError, "alpha: expected a number, .*got bool"),
            (
                "beta",
                lambda b: torch.ones(6)[::2],
                ValueError,
                r"beta: expected a contiguous tensor, got strides \[2\]",
            ),
            (
                "first_expert",
                lambda f: 1,
                ValueError,
                "first_expert: expected 0 to 0, where the 3 experts here fit into 3, got 1",
            ),
            ("first_expert", lambda f: True, TypeError, "first_expert: expected an integer, got bool"),
            ("num_global_experts", lambda n: 2, ValueError, "first_expert: expected 0 to -1"),
            ("limit", lambda a: -1.0, ValueError, r"limit: expected a number above 0, or None, got -1\.0"),
        ],
    )
    def test_inconsistent_prepared_weights(
        self, checkpoint: dict[str, torch.Tensor], name: str, change: Any, error: type[Exception], message: str
    ) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        with pytest.raises(error, match=f"^{message}"):
            dataclasses.replace(weights, **{name: change(getattr(weights, name))})


class TestNotGated:
    """Activations without a gate: w13 has I rows and keeps their order, whatever gate_up_order says."""

    @pytest.mark.parametrize("activation", ["silu", "relu2"])
    @pytest.mark.parametrize("order", ORDERS)
    def test_round_trip(self, checkpoint: dict[str, torch.Tensor], activation: str, order: str) -> None:
        plain = {name: t[:, :I].contiguous() if name.startswith("w13") else t for name, t in checkpoint.items()}
        weights = MoEWeights.from_mxfp4(**plain, activation=activation, gate_up_order=order)
        assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (E, H, I)
        assert weights.w13_rows == I
        assert torch.equal(restored(weights, "w13")[0], plain["w13"])
        for name, tensor in weights.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, plain[name].float() if name.endswith("bias") else plain[name])


class TestFromFloat:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("order", "activation"), [*((o, "swiglu_oai") for o in ORDERS), ("interleaved", "relu")])
    def test_is_the_quantizer_and_then_from_mxfp4(self, dtype: torch.dtype, order: str, activation: str) -> None:
        given = random_floats(dtype, I if activation == "relu" else 2 * I)
        w13, w13_scale = formats.quantize_mxfp4(given["w13"])
        w2, w2_scale = formats.quantize_mxfp4(given["w2"])
        expected = MoEWeights.from_mxfp4(
            w13,
            w13_scale,
            w2,
            w2_scale,
            w13_bias=given["w13_bias"],
            w2_bias=given["w2_bias"],
            gate_up_order=order,
            activation=activation,
        )
        assert same(MoEWeights.from_float(**given, gate_up_order=order, activation=activation), expected)
        transposed = {n: t.mT.contiguous().mT if n in ("w13", "w2") else t for n, t in given.items()}
        assert not transposed["w13"].is_contiguous()
        assert same(MoEWeights.from_float(**transposed, gate_up_order=order, activation=activation), expected)

    def test_values_that_mxfp4_holds_stay_as_they_are(self, checkpoint: dict[str, torch.Tensor]) -> None:
        values = {n: formats.dequantize_mxfp4(checkpoint[n], checkpoint[f"{n}_scale"]) for n in ("w13", "w2")}
        back = MoEWeights.from_float(values["w13"].bfloat16(), values["w2"].bfloat16()).to_mxfp4()
        assert torch.equal(formats.dequantize_mxfp4(back.w13, back.w13_scale), values["w13"])
        assert torch.equal(formats.dequantize_mxfp4(back.w2, back.w2_scale), values["w2"])

    def test_parameters(self) -> None:
        given = {name: torch.nn.Parameter(t) for name, t in random_floats(torch.float32, 2 * I).items()}
        weights = MoEWeights.from_float(**given)
        assert weights.w13_bias is not None
        assert not weights.w13_bias.requires_grad

    @pytest.mark.parametrize("name", ["w13", "w2"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_refuses_what_is_not_finite(self, name: str, value: float) -> None:
        given = random_floats(torch.bfloat16, 2 * I)
        given[name][1, 7, 40] = value
        with pytest.raises(ValueError, match=f"^{name}: expected finite values, got NaN or infinity in expert 1"):
            MoEWeights.from_float(**given)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"w13": torch.zeros(3, 320, 96).double()}, TypeError, r"w13: expected bfloat16 or .* \[E, 2I, H\]"),
            ({"w13": torch.zeros(3, 320, 90)}, ValueError, r"w13: expected H .* a multiple of 32, got 90"),
            (
                {"w2": torch.zeros(3, 96, 320)},
                ValueError,
                r"w2: expected .* \[3, 96, 160\], got float32 \[3, 96, 320\]",
            ),
            ({"w13_bias": torch.zeros(3, 96)}, ValueError, r"w13_bias: expected .* \[3, 320\], got float32 \[3, 96\]"),
            ({"w2_bias": torch.zeros(3, 96).int()}, TypeError, r"w2_bias: expected .* \[3, 96\], got int32"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            MoEWeights.from_float(**{**random_floats(torch.float32, 2 * I), **change})


class TestFromFlashInfer:
    @staticmethod
    def theirs(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layer as FlashInfer takes it; the checkpoint's own row order is to be read as [up; gate]."""
        swizzled = {n: formats.swizzle_scales(checkpoint[f"{n}_scale"]) for n in ("w13", "w2")}
        return {
            "fc1_expert_weights": checkpoint["w13"].view(torch.int64),
            "fc1_scale": swizzled["w13"].view(torch.int32).view(E, 384, 1),
            "fc2_expert_weights": checkpoint["w2"].view(torch.int64),
            "fc2_scale": swizzled["w2"].view(torch.int32).view(E, 128, 2),
            "fc1_expert_biases": checkpoint["w13_bias"],
            "fc2_expert_biases": checkpoint["w2_bias"],
        }

    def test_round_trip(self, checkpoint: dict[str, torch.Tensor]) -> None:
        theirs = self.theirs(checkpoint)
        weights = MoEWeights.from_flashinfer(**theirs)
        expected = MoEWeights.from_mxfp4(
            **checkpoint, gate_up_order="up_gate", activation="swiglu", alpha=1.0, beta=0.0, limit=None
        )
        assert same(weights, expected)
        back = weights.to_mxfp4()
        assert torch.equal(back.w13.view(torch.int64), theirs["fc1_expert_weights"])
        assert torch.equal(back.w2.view(torch.int64), theirs["fc2_expert_weights"])
        scale = formats.swizzle_scales(back.w13_scale)
        assert torch.equal(scale.flatten(1), theirs["fc1_scale"].view(torch.uint8).flatten(1))
        scale = formats.swizzle_scales(back.w2_scale)
        assert torch.equal(scale.flatten(1), theirs["fc2_scale"].view(torch.uint8).flatten(1))

    def test_ranks_name_what_is_here(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_flashinfer(**self.theirs(checkpoint), ep_rank=2, ep_size=4, tp_rank=1, tp_size=2)
        assert (weights.num_experts, weights.first_expert, weights.num_global_experts) == (E, 2 * E, 4 * E)
        assert weights.w13_bias is not None
        assert weights.w2_bias is None
        assert weights.intermediate_size == I

    @pytest.mark.parametrize(
        ("name", "change", "error", "message"),
        [
            (
                "fc1_expert_weights",
                lambda t: t.view(torch.uint8),
                TypeError,
                r"expected int64 \[E, 2I, H/16\], got uint8",
            ),
            ("fc1_scale", lambda t: t.view(torch.uint8), TypeError, r"expected int32 \[3, 384, 1\], got uint8"),
            ("fc1_scale", lambda t: t[:, :320], ValueError, r"expected int32 \[3, 384, 1\], got int32 \[3, 320, 1\]"),
            ("fc2_expert_weights", lambda t: t[..., :8], ValueError, r"expected int64 \[3, 96, 10\], got"),
            (
                "fc2_expert_weights",
                lambda t: t.mT.contiguous().mT,
                ValueError,
                r"expected a contiguous tensor, got strides \[960, 1, 96\]",
            ),
            ("fc2_scale", lambda t: t[:2], ValueError, r"expected int32 \[3, 128, 2\], got int32 \[2, 128, 2\]"),
            (
                "fc2_scale",
                lambda t: torch.full_like(t, -1),
                ValueError,
                r"expected E8M0 bytes 0\.\.253 \(2\^126\), got 255",
            ),
            ("fc1_expert_biases", lambda t: t[:1], ValueError, r"expected .* \[3, 320\], got bfloat16 \[1, 320\]"),
            ("ep_rank", lambda r: 4, ValueError, "expected 0 to 3, got 4"),
            ("tp_rank", lambda r: 2, ValueError, "expected 0 to 1, got 2"),
        ],
    )
    def test_refuses(
        self, checkpoint: dict[str, torch.Tensor], name: str, change: Any, error: type[Exception], message: str
    ) -> None:
        given = {**self.theirs(checkpoint), "ep_rank": 0, "ep_size": 4, "tp_rank": 0, "tp_size": 2}
        with pytest.raises(error, match=f"^{name}: {message}"):
            MoEWeights.from_flashinfer(**{**given, name: change(given[name])})


class TestSlices:
    """What `expert_parallel` and `tensor_parallel` cut out, against the same cut of the checkpoint."""

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("ranks", [(1, 3, 0, 1), (0, 1, 0, 5), (0, 1, 3, 5), (2, 3, 4, 5)])
    def test_of_weights_and_of_checkpoints(
        self, checkpoint: dict[str, torch.Tensor], order: str, ranks: tuple[int, int, int, int]
    ) -> None:
        ep_rank, ep_size, tp_rank, tp_size = ranks
        limit = torch.tensor([5.0, 6.0, 7.0])
        whole = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order, limit=limit)
        part = whole.expert_parallel(ep_rank, ep_size).tensor_parallel(tp_rank, tp_size)

        local, inter = E // ep_size, I // tp_size
        experts, columns = slice(ep_rank * local, (ep_rank + 1) * local), range(tp_rank * inter, (tp_rank + 1) * inter)
        gates, ups = ([rows[j] for j in columns] for rows in oracles.gate_up_rows(order, I))
        pairs = [row for pair in zip(gates, ups, strict=True) for row in pair]
        rows = {"interleaved": pairs, "gate_up": gates + ups, "up_gate": ups + gates}[order]
        cut = {name: t[experts][:, rows] if name.startswith("w13") else t[experts] for name, t in checkpoint.items()}
        cut["w2"] = cut["w2"][..., columns.start // 2 : columns.stop // 2]
        cut["w2_scale"] = cut["w2_scale"][..., columns.start // 32 : columns.stop // 32]
        if tp_rank:
            del cut["w2_bias"]
        expected = MoEWeights.from_mxfp4(**cut, gate_up_order=order, limit=limit[experts].clone())
        expected = dataclasses.replace(expected, first_expert=experts.start, num_global_experts=E)
        assert same(part, expected)

        options: dict[str, Any] = {"gate_up_order": order, "limit": limit}
        names = dict(zip(("ep_rank", "ep_size", "tp_rank", "tp_size"), ranks, strict=True))
        assert same(MoEWeights.from_mxfp4(**checkpoint, **options, **names), expected)
        for name, tensor in part.to_mxfp4()._asdict().items():
            if tensor is None:
                assert (name, tp_rank > 0) == ("w2_bias", True)
            else:
                assert torch.equal(tensor, cut[name].float() if name.endswith("bias") else cut[name])

    def test_not_gated(self, checkpoint: dict[str, torch.Tensor]) -> None:
        plain = {name: t[:, :I] if name.startswith("w13") else t for name, t in checkpoint.items()}
        part = MoEWeights.from_mxfp4(**plain, activation="gelu").tensor_parallel(1, 5)
        cut = {name: t[:, 32:64] if name.startswith("w13") else t for name, t in plain.items() if name != "w2_bias"}
        cut |= {"w2": plain["w2"][..., 16:32], "w2_scale": plain["w2_scale"][..., 1:2]}
        assert same(part, MoEWeights.from_mxfp4(**cut, activation="gelu"))

    def test_a_slice_of_a_slice(self) -> None:
        whole = MoEWeights.from_mxfp4(**oracles.random_checkpoint(8, 32, 32))
        part = whole.expert_parallel(1, 2).expert_parallel(1, 2)
        assert (part.first_expert, part.num_experts, part.num_global_experts) == (6, 2, 8)
        assert torch.equal(part.w13, whole.w13[6:])
        assert part.w13.untyped_storage().nbytes() == part.w13.numel(), "a part owns its memory, and no more"
        assert "num_experts=2, first_expert=6, num_global_experts=8, " in repr(part)

    @pytest.mark.parametrize(
        ("method", "rank", "size", "message"),
        [
            ("expert_parallel", 0, 4, "ep_size: expected 1 to 3 ranks for 3 experts, got 4"),
            ("expert_parallel", 3, 3, "ep_rank: expected 0 to 2, got 3"),
            ("tensor_parallel", 0, 6, "tp_size: expected 1 to 5 ranks for 5 blocks of 32 of .* 160, got 6"),
            ("tensor_parallel", 5, 5, "tp_rank: expected 0 to 4, got 5"),
        ],
    )
    def test_refuses(
        self, checkpoint: dict[str, torch.Tensor], method: str, rank: int, size: int, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            getattr(MoEWeights.from_mxfp4(**checkpoint), method)(rank, size)


@given(
    experts=st.integers(1, 4),
    hidden=st.integers(1, 5),
    inter=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_layer_comes_back(experts: int, hidden: int, inter: int, order: str, gated: bool, seed: int) -> None:
    checkpoint = oracles.random_checkpoint(experts, 32 * hidden, 32 * inter, seed=seed)
    if not gated:
        checkpoint = {n: t[:, : 32 * inter] if n.startswith("w13") else t for n, t in checkpoint.items()}
    weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order, activation="swiglu" if gated else "identity")
    for name, tensor in weights.to_mxfp4()._asdict().items():
        assert torch.equal(tensor, checkpoint[name].float() if name.endswith("bias") else checkpoint[name])


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages made under it, and the most that were alive after any one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                mapped = func is torch.ops.aten.set_.source_Storage  # how safetensors shows a mapped file
                self.alive[storage._cdata] = (StorageWeakRef(storage), 0 if mapped else storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class TestMemory:
    """What preparing needs beyond its result: less than two experts as they came in."""

    SIZES = (6, 256, 512)

    @pytest.fixture(autouse=True, params=formats.WordOrder, ids=lambda order: order.value)
    def word_order(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "word_order_of", lambda device: request.param)

    @staticmethod
    def result_bytes(weights: MoEWeights) -> int:
        return sum(t.nbytes for t in vars(weights).values() if isinstance(t, torch.Tensor))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_from_float(self, dtype: torch.dtype) -> None:
        experts, hidden, inter = self.SIZES
        g = torch.Generator().manual_seed(0)
        w13 = torch.randn(experts, 2 * inter, hidden, generator=g).to(dtype)
        w2 = torch.randn(experts, hidden, inter, generator=g).to(dtype)
        with StorageMeter() as meter:
            weights = MoEWeights.from_float(w13, w2)
        assert meter.peak - self.result_bytes(weights) < 2 * (w13[0].nbytes + w2[0].nbytes)

    @pytest.mark.parametrize("source", ["from_mxfp4", "from_mxfp4 strided", "from_flashinfer", "from_safetensors"])
    def test_from_mxfp4_of_any_kind(self, source: str, tmp_path: Path) -> None:
        experts, hidden, inter = self.SIZES
        checkpoint = oracles.random_checkpoint(experts, hidden, inter)
        two_experts = 2 * sum(t[0].nbytes for t in checkpoint.values())
        make: Callable[[], MoEWeights]
        if source == "from_safetensors":
            save_file(oracles.gpt_oss_tensors(checkpoint), tmp_path / "model.safetensors")
            make = functools.partial(MoEWeights.from_safetensors, tmp_path, layer=0)
        elif source == "from_flashinfer":
            scales = {n: formats.swizzle_scales(checkpoint[f"{n}_scale"]).view(torch.int32) for n in ("w13", "w2")}
            make = functools.partial(
                MoEWeights.from_flashinfer,
                checkpoint["w13"].view(torch.int64),
                scales["w13"].view(experts, 2 * inter, hidden // 128),
                checkpoint["w2"].view(torch.int64),
                scales["w2"].view(experts, hidden, inter // 128),
                fc1_expert_biases=checkpoint["w13_bias"],
                fc2_expert_biases=checkpoint["w2_bias"],
            )
        else:
            if "strided" in source:
                checkpoint = {name: t.mT.contiguous().mT for name, t in checkpoint.items()}
                for name in ("w13", "w2"):
                    checkpoint[name] = checkpoint[name].unflatten(-1, (-1, 16))
            make = functools.partial(MoEWeights.from_mxfp4, **checkpoint)
        with StorageMeter() as meter:
            weights = make()
        assert meter.peak - self.result_bytes(weights) < two_experts


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.mark.parametrize("order", ORDERS)
    def test_the_same_bits(self, checkpoint: dict[str, torch.Tensor], order: str) -> None:
        on_gpu = {name: tensor.cuda() for name, tensor in checkpoint.items()}
        expected = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order)
        weights = MoEWeights.from_mxfp4(**on_gpu, gate_up_order=order)
        assert weights.word_order is formats.word_order_of(weights.device)
        assert same(weights.to("cpu"), expected)
        assert same(expected.to("cuda"), weights)
        assert same(weights.tensor_parallel(2, 5).to("cpu"), expected.tensor_parallel(2, 5))
        for name, tensor in weights.to_mxfp4()._asdict().items():
            assert torch.equal(tensor.cpu(), checkpoint[name].float() if name.endswith("bias") else checkpoint[name])
        floats = random_floats(torch.bfloat16, 2 * I)
        on_gpu = {name: tensor.cuda() for name, tensor in floats.items()}
        assert same(MoEWeights.from_float(**on_gpu).to("cpu"), MoEWeights.from_float(**floats))

    @pytest.mark.parametrize("source", ["from_mxfp4", "from_float"])
    def test_memory(self, source: str) -> None:
        experts, hidden, inter = 6, 512, 1024
        if source == "from_mxfp4":
            given = {name: t.cuda() for name, t in oracles.random_checkpoint(experts, hidden, inter).items()}
        else:
            given = {
                "w13": torch.randn(experts, 2 * inter, hidden, dtype=torch.bfloat16, device="cuda"),
                "w2": torch.randn(experts, hidden, inter, dtype=torch.bfloat16, device="cuda"),
            }
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weights = getattr(MoEWeights, source)(**given)
        extra = torch.cuda.max_memory_allocated() - before - TestMemory.result_bytes(weights)
        assert extra < 2 * sum(tensor[0].nbytes for tensor in given.values())


class TestProgress:
    @staticmethod
    def stderr(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, after_s: float) -> str:
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(prepare, "_PROGRESS_AFTER_S", after_s)
        MoEWeights.from_mxfp4(**oracles.random_checkpoint(4, 32, 32))
        return stream.getvalue()

    def test_a_bar_when_it_is_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = self.stderr(monkeypatch, terminal=True, after_s=-1.0)
        lines = text.removesuffix("\n").split("\r")[1:]
        assert lines[-1] == f"MoE weights [{'#' * 30}] 4/4 experts"
        assert [line.count("#") for line in lines] == [7, 15, 22, 30]
        assert text.endswith("\n")

    def test_silence_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.stderr(monkeypatch, terminal=False, after_s=-1.0) == ""
        assert self.stderr(monkeypatch, terminal=True, after_s=60.0) == ""


class TestSafetensors:
    @pytest.fixture
    def directory(self, tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> Path:
        """A sharded checkpoint with layer 0 in two shards."""
        tensors = oracles.gpt_oss_tensors(checkpoint)
        shards = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for shard in set(shards.values()):
            save_file({n: t for n, t in tensors.items() if shards[n] == shard}, tmp_path / shard)
        self.write_index(tmp_path, {"metadata": {"total_size": 1}, "weight_map": shards})
        return tmp_path

    def write_index(self, directory: Path, content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def edit_index(self, directory: Path, name: str, shard: object) -> None:
        index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
        index["weight_map"][name] = shard
        self.write_index(directory, index)

    @pytest.mark.parametrize("as_directory", [False, True])
    @pytest.mark.parametrize("layer", [0, 35])
    def test_one_file(self, tmp_path: Path, as_directory: bool, layer: int) -> None:
        file = tmp_path / ("model.safetensors" if as_directory else "layer.safetensors")
        checkpoint = oracles.random_gpt_oss_checkpoint(
            file, num_experts=2, hidden_size=64, intermediate_size=32, layer=layer, seed=3
        )
        path = str(tmp_path) if as_directory else file
        assert same(MoEWeights.from_safetensors(path, layer=layer), MoEWeights.from_mxfp4(**checkpoint))

    def test_reads_one_rank(self, directory: Path, checkpoint: dict[str, torch.Tensor]) -> None:
        ranks = {"ep_rank": 1, "ep_size": 3, "tp_rank": 2, "tp_size": 5}
        weights = MoEWeights.from_safetensors(directory, layer=0, **ranks)
        assert same(weights, MoEWeights.from_mxfp4(**checkpoint, **ranks))
        assert weights.first_expert == 1

    def test_shards(self, directory: Path, checkpoint: dict[str, torch.Tensor]) -> None:
        numbers: dict[str, Any] = {"activation": "swiglu", "alpha": 2.0, "beta": 0.0, "limit": None}
        weights = MoEWeights.from_safetensors(directory, layer=0, gate_up_order="gate_up", **numbers)
        assert same(weights, MoEWeights.from_mxfp4(**checkpoint, gate_up_order="gate_up", **numbers))

    def test_reads_nothing_but_its_layer(self, directory: Path, checkpoint: dict[str, torch.Tensor]) -> None:
        (directory / "model-00003-of-00003.safetensors").write_bytes(b"not a safetensors file")
        self.edit_index(directory, "lm_head.weight", "model-00003-of-00003.safetensors")
        self.edit_index(directory, "model.norm.weight", "model-00004-of-00003.safetensors")
        assert same(MoEWeights.from_safetensors(directory, layer=0), MoEWeights.from_mxfp4(**checkpoint))

    def test_missing_tensors(self, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        name = r"model\.layers\.1\.mlp\.experts\.gate_up_proj_blocks"
        with pytest.raises(ValueError, match=rf"^{name}: no such tensor in .*index\.json; it has experts in layers 0 "):
            MoEWeights.from_safetensors(directory, layer=1)
        file = tmp_path_factory.mktemp("one") / "layer.safetensors"
        oracles.random_gpt_oss_checkpoint(file, num_experts=1, hidden_size=32, intermediate_size=32)
        with pytest.raises(ValueError, match=rf"^{name}: no such tensor in .*layer\.safetensors; it has experts in "):
            MoEWeights.from_safetensors(file, layer=1)

    def test_the_index_names_the_wrong_shard(self, directory: Path) -> None:
        name = PREFIX + "down_proj_scales"
        index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
        other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][name])
        self.edit_index(directory, name, other)
        with pytest.raises(ValueError, match=rf"{name}: no such tensor in .*{other}"):
            MoEWeights.from_safetensors(directory, layer=0)

    @pytest.mark.parametrize(
        ("shard", "message"),
        [
            ("gone.safetensors", r".*index\.json says gone\.safetensors, and there is no such file"),
            ("../other.safetensors", r"expected the name of a file beside .*, got '\.\./other\.safetensors'"),
            (7, r"expected the name of a file beside .*, got 7"),
        ],
    )
    def test_bad_shards(self, directory: Path, shard: object, message: str) -> None:
        self.edit_index(directory, PREFIX + "down_proj_bias", shard)
        with pytest.raises(ValueError, match=rf"{PREFIX}down_proj_bias: {message}"):
            MoEWeights.from_safetensors(directory, layer=0)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", "3", '{"weight_map": []}', '{"weight_map": null}'])
    def test_malformed_index(self, directory: Path, content: str) -> None:
        self.write_index(directory, content)
        with pytest.raises(ValueError, match=r'model\.safetensors\.index\.json: expected .*"weight_map"'):
            MoEWeights.from_safetensors(directory, layer=0)

    def test_corrupt_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.write_bytes(b"\x00" * 100)
        with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read: it is no safetensors file"):
            MoEWeights.from_safetensors(tmp_path, layer=0)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"path: expected model\.safetensors or .*index\.json in the directory"
        ):
            MoEWeights.from_safetensors(tmp_path, layer=0)
        with pytest.raises(FileNotFoundError, match=r"path: expected a file or directory, got .*nowhere"):
            MoEWeights.from_safetensors(tmp_path / "nowhere", layer=0)
        with pytest.raises(ValueError, match="layer: expected 0 or more, got -1"):
            MoEWeights.from_safetensors(tmp_path, layer=-1)
