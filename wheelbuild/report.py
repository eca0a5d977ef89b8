"""What a build made, and what that cost: two files, because the first is the same whoever builds, the second is not.

The report (what was built, and with what) goes into the wheel as build_report.json. The costs (seconds and memory of
each compilation) stay in the build folder, as build_costs.json: with them no two wheels of a commit would be equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wheelbuild import emulation
from wheelbuild.machine_code import is_instance, parse_ptxas
from wheelbuild.tile_model import floors
from wheelbuild.tile_model import tiles as tile_model

if TYPE_CHECKING:
    from mxfp4_moe.tiles import Tile
    from wheelbuild.plan import CompileJob, Plan
    from wheelbuild.settings import Settings
    from wheelbuild.toolchain import Toolchain

REPORT_NAME = "build_report.json"
COSTS_NAME = "build_costs.json"
REPORT_SCHEMA = 4


def _read(path: Path | None) -> dict[str, Any]:
    assert path is not None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _cost(root: Path, jobs: Sequence[CompileJob]) -> dict[str, float]:
    """Of several jobs: CPU and wall seconds summed, the memory of the largest."""
    records = [_read(root / job.record) for job in jobs if job.record is not None]
    return {
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 2),
        "wall_seconds": round(sum(record["wall_seconds"] for record in records), 2),
        "peak_mb": max((record["peak_mb"] for record in records), default=0),
    }


def _kernel(root: Path, job: CompileJob, tile: Tile, facts: Mapping[str, int]) -> dict[str, Any]:
    """The tile's kernel that this job compiled: its name, facts, registers and memory."""
    (arch,), (machine,) = job.archs, job.machine_archs
    function = tile_model.prove(tile, arch, job.pair).function
    compiled = parse_ptxas(_read(root / job.record if job.record else None)["output"])
    (used,) = (each for each in compiled if each.arch == machine and is_instance(each.kernel, function))
    names = ("registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes")
    of_kernel = {key: value for key, value in facts.items() if key not in ("tile_m", "tile_n", "swap_ab")}
    return {"function": function, **of_kernel, **{name: getattr(used, name) for name in names}}


def make_report(plan: Plan, settings: Settings, toolchain: Toolchain, version: str, root: Path) -> dict[str, Any]:
    """The report of a finished build; `root` is the source tree, to which the plan's paths are relative."""
    loaded = _read(root / plan.load)
    tiles: dict[str, Any] = {}
    for tile in plan.tiles:
        checked = _read(root / plan.check(tile.module))
        archs: dict[str, Any] = {}
        for job in plan.jobs_of(tile.module, "nvcc"):
            (arch,), pair = job.archs, job.pair
            kernel = _kernel(root, job, tile, loaded[tile.module]["facts"][arch][pair])
            if settings.emulates:
                kernel["emulated"] = checked["emulated"][pair]
                kernel["instructions"] = {"total": kernel["emulated"]["instructions"]}
            else:
                kernel["main_loop"] = checked["main_loop"][arch][pair]
                kernel["instructions"] = checked["kernel_instructions"][arch][pair]
            if scaled := checked["block_scaled"].get(arch, {}).get(pair):
                kernel["block_scaled"] = scaled
            archs.setdefault(arch, {})[pair] = kernel
        tiles[tile.name] = {
            "m": tile.m,
            "n": tile.n,
            "swap_ab": tile.swap_ab,
            "ops": loaded[tile.module]["ops"],
            "library": {key: checked[key] for key in ("file", "bytes", "sha256")},
            "archs": archs,
        }
    moe = _read(root / plan.check("moe"))
    return {
        "schema": REPORT_SCHEMA,
        "distribution": settings.distribution,
        "version": version,
        "profile": settings.profile,
        "pairs": list(dict.fromkeys(pair for tile in plan.tiles for pair in settings.pairs[tile])),
        "archs": list(plan.archs),
        **({"emulates": {"arch": emulation.ARCH, "on": emulation.ON}} if settings.emulates else {}),
        "built_with": {
            "cuda": ".".join(map(str, toolchain.cuda.version)),
            "cutlass": toolchain.cutlass.version,
            "torch": toolchain.torch.version,
            "torch_target": floors.dotted(floors.TORCH),
            "python": toolchain.python.version,
            "python_target": floors.dotted(floors.PYTHON),
            "cxx": toolchain.cxx_version,
        },
        "tiles": tiles,
        "moe": {
            "ops": loaded["moe"]["ops"],
            "library": {key: moe[key] for key in ("file", "bytes", "sha256")},
            "kernels": moe["kernels"],
            "instructions": moe["instructions"],
        },
    }


def make_costs(plan: Plan, root: Path) -> dict[str, Any]:
    """Seconds and memory of a finished build: per tile those of each kernel and of the host code, and of moe."""
    tiles: dict[str, Any] = {}
    for tile in plan.tiles:
        archs: dict[str, dict[str, Any]] = {}
        for job in plan.jobs_of(tile.module, "nvcc"):
            archs.setdefault(job.archs[0], {})[job.pair] = _cost(root, [job])
        tiles[tile.name] = {"archs": archs, "host": _cost(root, plan.jobs_of(tile.module, "cxx"))}
    return {"tiles": tiles, "moe": _cost(root, [*plan.jobs_of("moe", "nvcc"), *plan.jobs_of("moe", "cxx")])}


def summary(report: dict[str, Any], costs: dict[str, Any]) -> str:
    """The numbers of both as a table, one line per kernel."""
    rows = ["tile arch kernel stages smem regs loop NOP MMA LDSM per-MMA total CPU-s MB".split()]
    for name, tile in report["tiles"].items():
        for arch, pair in ((arch, pair) for arch, of_pairs in tile["archs"].items() for pair in of_pairs):
            built, cost = tile["archs"][arch][pair], costs["tiles"][name]["archs"][arch][pair]
            row = [name, f"sm_{arch}", built["function"], built["stages"], built["smem_bytes"], built["registers"]]
            if loop := built.get("main_loop"):
                row += [loop["instructions"], loop["nops"], loop["mma"], loop["ldsm"]]
                row += [f"{loop['instructions_per_mma']:.2f}"]
            else:  # emulated: calls take the MMA's place
                row += ["-", "-", built["emulated"]["calls"], "-", "-"]
            row += [built["instructions"]["total"], f"{cost['cpu_seconds']:.1f}", cost["peak_mb"]]
            rows.append([str(cell) for cell in row])
    return "\n".join(aligned(rows, left=3))


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table's lines; the first `left` columns are words and start at the left, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if place < left else c.rjust(w) for place, (c, w) in cells))
    return lines
