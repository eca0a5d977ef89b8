"""The scripts of ci/ and the tools' environment, for tests: what they say, and what to do when they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from wheelbuild import ROOT


def run(*words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command from the root of the source tree; it does not raise when the command fails."""
    return subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", **(env or {})},
    )


def verb(name: str, *words: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What ci/<name>.sh says; it must succeed."""
    result = run("bash", f"ci/{name}.sh", *words, env=env)
    assert result.returncode == 0, result.stdout
    return result.stdout


@cache
def tools() -> Path:
    """The programs of the tools' environment, which is made if it is missing."""
    result = run("bash", "-c", 'source ci/common.sh && tool python --version && echo "$tools_env"')
    assert result.returncode == 0, result.stdout
    return Path(result.stdout.splitlines()[-1]) / "bin"


def tool(name: str, *words: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What a program of the tools' environment says; it must succeed."""
    paths = {"PATH": f"{tools()}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = run(tools() / name, *words, env={**paths, **(env or {})})
    assert result.returncode == 0, result.stdout
    return result.stdout
