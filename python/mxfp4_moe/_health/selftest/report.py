"""What the self-test found: tiles with their answers, and the report in words and as JSON. Standard library alone."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from ..._install import wheel
from ...tiles import Tile

BLOCKING = ("layout", "accuracy", "agreement")  # the questions that a tile must pass, in the order of what they explain
_SCHEMA = 2


class Status(str, Enum):
    PASSED = "passed"
    FAILED = "failed"  # it ran, and gave a wrong answer, an error, or no end
    NOT_RUN = "not run"  # it did not load, or there was no memory: nothing is known about the tile


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a tile's sums compare with the published rule's."""

    values: int = 0  # that were compared
    differ: int = 0  # of them
    rules: tuple[str, ...] = ()  # where some differ: the rules that give exactly what the tile gave

    @property
    def as_published(self) -> bool:
        return self.differ == 0


@dataclass(frozen=True, kw_only=True)
class TileResult:
    """What became of one tile; `reason` is empty when it passed."""

    tile: Tile
    status: Status
    reason: str = ""
    checks: int = 0  # comparisons made
    seconds: float = 0.0
    answers: Mapping[str, str] = field(default_factory=dict)  # by question of BLOCKING: what is wrong, empty if nothing
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of outputs, the same for all tiles

    def as_dict(self) -> dict[str, Any]:
        data = {key: value for key, value in asdict(self).items() if key not in ("tile", "status")}
        return {"name": self.tile.name, "status": self.status.value, **data}


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

    @property
    def others(self) -> list[TileResult]:
        """The tiles that passed and add up by another rule than the published one."""
        return [result for result in self.having(Status.PASSED) if not result.arithmetic.as_published]

    @property
    def explained(self) -> bool:
        """Whether a known rule gives the bits of each of `others`."""
        return all(result.arithmetic.rules for result in self.others)

    def arithmetic(self) -> str:
        """One line to paste into an issue; empty when every tile that passed computes what is published."""
        if not self.others:
            return ""
        device = collections.defaultdict(lambda: "unknown", self.device)
        major, minor = self.device.get("capability", (0, 0))
        groups = collections.Counter(result.arithmetic.rules for result in self.others)
        explained = "; ".join(
            f"{count} of {len(self.results)} tiles compute {' or '.join(rules)}"
            if rules
            else f"{count} of {len(self.results)} tiles compute by no rule that is known"
            for rules, count in groups.most_common()
        )
        differ, values = self.others[0].arithmetic.differ, self.others[0].arithmetic.values
        return (
            f"mxfp4-moe {wheel.version()}, {device['name']} ({major}.{minor}), driver {device['driver']}, sm_"
            f"{device['arch']}: {explained}; published is {device['arithmetic']}; {differ} of {values} values differ "
            "in their last bits, all within the bound"
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "schema": _SCHEMA,
            "passed": self.passed,
            "fault": self.fault,
            "seconds": round(self.seconds, 2),
            "device": dict(self.device),
            "arithmetic": self.arithmetic(),
            "tiles": [result.as_dict() for result in self.results],
        }

    def text(self) -> str:
        """The report to paste into an issue."""
        device = collections.defaultdict(lambda: "unknown", self.device)
        lines = ["mxfp4-moe self-test", f"  wheel    {wheel.version()}, machine code for {_sm(wheel.built_archs())}"]
        if words := wheel.emulation_words(wheel.built_archs(), wheel.emulated_on()):
            lines.append(f"  EMULATES {words}")
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
        answered = [result for result in self.results if result.answers]
        if answered:
            counts = [(question, sum(not r.answers[question] for r in answered)) for question in BLOCKING]
            listed = ", ".join(f"{question} {count}" for question, count in counts)
            lines.append(f"  answers  of {len(answered)} tiles that ran, right in {listed}")
        if line := self.arithmetic():
            lines.append(f"  sums     {line}")
        elif answered:
            lines.append(f"  sums     as published: {device['arithmetic']}")
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
