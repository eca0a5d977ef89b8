"""The self-test's processes, with tiles that crash, hang and lie in place of a GPU's.

What is asked of a tile: test_selftest_devices.py. GPU: tests/gpu/test_selftest.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fake_wheel
import pytest

from mxfp4_moe._health import selftest
from mxfp4_moe._health.selftest import Report, Status, TileResult
from mxfp4_moe._install import blocklist
from mxfp4_moe.tiles import Tile

TILES = [Tile.from_mn((m, 128)) for m in (8, 16, 32, 64, 128, 256)]  # in the manifest, where the worker looks them up
NAMES = [tile.name for tile in TILES]
DEVICE, CAPABILITY = "NVIDIA GeForce RTX 5090", (12, 0)

# Does to each tile what its second argument says, and notes that it was started.
WORKER = """
import ctypes, json, os, sys, time
from mxfp4_moe._health import selftest

behaviour, log = json.loads(sys.argv[1]), sys.argv[2]
RIGHT = {"layout": "", "accuracy": "", "agreement": ""}
open(log, "a").write("started\\n")


def run_tile(tile):
    act = behaviour.get(tile.name, "pass")
    print("noise of a library", flush=True)
    ctypes.CDLL(None).puts(b"noise of C")
    ctypes.CDLL(None).fflush(None)
    if act == "exit":
        os._exit(7)
    if act == "abort":
        print("terminate called after throwing", file=sys.stderr, flush=True)
        os.abort()
    if act == "hang":
        time.sleep(600)
    if act == "raise":
        raise RuntimeError("CUDA error: an illegal instruction was encountered\\nadvice, many lines of it")
    if act == "wrong":
        return selftest.Outcome(checks=21, answers=RIGHT | {"layout": "3 of 9 values differ"})
    if act == "unloadable":
        raise selftest.NotRunError("its library is missing")
    return selftest.Outcome(checks=21, answers=RIGHT, digests={"GEMM": "other" if act == "other bits" else "bits"})


def prepare(device):
    act = behaviour.get("prepare", "pass")
    if act == "exit":
        os._exit(3)
    if act == "hang":
        time.sleep(600)
    if act == "raise":
        raise RuntimeError("needs a GPU")
    if act == "break":
        return {"name": "GPU"}, lambda tile: None
    facts = {"name": "NVIDIA GeForce RTX 5090", "capability": [12, 0], "multiprocessors": 170, "arch": "120f"}
    return facts | {"driver": "580.82.07", "driver_cuda": "13.0", "torch": "2.13.0", "torch_cuda": "13.0",
                    "python": "3.12.1"}, run_tile


sys.exit(selftest.main(sys.argv[3:], prepare))
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_wheel.install(tmp_path, monkeypatch, TILES)


class Runner:
    def __init__(self, folder: Path) -> None:
        self.script, self.log = folder / "worker.py", folder / "log"
        self.script.write_text(WORKER)
        self.lines: list[str] = []

    def __call__(self, tiles: Sequence[Tile] = TILES, seconds: float = 60, **behaviour: str) -> Report:
        command = [sys.executable, str(self.script), json.dumps(behaviour), str(self.log)]
        return selftest.run(
            tiles, command, progress=self.lines.append, start_seconds=max(seconds, 2), tile_seconds=seconds
        )

    @property
    def starts(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    return Runner(tmp_path)


def statuses(report: Report) -> dict[str, str]:
    return {result.tile.name: result.status.value for result in report.results}


# ---- processes -------------------------------------------------------------------------------------------------------


def test_all_tiles_pass_in_one_process(runner: Runner) -> None:
    report = runner()
    assert report.passed
    assert [result.tile for result in report.results] == TILES
    assert all(result.checks == 21 for result in report.results)
    assert runner.starts == 1
    assert [line.split(" (")[0] for line in runner.lines] == [
        f"tile {k} of 6: {name} passed" for k, name in enumerate(NAMES, start=1)
    ]


@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("exit", "the process ended with exit status 7 (noise of C)"),
        ("abort", "the process ended with signal SIGABRT (terminate called after throwing)"),
        ("raise", "CUDA error: an illegal instruction was encountered"),
    ],
)
def test_a_tile_that_takes_the_process_down_is_reported_and_the_others_run(
    act: str, reason: str, place: int, runner: Runner
) -> None:
    report = runner(**{NAMES[place]: act})
    (failed,) = report.having(Status.FAILED)
    assert (failed.tile, failed.reason) == (TILES[place], reason)
    assert len(report.having(Status.PASSED)) == 5
    assert [result.tile for result in report.results] == TILES
    assert not report.passed
    assert not report.fault
    assert runner.starts == (1 if place == 5 else 2), "a new process only when tiles are left"
    assert runner.lines[place].startswith(f"tile {place + 1} of 6: {NAMES[place]} failed: {reason} (")


def test_a_tile_that_hangs_is_given_up(runner: Runner) -> None:
    begin = time.monotonic()
    report = runner(seconds=2, **{NAMES[1]: "hang"})
    assert time.monotonic() - begin < 60
    (failed,) = report.having(Status.FAILED)
    assert (failed.tile, failed.reason) == (TILES[1], "no answer in 2 s")
    assert len(report.having(Status.PASSED)) == 5


def test_wrong_bits_and_missing_libraries_cost_no_process(runner: Runner) -> None:
    report = runner(**{NAMES[0]: "wrong", NAMES[3]: "unloadable"})
    assert statuses(report) == dict.fromkeys(NAMES, "passed") | {NAMES[0]: "failed", NAMES[3]: "not run"}
    assert report.results[0].reason == "layout: 3 of 9 values differ"
    assert report.results[3].reason == "its library is missing"
    assert runner.starts == 1


def test_when_every_tile_crashes_every_tile_is_reported(runner: Runner) -> None:
    report = runner(**dict.fromkeys(NAMES, "abort"))
    assert set(statuses(report).values()) == {"failed"}
    assert runner.starts == len(TILES)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        ("raise", "needs a GPU"),
        ("exit", "the process ended with exit status 3"),
        ("hang", "no answer in 2 s"),
    ],
)
def test_a_process_that_never_gets_ready_ends_the_test(act: str, fault: str, runner: Runner) -> None:
    report = runner(seconds=1, prepare=act)
    assert report.fault == fault
    assert set(statuses(report).values()) == {"not run"}
    assert not report.passed
    assert runner.starts == 1
    assert selftest.record(report) is None
    assert f"fault    {fault}" in report.text()


def test_a_command_that_is_no_worker(runner: Runner) -> None:
    for program, words in (("pass", "exit status 0"), ("print('no newline', end='')", "exit status 0")):
        report = selftest.run(TILES, [sys.executable, "-c", program], progress=runner.lines.append)
        assert report.fault == f"the process ended with {words}"


def test_a_tile_with_other_bits_than_most_fails() -> None:
    def results(*digests: str) -> list[TileResult]:
        return [
            TileResult(
                tile=tile,
                status=Status.PASSED if digest else Status.FAILED,
                answers=dict.fromkeys(selftest.BLOCKING, ""),
                digests=dict(zip(("GEMM", "layers"), digest, strict=True)) if digest else {},
            )
            for tile, digest in zip(TILES, digests, strict=True)
        ]

    same = results("aa", "aa", "", "aa", "aa", "aa")
    assert selftest.agree(same) == same
    agreed = selftest.agree(results("bb", "aa", "", "aa", "ac", "aa"))
    assert [result.status is Status.FAILED for result in agreed] == [True, False, True, False, True, False]
    words = "GEMM has other bits than from 3 other tiles, and so have 1 more outputs"
    assert agreed[0].reason == f"agreement: {words}".replace("from 3", "from 4")
    assert agreed[0].answers["agreement"] == words.replace("from 3", "from 4")
    assert agreed[4].reason == "agreement: layers has other bits than from 3 other tiles"
    assert agreed[2].reason == ""


# ---- the report and the list -----------------------------------------------------------------------------------------


def test_the_report_says_what_it_ran_on(runner: Runner) -> None:
    report = runner(**{NAMES[1]: "wrong", NAMES[2]: "other bits"})
    text = report.text()
    for words in (
        "wheel    0.1.0+cu130, machine code for sm_90a, sm_120f",
        "device   NVIDIA GeForce RTX 5090, compute capability 12.0, 170 multiprocessors",
        "cubin    sm_120f",
        "driver   580.82.07, serves CUDA 13.0",
        "torch    2.13.0 with CUDA 13.0, Python 3.12.1",
        "tiles    4 of 6 passed",
        "m16n128_swap  failed   layout: 3 of 9 values differ",
        "m32n128_swap  failed   agreement: GEMM has other bits than from 4 other tiles",
        "answers  of 6 tiles that ran, right in layout 5, accuracy 6, agreement 5",
        "m8n128_swap   passed   21 checks",
    ):
        assert words in text
    data = json.loads(json.dumps(report.as_dict()))
    assert set(data) == {"schema", "passed", "fault", "seconds", "device", "arithmetic", "tiles"}
    assert [tile["name"] for tile in data["tiles"]] == NAMES
    fields = {"name", "status", "reason", "checks", "seconds", "answers", "arithmetic", "digests"}
    assert set(data["tiles"][0]) == fields
    assert data["tiles"][1]["status"] == "failed"


def test_what_failed_is_blocked_until_all_pass(runner: Runner) -> None:
    path = selftest.record(runner(**{NAMES[0]: "abort", NAMES[4]: "wrong"}))
    assert path == blocklist.path_of(DEVICE, CAPABILITY)
    blocked = blocklist.read(DEVICE, CAPABILITY)
    assert list(blocked) == [NAMES[0], NAMES[4]]
    assert blocked[NAMES[4]] == "layout: 3 of 9 values differ"
    assert selftest.record(runner()) is None
    assert not path.exists()


def test_what_did_not_run_stays_as_it_was(runner: Runner) -> None:
    selftest.record(runner(**{NAMES[0]: "wrong"}))
    path = selftest.record(runner(**{NAMES[0]: "unloadable", NAMES[1]: "unloadable"}))
    assert blocklist.read(DEVICE, CAPABILITY) == {NAMES[0]: "layout: 3 of 9 values differ"}
    assert path is not None
    path.write_text("{")
    assert selftest.record(runner(**{NAMES[0]: "unloadable"})) is None
