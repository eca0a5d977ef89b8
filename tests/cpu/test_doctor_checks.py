"""From what was gathered to findings: each trouble with its next step, and no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from doctor_cases import ALL_SUBJECTS, CASES, ERROR, HEALTHY, OK, RESULT, WARNING, bad, change

from mxfp4_moe._health import checks
from mxfp4_moe._health.environment import (
    Environment,
    Remembered,
)
from mxfp4_moe._health.findings import Finding, as_text, worst
from mxfp4_moe._install.driver import Gpu


def test_a_healthy_environment_is_ok_in_every_subject() -> None:
    findings = checks.examine(HEALTHY)
    assert [finding.subject for finding in findings] == ALL_SUBJECTS
    assert worst(findings) is OK
    text = as_text(findings, "title")
    for words in (
        "cuda:0, NVIDIA H200, compute capability 9.0: runs the cubin for sm_90a",
        "580.82.07, which serves CUDA 13.0",
        "13.0, /site/nvidia/libcudart.so.13",
        "2.36; the wheel's libraries need 2.34 or newer",
        "2.13.0+cu130 with CUDA 13.0; the wheel's libraries need 2.10 or newer",
        "3 libraries are byte for byte what was built",
        "26 of 26 tiles passed on NVIDIA H200 on 2026-11-22, with driver 580.82 and torch 2.13.0",
        "no tile is blocked on NVIDIA H200 (/cache/h200.json would say so)",
        "h200.json is for NVIDIA H200",
        "profile mxfp4_minimal, 2 tiles for sm_90a, sm_120f, built with CUDA 13.0.88 and torch 2.13.0",
        "3 of 3 libraries load",
    ):
        assert words in text


@pytest.mark.parametrize("name", CASES)
def test_each_trouble_is_found_with_its_next_step_and_nothing_else_is(name: str) -> None:
    env, expected = CASES[name]
    findings = [finding for finding in checks.examine(env) if finding.level is not OK]
    assert [(finding.level, finding.subject) for finding in findings] == [
        (level, what) for level, what, _, _ in expected
    ]
    for finding, (_, _, text, step) in zip(findings, expected, strict=True):
        assert text in finding.text
        assert step in finding.next_step
        assert "\n" not in finding.text + finding.next_step


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (12, 1)])
def test_which_cubin_runs(capability: tuple[int, int]) -> None:
    gpu = Gpu(index=0, name="a GPU", capability=capability)
    findings = checks.examine(change(driver={"gpus": (gpu,)}))
    assert any(f"runs the cubin for sm_{'90a' if capability[0] == 9 else '120f'}" in f.text for f in findings)


def test_what_was_not_run_or_not_asked_for_is_ok_and_says_how() -> None:
    for memory, words in (
        (Remembered(device="X", path="/cache"), "has not been run on X"),
        (Remembered(device="X", path="/cache", result=RESULT), "was last run on X on 2026-11-22, with driver 580.82"),
    ):
        (finding,) = checks.check_selftest(dataclasses.replace(HEALTHY, memories=(memory,)))
        assert finding.level is OK
        assert words in finding.text
        assert "mxfp4-moe doctor --selftest" in finding.next_step
    unverified = checks.examine(dataclasses.replace(HEALTHY, verified=False))
    assert "hashes" not in [finding.subject for finding in unverified]
    assert any("--verify compares" in finding.text for finding in unverified)


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(Environment)][:7])
def test_a_part_that_cannot_be_looked_at_spoils_no_other(part: str) -> None:
    """Its fault is the finding, and the checks that would need it find nothing of their own."""
    subjects = {"python": "Python", "cudart": "", "memories": "self-test", "tuned": "tuned tables"}
    subject = subjects.get(part, part)
    env = dataclasses.replace(HEALTHY, **{part: None}, faults={subject: "OSError: no"} if subject else {})
    findings = checks.examine(env)
    expected = [(ERROR, subject)] if subject else [(WARNING, "CUDA runtime")]
    assert bad(findings) == expected
    if subject:
        assert any(finding.text == "cannot be examined: OSError: no" for finding in findings)


def test_a_fault_that_is_known_has_its_own_next_step() -> None:
    """As on a Python 3.10 without tomli, where the manifest cannot be read."""
    env = dataclasses.replace(HEALTHY, wheel=None, faults={"wheel": "ModuleNotFoundError: No module named 'tomli'"})
    (finding,) = [finding for finding in checks.examine(env) if finding.level is not OK]
    assert "a package that mxfp4-moe or torch needs is not installed" in finding.text
    assert finding.next_step == "pip install mxfp4-moe, without --no-deps"


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(env: Environment) -> Iterator[Finding]:
        raise KeyError("x")

    monkeypatch.setattr(checks, "CHECKS", (("thing", broken), *checks.CHECKS))
    findings = checks.examine(HEALTHY)
    assert bad(findings) == [(ERROR, "thing")]
    assert findings[0].text == "cannot be examined: KeyError: 'x'"
    assert findings[0].next_step
