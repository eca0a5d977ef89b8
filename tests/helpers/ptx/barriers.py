"""mbarriers, named barriers and cluster barriers (PTX ISA, "mbarrier", "barrier", "barrier.cluster")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import Fault, Kind
from .order import FENCED, KNOWN, Ints

MAX_COUNT = (1 << 20) - 1  # of an mbarrier's arrivals and of its bytes


@dataclass
class MBarrier:
    """One mbarrier object: arrivals and bytes that its current phase still waits for."""

    at: int  # byte in shared memory
    expected: int
    slot: int  # agent that stands for the copies that complete here
    inited_by: int  # thread
    init_epoch: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    fenced: bool = False
    given: Ints | None = None  # knowledge of all who arrived
    done: Ints | None = None  # that of the last complete phase

    def __post_init__(self) -> None:
        self.pending = self.expected

    def know(self, knowledge: Ints) -> None:
        self.given = knowledge if self.given is None else np.maximum(self.given, knowledge)

    def check_inited(self, knowledge: Ints, is_copy: bool) -> None:
        """Whoever uses it must know of its init; a copy also of a fence behind that."""
        if knowledge[KNOWN][self.inited_by] < self.init_epoch:
            raise Fault(Kind.RACE, f"mbarrier at byte {self.at} used, and its init is not ordered before")
        if is_copy and not self.fenced and knowledge[FENCED][self.inited_by] < self.init_epoch:
            raise Fault(Kind.RACE, f"mbarrier at byte {self.at}: no fence between its init and a tensor copy")

    def arrive(self, knowledge: Ints, times: int = 1) -> None:
        if times > self.pending:
            raise Fault(
                Kind.BARRIER,
                f"mbarrier at byte {self.at}: {times} arrivals where phase {self.phase} expects {self.pending} more",
            )
        self.know(knowledge)
        self.pending -= times
        self._complete()

    def expect(self, count: int) -> None:
        self.bytes += count
        if abs(self.bytes) > MAX_COUNT:
            raise Fault(Kind.BARRIER, f"mbarrier at byte {self.at}: transaction count {self.bytes} beyond {MAX_COUNT}")

    def complete_bytes(self, count: int, knowledge: Ints) -> int:
        """A copy has landed; returns the phase in which it did, counted from 1."""
        landed = self.phase + 1
        knowledge = knowledge.copy()
        knowledge[:, self.slot] = landed
        self.know(knowledge)
        self.bytes -= count
        if self.bytes < -MAX_COUNT or (self.bytes < 0 and self.pending == 0):
            raise Fault(
                Kind.BARRIER,
                f"mbarrier at byte {self.at}: {-self.bytes} bytes more than phase {self.phase} was told to expect",
            )
        self._complete()
        return landed

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            self.done = self.given

    def is_complete(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the one before the current, as far as parity can tell."""
        return self.phase % 2 != parity


@dataclass
class Meeting:
    """One round of a barrier that everybody waits at: bar.sync and barrier.cluster."""

    needed: int
    arrived: int = 0
    given: Ints | None = None
    value: int = 0  # what bar.red adds up
    done: bool = False

    def arrive(self, count: int, knowledge: Ints, value: int = 0) -> None:
        self.given = knowledge if self.given is None else np.maximum(self.given, knowledge)
        self.arrived += count
        self.value += value
        self.done = self.arrived >= self.needed


@dataclass
class Rounds:
    """A barrier's rounds, one after the other."""

    current: Meeting | None = None

    def join(self, needed: int, count: int, knowledge: Ints, value: int, name: str) -> Meeting:
        if self.current is None:
            self.current = Meeting(needed)
        meeting = self.current
        if meeting.needed != needed:
            raise Fault(Kind.BARRIER, f"{name}: one warp waits for {meeting.needed} threads, another for {needed}")
        meeting.arrive(count, knowledge, value)
        if meeting.arrived > needed:
            raise Fault(Kind.BARRIER, f"{name}: {meeting.arrived} threads arrive where {needed} are expected")
        if meeting.done:
            self.current = None
        return meeting


def lanes_of(mask: Any) -> Any:
    """Lane numbers of a mask; None is all."""
    return _ALL if mask is None else np.flatnonzero(mask)


_ALL = np.arange(32)
