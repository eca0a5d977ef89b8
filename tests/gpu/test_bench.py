"""`mxfp4-moe bench` on the GPU: it runs, its parts agree with each other, and a file comes out. No time is asserted."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from gpu_problems import gpu

from mxfp4_moe import cli, fused_moe, topk_softmax
from mxfp4_moe._choice import choice, facts, tuned
from mxfp4_moe._choice.facts import Layer
from mxfp4_moe.bench import inputs, report, shapes
from mxfp4_moe.bench.host import host_us
from mxfp4_moe.bench.timing import Timer
from mxfp4_moe.tiles import load_manifest

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
    assert run.host["fused_moe_from_logits_us"] > 0
    assert not [f for f in run.failures if f.implementation == report.OURS]
    for file in (drawing, tmp_path / "run-roofline.svg"):
        ElementTree.parse(file)


def test_kernels_are_recorded() -> None:
    device = gpu()
    shape = shapes.shape_from("gpt-oss-20b", experts=8)
    weights = inputs.layer_tensors(shape, device).prepared()
    given = inputs.call_inputs(shape, 64, device, seed=0)

    def call() -> torch.Tensor:
        return fused_moe(given.hidden_states, *topk_softmax(given.logits, shape.top_k), weights)

    kernels = Timer(device).kernels(call)
    assert 3 <= len(kernels) <= 12
    assert not any("bitwise_not" in kernel.name for kernel in kernels)
    assert all(kernel.duration_us > 0 for kernel in kernels)
    assert host_us(call, device, calls=5).median > 0


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


def test_tune_writes_a_table_that_the_choice_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", str(tmp_path))
    assert cli.main(["tune", *SIZES, "--tokens", "1,64", "--replays", "4"]) == 0
    device = facts.from_properties(torch.cuda.get_device_properties(0))
    path = tuned.user_path(device)
    assert path is not None
    table = tuned.read(path, device, same_wheel=True)
    assert table is not None
    (layer,) = table.layers
    assert layer.layer == Layer(experts=8, top_k=2, hidden=512, intermediate=256)
    tuned.tables.cache_clear()
    for entry in layer.entries:
        assert choice.choose_tile(entry.tokens, layer.layer, device, load_manifest().tiles) == entry.choice.gemm1
    tuned.tables.cache_clear()
