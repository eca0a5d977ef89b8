"""Checkpoint tensors -> prepared weights -> checkpoint tensors. All comparisons are bitwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_cases import ORDERS, E, H, I, same

from mxfp4_moe import formats
from mxfp4_moe._checkpoints import layers, prepare
from mxfp4_moe.weights import Activation, GateUpOrder, MoEWeights


def restored(weights: MoEWeights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 or w2 of all experts with prepared rows: codes [E, N, K/2] in plain order, scales [E, N, K/32]."""
    hidden, inter = weights.hidden_size, weights.intermediate_size
    n, k = (weights.w13_rows, hidden) if name == "w13" else (hidden, inter)
    experts = [formats.restore_weights(expert, n, k, weights.word_order) for expert in getattr(weights, name)]
    packed, scales = zip(*experts, strict=True)
    return torch.stack(packed), torch.stack(scales)


def as_halves(weights: MoEWeights) -> MoEWeights:
    """The weights as SM90 has them."""
    old, new = formats.WordOrder.CONTAINERS, formats.WordOrder.PAIRS
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
        monkeypatch.setattr(layers, "word_order_of", lambda device, activation_format: formats.WordOrder.PAIRS)
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
            assert part.word_order is formats.WordOrder.PAIRS
        assert same(halves.tensor_parallel(3, 5).to("cpu"), weights.tensor_parallel(3, 5))
        assert same(halves.expert_parallel(1, 3).to("cpu"), weights.expert_parallel(1, 3))
        for name, tensor in halves.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, checkpoint[name].float() if name.endswith("bias") else checkpoint[name])


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
