"""The last self-test's result on each device, beside the blocklist, so that the doctor can say whether it was run.

It counts only for the libraries that were tested: their fingerprint is in it. Nothing but the doctor reads it.
Standard library alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .._install import wheel
from .._install.cache import device_file, write_json

_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of `mxfp4-moe doctor --selftest` on one device."""

    passed: int
    tiles: int
    driver: str
    torch: str
    date: str  # ISO 8601, the day
    fingerprint: str  # of the libraries that were tested
    arithmetic: str = ""  # the report's line on sums, empty where all are as published
    explained: bool = True  # a known rule gives those sums


def read(device: str, capability: tuple[int, int]) -> Result | None:
    """The device's last result, None when there is none that can be read."""
    path = device_file("selftest", device, capability)
    try:
        data = json.loads(path.read_bytes()) if path else None
        if not isinstance(data, dict) or data.pop("schema", None) != _SCHEMA:
            return None
        result = Result(**data)
        return result if 0 <= result.passed <= result.tiles else None
    except (OSError, ValueError, TypeError):
        return None


def write(
    device: str,
    capability: tuple[int, int],
    *,
    passed: int,
    tiles: int,
    driver: str,
    torch: str,
    arithmetic: str = "",
    explained: bool = True,
) -> Path | None:
    """Remembers a result in place of the one before; None for a user without a home.

    Raises:
        OSError: the cache directory cannot be written.
    """
    path = device_file("selftest", device, capability)
    if path is None:
        return None
    result = Result(
        passed=passed,
        tiles=tiles,
        driver=driver,
        torch=torch,
        date=time.strftime("%Y-%m-%d"),
        fingerprint=wheel.fingerprint(),
        arithmetic=arithmetic,
        explained=explained,
    )
    write_json(path, {"schema": _SCHEMA, **asdict(result)})
    return path
