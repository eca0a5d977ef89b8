"""What a worker process needs to talk to its parent: stdout, kept for messages alone."""

from __future__ import annotations

import os
from typing import IO


def channel() -> IO[str]:
    """The parent's end of stdout; whatever else is printed from now on, by C too, goes to stderr."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return kept
