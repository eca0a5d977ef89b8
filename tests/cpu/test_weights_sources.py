"""Weights from floats, from FlashInfer's tensors and from files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import save_file
from weight_cases import ORDERS, E, I, random_floats, same

from mxfp4_moe import formats
from mxfp4_moe.weights import MoEWeights

PREFIX = "model.layers.0.mlp.experts."


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
