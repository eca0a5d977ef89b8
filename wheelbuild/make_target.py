"""What a wheel for another platform is built against: a folder with that platform's Python, torch and CUDA.

`python -m wheelbuild.make_target PLATFORM` makes it, from two ordinary sources. Debian's or Ubuntu's own packages are
unpacked, not installed, into `root/`: Python with its headers, and the C and C++ libraries. Then that Python, under
qemu, makes the virtual environment `venv/`, and pip installs there what the platform's users get: torch, the oldest
that the wheel promises, and CUDA's runtime and headers, of the same versions as the packages that compile here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from wheelbuild import BuildError
from wheelbuild.platforms import PLATFORMS, Platform, host_platform
from wheelbuild.target import (
    MADE,
    TARGET_VARIABLE,
    Target,
    find_target,
    pip_install,
    read_made,
    require_tools,
    run,
    target_folder,
    write_made,
)
from wheelbuild.toolchain import TORCH_TARGET, package_dirs

SYSTEM_PACKAGES = ("python3", "libpython3-dev", "libstdc++6")
CUDA_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")


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
    run(("apt-get", *options, "-q", "update"), remedy)
    install = ("-q", "-y", "--no-install-recommends", "--download-only", "install", *SYSTEM_PACKAGES)
    run(("apt-get", *options, *install), remedy)
    for archive in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(("dpkg-deb", "-x", str(archive), str(folder / "root")), remedy)
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
    # Found and not imported: setuptools warns of that in a process that has distutils.
    pip = PathFinder.find_spec("pip")
    if pip is None or pip.origin is None:
        raise BuildError("this environment has no pip, which the target's is a link to; python -m ensurepip makes one")
    emulator, root, python = target.platform.emulator, target.folder / "root", f"python{target.python_version}"
    remedy = f"remove {target.folder} and try again"
    venv = ("-m", "venv", "--without-pip", str(target.folder / "venv"))
    run((emulator, "-L", str(root), str(root / "usr" / "bin" / python), *venv), remedy)
    # This environment's pip, which is plain Python, in a folder of its own: its neighbours are for this platform.
    alone = target.folder / "pip"
    alone.mkdir()
    (alone / "pip").symlink_to(Path(pip.origin).parent)
    pip_install(target, wanted)


def make_target(env: Mapping[str, str], platform: Platform, wanted: Sequence[str]) -> Target:
    """Makes the folder, unless it has been made of the same."""
    folder = target_folder(env, platform)
    made, of = read_made(folder)
    if not made or of != list(wanted):
        require_tools(env, platform)
        if folder.exists() and any(folder.iterdir()) and not (folder / MADE).exists():
            raise BuildError(f"{folder} holds something else: let {TARGET_VARIABLE} name a folder of its own")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_made(folder, "", ())
        print(f"{folder}: {', '.join(SYSTEM_PACKAGES)} for {platform.debian}, and what they need", flush=True)
        _unpack_system(folder, platform)
        version = _python_version(folder)
        _link_headers(folder, platform, version)
        print(f"{folder}: {', '.join(wanted)} under {platform.emulator}", flush=True)
        _install(Target(platform=platform, folder=folder, python_version=version), wanted)
        write_made(folder, version, wanted)
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
        target = make_target(os.environ, platform, requirements(package_dirs(os.environ), TORCH_TARGET))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{target.folder}: Python {target.python_version} for {platform.machine}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
