"""`mxfp4-moe bench-routers`: its rules, its rivals and a run with a clock that stands still. On CPU tensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import router_cases as cases
import torch
from bench_results import exactly

from mxfp4_moe import cli, select_experts
from mxfp4_moe.bench import routers, statistics
from mxfp4_moe.bench.report import OURS
from mxfp4_moe.bench.rivals.packages import Absent
from mxfp4_moe.routers import ScoringFunc

CPU = torch.device("cpu")


class StillTimer:
    """Calls what it is given once, and says that it took a microsecond per token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, calls: Sequence[Callable[[], Any]], replays: int) -> statistics.Summary:
        return exactly(float(len(calls[-1]()[0])))


def test_a_rule_for_each_router_of_the_models() -> None:
    found = {rule.model: rule for rule in routers.rules(CPU)}
    assert list(found) == [
        *("gpt-oss-20b", "gpt-oss-120b", "DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "MiniMax-M3", "MiMo-V2"),
        *("Ling / Bailing V3", "Kimi-K3", "Qwen3-MoE, quantized here"),
    ]
    assert found["Ling / Bailing V3"].router.num_expert_group == 8
    assert found["Kimi-K3"].experts == 896
    bias = found["MiMo-V2"].router.e_score_correction_bias
    assert bias is not None
    assert bias.shape == (256,)
    assert [rule.model for rule in routers.rules(CPU, ["Kimi-K3"])] == ["Kimi-K3"]
    with pytest.raises(ValueError, match="models: expected all, or some of gpt-oss-20b; .*, got 'x'"):
        routers.rules(CPU, ["x"])


@pytest.mark.parametrize("name", list(cases.ROUTERS))
def test_torch_by_the_definition_is_the_same_router(name: str) -> None:
    experts, router = cases.router_named(name)
    logits = cases.logits_of(40, experts, torch.float32)
    theirs = routers._dense(routers.by_definition(logits, router), experts)
    ours = routers._dense(select_experts(logits, router), experts)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-7)


class FakeOps:
    """What vLLM's library does, by the definition; remembers which kernel was called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _choose(
        self, kind: str, weights: Any, ids: Any, logits: Any, renormalize: bool, bias: Any, factor: float
    ) -> None:
        scoring = {"softmax": "softmax", "sigmoid": "sigmoid"}.get(kind, "sqrtsoftplus")
        router = routers.Router(
            top_k=ids.shape[1],
            scoring_func=scoring,
            e_score_correction_bias=bias,
            renormalize=renormalize,
            routed_scaling_factor=factor,
        )
        found = select_experts(logits, router)
        weights.copy_(found[0])
        ids.copy_(found[1])
        self.called.append(kind)

    def topk_softmax(self, weights: Any, ids: Any, _: Any, logits: Any, renormalize: bool, bias: Any) -> None:
        self._choose("softmax", weights, ids, logits, renormalize, bias, 1.0)

    def topk_sigmoid(self, weights: Any, ids: Any, _: Any, logits: Any, renormalize: bool, bias: Any) -> None:
        self._choose("sigmoid", weights, ids, logits, renormalize, bias, 1.0)

    def topk_hash_softplus_sqrt(
        self, weights: Any, ids: Any, _: Any, logits: Any, renormalize: bool, factor: float, bias: Any, *rest: None
    ) -> None:
        assert rest == (None, None)
        self._choose("softplus", weights, ids, logits, renormalize, bias, factor)

    def grouped_topk(
        self, logits: Any, groups: int, kept: int, top_k: int, renormalize: bool, factor: float, bias: Any, scoring: int
    ) -> Any:
        assert scoring == 1
        self.called.append("grouped")
        rest = {"renormalize": renormalize, "routed_scaling_factor": factor, "e_score_correction_bias": bias}
        return select_experts(
            logits,
            routers.Router(
                top_k=top_k, scoring_func=ScoringFunc.SIGMOID, num_expert_group=groups, topk_group=kept, **rest
            ),
        )


def plan_of(rivals: Sequence[str]) -> routers.Plan:
    return routers.Plan(
        rules=routers.rules(CPU),
        tokens=(1, 5),
        rivals=rivals,
        rival_folders=[],
        replays=1,
        inputs=2,
        environment={"device": "none"},
    )


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ops = FakeOps()

    def find(name: str, folders: Sequence[Path]) -> Any:
        if name == routers.COMPILED:  # here one that computes something else
            return "1", lambda logits, router: lambda: routers.by_definition(-logits, router)
        return ("2", routers.vllm_calls(ops)) if name == routers.VLLM else original(name, folders)

    original = routers.find
    monkeypatch.setattr(routers, "Timer", StillTimer)
    monkeypatch.setattr(routers, "find", find)
    lines: list[str] = []
    results = routers.run(plan_of(tuple(routers.DESCRIPTIONS)), CPU, lines.append)
    done = {(m.implementation, m.rule.model, m.tokens): m for m in results.measurements}
    count = 2 * len(routers.rules(CPU))
    assert len(done) == len(results.measurements) == 3 * count
    assert {name for name, *_ in done} == {OURS, routers.DEFINITION, routers.VLLM}
    assert all(m.us.median == m.tokens for m in done.values())
    assert all((m.relative_error is None) == (m.implementation == OURS) for m in done.values())
    assert set(ops.called) == {"softmax", "sigmoid", "softplus", "grouped"}
    assert len(results.failures) == count
    assert all("it computes something else (relative error" in failure.reason for failure in results.failures)
    assert len(lines) == 4 * count

    routers.write(results, tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["schema"] == routers.SCHEMA
    assert data["measurements"][0]["router"]["scoring_func"] == "softmax"
    assert data["rivals"][routers.VLLM].startswith("version 2: vLLM's kernels")
    table = results.table().splitlines()
    assert table[0] == "| router | tokens | mxfp4-moe | torch | vllm |"
    assert table[2] == "| gpt-oss-20b | 1 | 1.0 | 1.0 | 1.0 |"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "Timer", StillTimer)

    def find(name: str, folders: Sequence[Path]) -> Any:
        raise Absent("vLLM is not installed")

    monkeypatch.setattr(routers, "find", find)
    results = routers.run(plan_of(["vllm"]), CPU, lambda line: None)
    assert [(failure.implementation, failure.reason) for failure in results.failures] == [
        ("vllm", "vLLM is not installed")
    ]
    monkeypatch.setattr(routers, "find", lambda name, folders: ("1", lambda logits, router: 1 / 0))
    results = routers.run(dataclasses.replace(plan_of(["torch"]), tokens=(3,)), CPU, lambda line: None)
    assert "ZeroDivisionError: division by zero" in results.failures[0].reason
    assert results.failures[0].tokens == 3


def test_rivals_by_name() -> None:
    assert routers.choose("all") == ("torch", "torch.compile", "vllm")
    assert routers.choose("none") == ()
    assert routers.choose("vllm, torch") == ("vllm", "torch")
    with pytest.raises(
        ValueError, match=r"rivals: expected all, none, or some of torch, torch\.compile, vllm, got 'x'"
    ):
        routers.choose("x")


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["bench-routers"]) == 2
    assert capsys.readouterr().err.startswith("mxfp4-moe bench-routers: a GPU is needed")
