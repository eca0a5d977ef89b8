"""The assemblers that docs/architectures.md and the tests ask: ptxas of each release in ci/cuda-versions.json.

`python -m wheelbuild.assemblers` puts them into build/assemblers/<release>/ptxas, from PyPI packages, and prints where
they are. Packages of two releases of one major version cannot be installed side by side, and of each only this one
program is needed, so they are downloaded and unpacked instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wheelbuild import ROOT, BuildError
from wheelbuild.versions import load_versions

FOLDER = ROOT / "build" / "assemblers"


def requirement(release: str) -> str:
    """The package that holds ptxas of a release such as '13.0.88'."""
    major = int(release.split(".")[0])
    return f"nvidia-cuda-nvcc{f'-cu{major}' if major < 13 else ''}=={release}"


def install(release: str, folder: Path | None = None) -> Path:
    """Where ptxas of this release is, after fetching it if it is not there yet.

    Raises:
        BuildError: the package cannot be had, or has no ptxas.
    """
    target = (FOLDER if folder is None else folder) / release / "ptxas"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run(
            [*command, f"--dest={scratch}", requirement(release)], capture_output=True, text=True, check=False
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            said = result.stderr.strip().splitlines() or ["it said nothing"]
            raise BuildError(f"ptxas {release}: pip download {requirement(release)} failed: {said[-1]}")
        whole = Path(scratch) / "ptxas"
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith("/bin/ptxas")]
            if len(inside) != 1:
                raise BuildError(f"ptxas {release}: {requirement(release)} has {len(inside)} bin/ptxas, expected one")
            with wheel.open(inside[0]) as source, whole.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        whole.chmod(0o755)
        os.replace(whole, target)  # at once, so that a run that was stopped leaves no half of it
    return target


def install_all() -> dict[str, Path]:
    """Every release of ci/cuda-versions.json, oldest first."""
    return {release: install(release) for release in load_versions().assemblers}


if __name__ == "__main__":
    try:
        for path in install_all().values():
            print(path)
    except BuildError as error:
        sys.exit(f"error: {error}")
