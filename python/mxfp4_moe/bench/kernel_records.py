"""From the profiler's list of kernels that ran to the times of each kernel of one call. Pure; tested on the CPU.

Calls are told apart by a marker kernel that runs before each (the one that empties the L2 cache). Nothing is assumed
about the kernels between two markers but that every call has the same ones in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import median


@dataclass(frozen=True, kw_only=True)
class Record:
    """One kernel that ran, in microseconds of the GPU's clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One kernel of a call: medians over the calls.

    `own_us` is by how much the kernel moved the end of the call on. A kernel that is launched early, while the one
    before it still runs (programmatic dependent launch), has a long `duration_us` and a short `own_us`; these add up
    to the time from the first kernel's start to the last one's end.
    """

    name: str
    duration_us: float
    own_us: float

    def as_dict(self) -> dict[str, str | float]:
        return {"name": self.name, "duration_us": round(self.duration_us, 2), "own_us": round(self.own_us, 2)}


def split_calls(records: Sequence[Record], marker: str) -> list[list[Record]]:
    """The records behind each marker, up to the next, in order of their start. What lies before the first is left out.

    Args:
        marker: a part of the marker kernel's name.
    """
    calls: list[list[Record]] = []
    for record in sorted(records, key=lambda r: r.start):
        if marker in record.name:
            calls.append([])
        elif calls:
            calls[-1].append(record)
    return calls


def kernel_times(calls: Sequence[Sequence[Record]]) -> list[KernelTime]:
    """Each kernel of a call.

    Raises:
        ValueError: no call, or calls that differ in their kernels.
    """
    if not calls or not calls[0]:
        raise ValueError("calls: expected at least one with a kernel, got none")
    names = [record.name for record in calls[0]]
    for call in calls:
        if [record.name for record in call] != names:
            raise ValueError(f"calls: expected the same kernels in each, got {names} and {[r.name for r in call]}")
    own: list[list[float]] = [[] for _ in names]
    for call in calls:
        reached = call[0].start
        for place, record in enumerate(call):
            own[place].append(max(record.end - reached, 0.0))
            reached = max(reached, record.end)
    return [
        KernelTime(
            name=short_name(name),
            duration_us=median([call[place].end - call[place].start for call in calls]),
            own_us=median(own[place]),
        )
        for place, name in enumerate(names)
    ]


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters: what a person calls it."""
    plain = name.removeprefix("void ")
    while (shorter := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = shorter
    plain = re.sub(r"\(anonymous namespace\)::", "", plain)
    plain = re.sub(r"\(.*", "", plain, flags=re.DOTALL).strip()
    return plain.rsplit("::", 1)[-1] or name
