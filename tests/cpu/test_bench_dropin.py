"""The drop-in's own bench, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import types

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


@pytest.mark.parametrize("choice", ["keep", "release"])
def test_memory_without_a_gpu(choice: str) -> None:
    """In a process of its own, whose allocator gives large tensors back to the system."""
    shape = "MoEShape(name='', experts=128, top_k=2, hidden=512, intermediate=1024)"
    program = (
        "import json\nfrom mxfp4_moe.bench.dropin import memory_on_cpu\nfrom mxfp4_moe.bench.shapes import MoEShape\n"
        f"print(json.dumps(memory_on_cpu({shape}, {choice!r})))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    layer = found["layer"]
    assert layer == 128 * 3 * 512 * 1024 * 17 // 32
    assert found["two"] == 2 * layer // 128
    low, high = (1.9, 2.5) if choice == "keep" else (0.9, 1.5)  # some ten megabytes are the interpreter's and torch's
    assert low * layer < found["peak"] < high * layer
    assert low * layer < found["after"] < high * layer


def test_without_a_gpu_there_is_the_memory_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {"keep": [2_000_000, 100_000, 4_000_000, 4_000_000], "release": [2_000_000, 100_000, 2_100_000, 2_000_000]}
    names = ("layer", "two", "peak", "after")

    def child(module: str, arguments: list[str]) -> dict[str, object]:
        choice = arguments[-1]
        return {"raw": choice, **dict(zip(names, rows[choice], strict=True))}

    monkeypatch.setattr(dropin, "in_a_process", child)
    monkeypatch.setattr(dropin, "__spec__", types.SimpleNamespace(name="bench.dropin"))
    assert dropin.main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == "CPU,"
    assert ["release", "2", "0", "2", "2"] in lines
