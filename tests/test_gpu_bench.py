"""`mxfp4-moe bench` on the GPU: it runs, its parts agree with each other, and a file comes out. No time is asserted."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from gpu_problems import gpu

from mxfp4_moe import cli, fused_moe, topk_softmax
from mxfp4_moe.bench import inputs, report, shapes
from mxfp4_moe.bench.host import host_us
from mxfp4_moe.bench.timing import Timer

pytestmark = pytest.mark.gpu

SIZES = ["--experts", "8", "--top-k", "2", "--hidden", "512", "--intermediate", "256"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu()
    path, drawing = tmp_path / "run.json", tmp_path / "run.svg"
    options = ["--tokens", "1,64", "--tile", "auto", "--kernels", "--rivals", "all", "--replays", "4"]
    assert cli.main(["bench", *SIZES, *options, "--json", str(path), "--picture", str(drawing)]) == 0
    printed = capsys.readouterr()
    run = report.read(path)
    assert report.table(run) in printed.out
    assert [m.tokens for m in run.measurements if m.ours] == [1, 64]
    assert all(m.kernels for m in run.measurements if m.ours), [f.reason for f in run.failures]
    assert run.ceilings["copy_gb_per_s"] > 0
    assert run.host["first_call_ms"] > 0
    assert not [f for f in run.failures if f.implementation == report.OURS]
    for file in (drawing, tmp_path / "run-roofline.svg"):
        ElementTree.parse(file)


def test_the_recorded_kernels_are_the_call() -> None:
    """Their own times add up to about what the events say; far off would mean kernels of someone else."""
    device = gpu()
    shape = shapes.shape_from("gpt-oss-20b", experts=8)
    weights = inputs.layer_tensors(shape, device).prepared()
    calls = [inputs.call_inputs(shape, 64, device, seed) for seed in (0, 1)]

    def call(place: int) -> torch.Tensor:
        return fused_moe(calls[place].hidden_states, *topk_softmax(calls[place].logits, shape.top_k), weights)

    timer = Timer(device)
    kernels = timer.kernels(lambda: call(0))
    whole = timer.measure([lambda: call(0), lambda: call(1)], 8)
    assert 3 <= len(kernels) <= 12
    assert whole.median / 3 < sum(kernel.own_us for kernel in kernels) < whole.median * 3
    assert host_us(lambda: call(0), device, calls=5).median > 0


def test_graphs_of_several_calls_do_not_disturb_each_other() -> None:
    """They share their memory: after many replays in turn, each still computes its own inputs' layer."""
    device = gpu()
    shape = shapes.shape_from("gpt-oss-20b", experts=8, hidden=512, intermediate=256)
    weights = inputs.layer_tensors(shape, device).prepared()
    given = [inputs.call_inputs(shape, 33, device, seed) for seed in range(3)]
    outs = [torch.empty_like(g.hidden_states) for g in given]

    def call(place: int) -> torch.Tensor:
        routed = topk_softmax(given[place].logits, shape.top_k)
        return fused_moe(given[place].hidden_states, *routed, weights, output=outs[place])

    expected = [call(place).clone() for place in range(3)]
    for out in outs:
        out.zero_()
    Timer(device).measure([lambda place=place: call(place) for place in range(3)], 9)
    assert all(torch.equal(out, right) for out, right in zip(outs, expected, strict=True))
