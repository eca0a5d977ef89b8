"""A run of the bench with a clock that stands still, and its command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from bench_results import exactly

from mxfp4_moe import cli, fused_moe, reference, topk_softmax
from mxfp4_moe.bench import inputs, report, shapes, statistics
from mxfp4_moe.bench import run as bench_run
from mxfp4_moe.bench.ceilings import Ceilings
from mxfp4_moe.bench.exact import exact_layer
from mxfp4_moe.bench.host import fresh_process
from mxfp4_moe.bench.kernel_records import KernelTime
from mxfp4_moe.bench.report import OURS, Results
from mxfp4_moe.bench.rivals import Absent, Found, Rival, padded
from mxfp4_moe.cli import bench as bench_cli

LARGE, SMALL = shapes.PRESETS["gpt-oss-120b"], shapes.MoEShape(name="", experts=8, top_k=2, hidden=128, intermediate=64)


class StillTimer:
    """Calls what it is given once, and says that it took a microsecond per token row."""

    flush_bytes = 1 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, calls: Sequence[Callable[[], torch.Tensor]], replays: int) -> statistics.Summary:
        return exactly(float(calls[-1]().shape[0]))

    def kernels(self, call: Callable[[], torch.Tensor]) -> list[KernelTime]:
        if call().shape[0] == 1:
            raise ValueError("calls: expected at least one with a kernel, got none")
        return [KernelTime(name="gemm", duration_us=2, own_us=1)]


def a_rival(name: str, factor: float, missing: str = "", layer: Any = None) -> Rival:
    """The layer by its reference, off by a factor."""

    def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
        if missing:
            raise Absent(missing)
        return Found(path=Path("."), version="1.0")

    def prepare(found: Found, tensors: inputs.LayerTensors) -> Any:
        weights = tensors.prepared() if layer is None else layer(tensors)
        if math.isnan(factor):
            raise ImportError("no such symbol\nand a traceback")

        def make_call(call: inputs.CallInputs) -> Callable[[], torch.Tensor]:
            routed = topk_softmax(call.logits, tensors.shape.top_k)
            return lambda: reference.fused_moe(call.hidden_states, *routed, weights) * factor

        return make_call

    return Rival(name=name, description=f"{name} one", find=find, prepare=prepare, layer=layer)


def test_a_run_measures_what_is_right_and_says_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "Timer", StillTimer)
    ceilings = Ceilings(copy_gb_per_s=1, bf16_tflops=1, f16_tflops=1, fp8_tflops=1)
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda device: ceilings)
    monkeypatch.setattr(bench_run, "environment", lambda *arguments: {"device": "none"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rest = {"include_routing": True, "host": False, "replays": 1, "inputs": 2, "command": ["x"], "rival_folders": []}
    plan = bench_run.Plan(
        shape=SMALL,
        tokens=(1, 5),
        tiles=(None, (64, 128)),
        rivals=[
            a_rival("right", 1.05),
            a_rival("wrong", -1),
            a_rival("absent", 1, "it is not here"),
            a_rival("broken", math.nan),
            a_rival("of another layer", 1.05, layer=padded.plain_swiglu),
        ],
        kernels=True,
        **rest,
    )
    told: list[str] = []
    saved: list[Results] = []
    run = bench_run._Run(plan, torch.device("cpu"), told.append, saved.append).results()
    assert [len(before.measurements) for before in saved] == [4, 6, 6, 6, 6, 8, 8], "kept after each step"
    assert [(m.implementation, m.tokens, m.tile, m.automatic) for m in run.measurements] == [
        *((OURS, tokens, "m8n128_swap", True) for tokens in plan.tokens),
        *((OURS, tokens, "m64n128", False) for tokens in plan.tokens),
        *(("right", tokens, "", False) for tokens in plan.tokens),
        *(("of another layer", tokens, "", False) for tokens in plan.tokens),
    ]
    assert [m.us.median for m in run.measurements] == [1, 5, 1, 5, 1, 5, 1, 5]
    assert run.measurements[-1].relative_error == pytest.approx(0.05, rel=0.1)
    found = ("right", "wrong", "broken", "of another layer")
    assert run.rivals == {name: f"version 1.0: {name} one" for name in found}
    assert run.measurements[1].active_experts == sum(
        inputs.call_inputs(SMALL, 5, torch.device("cpu"), seed).active_experts / 2 for seed in (0, 1)
    )
    reasons = {(f.implementation, f.tokens): f.reason for f in run.failures}
    assert reasons["wrong", 5] == "it computes something else (relative error 2)"
    assert reasons["absent", None] == "it is not here"
    assert reasons["broken", None] == "its weights could not be prepared: ImportError: no such symbol"
    assert "kernels were not recorded" in reasons[OURS, 1]
    recorded = [bool(m.kernels) for m in run.measurements]
    assert recorded == [False, True, False, True, *[False] * 4], "ours, where the profiler saw any"
    assert "right, 5 tokens: 5.0 us" in told
    assert Results.from_dict(json.loads(json.dumps(run.as_dict()))).as_dict() == run.as_dict()


def test_host_times_are_of_the_layer_from_logits_and_of_its_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest number of tokens; each call is really made, and all three must be what their names say."""
    returned: list[Any] = []

    def host_us(call: Callable[[], object], device: torch.device) -> statistics.Summary:
        returned.append(call())
        return statistics.summarize([10.0 * len(returned)])

    def fresh_process(*arguments: object) -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(bench_run, "Timer", StillTimer)
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda device: None)
    monkeypatch.setattr(bench_run, "host_us", host_us)
    monkeypatch.setattr(bench_run, "fresh_process", fresh_process)
    rest = {"include_routing": True, "host": True, "replays": 1, "inputs": 1, "command": ["x"], "rival_folders": []}
    plan = bench_run.Plan(shape=SMALL, tokens=(3, 5), tiles=(None,), rivals=[], kernels=False, **rest)
    run = bench_run._Run(plan, torch.device("cpu"), lambda text: None, lambda results: None)
    weights = run.tensors.prepared()
    run._host(weights)
    assert run.host == {"tokens": 3, "fused_moe_from_logits_us": 10, "fused_moe_us": 20, "topk_softmax_us": 30}
    assert [f.reason for f in run.failures] == ["RuntimeError: no GPU"]
    from_logits, from_ids, routed = returned
    assert torch.equal(from_logits, from_ids)
    assert torch.equal(fused_moe(run.calls[3][0].hidden_states, *routed, weights), from_ids)


@pytest.mark.parametrize(("activation_format", "low", "high"), [("mxfp8", 5e-3, 8e-2), ("bf16", 1e-4, 3e-3)])
def test_the_error_against_float64_is_what_the_activations_cost(
    monkeypatch: pytest.MonkeyPatch, activation_format: str, low: float, high: float
) -> None:
    monkeypatch.setattr(bench_run, "Timer", StillTimer)
    ceilings = Ceilings(copy_gb_per_s=1, bf16_tflops=1, f16_tflops=1, fp8_tflops=1)
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda device: ceilings)
    monkeypatch.setattr(bench_run, "environment", lambda *arguments: {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rest = {"include_routing": True, "host": False, "replays": 1, "inputs": 1, "command": ["x"], "rival_folders": []}
    plan = bench_run.Plan(
        shape=SMALL,
        tokens=(3, 64, 70),
        tiles=(None,),
        rivals=[a_rival("larger", 1.05), a_rival("of another layer", 1.05, layer=padded.plain_swiglu)],
        kernels=False,
        activation_format=activation_format,
        **rest,
    )
    run = bench_run._Run(plan, torch.device("cpu"), lambda text: None, lambda results: None).results()
    errors = {(m.implementation, m.tokens): m.exact_error for m in run.measurements if m.exact_error is not None}
    assert set(errors) == {(OURS, 64), ("larger", 64)}
    assert low < errors[OURS, 64] < high
    assert 0.04 < errors["larger", 64] < 0.1
    words = ", ".join(f"{name} {error:.2%}" for (name, _), error in errors.items())
    assert f"unquantized activations, 64 tokens: {words}" in report.summary(run)


def test_exact_layer_is_the_dense_sum() -> None:
    """Beside an oracle that goes token by token and knows nothing of sorting them by expert."""
    tensors = inputs.layer_tensors(SMALL, torch.device("cpu"))
    call = inputs.call_inputs(SMALL, 5, torch.device("cpu"), 0)
    scores = call.logits.double().topk(SMALL.top_k)
    layer = {name: getattr(tensors, name) for name in ("w13", "w13_scale", "w2", "w2_scale", "w13_bias", "w2_bias")}
    w13 = oracles.mxfp4_values(layer["w13"].numpy(), layer["w13_scale"].numpy())
    w2 = oracles.mxfp4_values(layer["w2"].numpy(), layer["w2_scale"].numpy())
    expected = np.zeros((5, SMALL.hidden))
    for t in range(5):
        for share, e in zip(scores.values.softmax(-1)[t].tolist(), scores.indices[t].tolist(), strict=True):
            sums = w13[e] @ call.hidden_states[t].double().numpy() + layer["w13_bias"][e].double().numpy()
            between = oracles.two_inputs(sums[0::2], sums[1::2], "swiglu_oai", 1.702, 1.0, 7.0)
            expected[t] += share * (w2[e] @ between + layer["w2_bias"][e].double().numpy())
    found = exact_layer(tensors, call).numpy()
    assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)


def test_a_fresh_process_that_fails_says_why() -> None:
    """Here it has no GPU; the import before that is timed, so the words are about the device and nothing else."""
    with pytest.raises(RuntimeError, match=r"^a fresh process failed: .*(CUDA|NVIDIA)"):
        fresh_process(SMALL, 1, 0)


def test_ours_is_the_public_call() -> None:
    shape = dataclasses.replace(SMALL, hidden=1440, intermediate=1440)
    weights = inputs.layer_tensors(shape, torch.device("cpu")).prepared()
    call = inputs.call_inputs(shape, 6, torch.device("cpu"), seed=0)
    expected = fused_moe(call.hidden_states, *topk_softmax(call.logits, 2), weights)
    for include_routing in (False, True):
        assert torch.equal(bench_run.our_call(weights, 2, (128, 128), include_routing)(call)(), expected)
    assert 0.2 < float(expected.float().std()) < 5, "values of a size that a layer has"


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_without_a_gpu_it_is_one_sentence(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert cli.main([command]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"mxfp4-moe {command}: a GPU is needed, and torch {torch.__version__} is built without CUDA\n"
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main([command]) == 2
    assert "torch sees none on this machine" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.main([command, "--device", "1"]) == 2
    assert "--device: expected 0 to 0, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "tokens: expected positive integers"),
        (["--tile", "100,100"], "tile: expected one of 64,8;"),
        (["--tile", "auto;big"], "tile: expected auto, all, or M,N"),
        (["--tile", "big"], "tile: expected auto, all, or M,N"),
        (["--rivals", "cutlass"], "rivals: expected all, none, or some of"),
        (["--rivals-path", "/nonexistent"], "rivals-path: /nonexistent is no folder"),
        (["--no-include-routing", "--rivals", "marlin"], "rivals: they start at the logits"),
        (["--json", "/nonexistent/run.json"], "json: /nonexistent/run.json would lie in a folder that does not exist"),
        (["--hidden", "7"], "hidden: expected a positive multiple of 32, got 7"),
        (["--replays", "0"], "replays: expected at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cli, "gpu_refusal", lambda index: "")
    assert cli.main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_results_do_not_tell_of_folders() -> None:
    given = ["bench", "--json", "/home/me/run.json", "--picture=../a/run.svg", "--tokens", "1,2", "--tile=8,128"]
    kept = ["bench", "--json", "run.json", "--picture=run.svg", "--tokens", "1,2", "--tile=8,128"]
    assert [bench_cli.without_folder(argument) for argument in given] == kept


def test_tiles_by_name() -> None:
    assert bench_cli.tiles_of("auto") == [None]
    assert bench_cli.tiles_of("8,128;64,128") == [(8, 128), (64, 128)]
    assert bench_cli.tiles_of("auto;8,128; auto;64,128;8,128") == [None, (8, 128), (64, 128)], "each once"
    every = bench_cli.tiles_of("all")
    assert every[0] is None
    assert len(every) == 27
    assert bench_cli.roofline_path(Path("a/layer.svg")) == Path("a/layer-roofline.svg")
