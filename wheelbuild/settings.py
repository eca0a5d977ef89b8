"""What was asked for: profile, platform, tile and arch filters, name and version, jobs. Read from the environment."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wheelbuild import BuildError, emulation
from wheelbuild.platforms import PLATFORMS, Platform, host_platform
from wheelbuild.tile_model import tiles

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Manifest, Tile

PROFILE_VARIABLE = "MXFP4_MOE_BUILD_PROFILE"
PLATFORM_VARIABLE = "MXFP4_MOE_PLATFORM"
TILES_VARIABLE = "MXFP4_MOE_TILES"
ARCHS_VARIABLE = "MXFP4_MOE_ARCHS"
LOCAL_VERSION_VARIABLE = "MXFP4_MOE_LOCAL_VERSION"
NAME_SUFFIX_VARIABLE = "MXFP4_MOE_NAME_SUFFIX"
JOBS_VARIABLE = "MAX_JOBS"
NAME = "mxfp4-moe"


@dataclass(frozen=True, kw_only=True)
class Settings:
    profile: str
    default_profile: bool
    platform: Platform
    cross: bool  # built for another platform than the one that builds
    tiles: tuple[Tile, ...]
    archs: tuple[str, ...]
    filtered: bool  # a developer's build of some tiles or archs only
    local_version: str | None  # None: derived from the toolkit
    name_suffix: str  # cu13 for PyPI, which has no local versions; empty elsewhere
    max_jobs: int | None
    pairs: Mapping[Tile, tuple[str, ...]]  # of formats that each tile is built for
    emulates: bool = False  # SM12x's kernels as SM90's machine code, for tests (wheelbuild.emulation)

    def kernels(self, tile: Tile) -> tuple[tuple[str, str], ...]:
        """The kernels of a tile: for each arch the pairs of formats that they read."""
        return tuple((arch, pair) for arch in self.archs for pair in tiles.kernel_pairs(arch, self.pairs[tile]))

    def compiled_for(self, arch: str) -> str:
        """Whose machine code an arch's kernels become: its own, but in a build that emulates."""
        return emulation.ON if self.emulates else arch

    def variant(self) -> str:
        """Empty for the wheel that is released; else what tells this build's artifacts from it."""
        parts = [] if self.default_profile else [self.profile.replace("_", "")]
        if self.filtered:
            chosen = "|".join([*sorted(tile.name for tile in self.tiles), *sorted(self.archs)])
            parts.append("dev" + hashlib.sha256(chosen.encode()).hexdigest()[:8])
        if self.emulates:
            parts.append(emulation.VARIANT)
        return ".".join(parts)

    @property
    def distribution(self) -> str:
        """The wheel's name: mxfp4-moe, or mxfp4-moe-cu13."""
        return f"{NAME}-{self.name_suffix}" if self.name_suffix else NAME

    def local(self, label: str) -> str:
        """The wheel's local version for a toolkit label: 'cu130', or 'cu130.full', or 'cu130.dev1a2b3c4d'.

        A name with a suffix says which toolkit it is, so only 'full' or 'dev1a2b3c4d' are left, or nothing.
        """
        if self.local_version is not None:
            return self.local_version
        variant = self.variant()
        if self.name_suffix:
            return variant
        return f"{label}.{variant}" if variant else label

    def build_folder(self, label: str) -> str:
        """Name under build/: two builds that differ in toolkit, profile, filter or platform never share an artifact."""
        variant = self.variant()
        parts = [self.profile, label, variant, self.platform.machine if self.cross else ""]
        return "-".join(filter(None, parts))

    def wheel_options(self) -> dict[str, str]:
        """For setuptools' bdist_wheel, which by itself names the platform that builds."""
        return {"plat_name": self.platform.name} if self.cross else {}


def _chosen(env: Mapping[str, str], variable: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = [name.strip() for name in env.get(variable, "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise BuildError(f"{variable}: {name!r} is not in the manifest, which has {', '.join(known)}")
    # In the manifest's order, so that the same choice written differently is the same build.
    return tuple(name for name in known if name in names) if names else known


def _platform(env: Mapping[str, str], host: str) -> Platform:
    name = env.get(PLATFORM_VARIABLE) or host
    if name not in PLATFORMS:
        raise BuildError(f"{PLATFORM_VARIABLE}: wheels are built for {', '.join(PLATFORMS)}, not for {name!r}")
    platform = PLATFORMS[name]
    if host not in (name, platform.cross_from):
        others = f" or on {platform.cross_from}" if platform.cross_from else ""
        raise BuildError(f"{PLATFORM_VARIABLE}: {name} is built on itself{others}, and this machine is {host}")
    return platform


def _emulates(env: Mapping[str, str], manifest: Manifest) -> bool:
    """Whether this is the build that emulates; BuildError beside a variable that would hide it or contradict it."""
    asked = env.get(emulation.VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"{emulation.VARIABLE}: expected 1 or nothing, got {asked!r}")
    if asked != "1":
        return False
    for variable in (ARCHS_VARIABLE, LOCAL_VERSION_VARIABLE, NAME_SUFFIX_VARIABLE, PLATFORM_VARIABLE):
        if env.get(variable):
            raise BuildError(
                f"{variable}: expected nothing beside {emulation.VARIABLE}, which decides it, got {env[variable]!r}"
            )
    if emulation.ARCH not in manifest.archs:
        raise BuildError(f"{emulation.VARIABLE}: sm_{emulation.ARCH} is not in the manifest, so nothing is emulated")
    return True


def read_settings(env: Mapping[str, str], manifest: Manifest, host: str | None = None) -> Settings:
    """Settings from the environment; BuildError with the list of known values for an unknown one.

    `host` is the platform that builds, this machine's if it is None.
    """
    host = host or host_platform()
    known = tuple(profile.name for profile in manifest.profiles)
    profile = env.get(PROFILE_VARIABLE) or manifest.default_profile
    if profile not in known:
        raise BuildError(f"{PROFILE_VARIABLE}: {profile!r} is not in the manifest, which has {', '.join(known)}")
    names = tuple(tile.name for tile in manifest.tiles)
    chosen = tuple(manifest.tile(name) for name in _chosen(env, TILES_VARIABLE, names))
    emulates = _emulates(env, manifest)
    all_archs = (emulation.ARCH,) if emulates else manifest.archs
    archs = all_archs if emulates else _chosen(env, ARCHS_VARIABLE, manifest.archs)
    jobs = env.get(JOBS_VARIABLE, "").strip()
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise BuildError(f"{JOBS_VARIABLE}: expected a positive integer, got {jobs!r}")
    suffix = env.get(NAME_SUFFIX_VARIABLE, "")
    if not re.fullmatch(r"(cu\d{2,3})?", suffix):
        raise BuildError(f"{NAME_SUFFIX_VARIABLE}: expected cu and a CUDA version, such as cu13, got {suffix!r}")
    platform = _platform(env, host)
    return Settings(
        profile=profile,
        default_profile=profile == manifest.default_profile,
        platform=platform,
        cross=platform.name != host,
        tiles=chosen,
        archs=archs,
        filtered=len(chosen) != len(names) or archs != all_archs,
        local_version=env.get(LOCAL_VERSION_VARIABLE),
        name_suffix=suffix,
        max_jobs=int(jobs) if jobs else None,
        pairs={tile: manifest.pairs_of(profile, tile) for tile in chosen},
        emulates=emulates,
    )
