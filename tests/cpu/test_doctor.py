"""The doctor's command, and how it gathers what it says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import fake_wheel
import pytest
from doctor_cases import CASES, ERROR, FIRST, H200, HEALTHY, OK, SECOND, WARNING, bad

from mxfp4_moe import cli
from mxfp4_moe._health import checks, environment, selftest
from mxfp4_moe._health.environment import (
    TorchFacts,
    TunedTable,
)
from mxfp4_moe._health.findings import Finding, Level, worst
from mxfp4_moe._install import wheel as _wheel


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["a tile is missing", "no torch", ""])
def test_text_json_and_exit_status_say_the_same(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = CASES[name][0] if name else HEALTHY
    monkeypatch.setattr("mxfp4_moe.cli.doctor.gather", lambda verify: env)
    engines = [checks.ok("engines", "vLLM 1.0: mxfp4-moe is not in, it is Sunday", "wait")]
    monkeypatch.setattr("mxfp4_moe.cli.doctor.engine_findings", lambda gpus: engines)
    findings = [*checks.examine(env), *engines]
    status, out = run(capsys, "--json")
    data = json.loads(out)
    assert status == worst(findings) == {"a tile is missing": 1, "no torch": 2, "": 0}[name]
    assert set(data) == {"schema", "version", "worst", "findings", "selftest"}
    assert (data["worst"], data["selftest"]) == (Level(status).name.lower(), None)
    assert data["findings"] == [finding.as_dict() for finding in findings]
    status, out = run(capsys)
    assert status == worst(findings)
    flat = " ".join(out.split())
    for finding in findings:
        step = f" -> {finding.next_step}" if finding.next_step else ""
        assert " ".join(f"{finding.level.name.lower()} {finding.subject} {finding.text}{step}".split()) in flat


def make_report(*statuses: selftest.Status) -> selftest.Report:
    results = [
        selftest.TileResult(tile=tile, status=status, reason="" if status is selftest.Status.PASSED else "wrong")
        for tile, status in zip((FIRST, SECOND), statuses, strict=True)
    ]
    device = {
        "name": H200.name,
        "capability": [9, 0],
        "multiprocessors": 132,
        "arch": "90a",
        "driver": "580.82",
        "driver_cuda": "13.0",
        "torch": "2.13.0",
        "torch_cuda": "13.0",
        "python": "3.12",
    }
    return selftest.Report(results=tuple(results), device=device)


def test_the_selftest_is_remembered_until_the_libraries_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = fake_wheel.install(tmp_path, monkeypatch, [FIRST, SECOND])
    passed, failed = selftest.Status.PASSED, selftest.Status.FAILED

    def memory() -> Finding:
        env = dataclasses.replace(HEALTHY, memories=environment.read_memories([H200, H200]))
        (finding,) = checks.check_selftest(env)
        return finding

    monkeypatch.setattr("mxfp4_moe.cli.doctor.gather", lambda verify: HEALTHY)
    assert "has not been run" in memory().text
    for statuses, level, text in (
        ((passed, passed), OK, "2 of 2 tiles passed on NVIDIA H200"),
        ((passed, failed), WARNING, "1 of 2 tiles passed on NVIDIA H200"),
    ):
        report = make_report(*statuses)
        monkeypatch.setattr(selftest, "run", lambda *_, _report=report, **__: _report)
        status, out = run(capsys, "--selftest")
        assert status == level
        assert "26 of 26" not in out, "what was remembered gives way to what has just been seen"
        assert memory().level is level
        assert memory().text.startswith(text)
    path = package / "_ext" / f"{SECOND.module}.abi3.so"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "of other libraries than these" in memory().text
    for file in (tmp_path / "cache" / "selftest").iterdir():
        for text in ("{", "[]", '{"schema": 1}', '{"schema": 1, "passed": "x", "tiles": null}'):
            file.write_text(text)
            assert "has not been run" in memory().text


def test_selftest_that_cannot_be_run_is_an_error_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wheel.install(tmp_path, monkeypatch, [FIRST, SECOND])
    monkeypatch.setattr("mxfp4_moe.cli.doctor.gather", lambda verify: HEALTHY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status, out = run(capsys, "--selftest", "--json")
    data = json.loads(out)
    (finding,) = [finding for finding in data["findings"] if finding["level"] != "ok"]
    assert (status, finding["subject"]) == (2, "self-test")
    assert "needs GPU 0 and a CUDA build of torch" in data["selftest"]["fault"]
    assert {tile["status"] for tile in data["selftest"]["tiles"]} == {"not run"}

    def broken() -> Any:
        raise ValueError("tile_manifest.toml: not valid TOML")

    monkeypatch.setattr(_wheel, "load_manifest", broken)
    status, out = run(capsys, "--selftest")
    assert status == 2
    assert "cannot be run: ValueError: tile_manifest.toml: not valid TOML" in out


def test_gathering_survives_a_manifest_that_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ValueError("tile_manifest.toml: not valid TOML")

    monkeypatch.setattr(_wheel, "load_manifest", broken)
    monkeypatch.setattr(_wheel, "read_report", lambda path=None: None)
    monkeypatch.setattr(environment, "read_torch", lambda wheel: (TorchFacts(version="2.13.0"), None))
    env = environment.gather()
    assert env.wheel is None
    assert env.faults["wheel"] == "ValueError: tile_manifest.toml: not valid TOML"
    assert (ERROR, "wheel") in bad(checks.examine(env))


@pytest.mark.parametrize(
    ("program", "facts"),
    [
        ("import os; os.abort()", {"ended": "ended with signal SIGABRT while torch was imported"}),
        ("import os; os._exit(3)", {"ended": "ended with exit status 3 while torch was imported"}),
        ("raise SystemExit('no')", {"error": "SystemExit: no"}),
        ("import time; time.sleep(60)", {"ended": "gave no answer in 1 s while torch was imported"}),
        ("print('noise'); import os; os.write(1, b'noise'); raise OSError('x')", {"error": "OSError: x"}),
    ],
)
def test_a_torch_that_does_whatever_it_likes(
    program: str, facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "TORCH_SECONDS", 1.0 if "sleep" in program else 60.0)
    torch, _ = environment.read_torch(None)
    assert torch == TorchFacts(**facts)


def test_a_line_that_a_crash_cut_short_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        'print(\'{"torch": {"version": "2.13.0"}}\'); print(\'{"load\', end="", flush=True); import os; os._exit(1)'
    )
    monkeypatch.setattr(environment, "torch_command", lambda soname, modules: [sys.executable, "-c", program])
    torch, cudart_facts = environment.read_torch(None)
    assert torch == TorchFacts(version="2.13.0", ended="ended with exit status 1 while CUDA was initialized")
    assert cudart_facts is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"device"', "null", b"\xff\xfe{}"])
def test_a_tuned_table_that_is_none(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert environment.read_tuned_table(path).fault


def test_tuned_tables_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wheel, "PACKAGE", tmp_path)
    assert environment.read_tuned() == ()
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "h200.json").write_text('{"device": "NVIDIA H200"}')
    assert environment.read_tuned() == (TunedTable(name="h200.json", device="NVIDIA H200"),)
