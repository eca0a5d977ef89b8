"""What the executor reports: one exception, with the kind of the mistake and the place where it happened."""

from __future__ import annotations

from enum import Enum


class Kind(str, Enum):
    UNKNOWN = "unknown instruction"
    BOUNDS = "out of bounds"
    ALIGNMENT = "misaligned"
    UNWRITTEN = "read of memory that nobody wrote"
    RACE = "race"
    EARLY = "before griddepcontrol.wait"
    STALE = "read-only path to memory that is being written"
    CONTAINER = "container with bits outside 5..2"
    HANG = "hang"
    BARRIER = "misuse of a barrier"
    COPY = "misuse of a tensor copy"
    CONVERGENCE = "lanes that must execute an instruction together do not"
    REGISTERS = "registers do not add up"


class Fault(Exception):
    """A mistake of the kernel under execution; `kind` says which, the text says where."""

    def __init__(self, kind: Kind, text: str, place: str = "") -> None:
        super().__init__(kind, text, place)
        self.kind, self.text, self.place = kind, text, place

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.text}" + (f"\n  at {self.place}" if self.place else "")
