"""Building the wheel: settings and manifest -> plan -> one ninja graph -> checks -> report.

`setup.py` drives this package; the pure parts (settings, toolchain resolution, plan, parsing) are tested without a
compiler. Standard library only, plus the `ninja` package for the executable.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "refused: "  # what a check prints before its sentence, by which the build knows it


class BuildError(Exception):
    """The build cannot go on; the message is one sentence with what to do next."""
