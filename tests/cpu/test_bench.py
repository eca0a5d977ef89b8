"""Shapes, floors, statistics, tables and pictures of the bench."""

from __future__ import annotations

import dataclasses
import json
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import results

from mxfp4_moe.bench import floors, kernel_records, picture, report, shapes, statistics
from mxfp4_moe.bench.kernel_records import Record
from mxfp4_moe.bench.report import OURS, Results

LARGE, SMALL = shapes.PRESETS["gpt-oss-120b"], shapes.MoEShape(name="", experts=8, top_k=2, hidden=128, intermediate=64)


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
    first, second = report.markdown(run).splitlines()[2:]
    assert first == "| 1 | 4.0 | 20.0 | m8n128_swap | m8n128_swap 20.0 | 50.0 | 13.2 | 66% | 10.0 | 2.50x |"
    assert "| 500.0 | m8n128_swap | m64n128 400.0 |" in second
    chosen = dataclasses.replace(run, measurements=[m for m in run.measurements if m.automatic or not m.ours])
    first = report.markdown(chosen).splitlines()[2]
    assert first == "| 1 | 4.0 | 20.0 | m8n128_swap | 50.0 | 13.2 | 66% | 10.0 | 2.50x |", "no tiles, no column"
    assert report.kernel_table(run).splitlines()[1].split() == ["1", "humming-w4a8", "1", "gemm", "9.0", "8.0"]
    said = report.summary(run)
    assert "marlin is left out: vLLM is not installed" in said
    assert "copy (read + write) 4,000 GB/s, bf16 matmul 800 TFLOP/s, f16 matmul 790 TFLOP/s" in said
    failed = [report.Failure(implementation="marlin", tokens=tokens, reason="no kernel") for tokens in (1, 64)]
    said = report.summary(dataclasses.replace(run, failures=failed))
    assert "marlin at 1, 64 tokens is left out: no kernel" in said


def test_what_the_automatic_choice_loses() -> None:
    run = results()
    mine = {m.tile: m.us.median for m in run.measurements if m.ours and m.tokens == 64}
    loss = 100 * (mine["m8n128_swap"] / mine["m64n128"] - 1)
    said = f"loss of auto at 64 tokens: {loss:.1f}% (m8n128_swap {mine['m8n128_swap']:.1f} us, best m64n128 "
    assert report.losses(run).startswith(said), "nothing at 1 token, where no tile was asked for"
    assert len(report.losses(run).splitlines()) == 1
    alone = dataclasses.replace(run, measurements=[m for m in run.measurements if m.automatic or not m.ours])
    assert report.losses(alone) == ""
    same = [dataclasses.replace(m, tile="m64n128") if m.ours else m for m in run.measurements]
    assert "loss of auto at 64 tokens: 0.0% (m64n128 " in report.losses(dataclasses.replace(run, measurements=same))


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
