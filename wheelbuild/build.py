"""The build as setup.py calls it: resolve, plan, run, report, and put the results where the wheel is made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wheelbuild import ROOT, BuildError, emulation
from wheelbuild.graph import run_plan
from wheelbuild.plain_paths import require_quotable
from wheelbuild.plan import Plan, plan
from wheelbuild.report import COSTS_NAME, REPORT_NAME, make_costs, make_report, summary
from wheelbuild.settings import NAME_SUFFIX_VARIABLE, Settings, read_settings
from wheelbuild.thresholds import Thresholds, load_thresholds
from wheelbuild.tile_model import tiles
from wheelbuild.toolchain import Toolchain, resolve_cross_toolchain, resolve_toolchain
from wheelbuild.versions import LABEL_VARIABLE, load_versions

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Manifest


@dataclass(frozen=True, kw_only=True)
class Build:
    manifest: Manifest
    settings: Settings
    toolchain: Toolchain
    thresholds: Thresholds

    @property
    def local_version(self) -> str:
        return self.settings.local(self.toolchain.cuda.label)

    @property
    def folder(self) -> Path:
        """Everything this build makes, relative to the source tree."""
        return Path("build") / self.settings.build_folder(self.toolchain.cuda.label)


def check_label(env: Mapping[str, str], settings: Settings, found: str) -> None:
    """BuildError when the toolkit that was found (its label, e.g. cu130) is not the one that was asked for."""
    if env.get(LABEL_VARIABLE) and load_versions().choose(env).label != found:
        raise BuildError(
            f"{LABEL_VARIABLE} asks for {env[LABEL_VARIABLE]}, and the CUDA toolkit found is {found}: set CUDA_HOME to "
            "the right one, or run ci/build.sh, which installs it"
        )
    if not found.startswith(settings.name_suffix):
        raise BuildError(f"{NAME_SUFFIX_VARIABLE} is {settings.name_suffix}, and the CUDA toolkit found is {found}")


def resolve_build(env: Mapping[str, str]) -> Build:
    """What to build and with what; BuildError, one sentence, when something is missing or unknown."""
    try:
        manifest = tiles.load_manifest(ROOT / tiles.MANIFEST_NAME)
    except tiles.ManifestError as error:
        raise BuildError(str(error)) from error
    settings = read_settings(env, manifest)
    require_quotable()
    if settings.cross:
        toolchain = resolve_cross_toolchain(env, settings.archs, settings.platform)
    else:
        toolchain = resolve_toolchain(env, settings.archs)
    check_label(env, settings, toolchain.cuda.label)
    return Build(
        manifest=manifest,
        settings=settings,
        toolchain=toolchain,
        thresholds=load_thresholds(),
    )


def make_plan(build: Build) -> Plan:
    sources = [path.relative_to(ROOT) for path in ROOT.glob("csrc/moe/*.c*") if path.suffix in (".cu", ".cpp")]
    return plan(build.settings, build.toolchain, build.thresholds, sources, build.folder / "ninja")


def run_build(build: Build, version: str) -> tuple[Plan, dict[str, Any]]:
    """Builds and checks every extension; returns the plan, which knows the libraries, and the report."""
    cuda = build.toolchain.cuda
    print(
        f"CUDA {'.'.join(map(str, cuda.version))} ({cuda.origin}), CUTLASS {build.toolchain.cutlass.version}, torch "
        f"{build.toolchain.torch.version}, {build.toolchain.cxx_version}; profile {build.settings.profile}, "
        + ", ".join(f"sm_{arch}" for arch in build.settings.archs)
        + (f", EMULATED on sm_{emulation.ON}, for tests alone" if build.settings.emulates else "")
        + (f"; for {build.settings.platform.name}" if build.settings.cross else ""),
        flush=True,
    )
    made = make_plan(build)
    run_plan(made, build.settings.max_jobs)
    report = make_report(made, build.settings, build.toolchain, version, ROOT)
    costs = make_costs(made, ROOT)
    (ROOT / build.folder / COSTS_NAME).write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    print(summary(report, costs), flush=True)
    return made, report


def write_package_files(package: Path, report: dict[str, Any]) -> None:
    """The manifest's copy and the report, into the package folder that becomes the wheel."""
    package.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / tiles.MANIFEST_NAME, package / tiles.MANIFEST_NAME)
    (package / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
