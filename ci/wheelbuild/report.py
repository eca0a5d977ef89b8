"""What a build made, and what that cost: two files, because the first is the same whoever builds, the second is not.

The report (what was built, and with what) goes into the wheel as build_report.json. The costs (seconds and memory of
each compilation) stay in the build folder, as build_costs.json: with them no two wheels of a commit would be equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wheelbuild import emulation
from wheelbuild.machine_code import parse_ptxas

if TYPE_CHECKING:
    from wheelbuild.plan import CompileJob, Plan
    from wheelbuild.settings import Settings
    from wheelbuild.toolchain import Toolchain

REPORT_NAME = "build_report.json"
COSTS_NAME = "build_costs.json"
REPORT_SCHEMA = 1


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


def _worst(root: Path, job: CompileJob, arch: str) -> dict[str, int]:
    """Registers and memory of the greediest kernel that this job compiled into this arch's machine code."""
    output = _read(root / job.record if job.record else None)["output"]
    kernels = [kernel for kernel in parse_ptxas(output) if kernel.arch == arch]
    return {
        name: max((getattr(kernel, name) for kernel in kernels), default=0)
        for name in ("registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes")
    }


def make_report(plan: Plan, settings: Settings, toolchain: Toolchain, version: str, root: Path) -> dict[str, Any]:
    """The report of a finished build; `root` is the source tree, to which the plan's paths are relative."""
    loaded = _read(root / plan.load)
    tiles: dict[str, Any] = {}
    for tile in plan.tiles:
        checked = _read(root / plan.check(tile.module))
        archs: dict[str, Any] = {}
        for job in plan.jobs_of(tile.module, "nvcc"):
            (arch,), (machine,) = job.archs, job.machine_archs
            facts = loaded[tile.module]["facts"][arch]
            facts = {key: value for key, value in facts.items() if isinstance(value, int)}
            archs[arch] = {
                **facts,
                **_worst(root, job, machine),
                "instructions": checked["instructions"][machine],
                **(
                    {"emulated": checked["emulated"]}
                    if settings.emulates
                    else {"main_loop": checked["main_loop"][arch]}
                ),
            }
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
        "archs": list(plan.archs),
        **({"emulates": {"arch": emulation.ARCH, "on": emulation.ON}} if settings.emulates else {}),
        "built_with": {
            "cuda": ".".join(map(str, toolchain.cuda.version)),
            "cutlass": toolchain.cutlass.version,
            "torch": toolchain.torch.version,
            "torch_target": "2.10",
            "python": toolchain.python.version,
            "python_target": "3.10",
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
    """Seconds and memory of a finished build: per tile those of each arch's kernel and of the host code, and of moe."""
    tiles = {
        tile.name: {
            "archs": {job.archs[0]: _cost(root, [job]) for job in plan.jobs_of(tile.module, "nvcc")},
            "host": _cost(root, plan.jobs_of(tile.module, "cxx")),
        }
        for tile in plan.tiles
    }
    return {"tiles": tiles, "moe": _cost(root, [*plan.jobs_of("moe", "nvcc"), *plan.jobs_of("moe", "cxx")])}


def summary(report: dict[str, Any], costs: dict[str, Any]) -> str:
    """The numbers of both as a table, one line per tile and arch."""
    rows = ["tile arch stages smem regs total loop NOP MMA LDSM per-MMA CPU-s MB".split()]
    for name, tile in report["tiles"].items():
        for arch, data in tile["archs"].items():
            cost = costs["tiles"][name]["archs"][arch]
            row = [name, f"sm_{arch}", data["stages"], data["smem_bytes"], data["registers"]]
            row += [data["instructions"]["total"]]
            if loop := data.get("main_loop"):
                row += [loop["instructions"], loop["nops"], loop["mma"], loop["ldsm"]]
                row += [f"{loop['instructions_per_mma']:.2f}"]
            else:  # emulated: calls take the MMA's place
                row += ["-", "-", data["emulated"]["calls"], "-", "-"]
            row += [f"{cost['cpu_seconds']:.1f}", cost["peak_mb"]]
            rows.append([str(cell) for cell in row])
    return "\n".join(aligned(rows, left=2))


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table's lines; the first `left` columns are words and start at the left, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if place < left else c.rjust(w) for place, (c, w) in cells))
    return lines
