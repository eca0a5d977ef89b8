"""What many timings of one thing come to: a median and how far they spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Microseconds. Half of the timings lie between `low` and `high` (the quartiles)."""

    median: float
    low: float
    high: float
    fastest: float
    count: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a part of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, float | int]:
        return {key: round(value, 3) for key, value in vars(self).items()}


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie, between two neighbours by their distance.

    Raises:
        ValueError: no values, or a part outside 0 to 1.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    if not 0 <= part <= 1:
        raise ValueError(f"part: expected 0 to 1, got {part}")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle.

    Raises:
        ValueError: no values.
    """
    return quantile(values, 0.5)


def summarize(values: Sequence[float]) -> Summary:
    """Median, quartiles and the fastest of the values.

    Raises:
        ValueError: no values.
    """
    return Summary(
        median=median(values),
        low=quantile(values, 0.25),
        high=quantile(values, 0.75),
        fastest=min(values, default=0.0),
        count=len(values),
    )
