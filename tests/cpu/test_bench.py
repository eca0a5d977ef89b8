"""What `mxfp4-moe bench` is made of, without a GPU: floors, statistics, kernel records, tables, pictures, rivals."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import exactly, results

from mxfp4_moe import cli, fused_moe, reference, topk_softmax
from mxfp4_moe.bench import floors, inputs, kernel_records, picture, report, rivals, shapes, statistics
from mxfp4_moe.bench import run as bench_run
from mxfp4_moe.bench.ceilings import Ceilings
from mxfp4_moe.bench.host import fresh_process
from mxfp4_moe.bench.kernel_records import KernelTime, Record
from mxfp4_moe.bench.report import OURS, Results
from mxfp4_moe.bench.rivals import Absent, Found, Rival, humming, marlin, packages
from mxfp4_moe.cli import bench as bench_cli

LARGE, SMALL = shapes.PRESETS["gpt-oss-120b"], shapes.MoEShape(name="", experts=8, top_k=2, hidden=128, intermediate=64)


# ---- shapes and floors -----------------------------------------------------------------------------------------------


def test_a_preset_and_sizes_in_its_place() -> None:
    assert shapes.shape_from(None) == LARGE
    assert shapes.shape_from("gpt-oss-120b", experts=128) == LARGE, "the preset's own size changes nothing"
    changed = shapes.shape_from("gpt-oss-20b", hidden=4096)
    assert (changed.name, changed.experts, changed.hidden, changed.intermediate) == ("", 32, 4096, 2880)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"experts": 0}, "experts: expected 1 to 1024, got 0"),
        ({"experts": 2}, "top_k: expected 1 to 2, got 4"),
        ({"hidden": 100}, "hidden: expected a positive multiple of 32, got 100"),
        ({"intermediate": -32}, "intermediate: expected a positive multiple of 32, got -32"),
        ({"preset": "gpt-5"}, "preset: expected one of gpt-oss-20b, gpt-oss-120b, got 'gpt-5'"),
    ],
)
def test_a_shape_that_is_none(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shapes.shape_from(sizes.pop("preset", None), **sizes)


def test_tokens() -> None:
    assert shapes.parse_tokens("64, 1,16,1") == (1, 16, 64)
    for text in ("", "1,,2", "0", "-1", "1.5", "a"):
        with pytest.raises(ValueError, match="tokens: expected positive integers"):
            shapes.parse_tokens(text)


def test_the_two_numbers_of_a_gpt_oss_layer() -> None:
    by_hand = 5760 * 1440 + 5760 * 90 + 2880 * 1440 + 2880 * 90
    assert floors.expert_bytes(LARGE) == by_hand == 13_219_200
    assert floors.flops(LARGE, 3) == 3 * 4 * 2 * (5760 * 2880 + 2880 * 2880)
    assert floors.expected_active_experts(LARGE, 0) == 0
    assert floors.expected_active_experts(LARGE, 1) == pytest.approx(4)
    assert floors.expected_active_experts(LARGE, 10_000) == pytest.approx(128)


def test_the_expected_experts_are_those_of_random_routing() -> None:
    rng = random.Random(5)
    hits = [len({e for _ in range(6) for e in rng.sample(range(SMALL.experts), SMALL.top_k)}) for _ in range(4000)]
    assert floors.expected_active_experts(SMALL, 6) == pytest.approx(sum(hits) / len(hits), rel=0.01)


def test_a_floor_is_the_larger_of_both() -> None:
    memory = floors.floor(4e9, 1e12, gb_per_s=4000, tflops=1000)
    assert (memory.memory_us, memory.math_us, memory.us, memory.bound_by) == (1000, 1000, 1000, "memory")
    assert floors.floor(4e9, 2e12, gb_per_s=4000, tflops=1000).bound_by == "math"
    with pytest.raises(ValueError, match="rates above 0"):
        floors.floor(1, 1, gb_per_s=0, tflops=1)


# ---- statistics and kernel records -----------------------------------------------------------------------------------


def test_statistics_against_torch() -> None:
    values = torch.rand(37, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    summary = statistics.summarize(values)
    expected = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert [summary.low, summary.median, summary.high] == pytest.approx(expected.tolist())
    assert (summary.fastest, summary.count) == (min(values), 37)
    assert summary.spread == pytest.approx((summary.high - summary.low) / summary.median)
    assert statistics.median([4, 1, 3, 2]) == 2.5
    with pytest.raises(ValueError, match="at least one, got none"):
        statistics.summarize([])


def test_kernels_of_a_call_by_what_lies_between_markers() -> None:
    records = [Record(name="left over", start=0, end=1)]
    for call in range(3):
        at = 100.0 * call + 10
        records += [
            Record(name="void at::bitwise_not_kernel<int>(int)", start=at, end=at + 5),
            Record(name="route", start=at + 6, end=at + 8),
            Record(name="gemm", start=at + 7, end=at + 18),  # launched early, while route runs
            Record(name="gemm", start=at + 19, end=at + 20 + call),
        ]
    random.Random(0).shuffle(records)
    times = kernel_records.kernel_times(kernel_records.split_calls(records, "bitwise_not"))
    assert [(t.name, t.duration_us, t.own_us) for t in times] == [
        ("route", 2, 2),
        ("gemm", 11, 10),
        ("gemm", 2, 3),  # with the gap before it: the parts add up to the whole
    ]


def test_calls_with_other_kernels_are_refused() -> None:
    one, two = [Record(name="a", start=0, end=1)], [Record(name="b", start=0, end=1)]
    with pytest.raises(ValueError, match=r"the same kernels in each, got \['a'\] and \['b'\]"):
        kernel_records.kernel_times([one, two])
    with pytest.raises(ValueError, match="got none"):
        kernel_records.kernel_times([])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void mxfp4_moe::gemm_kernel<mxfp4_moe::Tile_90a, (int)2>(Args<int>)", "gemm_kernel"),
        ("void (anonymous namespace)::route(RouteArgs)", "route"),
        ("_matmul_ogs_NNT_bf16", "_matmul_ogs_NNT_bf16"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert kernel_records.short_name(name) == short


# ---- results, tables, pictures ---------------------------------------------------------------------------------------


def test_figures() -> None:
    run = results()
    mine = run.automatic(64)
    assert mine is not None
    figures = run.figures(mine)
    assert figures.gb_per_s == pytest.approx(110 * 13.2192e6 / 500e-6 / 1e9)
    assert figures.percent_of_copy == pytest.approx(100 * figures.gb_per_s / 4000)
    assert figures.tflops == pytest.approx(64 * 4 * 6 * 2880**2 / 500e-6 / 1e12)
    assert figures.speedup == pytest.approx(440 / 500)
    assert figures.floor is not None
    assert figures.floor.us == pytest.approx(110 * 13.2192e6 / 4000e9 * 1e6)
    best = run.best_tile(64)
    assert best is not None
    assert best.tile == "m64n128"


def test_a_file_of_results_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = results()
    report.write(run, tmp_path / "run.json")
    again = report.read(tmp_path / "run.json")
    assert again.as_dict() == run.as_dict()
    assert report.table(again) == report.table(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"measurements": [{}]}, "KeyError"),
        ({"shape": {"name": "x"}}, "TypeError"),
        (
            {"shape": shapes.PRESETS["gpt-oss-20b"].as_dict() | {"experts": 0}},
            "ValueError: experts: expected 1 to 1024",
        ),
        (None, "Expecting"),
    ],
)
def test_a_file_that_is_none(change: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{" if change is None else json.dumps(results().as_dict() | change))
    with pytest.raises(report.ResultsError, match=words) as caught:
        report.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(report.ResultsError, match="No such file"):
        report.read(tmp_path / "none.json")


def test_the_tables() -> None:
    run = results()
    lines = [line.split() for line in report.table(run).splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        *(["1", OURS], ["1", "humming-w4a8"], ["64", OURS], ["64", OURS], ["64", "humming-w4a8"])
    ]
    assert "m8n128_swap, auto" in report.table(run)
    assert lines[1][-1] == "2.50x"
    first = report.markdown(run).splitlines()[2]
    assert first == "| 1 | 4.0 | 20.0 | m8n128_swap | 50.0 | 13.2 | 66% | 10.0 | 2.50x |"
    assert report.kernel_table(run).splitlines()[1].split() == ["1", "humming-w4a8", "1", "gemm", "9.0", "8.0"]
    said = report.summary(run)
    assert "marlin is left out: vLLM is not installed" in said
    assert "copy (read + write) 4,000 GB/s, bf16 matmul 800 TFLOP/s, f16 matmul 790 TFLOP/s" in said


@pytest.mark.parametrize("draw", [picture.time_picture, picture.roofline_picture])
def test_the_pictures(draw: Callable[[Results], str]) -> None:
    root = ElementTree.fromstring(draw(results()))
    space = "{http://www.w3.org/2000/svg}"
    marks = root.findall(f"{space}circle")
    assert len(marks) == 4, "two implementations at two numbers of tokens; of ours the automatic choice"
    size = [float(side) for side in root.attrib["viewBox"].split()[2:]]
    for mark in marks:
        assert 0 < float(mark.attrib["cx"]) < size[0]
        assert 0 < float(mark.attrib["cy"]) < size[1]
    dashed = [line for line in root.findall(f"{space}polyline") if "stroke-dasharray" in line.attrib]
    assert all(len(line.attrib["points"].split()) >= 2 for line in dashed), "roofs and floors are lines, not points"
    assert len(dashed) == 2, "one, and its place in the legend"
    words = [text.text for text in root.iter(f"{space}text")]
    assert OURS in words
    assert "humming-w4a8" in words
    assert any("NVIDIA <Test>" in word for word in words if word), "escaped, and read back"


def test_a_picture_puts_more_further_up_and_right() -> None:
    axis = picture.Axis(title="x", low=1, high=100)
    assert [axis.place(v) for v in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
    with pytest.raises(ValueError, match="0 < low < high"):
        picture.Axis(title="x", low=0, high=1)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_no_rounding_changes_who_is_picked() -> None:
    for experts in (8, 32, 128, 200):
        shape = dataclasses.replace(SMALL, experts=experts, top_k=4)
        call = inputs.call_inputs(shape, 50, torch.device("cpu"), seed=1)
        assert torch.equal(call.logits, call.logits.bfloat16().float())
        assert all(len(set(row.tolist())) == experts for row in call.logits), "no ties"
        assert call.active_experts == len(call.logits.topk(4).indices.unique())
        assert torch.equal(call.logits, inputs.call_inputs(shape, 50, torch.device("cpu"), seed=1).logits)
        assert not torch.equal(call.logits, inputs.call_inputs(shape, 50, torch.device("cpu"), seed=2).logits)


# ---- rivals ----------------------------------------------------------------------------------------------------------


def test_rivals_by_name() -> None:
    assert rivals.choose("all") == rivals.RIVALS
    assert rivals.choose("none") == ()
    assert [rival.name for rival in rivals.choose("marlin, humming-w4a8,marlin")] == ["marlin", "humming-w4a8"]
    with pytest.raises(ValueError, match="expected all, none, or some of humming-w4a8, humming-w4a16, triton_kernels"):
        rivals.choose("cutlass")


def test_every_rival_says_why_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for rival in rivals.RIVALS:
        with pytest.raises(Absent) as caught:
            rival.find([tmp_path], (12, 0))
        assert "not installed" in str(caught.value)
        assert str(tmp_path) in str(caught.value), "where it was looked for"
        assert "\n" not in str(caught.value)


def test_rivals_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for name in ("humming", "triton_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "humming" / "_version.py").write_text("__version__ = version = '0.1.19'\n")
    with pytest.raises(Absent, match="needs vLLM's routing operators, and vLLM is not installed, and no _moe_C"):
        humming.find([tmp_path], (9, 0))
    (tmp_path / "_moe_C_stable.abi3.so").touch()
    assert humming.find([tmp_path], (9, 0)) == Found(path=tmp_path / "humming", version="0.1.19")
    assert marlin.find([tmp_path], (9, 0)).path == tmp_path / "_moe_C_stable.abi3.so"
    with pytest.raises(Absent, match="compute capability 8.0 or newer, this GPU has 7.5"):
        marlin.find([tmp_path], (7, 5))
    with pytest.raises(Absent, match="has no matmul_ogs"):
        rivals.choose("triton_kernels")[0].find([tmp_path], (9, 0))
    (tmp_path / "triton_kernels" / "matmul_ogs.py").touch()
    assert rivals.choose("triton_kernels")[0].find([tmp_path], (9, 0)).path == tmp_path / "triton_kernels"
    with pytest.raises(Absent, match="this GPU has 9.0"):
        rivals.choose("flashinfer")[0].find([tmp_path], (9, 0))


def test_marlin_weights_are_where_its_fragments_want_them() -> None:
    n, k = 128, 48
    blocks = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).view(n, k)
    words = marlin.marlin_weights(blocks)
    assert words.shape == (k // 16, 2 * n)
    for tile_k, tile_n, lane, warp in ((0, 0, 0, 0), (2, 1, 31, 3), (1, 0, 13, 2)):
        word = int(words[tile_k, 128 * tile_n + 4 * lane + warp]) & 0xFFFFFFFF
        row, column = 16 * tile_k + 2 * (lane % 4), 64 * tile_n + 16 * warp + lane // 4
        fragment = [int(nibbles[column + c, row + r]) for c in (0, 8) for r in (0, 1, 8, 9)]
        assert [word >> 4 * i & 15 for i in range(8)] == [fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_marlin_scales_and_bias_are_permutations() -> None:
    columns = torch.arange(128, dtype=torch.uint8)
    scales = marlin.marlin_scales(columns[:, None].expand(128, 3).contiguous())
    assert scales[0, :8].tolist() == [0, 16, 8, 24, 32, 48, 40, 56]
    assert all(sorted(row.tolist()) == list(range(128)) for row in scales)
    bias = marlin.marlin_bias(torch.arange(64.0)[None])
    assert bias[0, :10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert sorted(bias[0].tolist()) == list(range(64))


def test_marlin_and_humming_blocks() -> None:
    assert [marlin.block_size(tokens, 4, 128) for tokens in (1, 128, 512, 4096)] == [8, 8, 32, 64]
    tuning = [(0, 64, {"block_shape": [16, 1, 1]}), (64, 256, {"block_shape": [32, 1, 1]})]
    assert [humming.block_rows(tuning, slots) for slots in (1, 64, 65, 999)] == [16, 16, 32, 64]


# ---- the run, with a clock that stands still -------------------------------------------------------------------------


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


def a_rival(name: str, factor: float, missing: str = "") -> Rival:
    """The layer by its reference, off by a factor."""

    def find(folders: Sequence[Path], capability: tuple[int, int]) -> Found:
        if missing:
            raise Absent(missing)
        return Found(path=Path("."), version="1.0")

    def prepare(found: Found, tensors: inputs.LayerTensors) -> Any:
        weights = tensors.prepared()
        if math.isnan(factor):
            raise ImportError("no such symbol\nand a traceback")

        def make_call(call: inputs.CallInputs) -> Callable[[], torch.Tensor]:
            routed = topk_softmax(call.logits, tensors.shape.top_k)
            return lambda: reference.fused_moe(call.hidden_states, *routed, weights) * factor

        return make_call

    return Rival(name=name, description=f"{name} one", find=find, prepare=prepare)


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
        ],
        kernels=True,
        **rest,
    )
    told: list[str] = []
    saved: list[Results] = []
    run = bench_run._Run(plan, torch.device("cpu"), told.append, saved.append).results()
    assert [len(before.measurements) for before in saved] == [4, 6, 6, 6, 6, 6], "kept after each step"
    assert [(m.implementation, m.tokens, m.tile, m.automatic) for m in run.measurements] == [
        *((OURS, tokens, "m8n128_swap", True) for tokens in plan.tokens),
        *((OURS, tokens, "m64n128", False) for tokens in plan.tokens),
        *(("right", tokens, "", False) for tokens in plan.tokens),
    ]
    assert [m.us.median for m in run.measurements] == [1, 5, 1, 5, 1, 5]
    assert run.measurements[-1].relative_error == pytest.approx(0.05, rel=0.1)
    assert run.rivals == {name: f"version 1.0: {name} one" for name in ("right", "wrong", "broken")}
    assert run.measurements[1].active_experts == sum(
        inputs.call_inputs(SMALL, 5, torch.device("cpu"), seed).active_experts / 2 for seed in (0, 1)
    )
    reasons = {(f.implementation, f.tokens): f.reason for f in run.failures}
    assert reasons["wrong", 5] == "it computes something else (relative error 2)"
    assert reasons["absent", None] == "it is not here"
    assert reasons["broken", None] == "its weights could not be prepared: ImportError: no such symbol"
    assert "kernels were not recorded" in reasons[OURS, 1]
    recorded = [bool(m.kernels) for m in run.measurements]
    assert recorded == [False, True, False, True, False, False], "ours, where the profiler saw any"
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


# ---- the command -----------------------------------------------------------------------------------------------------


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
    every = bench_cli.tiles_of("all")
    assert every[0] is None
    assert len(every) == 27
    assert bench_cli.roofline_path(Path("a/layer.svg")) == Path("a/layer-roofline.svg")
