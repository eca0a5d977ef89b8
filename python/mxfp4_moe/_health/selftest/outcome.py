"""What a tile's run comes to, for the worker that runs tiles and the checks that judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...tiles import Tile
from .report import BLOCKING, Arithmetic


class NotRunError(RuntimeError):
    """A tile could not be run, for a reason that says nothing about the tile on this GPU."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a tile that ran to its end: the fields of `TileResult`."""

    checks: int = 0
    answers: Mapping[str, str] = field(default_factory=dict)
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    digests: Mapping[str, str] = field(default_factory=dict)

    def reason(self) -> str:
        """The first question that was answered wrongly, with how."""
        wrong = ((question, self.answers.get(question, "")) for question in BLOCKING)
        return next((f"{question}: {why}" for question, why in wrong if why), "")


RunTile = Callable[[Tile], Outcome]
