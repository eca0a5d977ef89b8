"""Memory of a process on the host, and processes that measure theirs. Linux alone has what this reads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_POLL_S = 0.005


class Peak:
    """Anonymous memory of this process, looked at often; `most` is by how much it was above the beginning."""

    def __init__(self) -> None:
        self.most = 0
        self._begin = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._begin = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.most = max(self.most, anonymous_bytes() - self._begin)
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            self.most = max(self.most, anonymous_bytes() - self._begin)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: files that are mapped do not count."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(value) * 1024


def bytes_read() -> int:
    """What this process has read so far with plain reads, from files and whatever else."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("rchar:"))
    return int(value)


def in_a_process(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a module prints as JSON in its last line, run by this Python in a process of its own."""
    ran = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
