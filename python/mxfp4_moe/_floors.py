"""The oldest Python and torch that the wheel promises: what it is built for, and what errors tell people to install.

Standard library alone: the wheel's build imports this before the package exists. pyproject.toml and ci/common.sh cannot
import it; a test compares them.
"""

from __future__ import annotations

PYTHON = (3, 10)
TORCH = (2, 10)
PYTHON_TAG = f"cp{PYTHON[0]}{PYTHON[1]}"  # of the wheel, whose libraries use that Python's stable ABI


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
