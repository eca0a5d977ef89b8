"""Tiles: the manifest's model, the proof that a tile fits the hardware, and the choice of a tile for a call.

Everything here is a pure function of its arguments and the standard library alone, because the wheel's build loads this
file before the package exists. Importing a tile's extension module is done elsewhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from .archs import ArchError, check_arch

MANIFEST_NAME = "tile_manifest.toml"


class ManifestError(ValueError):
    """The manifest, or one tile of it, is not what the build can work with; the message says which and why."""


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, order=True)
class Tile:
    """One logical GEMM tile: `m` activation rows by `n` weight rows; `swap_ab` feeds weights to the MMA's A operand."""

    m: int
    n: int
    swap_ab: bool

    @property
    def name(self) -> str:
        return f"m{self.m}n{self.n}{'_swap' if self.swap_ab else ''}"

    @property
    def module(self) -> str:
        """Name of the extension module inside `mxfp4_moe._ext`."""
        return f"tile_{self.name}"

    @property
    def mn(self) -> tuple[int, int]:
        return (self.m, self.n)

    @classmethod
    def from_mn(cls, tile_mn: tuple[int, int]) -> Tile:
        """The tile of this shape; fewer than 64 rows means swapped operands."""
        m, n = tile_mn
        return cls(m=m, n=n, swap_ab=m < 64)


class Kernel(IntEnum):
    """Which kernel of a tile runs: Mxfp4MoeKernel of csrc/tile_abi.h. All give the same bits."""

    BY_SIZE = 0  # csrc/tile/launcher.cuh decides, for every call of the layer
    PLAIN = 1
    PARALLEL_K = 2
    FOLDED = 3  # reads folded activations (csrc/shared/folded.cuh)


# Every tile that was considered for the wheel; the proof below says which of them can be.
CANDIDATES = (
    *(Tile(m=m, n=n, swap_ab=False) for m in (64, 128, 256) for n in (8, 16, 32, 64, 128, 256)),
    *(Tile(m=m, n=n, swap_ab=True) for m in (8, 16, 32) for n in (64, 128, 256)),
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a wheel can compute: quantization modes (activations_weights) and output dtypes."""

    name: str
    quantization: tuple[str, ...]
    out_dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    archs: tuple[str, ...]
    default_profile: str
    profiles: tuple[Profile, ...]
    tiles: tuple[Tile, ...]

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

    def refusal(self, profile: str, quantization: str) -> str | None:
        """Why a wheel of this profile cannot compute this quantization mode, in one sentence; None when it can."""
        if quantization in self.profile(profile).quantization:
            return None
        having = [p.name for p in self.profiles if quantization in p.quantization]
        remedy = f"install a wheel built with MXFP4_MOE_BUILD_PROFILE={having[0]}" if having else "no profile has it"
        has = ", ".join(self.profile(profile).quantization)
        return f"quantization {quantization!r} is not in this wheel's profile {profile!r} (it has {has}): {remedy}"


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


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


def _read_tile(row: object, where: str) -> Tile:
    table = _table(row, where)
    _keys(table, ("m", "n", "swap_ab"), where)
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
        _keys(table, ("quantization", "out_dtypes"), where)
        profiles.append(
            Profile(
                name=name,
                quantization=_strings(table["quantization"], f"{where}: quantization"),
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
    for place, row in enumerate(rows, start=1):
        tile = _read_tile(row, f"{source}: tile {place} {row!r}")
        where = f"{source}: tile {place} ({tile.name})"
        if tile in tiles:
            raise ManifestError(f"{where}: duplicate of tile {tiles.index(tile) + 1}")
        for arch in archs:
            refusals = prove(tile, arch).refusals
            if refusals:
                raise ManifestError(f"{where}: impossible on sm_{arch}: {'; '.join(refusals)}")
        tiles.append(tile)
    return Manifest(archs=archs, default_profile=default_profile, profiles=tuple(profiles), tiles=tuple(tiles))


def manifest_path() -> Path:
    """The installed wheel's manifest; in a source checkout, the top-level file that the wheel's is a copy of."""
    here = Path(__file__).resolve()
    packaged = here.with_name(MANIFEST_NAME)
    return packaged if packaged.exists() else here.parents[2] / MANIFEST_NAME


def load_manifest(path: Path | None = None) -> Manifest:
    """The manifest at `path`, by default this package's own."""
    path = manifest_path() if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}): reinstall mxfp4-moe") from error
    return parse_manifest(text, source=path.name)


# ----------------------------------------------------------------------------------------------------------------------
# Proof: csrc/tile/tile_shape.cuh and stages.cuh, statement by statement
# ----------------------------------------------------------------------------------------------------------------------

TILE_K = 128  # one 32-bit scale word per row: four K = 32 blocks
_ACT_ROW_BYTES = TILE_K  # E4M3
_WEIGHT_BLOCK_ROWS = 64
_WEIGHT_BLOCK_BYTES = _WEIGHT_BLOCK_ROWS * (TILE_K // 2 + 4)  # packed E2M1, and one scale word per row
_SMEM_PER_SM = {9: 228 * 1024, 12: 100 * 1024}  # by the major number of the arch
_SMEM_RESERVED_PER_BLOCK = 1024  # taken by the system from every block
_REGISTERS_PER_SUBPARTITION = 512  # of 32 lanes each; a multiprocessor's warps share four of these
MAX_STAGES = 8
MAX_BLOCKS_PER_SM = 4
_REGISTERS_WANTED = ((8, 96), (16, 112), (32, 168), (math.inf, 176))  # by accumulators, per thread
_BARRIER_BYTES_PER_STAGE = 16
MAX_ACCUMULATORS = 128  # fp32 registers per thread; beyond it ptxas spills
MAX_ACTIVATING_ACCUMULATORS = 64  # of a tile whose epilogue applies GEMM1's activation; beyond it ptxas spills


def max_smem_per_block(arch: str) -> int:
    """Bytes of shared memory that a block may opt in to."""
    return _SMEM_PER_SM[check_arch(arch)[0]] - _SMEM_RESERVED_PER_BLOCK


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, kw_only=True)
class TileProof:
    """What a tile becomes on one arch, in bytes, registers and threads, and every reason why it cannot be.

    `smem_bytes` is the dynamic shared memory of one block; the part sizes are per pipeline stage.
    """

    tile: Tile
    arch: str
    physical_m: int
    physical_n: int
    warps_m: int
    warps_n: int
    warp_m: int
    warp_n: int
    threads: int
    accumulator_registers: int
    act_bytes: int
    weight_bytes: int
    act_scale_bytes: int
    barrier_bytes: int
    amax_bytes: int
    stage_bytes: int
    blocks_per_sm: int
    stages: int
    smem_bytes: int
    refusals: tuple[str, ...]

    @property
    def legal(self) -> bool:
        return not self.refusals

    def facts(self) -> dict[str, int]:
        """The fields of Mxfp4MoeTileFacts (csrc/tile_abi.h) that the compiled tile must report for this arch."""
        return {
            "tile_m": self.tile.m,
            "tile_n": self.tile.n,
            "swap_ab": int(self.tile.swap_ab),
            "threads": self.threads,
            "stages": self.stages,
            "stage_bytes": self.stage_bytes,
            "smem_bytes": self.smem_bytes,
            "blocks_per_sm": self.blocks_per_sm,
            "accumulator_registers": self.accumulator_registers,
            "kernels": sum(1 << kernel for kernel in kernels_of(self.tile, self.arch)),
        }


def _shape_refusals(tile: Tile) -> list[str]:
    m, n = tile.m, tile.n
    refusals = []
    if tile.swap_ab:
        if m not in (8, 16, 32):
            refusals.append(f"a swapped tile has m in 8, 16, 32, not {m}")
        if n < 64:
            refusals.append(f"a swapped tile has n of at least 64, not {n}")
    else:
        if m < 64 or m % 64 != 0:
            refusals.append(f"a native tile has m divisible by 64, not {m}")
    if not 8 <= n <= 256:
        refusals.append(f"n must be from 8 to 256 (a TMA box has at most 256 rows), not {n}")
    if m > 256:
        refusals.append(f"m must be at most 256 (a TMA box has at most 256 rows), not {m}")
    if n >= 8 and n % 8 != 0:
        refusals.append(f"n must be divisible by 8, the MMA's granule, not {n}")
    if n > 0 and _WEIGHT_BLOCK_ROWS % n != 0 and n % _WEIGHT_BLOCK_ROWS != 0:
        refusals.append(f"n must divide {_WEIGHT_BLOCK_ROWS}, the rows of a weight block, or be a multiple: {n}")
    return refusals


def prove(tile: Tile, arch: str) -> TileProof:
    """Stages, shared memory by part, registers and threads of `tile` on `arch`, legal or not.

    SM90 and SM12x differ in shared memory, hence in stages and blocks, and in the warps of (8, 128).

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    smem_per_sm = _SMEM_PER_SM[check_arch(arch)[0]]
    m, n, swap = tile.m, tile.n, tile.swap_ab
    refusals = _shape_refusals(tile)
    m, n = max(m, 1), max(n, 1)  # the sizes of a senseless tile are senseless too, but never a division by zero

    physical_m, physical_n = (n, m) if swap else (m, n)
    if swap:
        long_warps = (m <= 16 and n >= 256) or (m == 8 and n == 128 and check_arch(arch)[0] == 12)
        mma_warps = max(n // (16 if n <= 64 else 64 if long_warps else 32), 1)
    else:
        mma_warps = 8 if m * n >= 16384 else 4
    warp_n = physical_n if swap else min(n, 32)
    warps_n = physical_n // warp_n
    warps_m = max(mma_warps // warps_n, 1)
    warp_m = physical_m // warps_m
    accumulators = (warp_m // 16) * (warp_n // 8) * 4
    # One warp produces; beside eight warps with large accumulators a whole warpgroup, because registers move between
    # roles by warpgroups.
    moves_registers = mma_warps == 8 and accumulators >= 64
    threads = (mma_warps + (4 if moves_registers else 1)) * 32

    act_bytes = m * _ACT_ROW_BYTES
    weight_bytes = _ceil_div(n, _WEIGHT_BLOCK_ROWS) * _WEIGHT_BLOCK_BYTES
    act_scale_bytes = _ceil_div((m + 4) * 4, 128) * 128  # TMA moves four rows; the first may be any of the four
    stage_bytes = act_bytes + weight_bytes + act_scale_bytes
    stage_and_barriers = stage_bytes + _BARRIER_BYTES_PER_STAGE
    # GEMM1's activation: the largest magnitude per row and warp.
    activates = n >= 64 and accumulators <= MAX_ACTIVATING_ACCUMULATORS
    amax_bytes = (n // (warp_m if swap else warp_n)) * m * 4 if activates else 0

    def stages_for(blocks: int) -> int:
        budget = smem_per_sm // blocks - _SMEM_RESERVED_PER_BLOCK - amax_bytes
        return min(MAX_STAGES, budget // stage_and_barriers)

    # Several blocks hide each other's latencies, as long as each has three stages and registers for its accumulators.
    registers_wanted = next(wanted for most, wanted in _REGISTERS_WANTED if accumulators <= most)

    def registers_for(blocks: int) -> int:
        return _REGISTERS_PER_SUBPARTITION // _ceil_div(blocks * threads // 32, 4) // 8 * 8

    fitting = (
        b for b in range(MAX_BLOCKS_PER_SM, 1, -1) if stages_for(b) >= 3 and registers_for(b) >= registers_wanted
    )
    blocks_per_sm = next(fitting, 1)
    stages = stages_for(blocks_per_sm)

    if not refusals and (
        warp_m % 16 != 0
        or warps_m * warp_m != physical_m
        or warps_n * warp_n != physical_n
        or warps_m * warps_n != mma_warps
    ):
        refusals.append(
            f"{mma_warps} MMA warps as a {warps_m} x {warps_n} grid of {warp_m} x {warp_n} warp tiles do not cover "
            f"{physical_m} x {physical_n} in whole 16 x 8 fragments"
        )
    if stages < 2:
        refusals.append(
            f"shared memory: two pipeline stages need 2 x {stage_and_barriers:,} = {2 * stage_and_barriers:,} bytes "
            f"(per stage: activations {act_bytes:,}, weights {weight_bytes:,}, "
            f"activation scales {act_scale_bytes:,}, barriers {_BARRIER_BYTES_PER_STAGE}), a block has "
            f"{max_smem_per_block(arch):,}"
        )
    if accumulators > MAX_ACCUMULATORS:
        refusals.append(
            f"registers: {accumulators} accumulators per thread ({warp_m} x {warp_n} per warp), at most "
            f"{MAX_ACCUMULATORS} leave room for the rest"
        )
    return TileProof(
        tile=tile,
        arch=arch,
        physical_m=physical_m,
        physical_n=physical_n,
        warps_m=warps_m,
        warps_n=warps_n,
        warp_m=warp_m,
        warp_n=warp_n,
        threads=threads,
        accumulator_registers=accumulators,
        act_bytes=act_bytes,
        weight_bytes=weight_bytes,
        act_scale_bytes=act_scale_bytes,
        barrier_bytes=_BARRIER_BYTES_PER_STAGE,
        stage_bytes=stage_bytes,
        blocks_per_sm=blocks_per_sm,
        stages=stages,
        smem_bytes=stages * stage_and_barriers + amax_bytes,
        amax_bytes=amax_bytes,
        refusals=tuple(refusals),
    )


def kernels_of(tile: Tile, arch: str) -> tuple[Kernel, ...]:
    """The kernels that a tile has on an arch: csrc/tile/shapes.cuh; the build compares the two.

    Raises:
        ArchError: the kernel has no code for the arch.
    """
    if check_arch(arch)[0] != 9:
        return (Kernel.PLAIN,)
    has_few_rows = tile.m <= 64 and tile.n >= 64
    reads_folded = has_few_rows or tile.mn in ((128, 64), (128, 128), (256, 128))
    parallel_k = (Kernel.PARALLEL_K,) if tile.mn == (8, 64) else ()
    return (Kernel.PLAIN, *parallel_k, *((Kernel.FOLDED,) if reads_folded else ()))


# ----------------------------------------------------------------------------------------------------------------------
# Selection
# ----------------------------------------------------------------------------------------------------------------------


# Hardly any expert stays empty when slots are many, so E * m slots give a hair over m rows: that still counts as m.
_COVER_SLACK = 1.001


def select_tile_mn_for_sm120(num_tokens: int) -> tuple[int, int]:
    """The simple rule, by token count alone: (64, 128) below 64 tokens, (256, 64) from 256 on, else (128, 128)."""
    if num_tokens < 64:
        return (64, 128)
    if num_tokens >= 256:
        return (256, 64)
    return (128, 128)


def expected_rows_per_expert(num_tokens: int, top_k: int, num_experts: int) -> float:
    """Mean rows of an expert that gets any, when num_tokens * top_k slots fall on experts uniformly; 0 for no slots.

    An expert stays empty with probability (1 - 1/E)^(T*k), so E * (1 - (1 - 1/E)^(T*k)) experts are active.
    """
    if num_tokens < 0 or top_k < 1 or num_experts < 1:
        raise ValueError(
            "expected num_tokens >= 0, top_k >= 1 and num_experts >= 1, got "
            f"num_tokens={num_tokens}, top_k={top_k}, num_experts={num_experts}"
        )
    slots = num_tokens * top_k
    if slots == 0:
        return 0.0
    if num_experts == 1:
        return float(slots)
    active = -num_experts * math.expm1(slots * math.log1p(-1.0 / num_experts))
    return slots / active


def select_tile(num_tokens: int, top_k: int, num_experts: int, tiles: Iterable[Tile]) -> Tile:
    """The default choice among `tiles`: the smallest m that covers the expected rows of an active expert.

    Fewer rows than m are wasted MMA work, more mean a second pass over the expert's weights. When none covers, the
    largest m. Among equal m, the n nearest to 128: one whole scale block, and enough columns to reuse activations.
    """
    choices = list(tiles)
    if not choices:
        raise ValueError("tiles: expected at least one tile, got none")
    rows = expected_rows_per_expert(num_tokens, top_k, num_experts)
    covering = [tile.m for tile in choices if tile.m * _COVER_SLACK >= rows]
    m = min(covering) if covering else max(tile.m for tile in choices)
    return nearest_tile(Tile.from_mn((m, 128)), [tile for tile in choices if tile.m == m])


def nearest_tile(wanted: Tile, tiles: Iterable[Tile]) -> Tile:
    """`wanted` if it is among `tiles`, else the nearest: of the same mode, then by ratio in m, in n; larger on a tie.

    This is the fallback when a tile is missing from the wheel or blocked on the device.
    """
    choices = list(tiles)
    if not choices:
        raise ValueError("tiles: expected at least one tile, got none")

    def distance(tile: Tile) -> tuple[bool, float, float, int, int]:
        m, n = abs(math.log2(tile.m / wanted.m)), abs(math.log2(tile.n / wanted.n))
        return (tile.swap_ab != wanted.swap_ab, m, n, -tile.m, -tile.n)

    return min(choices, key=distance)
