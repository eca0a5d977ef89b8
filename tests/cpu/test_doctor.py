"""`mxfp4-moe doctor`: its checks on environments as data, then itself in environments that are broken for real."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_wheel
import pytest
from broken import CAPABILITY, CPU_TORCH, GPU, NO_CUDA, OLD_TORCH, Place, cudart, make_driver

from mxfp4_moe import cli
from mxfp4_moe._health import checks, environment, remembered, selftest
from mxfp4_moe._health.environment import (
    CudartFacts,
    DriverFacts,
    Environment,
    Library,
    PythonFacts,
    Remembered,
    TorchFacts,
    TunedTable,
    WheelFacts,
)
from mxfp4_moe._health.findings import Finding, Level, as_text, worst
from mxfp4_moe._install import blocklist, driver
from mxfp4_moe._install import wheel as _wheel
from mxfp4_moe._install.driver import Gpu
from mxfp4_moe.tiles import Tile, load_manifest

OK, WARNING, ERROR = Level.OK, Level.WARNING, Level.ERROR
FIRST, SECOND = load_manifest().tiles[:2]
H200 = Gpu(index=0, name="NVIDIA H200", capability=(9, 0))
SPARK = Gpu(index=1, name="NVIDIA GB10", capability=(12, 1))
OLD_GPU = Gpu(index=2, name="NVIDIA GeForce RTX 4090", capability=(8, 9))


# ---- the checks ------------------------------------------------------------------------------------------------------

MODULES = ("moe", FIRST.module, SECOND.module)
RESULT = remembered.Result(passed=26, tiles=26, driver="580.82", torch="2.13.0", date="2026-11-22", fingerprint="these")
HEALTHY = Environment(
    python=PythonFacts(
        version="3.12.4",
        implementation="CPython",
        free_threaded=False,
        libc=("glibc", "2.36"),
        executable="/bin/python",
    ),
    wheel=WheelFacts(
        version="0.1.0+cu130",
        path="/site/mxfp4_moe",
        has_report=True,
        profile="mxfp4_minimal",
        archs=("90a", "120f"),
        tiles=2,
        cuda="13.0.88",
        torch="2.13.0",
        torch_floor="2.10",
        python_floor="3.10",
        libraries=tuple(Library(module=module, fault="", built_sha256="ab", sha256="ab") for module in MODULES),
        cudart="libcudart.so.13",
        glibc_floor="2.34",
    ),
    torch=TorchFacts(
        version="2.13.0+cu130",
        cuda="13.0",
        path="/site/torch",
        cudart="/site/nvidia/libcudart.so.13",
        gpus=(H200.name,),
        loaded=dict.fromkeys(MODULES, ""),
    ),
    cudart=CudartFacts(soname="libcudart.so.13", path="/site/nvidia/libcudart.so.13", version="13.0"),
    driver=DriverFacts(version="580.82.07", cuda="13.0", gpus=(H200,)),
    memories=(Remembered(device=H200.name, path="/cache/h200.json", result=RESULT, same_libraries=True),),
    tuned=(TunedTable(name="h200.json", device=H200.name),),
    verified=True,
    cache_dir="/cache",
)
ALL_SUBJECTS = [subject for subject, _ in checks.CHECKS]


def change(**parts: dict[str, Any] | None) -> Environment:
    """The healthy environment with some fields of its parts changed; None takes the whole part away."""
    changed = {}
    for name, fields in parts.items():
        changed[name] = None if fields is None else dataclasses.replace(getattr(HEALTHY, name), **fields)
    return dataclasses.replace(HEALTHY, **changed)


def bad(findings: list[Finding]) -> list[tuple[Level, str]]:
    return [(finding.level, finding.subject) for finding in findings if finding.level is not OK]


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


def libraries(**changes: dict[str, str]) -> dict[str, Any]:
    """The wheel's libraries with changed fields, by module."""
    assert HEALTHY.wheel
    return {
        "libraries": tuple(
            dataclasses.replace(library, **changes.get(library.module, {})) for library in HEALTHY.wheel.libraries
        )
    }


NO_CUDART = "libcudart.so.13: cannot open shared object file: No such file or directory"
CPU = {"version": "2.13.0+cpu", "cuda": "", "gpus": (), "loaded": {}, "cudart": ""}
NO_GPU = {"version": "unknown", "cuda": "none", "gpus": ()}
REINSTALL = "reinstall the wheel: pip install --force-reinstall"

CASES: dict[str, tuple[Environment, list[tuple[Level, str, str, str]]]] = {
    "free-threaded Python": (
        change(python={"free_threaded": True}),
        [(ERROR, "Python", "free-threaded, does not load", "an ordinary build of CPython 3.10 or newer")],
    ),
    "PyPy": (change(python={"implementation": "PyPy"}), [(ERROR, "Python", "PyPy", "CPython")]),
    "old Python": (change(python={"version": "3.9.18"}), [(ERROR, "Python", "needs 3.10 or newer", "CPython 3.10")]),
    "old glibc": (
        change(python={"libc": ("glibc", "2.31")}),
        [(ERROR, "glibc", "2.31: the wheel's libraries need 2.34", "newer Linux")],
    ),
    "musl": (change(python={"libc": ("", "")}), [(WARNING, "glibc", "unknown: the wheel needs glibc", "newer Linux")]),
    "no torch": (
        change(
            torch={"error": "ModuleNotFoundError: No module named 'torch'", "version": "", "cuda": "", "loaded": {}}
        ),
        [(ERROR, "torch", "torch is not installed", "pip install 'torch>=2.10', in a build for CUDA 13")],
    ),
    "broken torch": (
        change(torch={"error": "ImportError: libcudnn.so.9: cannot open", "version": "", "cuda": "", "loaded": {}}),
        [(ERROR, "torch", "(ImportError: libcudnn.so.9", "reinstall torch")],
    ),
    "torch that crashes": (
        change(torch={"version": "", "cuda": "", "loaded": {}, "ended": "ended with signal SIGILL"}, cudart=None),
        [
            (ERROR, "torch", "the process that imports it ended with signal SIGILL", "reinstall torch"),
            (WARNING, "CUDA runtime", "was not looked for", "torch"),
        ],
    ),
    "no torch, and a driver with a trouble of its own": (
        change(
            torch={"error": "ModuleNotFoundError: No module named 'torch'", "version": "", "cuda": "", "loaded": {}},
            driver={"gpus": (), "error": "cuInit: unknown error (999)"},
        ),
        [
            (ERROR, "driver", "580.82.07, which serves CUDA 13.0: cuInit: unknown error (999)", "nvidia-smi"),
            (ERROR, "torch", "torch is not installed", "pip install 'torch>=2.10'"),
        ],
    ),
    "old torch": (
        change(torch={"version": "2.9.1+cu130", "loaded": {"moe": "undefined symbol: torch_list_push_back"}}),
        [(ERROR, "torch", "2.9.1+cu130 with CUDA 13.0: older than 2.10", "pip install --upgrade 'torch>=2.10'")],
    ),
    "CPU torch with a GPU": (
        change(torch=CPU),
        [(ERROR, "torch", "sees no GPU, and there is one", "a torch 2.10 or newer that is built for CUDA 13")],
    ),
    "CPU torch, no GPU, no runtime": (
        dataclasses.replace(
            change(torch=CPU, driver=NO_GPU, cudart={"error": NO_CUDART, "version": "", "path": ""}), memories=()
        ),
        [
            (WARNING, "driver", "no NVIDIA driver here", "CPU tensors work, slowly"),
            (WARNING, "torch", "with no CUDA", "CPU tensors work, slowly; for a GPU install a torch"),
        ],
    ),
    "ROCm torch": (change(torch=CPU | {"hip": "6.4"}), [(ERROR, "torch", "with ROCm 6.4", "built for CUDA 13")]),
    "no CUDA runtime": (
        change(
            cudart={"error": NO_CUDART, "version": "", "path": ""}, torch={"loaded": dict.fromkeys(MODULES, NO_CUDART)}
        ),
        [
            (ERROR, "CUDA runtime", "is not found (libcudart.so.13: ", "LD_LIBRARY_PATH"),
            (ERROR, "loading", "(and 2 more for the same reason)", "LD_LIBRARY_PATH"),
        ],
    ),
    "a wheel for another CUDA": (
        change(
            cudart={"error": NO_CUDART, "version": "", "path": ""},
            torch={"cuda": "12.8", "loaded": {"moe": NO_CUDART}},
        ),
        [
            (ERROR, "CUDA runtime", "this torch brings that of CUDA 12", "or the mxfp4-moe wheel for CUDA 12"),
            (ERROR, "loading", "moe: the wheel needs", "install a torch that is built for CUDA 13"),
        ],
    ),
    "two CUDA runtimes": (
        change(torch={"cuda": "12.8", "cudart": "/site/libcudart.so.12"}),
        [(WARNING, "CUDA runtime", "torch brings another, /site/libcudart.so.12", "so that both use one")],
    ),
    "old driver": (
        change(driver={"cuda": "12.4"}, torch={"gpus": (), "gpu_error": "The NVIDIA driver on your system is too old"}),
        [
            (ERROR, "driver", "too old for the wheel, which is for CUDA 13", "one that serves CUDA 13"),
            (ERROR, "GPU", "torch sees 0 of 1: the NVIDIA driver is older", "update the NVIDIA driver"),
        ],
    ),
    "driver in two versions": (
        change(
            driver={
                "gpus": (),
                "error": "cuInit: system has unsupported display driver / cuda driver combination (803)",
            }
        ),
        [(ERROR, "driver", "not of one version", "restart the machine")],
    ),
    "no GPU shown": (
        change(driver={"gpus": ()}, torch={"gpus": ()}),
        [(WARNING, "GPU", "the driver shows this process none", "CUDA_VISIBLE_DEVICES")],
    ),
    "GPU of another arch": (
        change(driver={"gpus": (OLD_GPU,)}),
        [(ERROR, "GPU", "RTX 4090, compute capability 8.9: no cubin", "this wheel runs on sm_90a, sm_120f; CPU")],
    ),
    "GPU of another arch beside a good one": (
        change(driver={"gpus": (SPARK, OLD_GPU)}, torch={"gpus": ("a", "b")}),
        [(WARNING, "GPU", "compute capability 8.9: no cubin", "this wheel runs on sm_90a, sm_120f")],
    ),
    "GPU that torch does not see": (
        change(driver={"gpus": (H200, SPARK)}),
        [(WARNING, "GPU", "torch sees 1 of 2", "CUDA_VISIBLE_DEVICES")],
    ),
    "two owners": (
        change(wheel={"conflict": "a 1 and b 1 are both installed in /site: pip uninstall a b, then install one"}),
        [(ERROR, "wheel", "a 1 and b 1 are both installed in /site", "pip uninstall a b, then install one")],
    ),
    "no report": (change(wheel={"has_report": False}), [(ERROR, "wheel", "a damaged install", REINSTALL)]),
    "a tile is missing": (
        change(wheel=libraries(**{FIRST.module: {"fault": f"{FIRST.module}.abi3.so is missing", "sha256": ""}})),
        [(WARNING, "libraries", "is missing", REINSTALL)],
    ),
    "the layer is missing": (
        change(wheel=libraries(moe={"fault": "moe.abi3.so is missing", "sha256": ""})),
        [(ERROR, "libraries", "moe.abi3.so is missing", REINSTALL)],
    ),
    "all tiles are missing": (
        change(wheel=libraries(**{module: {"fault": f"{module} is missing"} for module in MODULES[1:]})),
        [(ERROR, "libraries", f"{FIRST.module} is missing; {SECOND.module} is missing", REINSTALL)],
    ),
    "an edited tile": (
        change(wheel=libraries(**{FIRST.module: {"sha256": "cd"}})),
        [(ERROR, "hashes", f"1 of 3 libraries are not what was built: {FIRST.module}.abi3.so", REINSTALL)],
    ),
    "no hashes in the report": (
        change(wheel=libraries(moe={"built_sha256": ""})),
        [(WARNING, "hashes", "1 of 3 libraries have no hash", REINSTALL)],
    ),
    "a tile does not load": (
        change(
            torch={"loaded": dict.fromkeys(MODULES, "") | {FIRST.module: f"{FIRST.module}.abi3.so: file too short"}}
        ),
        [(WARNING, "loading", f"{FIRST.module}: a file of the wheel is not what was built", REINSTALL)],
    ),
    "a message that nobody knows": (
        change(torch={"loaded": dict.fromkeys(MODULES, "") | {"moe": "the moon is full"}}),
        [(ERROR, "loading", "moe: the moon is full", REINSTALL)],
    ),
    "a crash while loading": (
        change(torch={"loaded": {"moe": ""}, "ended": f"ended with signal SIGSEGV while {FIRST.module} was loaded"}),
        [(ERROR, "loading", f"SIGSEGV while {FIRST.module} was loaded", "open an issue")],
    ),
    "a self-test that failed": (
        dataclasses.replace(
            HEALTHY,
            memories=(
                Remembered(
                    device=H200.name,
                    path="/cache/h200.json",
                    blocked={FIRST.name: "3 of 9 values differ"},
                    result=dataclasses.replace(RESULT, passed=25),
                    same_libraries=True,
                ),
            ),
        ),
        [
            (WARNING, "self-test", "25 of 26 tiles passed", "calls use the tiles that passed"),
            (WARNING, "blocklist", f"{FIRST.name} failed the self-test on NVIDIA H200: 3 of 9 values", "--selftest"),
        ],
    ),
    "a foreign blocklist": (
        dataclasses.replace(
            HEALTHY, memories=(Remembered(device=H200.name, path="/cache", blocklist_fault="is for another wheel"),)
        ),
        [(WARNING, "blocklist", "is for another wheel", "`mxfp4-moe doctor --selftest` to write a new one")],
    ),
    "no home": (
        dataclasses.replace(HEALTHY, cache_dir=""),
        [(WARNING, "blocklist", "this user has no home", "set MXFP4_MOE_CACHE_DIR to a folder")],
    ),
    "a damaged tuned table": (
        dataclasses.replace(HEALTHY, tuned=(TunedTable(name="x.json", fault="KeyError: 'device'"),)),
        [(WARNING, "tuned tables", "x.json cannot be read (KeyError: 'device')", REINSTALL)],
    ),
}


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


# ---- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["a tile is missing", "no torch", ""])
def test_text_json_and_exit_status_say_the_same(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = CASES[name][0] if name else HEALTHY
    monkeypatch.setattr("mxfp4_moe.cli.doctor.gather", lambda verify: env)
    findings = checks.examine(env)
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


# ---- gathering -------------------------------------------------------------------------------------------------------


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


# ---- environments that are broken for real ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver with one GPU, and the CUDA runtime, as LD_LIBRARY_PATH would have them."""
    folder = tmp_path_factory.mktemp("libraries")
    make_driver(folder)
    (folder / cudart().name).symlink_to(cudart())
    return folder


@pytest.fixture
def place(tmp_path: Path, stubs: Path) -> Place:
    return Place(folder=tmp_path, libraries=stubs)


def expect(place: Place, status: int, *expected: tuple[str, str, str, str], arguments: tuple[str, ...] = ()) -> None:
    """The doctor's exit status and all its findings that are not ok: level, subject, words, next step."""
    code, data = place.doctor(*arguments)
    findings = [finding for finding in data["findings"] if finding["level"] != "ok"]
    assert [(f["level"], f["subject"]) for f in findings] == [(level, subject) for level, subject, _, _ in expected]
    assert code == status
    for finding, (_, _, text, step) in zip(findings, expected, strict=True):
        assert text in finding["text"]
        assert step in finding["next_step"]


def test_all_is_well(place: Place) -> None:
    code, data = place.doctor("--verify")
    assert (code, data["worst"]) == (0, "ok"), data
    assert [finding["subject"] for finding in data["findings"]] == ALL_SUBJECTS
    texts = {finding["subject"]: finding["text"] for finding in data["findings"]}
    assert texts["GPU"] == f"cuda:0, {GPU}, compute capability 12.0: runs the cubin for sm_120f"
    assert texts["driver"].endswith("which serves CUDA 13.0")
    assert cudart().resolve().name in texts["CUDA runtime"]
    count = len(load_manifest().tiles) + 1
    assert texts["loading"] == f"{count} of {count} libraries load"


def test_without_torch(place: Place) -> None:
    place.set_torch("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    step = "pip install 'torch>=2.10', in a build for CUDA 13"
    expect(place, 2, ("error", "torch", "torch is not installed in this Python", step))
    use = place.run("-c", "import mxfp4_moe; mxfp4_moe.fused_moe")
    last = use.stderr.splitlines()[-1]
    assert last.startswith("ImportError: mxfp4_moe cannot be used (ModuleNotFoundError: No module named 'torch')")
    assert step in last
    assert last.endswith("`mxfp4-moe doctor` says more")
    assert place.run("-m", "mxfp4_moe.cli", "tiles").returncode == 0


def test_with_an_old_torch(place: Place) -> None:
    place.set_torch(OLD_TORCH)
    words, step = "2.9.1+cu130 with CUDA 13.0: older than 2.10", "pip install --upgrade 'torch>=2.10'"
    expect(place, 2, ("error", "torch", words, step))


def test_with_a_cpu_torch(place: Place) -> None:
    place.set_torch(CPU_TORCH)
    words = "with no CUDA: it sees no GPU, and there is one here"
    expect(place, 2, ("error", "torch", words, "install a torch 2.10 or newer that is built for CUDA 13"))


def test_without_the_cuda_runtime(place: Place) -> None:
    place.set_cuda_of_wheel(NO_CUDA)
    place.env["TEST_TORCH_CUDA"] = f"{NO_CUDA}.0"
    missing = f"libcudart.so.{NO_CUDA}: cannot open shared object file: No such file or directory"
    step = f"reinstall torch for CUDA {NO_CUDA} with what it depends on"
    expect(
        place,
        2,
        ("error", "driver", f"too old for the wheel, which is for CUDA {NO_CUDA}", f"serves CUDA {NO_CUDA}"),
        ("error", "CUDA runtime", f"is not found ({missing})", step),
        ("error", "loading", f"is not found ({missing}) (and {len(load_manifest().tiles)} more", step),
    )
    place.env["TEST_TORCH_CUDA"] = "13.0"
    step = f"install a torch that is built for CUDA {NO_CUDA}, or the mxfp4-moe wheel for CUDA 13"
    expect(
        place,
        2,
        ("error", "driver", "too old for the wheel", ""),
        ("error", "CUDA runtime", f"this torch brings that of CUDA 13 ({missing})", step),
        ("error", "loading", f"this torch brings that of CUDA 13 ({missing})", step),
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # inside the machine code for the GPU
    path.write_bytes(data)


def test_with_a_truncated_library(place: Place) -> None:
    cut(place.library(FIRST.module))
    words, step = f"{FIRST.module}.abi3.so is truncated", "reinstall the wheel"
    expect(place, 1, ("warning", "libraries", words, step))
    cut(place.library("moe"))
    expect(
        place, 2, ("error", "libraries", f"moe.abi3.so is truncated: {place.library('moe').stat().st_size:,} of", step)
    )


def test_with_an_edited_library(place: Place) -> None:
    flip(place.library(FIRST.module))
    expect(place, 0)
    words = f"1 of {len(load_manifest().tiles) + 1} libraries are not what was built: {FIRST.module}.abi3.so"
    expect(place, 2, ("error", "hashes", words, "reinstall the wheel"), arguments=("--verify",))


def test_with_a_foreign_blocklist(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", place.env["MXFP4_MOE_CACHE_DIR"])
    path = blocklist.write(GPU, CAPABILITY, {FIRST: "3 of 9 values differ"})
    assert path is not None
    expect(place, 1, ("warning", "blocklist", f"{FIRST.name} failed the self-test on {GPU}: 3 of 9", "--selftest"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wheel": "0.0.9"}))
    step = "run `mxfp4-moe doctor --selftest` to write a new one"
    expect(place, 1, ("warning", "blocklist", "for another wheel", step))


def test_the_driver_is_asked_without_torch(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], Any] = driver.ctypes.CDLL
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: real(str(stubs / name)))
    assert driver.driver_cuda() == "13.0"
    assert driver.driver_gpus() == (Gpu(index=0, name=GPU, capability=CAPABILITY),)


def test_a_driver_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        status = 803

        def cuInit(self, flags: int) -> int:
            return self.status

        def cuGetErrorString(self, status: int, text: Any) -> int:
            text._obj.value = b"system has unsupported display driver / cuda driver combination"
            return 0

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Refusing())
    with pytest.raises(RuntimeError, match=r"^cuInit: system has unsupported .* combination \(803\)$"):
        driver.driver_gpus()
    facts = environment.read_driver()
    assert facts.error.startswith("cuInit: system has unsupported")
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match=r"^libcuda\.so\.1 has no cuInit: it is not the NVIDIA driver's$"):
        driver.driver_gpus()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Refusing())
    monkeypatch.setattr(Refusing, "status", 100)
    assert driver.driver_gpus() == (), "a driver without a GPU is no fault"


def test_where_the_libraries_stand_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash that the build wrote is looked up for each module, and a report without one is no crash."""
    fake_wheel.install(tmp_path, monkeypatch, [FIRST, Tile.from_mn((128, 128))])
    assert _wheel.built_sha256(FIRST.module) == "0" * 64
    assert _wheel.built_sha256("moe") is None
    wheel = environment.read_wheel(verify=True)
    assert next(library.module for library in wheel.libraries) == "moe"
    assert (wheel.cudart, wheel.glibc_floor) == ("", "")
