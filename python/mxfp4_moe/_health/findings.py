"""What the doctor says: findings, and how bad they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """How bad; the worst one is the exit status."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing seen, and the next step: always where it is not ok, elsewhere where there is one worth taking."""

    level: Level
    subject: str
    text: str
    next_step: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "level": self.level.name.lower(),
            "subject": self.subject,
            "text": self.text,
            "next_step": self.next_step,
        }


def worst(findings: Sequence[Finding]) -> Level:
    return max((finding.level for finding in findings), default=Level.OK)


def as_text(findings: Sequence[Finding], title: str) -> str:
    """One line for each finding, and one below it for its next step."""
    lines = [title]
    width = max((len(finding.subject) for finding in findings), default=0)
    for finding in findings:
        lines.append(f"  {finding.level.name.lower():<7}  {finding.subject:<{width}}  {finding.text}")
        if finding.next_step:
            lines.append(f"  {'':<7}  {'':<{width}}  -> {finding.next_step}")
    return "\n".join(lines)
