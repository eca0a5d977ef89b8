"""What pyproject.toml says a build needs, for scripts that make the build environment themselves.

`python -m wheelbuild.requirements` prints one requirement per line.
"""

from __future__ import annotations

import sys
from typing import cast

from wheelbuild import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def build_requirements() -> list[str]:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return cast("list[str]", data["build-system"]["requires"])


if __name__ == "__main__":
    print("\n".join(build_requirements()))
