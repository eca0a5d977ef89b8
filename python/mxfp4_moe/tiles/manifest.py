"""tile_manifest.toml, the one list of tiles, archs, profiles and pairs of formats: read, and refused with reasons."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..archs import ArchError, check_arch
from .kernels import prove
from .pairs import PAIRS
from .tile import Tile

MANIFEST_NAME = "tile_manifest.toml"


class ManifestError(ValueError):
    """The manifest, or one tile of it, is not what the build can work with; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a wheel can compute: pairs of formats (weights_activations) and output dtypes."""

    name: str
    pairs: tuple[str, ...]
    out_dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    archs: tuple[str, ...]
    default_profile: str
    profiles: tuple[Profile, ...]
    tiles: tuple[Tile, ...]
    narrowed: Mapping[Tile, tuple[str, ...]]  # tiles whose row says which pairs they can be built for

    def profile(self, name: str) -> Profile:
        for profile in self.profiles:
            if profile.name == name:
                return profile
        raise ManifestError(f"profile {name!r}: expected one of {', '.join(p.name for p in self.profiles)}")

    def tile(self, name: str) -> Tile:
        """The manifest's tile of this name, such as 'm128n128' or 'm8n128_swap'."""
        for tile in self.tiles:
            if tile.name == name:
                return tile
        raise ManifestError(f"tile {name!r}: expected one of {', '.join(t.name for t in self.tiles)}")

    def pairs_of(self, profile: str, tile: Tile) -> tuple[str, ...]:
        """The pairs of formats that a wheel of this profile has a tile for."""
        return tuple(p for p in self.profile(profile).pairs if p in self.narrowed.get(tile, PAIRS))

    def refusal(self, profile: str, quantization: str) -> str | None:
        """Why a wheel of this profile cannot compute this pair of formats, in one sentence; None when it can.

        Args:
            profile: the wheel's.
            quantization: a pair of the manifest, or a name that others have for theirs.
        """
        if quantization in self.profile(profile).pairs:
            return None
        having = [p.name for p in self.profiles if quantization in p.pairs]
        remedy = f"install a wheel built with MXFP4_MOE_BUILD_PROFILE={having[0]}" if having else "no profile has it"
        has = ", ".join(self.profile(profile).pairs)
        return f"quantization {quantization!r} is not in this wheel's profile {profile!r} (it has {has}): {remedy}"


def _keys(table: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    unknown = sorted(set(table) - set(allowed))
    if unknown:
        raise ManifestError(f"{where}: unknown key {unknown[0]!r}, expected only {', '.join(allowed)}")
    missing = [key for key in allowed if key not in table]
    if missing:
        raise ManifestError(f"{where}: key {missing[0]!r} is missing")


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ManifestError(f"{where}: expected a list of one or more strings, got {value!r}")
    if len(set(value)) != len(value):
        raise ManifestError(f"{where}: duplicates in {value!r}")
    return tuple(value)


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected a table, got {value!r}")
    return value


def _pairs(value: object, where: str) -> tuple[str, ...]:
    names = _strings(value, where)
    for name in names:
        if name not in PAIRS:
            raise ManifestError(f"{where}: expected pairs among {', '.join(PAIRS)}, got {name!r}")
    return names


def _read_tile(row: object, where: str) -> Tile:
    table = _table(row, where)
    _keys({key: value for key, value in table.items() if key != "pairs"}, ("m", "n", "swap_ab"), where)
    m, n, swap_ab = table["m"], table["n"], table["swap_ab"]
    if not isinstance(m, int) or isinstance(m, bool):
        raise ManifestError(f"{where}: m must be an integer, got {m!r}")
    if not isinstance(n, int) or isinstance(n, bool):
        raise ManifestError(f"{where}: n must be an integer, got {n!r}")
    if not isinstance(swap_ab, bool):
        raise ManifestError(f"{where}: swap_ab must be true or false, got {swap_ab!r}")
    return Tile(m=m, n=n, swap_ab=swap_ab)


def parse_manifest(text: str, source: str = MANIFEST_NAME) -> Manifest:
    """The manifest in `text`. ManifestError names the tile (by its place and name) or the key, and the reason."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # not at the top: where tomli is missing, the doctor has to start and say so
        import tomli as tomllib
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{source}: not valid TOML: {error}") from error
    _keys(data, ("archs", "default_profile", "profile", "tile"), source)

    archs = _strings(data["archs"], f"{source}: archs")
    for arch in archs:
        try:
            check_arch(arch)
        except ArchError as error:
            raise ManifestError(f"{source}: {error}") from None

    profiles = []
    for name, value in _table(data["profile"], f"{source}: profile").items():
        where = f"{source}: profile {name!r}"
        table = _table(value, where)
        _keys(table, ("pairs", "out_dtypes"), where)
        profiles.append(
            Profile(
                name=name,
                pairs=_pairs(table["pairs"], f"{where}: pairs"),
                out_dtypes=_strings(table["out_dtypes"], f"{where}: out_dtypes"),
            )
        )
    default_profile = data["default_profile"]
    if default_profile not in [profile.name for profile in profiles]:
        names = ", ".join(profile.name for profile in profiles)
        raise ManifestError(f"{source}: default_profile: expected one of {names}, got {default_profile!r}")

    rows = data["tile"]
    if not isinstance(rows, list) or not rows:
        raise ManifestError(f"{source}: expected one or more [[tile]] tables, got {rows!r}")
    tiles: list[Tile] = []
    narrowed = {}
    for place, row in enumerate(rows, start=1):
        tile = _read_tile(row, f"{source}: tile {place} {row!r}")
        where = f"{source}: tile {place} ({tile.name})"
        if tile in tiles:
            raise ManifestError(f"{where}: duplicate of tile {tiles.index(tile) + 1}")
        pairs = tuple(dict.fromkeys(pair for profile in profiles for pair in profile.pairs))
        if "pairs" in row:
            named = narrowed[tile] = _pairs(row["pairs"], f"{where}: pairs")
            pairs = tuple(pair for pair in pairs if pair in named)
        for profile in profiles:
            if not set(profile.pairs) & set(pairs):
                raise ManifestError(f"{where}: pairs: expected one of profile {profile.name}'s at least, got none")
        for arch, pair in product(archs, pairs):
            if refusals := prove(tile, arch, pair).refusals:
                raise ManifestError(f"{where}: impossible on sm_{arch} for {pair}: {'; '.join(refusals)}")
        tiles.append(tile)
    return Manifest(
        archs=archs,
        default_profile=default_profile,
        profiles=tuple(profiles),
        tiles=tuple(tiles),
        narrowed=narrowed,
    )


def manifest_path() -> Path:
    """The installed wheel's manifest; in a source checkout, the top-level file that the wheel's is a copy of."""
    here = Path(__file__).resolve()
    packaged = here.parents[1] / MANIFEST_NAME
    return packaged if packaged.exists() else here.parents[3] / MANIFEST_NAME


def load_manifest(path: Path | None = None) -> Manifest:
    """The manifest at `path`, by default this package's own."""
    path = manifest_path() if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}): reinstall mxfp4-moe") from error
    return parse_manifest(text, source=path.name)
