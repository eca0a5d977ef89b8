"""The parent: starts workers, one after the other, and makes a report of what they say. Standard library alone.

A worker sends one line of JSON per event:

    {"ready": {facts about the device}}   {"start": name}   {"result": name, "status": ..., ...}   {"fatal": reason}
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ..._install import blocklist
from ...tiles import Tile
from .. import remembered
from .report import Arithmetic, Report, Status, TileResult

START_SECONDS = 300.0  # for importing torch from a slow disk and for what must come out
TILE_SECONDS = 60.0  # a tile takes about one
_END_SECONDS = 30.0


def worker_command(device: int) -> list[str]:
    """The worker's command line, to which the tiles' names are appended."""
    return [sys.executable, "-m", "mxfp4_moe._health.selftest", "--device", str(device)]


def run(
    tiles: Sequence[Tile],
    command: Sequence[str],
    *,
    progress: Callable[[str], None],
    start_seconds: float = START_SECONDS,
    tile_seconds: float = TILE_SECONDS,
) -> Report:
    """Runs the tiles in worker processes, one after the other, whatever becomes of each.

    Args:
        tiles: in the order in which to run them.
        command: the worker's, see `worker_command`.
        progress: gets one line per tile.
        start_seconds, tile_seconds: how long a worker may take to be ready, and to finish a tile.
    """
    begin = time.monotonic()
    results: list[TileResult] = []
    device: dict[str, Any] = {}
    left = list(tiles)
    fault = ""

    def finish(result: TileResult) -> None:
        results.append(result)
        left.remove(result.tile)
        words = result.status.value + (f": {result.reason}" if result.reason else "")
        progress(f"tile {len(results)} of {len(tiles)}: {result.tile.name} {words} ({time.monotonic() - begin:.0f} s)")

    while left and not fault:
        with _worker(command, left) as worker:
            message = worker.receive(start_seconds)
            if "ready" not in message:
                fault = message.get("fatal", "the self-test's process did not begin")
                break
            device = message["ready"]
            running: Tile | None = None
            fault = "the self-test's process ended before its first tile"  # cleared by the first event of a tile
            while left:
                message = worker.receive(tile_seconds)
                if "start" in message:
                    running, fault = left[0], ""
                elif "result" in message:
                    finish(_result(left[0], message))
                    running = None
                else:
                    if running is not None:
                        finish(TileResult(tile=running, status=Status.FAILED, reason=message["fatal"]))
                    elif fault:
                        fault += f": {message['fatal']}"
                    break
    results += [TileResult(tile=tile, status=Status.NOT_RUN, reason=fault) for tile in left]
    agreed = agree(results)
    return Report(results=tuple(agreed), device=device, fault=fault, seconds=time.monotonic() - begin)


def agree(results: Sequence[TileResult]) -> list[TileResult]:
    """Fails the tiles whose outputs have other bits than those of most tiles that passed.

    Not every tile has a kernel for every kind of activations. Where as many tiles give one as the other, those are
    believed that compute what is published.
    """
    blamed: dict[Tile, list[str]] = {}
    voters = [result for result in results if result.status is Status.PASSED]
    for what in dict.fromkeys(key for result in voters for key in result.digests):
        asked = [result for result in voters if what in result.digests]
        votes = collections.Counter(result.digests[what] for result in asked)
        published = {result.digests[what] for result in asked if result.arithmetic.as_published}
        common, count = max(votes.items(), key=lambda item: (item[1], item[0] in published))
        for result in asked:
            if result.digests[what] != common:
                blamed.setdefault(result.tile, []).append(f"{what} has other bits than from {count} other tiles")
    return [_blame(result, blamed[result.tile]) if result.tile in blamed else result for result in results]


def _blame(result: TileResult, sentences: Sequence[str]) -> TileResult:
    why = sentences[0] + (f", and so have {len(sentences) - 1} more outputs" if len(sentences) > 1 else "")
    answers = {**result.answers, "agreement": why}
    return replace(result, status=Status.FAILED, reason=f"agreement: {why}", answers=answers)


def record(report: Report) -> Path | None:
    """Remembers the result, and writes the device's blocklist: what failed, and what was blocked and did not run.

    Returns:
        The list's file, None when no tile is blocked; without one, a list from before is removed.

    Raises:
        OSError: the cache directory cannot be written.
    """
    if not report.device:
        return None
    device, (major, minor) = report.device["name"], report.device["capability"]
    try:
        before = blocklist.read(device, (major, minor))
    except blocklist.BlocklistError:
        before = {}
    reasons = {result.tile: result.reason for result in report.having(Status.FAILED)}
    for result in report.having(Status.NOT_RUN):
        if result.tile.name in before:
            reasons[result.tile] = before[result.tile.name]
    path = blocklist.write(device, (major, minor), reasons)
    remembered.write(
        device,
        (major, minor),
        passed=len(report.having(Status.PASSED)),
        arithmetic=report.arithmetic(),
        explained=report.explained,
        tiles=len(report.results),
        driver=report.device.get("driver", ""),
        torch=report.device.get("torch", ""),
    )
    return path


def _result(tile: Tile, message: Mapping[str, Any]) -> TileResult:
    return TileResult(
        tile=tile,
        status=Status(message["status"]),
        reason=message["reason"],
        checks=message["checks"],
        seconds=message["seconds"],
        answers=message["answers"],
        arithmetic=Arithmetic(**{**message["arithmetic"], "rules": tuple(message["arithmetic"]["rules"])}),
        digests=message["digests"],
    )


class _Worker:
    """A worker process and the messages that it sends."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.output: IO[str] = process.stdout
        self.errors = errors
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.output:
            if line.endswith("\n"):  # the last one may be cut short
                self.lines.put(line)
        self.lines.put("")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message; {"fatal": why there is none} for a worker that ended or said nothing for so long."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return {"fatal": f"no answer in {seconds:.0f} s"}
        if line:
            message: dict[str, Any] = json.loads(line)
            return message
        try:
            code = self.process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            return {"fatal": "the process closed its output and does not end"}
        words = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        self.errors.seek(0)
        said = [line.strip() for line in self.errors if line.strip()]
        return {"fatal": f"the process ended with {words}" + (f" ({said[-1][:300]})" if said else "")}

    def end(self) -> None:
        """Kills the process; a kernel that hangs may keep it for a while, and it is then left to the system."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_END_SECONDS)
            self.reader.join(timeout=_END_SECONDS)
        if not self.reader.is_alive():
            self.output.close()


@contextlib.contextmanager
def _worker(command: Sequence[str], tiles: Sequence[Tile]) -> Iterator[_Worker]:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*command, *(tile.name for tile in tiles)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            # The folder that the user stands in is no place to import from.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        worker = _Worker(process, errors)
        try:
            yield worker
        finally:
            worker.end()
