"""Builds the wheel's extensions: one per tile of tile_manifest.toml, and the one that they share.

All thinking is in wheelbuild; this file fits it into setuptools. Environment variables: wheelbuild/settings.py
and wheelbuild/toolchain.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from wheelbuild import BuildError  # noqa: E402
from wheelbuild.build import Build, resolve_build, run_build, write_package_files  # noqa: E402
from wheelbuild.plan import MOE_MODULE  # noqa: E402
from wheelbuild.report import REPORT_NAME  # noqa: E402
from wheelbuild.sbom import write_sbom  # noqa: E402
from wheelbuild.thresholds import check_wheel  # noqa: E402
from wheelbuild.tile_model import floors  # noqa: E402

VERSION = "0.1.0"


def resolve() -> tuple[Build | None, str]:
    """The build, or why there is none: reading metadata or making an sdist needs no compiler."""
    try:
        return resolve_build(os.environ), ""
    except BuildError as error:
        return None, str(error)


BUILD, REFUSAL = resolve()


def needed_build() -> Build:
    if BUILD is None:
        raise SetupError(REFUSAL)
    return BUILD


def full_version() -> str:
    if BUILD is None or "sdist" in sys.argv or not BUILD.local_version:
        return VERSION
    return f"{VERSION}+{BUILD.local_version}"


class Named(Distribution):
    """pyproject.toml must name the project, and says mxfp4-moe; MXFP4_MOE_NAME_SUFFIX has the last word."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        super().parse_config_files(*args, **kwargs)
        if BUILD is not None and "sdist" not in sys.argv:
            self.metadata.name = BUILD.settings.distribution


class BuildInOwnFolder(build):
    """Each profile, toolkit and filter has its own folder, and the wheel's contents are gathered afresh each time."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if BUILD is not None:  # an sdist asks for this command too, and is made where nothing could be built
            self.build_base = str(BUILD.folder)

    def run(self) -> None:
        needed_build()
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildTiles(build_ext):
    """Runs the one graph over all extensions, then puts each library where setuptools expects it."""

    def build_extensions(self) -> None:
        try:
            plan, self.report = run_build(needed_build(), full_version())
        except BuildError as error:
            raise SetupError(str(error)) from error
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / plan.library(extension.name.rpartition(".")[2]), target)
        write_package_files(Path(self.build_lib) / "mxfp4_moe", self.report)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the sources' folder is the package, so what the wheel has on top goes there."""
        package = ROOT / "python" / "mxfp4_moe"
        shutil.rmtree(package / "_ext", ignore_errors=True)
        (package / "_ext").mkdir()
        super().copy_extensions_to_source()
        write_package_files(package, self.report)


class Wheel(bdist_wheel):
    """Adds the bill of materials, and refuses a wheel that is larger than ci/thresholds.toml allows."""

    def write_wheelfile(self, wheelfile_base: str, *args: Any, **kwargs: Any) -> None:
        """The last thing written into .dist-info, also where pip had the rest of it made before (PEP 517)."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        report = Path(self.bdist_dir) / "mxfp4_moe" / REPORT_NAME
        if not report.exists():
            return  # an editable install, whose package is the sources' folder
        write_sbom(Path(wheelfile_base), json.loads(report.read_text(encoding="utf-8")), needed_build().toolchain)
        for path in Path(self.bdist_dir).rglob("*"):  # the same for everybody, whatever the checkout has
            path.chmod(0o755 if path.is_dir() else 0o644)

    def run(self) -> None:
        os.umask(0o022)
        super().run()
        for command, _, path in self.distribution.dist_files:
            if command == "bdist_wheel":
                try:
                    check_wheel(Path(path), needed_build().settings.profile, needed_build().thresholds)
                except BuildError as error:
                    raise SetupError(str(error)) from error


def extensions() -> list[Extension]:
    modules = [*(tile.module for tile in BUILD.settings.tiles), MOE_MODULE] if BUILD else [MOE_MODULE]
    return [Extension(f"mxfp4_moe._ext.{module}", sources=[], py_limited_api=True) for module in modules]


setup(
    distclass=Named,
    version=full_version(),
    ext_modules=extensions(),
    cmdclass={"build": BuildInOwnFolder, "build_ext": BuildTiles, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": floors.PYTHON_TAG, **(BUILD.settings.wheel_options() if BUILD else {})}},
)
