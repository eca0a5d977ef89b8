"""What a call costs before the GPU starts: host time per call, the first call of a process, the import.

The last two are measured in processes of their own (`python -m mxfp4_moe.bench.fresh`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .shapes import MoEShape
from .statistics import Summary, summarize

_PROCESSES = 3
_TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class FreshProcess:
    """Medians over new processes. Both times come after `import torch`, the call's also after the CUDA context."""

    import_ms: float
    first_call_ms: float  # topk_softmax and fused_moe until the result is there, loading the extensions included
    second_call_ms: float


def host_us(call: Callable[[], object], device: torch.device, calls: int = 200) -> Summary:
    """Microseconds from a call's begin to its return: Python, checks and launches, with an idle GPU."""
    for _ in range(10):
        call()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize(device)
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize(device)
    return summarize(times)


def fresh_process(shape: MoEShape, tokens: int, device_index: int) -> FreshProcess:
    """Import and first call, each in three new processes.

    Raises:
        RuntimeError: a process failed; the message is the last line that it wrote.
    """
    command = [sys.executable, "-m", "mxfp4_moe.bench.fresh", "--device", str(device_index), "--tokens", str(tokens)]
    for name in ("experts", "top_k", "hidden", "intermediate"):
        command += [f"--{name.replace('_', '-')}", str(getattr(shape, name))]
    runs = []
    for _ in range(_PROCESSES):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"a fresh process took longer than {_TIMEOUT_S} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, without a word"]
            raise RuntimeError(f"a fresh process failed: {lines[-1]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return FreshProcess(
        import_ms=summarize([run["import_ms"] for run in runs]).median,
        first_call_ms=summarize([run["first_call_ms"] for run in runs]).median,
        second_call_ms=summarize([run["second_call_ms"] for run in runs]).median,
    )
