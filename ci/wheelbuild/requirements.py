"""What pyproject.toml says a build needs, for scripts that make the build environment themselves.

`python -m wheelbuild.requirements` prints one requirement per line, with the CUDA toolkit that MXFP4_MOE_CUDA names;
`... --group release` those of a dependency group.
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
    default, chosen = versions.cuda[0], versions.choose(env or {})
    if default.requirement not in required:
        raise BuildError(f"pyproject.toml does not build with {default.requirement}, as ci/cuda-versions.json says")
    others = {default.requirement: [chosen.requirement] if chosen.compiler == "packages" else []}
    return [word for line in required for word in others.get(line, [line])]


def group(name: str) -> list[str]:
    """The requirements of one of pyproject.toml's dependency groups."""
    return cast("list[str]", _pyproject()["dependency-groups"][name])


if __name__ == "__main__":
    try:
        print("\n".join(group(sys.argv[2]) if sys.argv[1:2] == ["--group"] else build_requirements(os.environ)))
    except BuildError as error:
        sys.exit(f"error: {error}")
