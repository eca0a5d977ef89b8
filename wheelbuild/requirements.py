"""What pyproject.toml says a build needs, for scripts that make the build environment themselves.

`python -m wheelbuild.requirements` prints one requirement per line, with the CUDA toolkit that MXFP4_MOE_CUDA names;
`... --toolkit` the toolkit alone, which is not installed together with torch, because torch pins one of its own
and pip finds no solution; `... --group release` those of a dependency group.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

from wheelbuild import ROOT, BuildError
from wheelbuild.versions import load_versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build_requirements(env: Mapping[str, str] | None = None) -> list[str]:
    """pyproject.toml's build requirements. It pins the default toolkit; the one that `env` names takes its place, and
    none where the compiler comes with the container.
    """
    required = cast("list[str]", _pyproject()["build-system"]["requires"])
    versions = load_versions()
    default = versions.cuda[0]
    if default.requirement not in required:
        raise BuildError(f"pyproject.toml does not build with {default.requirement}, as ci/cuda-versions.json says")
    others = {default.requirement: toolkit_requirements(env)}
    return [word for line in required for word in others.get(line, [line])]


def toolkit_requirements(env: Mapping[str, str] | None = None) -> list[str]:
    """The one of `build_requirements` that is the CUDA toolkit, if there is one."""
    chosen = load_versions().choose(env or {})
    return [chosen.requirement] if chosen.compiler == "packages" else []


def group(name: str) -> list[str]:
    """The requirements of one of pyproject.toml's dependency groups."""
    return cast("list[str]", _pyproject()["dependency-groups"][name])


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--group"]:
            print("\n".join(group(sys.argv[2])))
        elif sys.argv[1:2] == ["--toolkit"]:
            print("\n".join(toolkit_requirements(os.environ)))
        else:
            print("\n".join(build_requirements(os.environ)))
    except BuildError as error:
        sys.exit(f"error: {error}")
