"""The self-test: every tile of the installed wheel, on the GPU that is here, against the oracle. Seconds, not minutes.

A tile that is wrong for a GPU may do more than compute wrongly: an illegal instruction ends the CUDA context, a missing
barrier never returns. So tiles run in a worker process (`python -m mxfp4_moe._health.selftest TILE ...`), which is
started anew behind a tile that took it down. The parent only reads what the worker says, one line of JSON per event:

    {"ready": {facts about the device}}   {"start": name}   {"result": name, "status": ..., ...}   {"fatal": reason}

The parent half needs the standard library alone; torch is imported in the worker.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .._install import blocklist, driver, wheel
from .._install.troubles import words
from ..tiles import Tile, load_manifest
from . import remembered
from .child import channel

if TYPE_CHECKING:
    import torch

START_SECONDS = 300.0  # for importing torch from a slow disk and for the oracle
TILE_SECONDS = 60.0  # a tile takes about one
_END_SECONDS = 30.0
_SCHEMA = 1

# (K, N, scales over E8M0's whole range): tails in K and N, fewer and more pipeline steps than stages. Rows have tails
# of every kind, and experts without rows, in each of them (problems.ROWS_PER_EXPERT).
_GEMMS = ((32, 16, False), (96, 80, False), (160, 144, True), (640, 272, False), (2880, 512, False))
_LAYERS = ((1, 2), (33, 3), (200, 4))  # tokens, top_k
_LAYER_SIZE = (8, 160, 96)  # experts, hidden size, intermediate size
_LAYER_TOLERANCE = 5e-3  # both sides quantize the same values twice; what is left is the last bits of exp


class Status(str, Enum):
    PASSED = "passed"
    FAILED = "failed"  # it ran, and gave wrong bits, an error, or no end
    NOT_RUN = "not run"  # it did not load, or there was no memory: nothing is known about the tile


@dataclass(frozen=True, kw_only=True)
class TileResult:
    """What became of one tile; `reason` is empty when it passed."""

    tile: Tile
    status: Status
    reason: str = ""
    checks: int = 0  # comparisons made
    seconds: float = 0.0
    layer: str = ""  # SHA-256 of the layers' outputs, the same for all tiles


@dataclass(frozen=True, kw_only=True)
class Report:
    """All tiles, and what they ran on. `fault` says why no worker came up; then `device` is empty."""

    results: tuple[TileResult, ...]
    device: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    seconds: float = 0.0

    def having(self, status: Status) -> list[TileResult]:
        return [result for result in self.results if result.status is status]

    @property
    def passed(self) -> bool:
        return not self.fault and all(result.status is Status.PASSED for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        tiles = [
            {"name": result.tile.name}
            | {key: value for key, value in asdict(result).items() if key not in ("tile", "status")}
            | {"status": result.status.value}
            for result in self.results
        ]
        return {
            "schema": _SCHEMA,
            "passed": self.passed,
            "fault": self.fault,
            "seconds": round(self.seconds, 2),
            "device": dict(self.device),
            "tiles": tiles,
        }

    def text(self) -> str:
        """The report to paste into an issue."""
        device = collections.defaultdict(lambda: "unknown", self.device)
        lines = ["mxfp4-moe self-test", f"  wheel    {wheel.version()}, machine code for {_sm(wheel.built_archs())}"]
        if self.device:
            major, minor = device["capability"]
            lines += [
                f"  device   {device['name']}, compute capability {major}.{minor}, "
                f"{device['multiprocessors']} multiprocessors",
                f"  cubin    sm_{device['arch']}",
                f"  driver   {device['driver']}, serves CUDA {device['driver_cuda']}",
                f"  torch    {device['torch']} with CUDA {device['torch_cuda']}, Python {device['python']}",
            ]
        lines.append(
            f"  tiles    {len(self.having(Status.PASSED))} of {len(self.results)} passed in {self.seconds:.0f} s"
        )
        if self.fault:
            lines.append(f"  fault    {self.fault}")
        shown = self.results if self.device else ()
        width = max((len(result.tile.name) for result in shown), default=0)
        for result in shown:
            words = f"{result.checks} checks, {result.seconds:.1f} s"
            if result.status is not Status.PASSED:
                words = result.reason
            lines.append(f"  {result.tile.name.ljust(width)}  {result.status.value.ljust(7)}  {words}")
        return "\n".join(lines)


def _sm(archs: Sequence[str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


# ----------------------------------------------------------------------------------------------------------------------
# Parent
# ----------------------------------------------------------------------------------------------------------------------


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
    """Fails the tiles whose layers have other bits than those of most tiles."""
    digests = collections.Counter(result.layer for result in results if result.status is Status.PASSED)
    if len(digests) < 2:
        return list(results)
    common, count = digests.most_common(1)[0]
    reason = f"the layers' outputs differ in bits from those of {count} other tiles"
    return [
        replace(result, status=Status.FAILED, reason=reason)
        if result.status is Status.PASSED and result.layer != common
        else result
        for result in results
    ]


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
        layer=message["layer"],
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


# ----------------------------------------------------------------------------------------------------------------------
# Worker
# ----------------------------------------------------------------------------------------------------------------------


class NotRunError(RuntimeError):
    """A tile could not be run, for a reason that says nothing about the tile on this GPU."""


class WrongResultError(RuntimeError):
    """A tile ran and gave something else than it must; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a tile that passed."""

    checks: int
    layer: str


RunTile = Callable[[Tile], Outcome]


def work(
    tiles: Sequence[Tile], prepare: Callable[[], tuple[dict[str, Any], RunTile]], send: Callable[[dict[str, Any]], None]
) -> int:
    """Runs tiles and sends what happens; stops behind one that raised, for the GPU's context may be broken.

    Args:
        tiles: in the order in which to run them.
        prepare: gives the facts about the device and the function that runs a tile.
        send: delivers one message to the parent.

    Returns:
        The exit status.
    """
    try:
        facts, run_tile = prepare()
    except Exception as error:
        send({"fatal": words(error)})
        return 1
    send({"ready": facts})
    for tile in tiles:
        send({"start": tile.name})
        begin = time.monotonic()
        outcome, status, reason, broken = Outcome(checks=0, layer=""), Status.PASSED, "", False
        try:
            outcome = run_tile(tile)
        except NotRunError as error:
            status, reason = Status.NOT_RUN, str(error)
        except WrongResultError as error:
            status, reason = Status.FAILED, str(error)
        except Exception as error:
            status, reason, broken = Status.FAILED, words(error), True
        seconds = round(time.monotonic() - begin, 2)
        send({"result": tile.name, "status": status.value, "reason": reason, "seconds": seconds, **asdict(outcome)})
        if broken:
            return 1
    return 0


def prepare_gpu(index: int) -> tuple[dict[str, Any], RunTile]:
    """The facts about a GPU, and the function that runs a tile on it.

    Raises:
        RuntimeError: no such GPU, none that the wheel has machine code for, or extensions that do not load.
    """
    import torch

    from .._call.launch import check_capability
    from .._install import loading

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        here = torch.cuda.device_count() if torch.version.cuda else "no CUDA"
        raise RuntimeError(f"needs GPU {index} and a CUDA build of torch, got torch {torch.__version__}, GPUs: {here}")
    torch.cuda.set_device(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    check_capability(capability, name)
    loading.moe_ops()
    # No list is found in this folder, so that a tile which is blocked is run here as itself.
    os.environ[blocklist.CACHE_DIR_VARIABLE] = os.devnull
    facts = {
        "name": name,
        "index": index,
        "capability": list(capability),
        "multiprocessors": torch.cuda.get_device_properties(index).multi_processor_count,
        "arch": wheel.arch_for(capability),
        "driver": driver.driver_version(),
        "driver_cuda": driver.driver_cuda(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return facts, tile_runner(torch.device("cuda", index))


def tile_runner(device: torch.device) -> RunTile:
    """Makes the problems and what must come out of them, once; the function returned runs a tile on them all."""
    import torch

    from .. import problems, reference
    from .._call.fused_moe import fused_moe
    from .._call.launch import layer_operator
    from .._install import loading

    gemms = {"one-hot rows": problems.layout_problem(device)}
    for k, n, wide in _GEMMS:
        gemms[f"K={k}, N={n}"] = problems.random_problem(k, n, device, wide_scales=wide)
    weights = problems.random_weights(*_LAYER_SIZE, device)
    calls = [problems.random_call(tokens, top_k, weights) for tokens, top_k in _LAYERS]
    calls[1].topk_ids[::5, 1] = -1  # slots of no expert
    expected = [reference.fused_moe(*call.args(), weights) for call in calls]

    def run_gemms(tile: Tile) -> int:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        for (what, problem), dtype in itertools.product(gemms.items(), dtypes):
            if mismatch := problem.check(tile, dtype):
                raise WrongResultError(f"GEMM, {what}, {str(dtype).removeprefix('torch.')}: {mismatch}")
        return len(gemms) * len(dtypes)

    def run_layers(tile: Tile) -> str:
        digest = hashlib.sha256()
        if device.type == "cuda" and layer_operator(device.index, tile)[1] != tile:
            raise NotRunError("another tile takes its place in the layer")
        for call, wanted in zip(calls, expected, strict=True):
            output = torch.full_like(call.hidden_states, float("nan"))
            fused_moe(*call.args(), weights, tile_mn=tile.mn, output=output)
            off = problems.relative_error(output, wanted)
            if not off <= _LAYER_TOLERANCE:  # NaN is off too
                raise WrongResultError(f"layer of {len(output)} tokens: relative error {off:.1e}")
            digest.update(bytes(problems.bits(output).view(torch.uint8).flatten().tolist()))
        return digest.hexdigest()

    def run_tile(tile: Tile) -> Outcome:
        try:
            loading.load_tile(tile)
            checks, layer = run_gemms(tile), run_layers(tile)
        except loading.LoadError as error:
            raise NotRunError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise NotRunError(words(error)) from error
        return Outcome(checks=checks + len(calls), layer=layer)

    return run_tile


def main(
    arguments: Sequence[str] | None = None,
    prepare: Callable[[int], tuple[dict[str, Any], RunTile]] = prepare_gpu,
) -> int:
    """The worker; users call `mxfp4-moe doctor --selftest`."""
    parser = argparse.ArgumentParser(prog="python -m mxfp4_moe._health.selftest", description=main.__doc__)
    parser.add_argument("--device", type=int, default=0, help="the GPU's number")
    parser.add_argument("tiles", nargs="*", metavar="TILE", help="names such as m128n128; all by default")
    args = parser.parse_args(arguments)
    manifest = load_manifest()
    tiles = [manifest.tile(name) for name in args.tiles] or list(wheel.built_tiles())
    messages = channel()

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    return work(tiles, lambda: prepare(args.device), send)


if __name__ == "__main__":
    sys.exit(main())
