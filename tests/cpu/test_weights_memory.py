"""What preparing weights needs beyond its result, and its progress."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path

import model_checkpoints
import oracles
import pytest
import torch
from safetensors.torch import save_file
from storage_meter import StorageMeter
from weight_cases import ORDERS, I, random_floats, same

from mxfp4_moe import formats
from mxfp4_moe._checkpoints import layers, prepare
from mxfp4_moe.weights import MoEWeights


class TestMemory:
    """What preparing needs beyond its result: less than two experts as they came in."""

    SIZES = (6, 256, 512)

    @pytest.fixture(autouse=True, params=formats.WordOrder, ids=lambda order: order.value)
    def word_order(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "word_order_of", lambda device, activation_format: request.param)

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

    @pytest.mark.parametrize("scheme", model_checkpoints.SCHEMES)
    @pytest.mark.parametrize("shards", [1, 3])
    def test_from_a_checkpoint_of_any_naming(self, scheme: str, shards: int, tmp_path: Path) -> None:
        experts, hidden, inter = self.SIZES
        layer = model_checkpoints.layer_of(scheme, experts, hidden, inter)
        tensors = model_checkpoints.tensors_of(scheme, layer, 0)
        model_checkpoints.write(tmp_path, tensors, shards=shards)
        two_experts = 2 * sum(t.nbytes for t in tensors.values()) // experts
        with StorageMeter() as meter:
            weights = MoEWeights.from_pretrained(tmp_path, layer=0, activation="swiglu_oai")
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
