"""What a wheel for another platform is built against: a folder with that platform's Python, torch and CUDA.

make_target.py makes it; here is what is in it, and how that Python is run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wheelbuild import ROOT, BuildError
from wheelbuild.platforms import Platform

TARGET_VARIABLE = "MXFP4_MOE_TARGET"  # the folder; without it .cross/<machine> in the source tree
MADE = "made.json"  # what the folder was made of


@dataclass(frozen=True, kw_only=True)
class Target:
    platform: Platform
    folder: Path
    python_version: str  # e.g. 3.11

    @property
    def python(self) -> tuple[str, ...]:
        """Runs the platform's Python in its environment; of this machine's modules it sees those of this tree."""
        return self.python_with(ROOT)

    def python_with(self, modules: Path) -> tuple[str, ...]:
        """The same, with another folder of modules."""
        options = ("-L", str(self.folder / "root"), "-E", f"PYTHONPATH={modules}", "-E", "PYTHONNOUSERSITE=1")
        return self.platform.emulator, *options, str(self.folder / "venv" / "bin" / "python")

    @property
    def packages(self) -> Path:
        return self.folder / "venv" / "lib" / f"python{self.python_version}" / "site-packages"

    @property
    def python_include_dirs(self) -> tuple[Path, ...]:
        return self.folder / "include" / f"python{self.python_version}", self.folder / "include"

    def cuda(self, major: int) -> Path:
        return self.packages / "nvidia" / f"cu{major}"


def target_folder(env: Mapping[str, str], platform: Platform) -> Path:
    named = env.get(TARGET_VARIABLE)
    return Path(named).resolve() if named else ROOT / ".cross" / platform.machine


def read_made(folder: Path) -> tuple[str, list[str]]:
    """Version of Python and requirements; empty when the folder was not made, or not to the end."""
    path = folder / MADE
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"python": "", "requirements": []}
    return str(data["python"]), list(data["requirements"])


def write_made(folder: Path, python: str, wanted: Sequence[str]) -> None:
    text = json.dumps({"python": python, "requirements": list(wanted)}, indent=1)
    (folder / MADE).write_text(text + "\n", encoding="utf-8")


def find_target(env: Mapping[str, str], platform: Platform) -> Target:
    """The folder for this platform; BuildError when it has not been made."""
    folder = target_folder(env, platform)
    version, _ = read_made(folder)
    if not version:
        raise BuildError(
            f"{folder} has no Python, torch and CUDA of {platform.machine}: run ci/build-{platform.machine}.sh, which "
            f"makes it, or point {TARGET_VARIABLE} at the folder"
        )
    return Target(platform=platform, folder=folder, python_version=version)


def require_tools(env: Mapping[str, str], platform: Platform) -> Path:
    """The cross compiler; BuildError, with what to install, when it or the emulator is missing."""
    found = {tool: shutil.which(tool, path=env.get("PATH", "")) for tool in (platform.cxx, platform.emulator)}
    if missing := [tool for tool, path in found.items() if path is None]:
        raise BuildError(
            f"{' and '.join(missing)}: not on PATH, and {platform.machine} wheels are built with them; on Debian or "
            f"Ubuntu, apt-get install {' '.join(platform.packages)}"
        )
    return Path(str(found[platform.cxx]))


def run(command: Sequence[str], remedy: str) -> None:
    """Runs a command; BuildError with its last words and the remedy when it fails."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror}): {remedy}") from error
    if result.returncode != 0:
        last = " / ".join(result.stdout.strip().splitlines()[-3:])
        raise BuildError(f"{Path(command[0]).name} failed ({last}): {remedy}")


def pip_install(target: Target, words: Sequence[str]) -> None:
    """`pip install` as the platform's Python does it: its tags, its markers."""
    install = ("-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--only-binary", ":all:", *words)
    run((*target.python_with(target.folder / "pip"), *install), f"can pip get these for {target.platform.machine}?")
