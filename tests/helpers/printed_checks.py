"""Checks of a program that has no pytest beside it: each is a line, and the exit status remembers a failed one."""

from __future__ import annotations

from torch import Tensor


class Checks:
    """`status` is 0 as long as all held, then 1."""

    def __init__(self) -> None:
        self.status = 0

    def __call__(self, name: str, what: str, holds: bool) -> None:
        print(f"  {'ok  ' if holds else 'FAIL'} {name}: {what}", flush=True)
        self.status |= not holds

    def mean(self, name: str, of: str, a: Tensor, b: Tensor, limit: float) -> None:
        """Log-probabilities of the same tokens: how far apart on average, at most `limit`."""
        change = (a - b).abs()
        words = f"|d log p| of {of}: mean {change.mean():.4f} <= {limit}, largest {change.max():.3f}"
        self(name, words, float(change.mean()) <= limit)
