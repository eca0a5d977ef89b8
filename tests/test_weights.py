"""Checkpoint tensors -> prepared weights -> checkpoint tensors. All comparisons are bitwise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import save_file

from mxfp4_moe.weights import Activation, GateUpOrder, MoEWeights

ORDERS = ["interleaved", "gate_up", "up_gate"]
E, H, I = 3, 96, 160  # noqa: E741  (the formulas' names)
PREFIX = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    return oracles.random_checkpoint(E, H, I, seed=7)


def same(a: MoEWeights, b: MoEWeights) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MoEWeights))


class TestPrepare:
    @pytest.mark.parametrize("order", ORDERS)
    def test_every_row_lands_where_the_layout_says(self, checkpoint: dict[str, torch.Tensor], order: str) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order)
        gates, ups = oracles.gate_up_rows(order, I)
        scale, bias = weights.w13_scale.flatten(1), weights.w13_bias
        assert bias is not None
        for j in range(I):
            for row, source in ((16 * (j // 8) + j % 8, gates[j]), (16 * (j // 8) + 8 + j % 8, ups[j])):
                words = weights.w13[:, row].numpy().view("<u4")
                back = words >> 2 | words << 30
                assert (back == checkpoint["w13"][:, source].numpy().view("<u4")).all()
                for block in range(H // 32):
                    offset = oracles.scale_offset(row, block, H)
                    assert torch.equal(scale[:, offset], checkpoint["w13_scale"][:, source, block])
                assert torch.equal(bias[:, row], checkpoint["w13_bias"][:, source].float())

    def test_w2_keeps_its_rows(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        words = weights.w2.numpy().view("<u4")
        assert ((words >> 2 | words << 30) == checkpoint["w2"].numpy().view("<u4")).all()
        for row in range(H):
            for block in range(I // 32):
                offset = oracles.scale_offset(row, block, I)
                assert torch.equal(weights.w2_scale.flatten(1)[:, offset], checkpoint["w2_scale"][:, row, block])
        assert weights.w2_bias is not None
        assert torch.equal(weights.w2_bias, checkpoint["w2_bias"].float())

    def test_scale_padding_is_zero(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        assert weights.w13_scale.shape == (E, 3, 1, 512)
        assert weights.w2_scale.shape == (E, 1, 2, 512)
        # Random scales are 118..123, so exactly the padding is zero.
        assert weights.w13_scale.count_nonzero() == checkpoint["w13_scale"].numel()
        assert weights.w2_scale.count_nonzero() == checkpoint["w2_scale"].numel()

    def test_properties(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        assert (weights.num_experts, weights.hidden_size, weights.intermediate_size) == (E, H, I)
        assert weights.device == torch.device("cpu")
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
        for name, tensor in given.items():
            assert getattr(weights, name).data_ptr() != tensor.data_ptr()

    def test_to(self, checkpoint: dict[str, torch.Tensor]) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint, activation="swiglu", limit=None)
        assert same(weights.to("cpu"), weights)
        moved = weights.to("meta")
        assert moved.device == torch.device("meta")
        assert moved.w2_bias is not None
        assert moved.w2_bias.device == torch.device("meta")
        assert (moved.activation, moved.limit) == (Activation.SWIGLU, None)


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
            ({"activation": "gelu"}, ValueError, "activation: expected one of 'swiglu', 'swiglu_oai', got 'gelu'"),
            ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
            ({"beta": math.nan}, ValueError, "beta: expected a finite number, got nan"),
            ({"limit": math.inf}, ValueError, "limit: expected a finite number, got inf"),
            ({"limit": 0}, ValueError, "limit: expected a number above 0, or None, got 0"),
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
        with pytest.raises(ValueError, match=rf"{name}: expected E8M0 bytes 0\.\.254, got 255 \(NaN\) at \[1, 17, 2\]"):
            MoEWeights.from_mxfp4(**{**checkpoint, name: scale})
        scale[1, 17, 2] = 254
        MoEWeights.from_mxfp4(**{**checkpoint, name: scale})

    @pytest.mark.parametrize(
        ("name", "change", "error", "message"),
        [
            ("w13", lambda t: t.int(), TypeError, r"w13: expected uint8 \[E, 2I, H/2\], got int32 \[3, 320, 48\]"),
            ("w13", lambda t: t[..., :40], ValueError, r"w13: expected H .* a multiple of 32, got 80"),
            (
                "w13",
                lambda t: t.mT.contiguous().mT,
                ValueError,
                r"w13: expected a contiguous tensor, got strides \[.*\]",
            ),
            (
                "w13_scale",
                lambda t: t[:, :2],
                ValueError,
                r"w13_scale: expected uint8 \[3, 3, 1, 512\], got .*\[3, 2, 1, 512\]",
            ),
            ("w2", lambda t: t[:2], ValueError, r"w2: expected uint8 \[3, 96, 80\], got uint8 \[2, 96, 80\]"),
            ("w2", lambda t: None, TypeError, r"w2: expected uint8 \[3, 96, 80\], got NoneType"),
            ("w2_scale", lambda t: t.to("meta"), ValueError, r"w2_scale: expected .* on cpu, got .* on meta"),
            (
                "w13_bias",
                lambda t: t.bfloat16(),
                TypeError,
                r"w13_bias: expected float32 \[3, 320\], got bfloat16 \[3, 320\]",
            ),
            ("w2_bias", lambda t: t[:, :32], ValueError, r"w2_bias: expected float32 \[3, 96\], got float32 \[3, 32\]"),
            ("activation", lambda a: "swiglu", TypeError, "activation: expected an Activation, got 'swiglu'"),
            ("gate_up_order", lambda o: "gate_up", TypeError, "gate_up_order: expected a GateUpOrder, got 'gate_up'"),
            ("alpha", lambda a: True, TypeError, "alpha: expected a number, got bool"),
            ("limit", lambda a: -1.0, ValueError, r"limit: expected a number above 0, or None, got -1\.0"),
        ],
    )
    def test_inconsistent_prepared_weights(
        self, checkpoint: dict[str, torch.Tensor], name: str, change: Any, error: type[Exception], message: str
    ) -> None:
        weights = MoEWeights.from_mxfp4(**checkpoint)
        with pytest.raises(error, match=f"^{message}"):
            dataclasses.replace(weights, **{name: change(getattr(weights, name))})


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
        with pytest.raises(ValueError, match=rf"^{name}: no such tensor in .*model\.safetensors\.index\.json$"):
            MoEWeights.from_safetensors(directory, layer=1)
        file = tmp_path_factory.mktemp("one") / "layer.safetensors"
        oracles.random_gpt_oss_checkpoint(file, num_experts=1, hidden_size=32, intermediate_size=32)
        with pytest.raises(ValueError, match=rf"^{name}: no such tensor in .*layer\.safetensors$"):
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
        with pytest.raises(ValueError, match=rf"{PREFIX}gate_up_proj_blocks: cannot be read from .*model\.safetensors"):
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
