"""The drop-in's own bench, as far as it goes without a GPU."""

from __future__ import annotations

import pytest
import torch

from mxfp4_moe.bench import dropin
from mxfp4_moe.bench.shapes import MoEShape
from mxfp4_moe.flashinfer_api import SfLayout, weight_cache

CPU = torch.device("cpu")


def test_both_quantizers_are_one_function() -> None:
    x = torch.randn(33, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layout in SfLayout:
        before, after = (call() for call in dropin.quantizer_calls(x, layout))
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_layer_is_padded_and_runs() -> None:
    shape = MoEShape(name="", experts=3, top_k=2, hidden=96, intermediate=160)
    tensors = dropin.raw_layer(shape, CPU)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 512, 8), (3, 512, 1), (3, 128, 16), (3, 128, 2)]
    result = dropin.first_call(tensors, CPU, "keep")
    assert result.shape == (1, 128)
    assert not result.any()
    weight_cache._layers.clear()


def test_it_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dropin.main([]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err
