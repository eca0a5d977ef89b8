"""What a wheel for another platform is built against: a folder with that platform's Python, torch and CUDA.

`python -m wheelbuild.target PLATFORM` makes it, from two ordinary sources. Debian's or Ubuntu's own packages are
unpacked, not installed, into `root/`: Python with its headers, and the C and C++ libraries. Then that Python, under
qemu, makes the virtual environment `venv/`, and pip installs there what the platform's users get: torch, the oldest
that the wheel promises, and CUDA's runtime and headers, of the same versions as the packages that compile here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from wheelbuild import ROOT, BuildError
from wheelbuild.platforms import PLATFORMS, Platform, host_platform

TARGET_VARIABLE = "MXFP4_MOE_TARGET"  # the folder; without it .cross/<machine> in the source tree
SYSTEM_PACKAGES = ("python3", "libpython3-dev", "libstdc++6")
CUDA_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")
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


def _read_made(folder: Path) -> tuple[str, list[str]]:
    """Version of Python and requirements; empty when the folder was not made, or not to the end."""
    path = folder / MADE
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"python": "", "requirements": []}
    return str(data["python"]), list(data["requirements"])


def _write_made(folder: Path, python: str, wanted: Sequence[str]) -> None:
    text = json.dumps({"python": python, "requirements": list(wanted)}, indent=1)
    (folder / MADE).write_text(text + "\n", encoding="utf-8")


def find_target(env: Mapping[str, str], platform: Platform) -> Target:
    """The folder for this platform; BuildError when it has not been made."""
    folder = target_folder(env, platform)
    version, _ = _read_made(folder)
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


# ----------------------------------------------------------------------------------------------------------------------
# Making it
# ----------------------------------------------------------------------------------------------------------------------


def requirements(folders: Sequence[Path], torch: tuple[int, int]) -> list[str]:
    """For pip: the oldest torch, and CUDA's packages in the versions that are installed in `folders`."""
    found: dict[str, str] = {}
    for dist in metadata.distributions(path=[str(folder) for folder in folders]):
        found.setdefault(dist.name, dist.version)  # of several the first, which is also the one that is imported
    missing = [name for name in CUDA_PACKAGES if name not in found]
    if missing:
        raise BuildError(
            f"{', '.join(missing)} is not installed here, and a wheel for another platform is built with CUDA's "
            "packages: run ci/build.sh first, whose environment has them"
        )
    return [f"torch=={torch[0]}.{torch[1]}.*", *(f"{name}=={found[name]}" for name in CUDA_PACKAGES)]


def apt_options(folder: Path, platform: Platform) -> tuple[str, ...]:
    """apt for the other architecture, with lists and archives of its own: nothing of this machine's is changed."""
    settings = {
        "APT::Architecture": platform.debian,
        "APT::Architectures::": platform.debian,
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
        "Dir::State": str(folder / "state"),
        "Dir::State::status": str(folder / "state" / "status"),
        "Dir::Cache": str(folder / "cache"),
    }
    return tuple(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))


def _run(command: Sequence[str], remedy: str) -> None:
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror}): {remedy}") from error
    if result.returncode != 0:
        last = " / ".join(result.stdout.strip().splitlines()[-3:])
        raise BuildError(f"{Path(command[0]).name} failed ({last}): {remedy}")


def _unpack_system(folder: Path, platform: Platform) -> None:
    apt = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state" / "status").touch()  # nothing is installed, so that all dependencies come too
    options = apt_options(apt, platform)
    remedy = (
        f"{platform.machine} wheels are built on Debian or Ubuntu, with apt sources that carry {platform.debian} "
        f"packages, or with {TARGET_VARIABLE} naming a folder that was made there"
    )
    _run(("apt-get", *options, "-q", "update"), remedy)
    install = ("-q", "-y", "--no-install-recommends", "--download-only", "install", *SYSTEM_PACKAGES)
    _run(("apt-get", *options, *install), remedy)
    for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(("dpkg-deb", "-x", str(archive), str(folder / "root")), remedy)
    shutil.rmtree(apt)


def _python_version(folder: Path) -> str:
    (python,) = (folder / "root" / "usr" / "bin").glob("python3.[0-9]*[0-9]")
    return python.name.removeprefix("python")


def _link_headers(folder: Path, platform: Platform, version: str) -> None:
    """Python's headers without the C library's, which are the cross compiler's own; pyconfig.h is in the second."""
    include = folder / "root" / "usr" / "include"
    (folder / "include").mkdir()
    for name in (f"python{version}", f"{platform.machine}-linux-gnu"):
        (folder / "include" / name).symlink_to(Path("..", include.relative_to(folder), name))


def _install(target: Target, wanted: Sequence[str]) -> None:
    import pip

    emulator, root, python = target.platform.emulator, target.folder / "root", f"python{target.python_version}"
    remedy = f"remove {target.folder} and try again"
    venv = ("-m", "venv", "--without-pip", str(target.folder / "venv"))
    _run((emulator, "-L", str(root), str(root / "usr" / "bin" / python), *venv), remedy)
    # This environment's pip, which is plain Python, in a folder of its own: its neighbours are for this platform.
    alone = target.folder / "pip"
    alone.mkdir()
    (alone / "pip").symlink_to(Path(pip.__file__).parent)
    pip_install(target, wanted)


def pip_install(target: Target, words: Sequence[str]) -> None:
    """`pip install` as the platform's Python does it: its tags, its markers."""
    install = ("-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--only-binary", ":all:", *words)
    _run((*target.python_with(target.folder / "pip"), *install), f"can pip get these for {target.platform.machine}?")


def make_target(env: Mapping[str, str], platform: Platform, wanted: Sequence[str]) -> Target:
    """Makes the folder, unless it has been made of the same."""
    folder = target_folder(env, platform)
    made, of = _read_made(folder)
    if not made or of != list(wanted):
        require_tools(env, platform)
        if folder.exists() and any(folder.iterdir()) and not (folder / MADE).exists():
            raise BuildError(f"{folder} holds something else: let {TARGET_VARIABLE} name a folder of its own")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_made(folder, "", ())
        print(f"{folder}: {', '.join(SYSTEM_PACKAGES)} for {platform.debian}, and what they need", flush=True)
        _unpack_system(folder, platform)
        version = _python_version(folder)
        _link_headers(folder, platform, version)
        print(f"{folder}: {', '.join(wanted)} under {platform.emulator}", flush=True)
        _install(Target(platform=platform, folder=folder, python_version=version), wanted)
        _write_made(folder, version, wanted)
    return find_target(env, platform)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=[name for name, platform in PLATFORMS.items() if platform.cross_from])
    parser.add_argument("--check", action="store_true", help="only whether this machine has what making it takes")
    args = parser.parse_args()
    platform = PLATFORMS[args.platform]
    try:
        if host_platform() != platform.cross_from:
            raise BuildError(f"{platform.name} is cross built on {platform.cross_from}, and this is {host_platform()}")
        require_tools(os.environ, platform)
        if args.check:
            return 0
        from wheelbuild.toolchain import TORCH_TARGET, package_dirs  # needs what a build environment has

        target = make_target(os.environ, platform, requirements(package_dirs(os.environ), TORCH_TARGET))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{target.folder}: Python {target.python_version} for {platform.machine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
