"""The tiles of the installed wheel, or the proof that a tile is or is not possible."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from .. import __version__
from .._install import wheel
from ..tiles import MAX_ACCUMULATORS, Tile, TileProof, max_smem_per_block, prove

HELP = "the table of tiles, or one tile's proof"

_SCHEMA = 4
_UNKNOWN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--explain",
        type=_tile,
        metavar="M,N[,swap]",
        help="the proof for any tile, in the wheel or not: shared memory by part, stages, registers, and the verdict",
    )
    parser.add_argument("--json", action="store_true", help="the same for machines")


def run(arguments: argparse.Namespace) -> int:
    if arguments.explain is not None:
        data = explain_data(arguments.explain)
        words = explain_text(arguments.explain)
    else:
        data = table_data()
        words = table_text(data)
    print(json.dumps(data, indent=1) if arguments.json else words)
    return 0


def _tile(text: str) -> Tile:
    parts = [part.strip() for part in text.split(",")]
    sizes, mode = parts[:2], parts[2:]
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes) or mode not in ([], ["swap"]):
        raise argparse.ArgumentTypeError(f"expected M,N or M,N,swap, such as 128,128 or 8,128,swap, got {text!r}")
    return Tile(m=int(sizes[0]), n=int(sizes[1]), swap_ab=bool(mode))


def _mode(tile: Tile) -> str:
    return "swapped" if tile.swap_ab else "native"


# ---- the table -------------------------------------------------------------------------------------------------------


def table_data() -> dict[str, Any]:
    """The wheel's tiles: what its build report measured, and the proof's numbers where the report has none."""
    report = wheel.read_report() or {}
    archs = wheel.built_archs()
    tiles = []
    for tile in wheel.built_tiles():
        entry = report.get("tiles", {}).get(tile.name, {})
        path = wheel.library(tile.module)
        tiles.append(
            {
                "name": tile.name,
                "m": tile.m,
                "n": tile.n,
                "mode": _mode(tile),
                "library": {
                    "file": f"_ext/{path.name}",
                    "bytes": path.stat().st_size if path.exists() else None,
                    "sha256": entry.get("library", {}).get("sha256"),
                },
                "archs": _by_kernel(wheel.kernels(tile), functools.partial(_kernel_data, tile, entry.get("archs", {}))),
            }
        )
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "profile": report.get("profile"),
        "built_with": report.get("built_with"),
        "archs": list(archs),
        "tiles": tiles,
    }


def _by_kernel(
    kernels: Sequence[tuple[str, str]], data: Callable[[str, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By arch and the pair of formats that a kernel reads."""
    found: dict[str, dict[str, Any]] = {}
    for arch, pair in kernels:
        found.setdefault(arch, {})[pair] = data(arch, pair)
    return found


def _kernel_data(tile: Tile, report: dict[str, Any], arch: str, pair: str) -> dict[str, Any]:
    """`report`: what it has of the tile, by arch and pair."""
    proof, built = prove(tile, arch, pair), report.get(arch, {}).get(pair, {})
    facts = proof.facts()
    names = ("stages", "smem_bytes", "threads", "blocks_per_sm", "accumulator_registers")
    return {
        "function": built.get("function", proof.function),
        **{name: built.get(name, facts[name]) for name in names},
        "registers": built.get("registers"),
        "instructions_per_mma": (built.get("main_loop") or {}).get("instructions_per_mma"),
    }


def table_text(data: dict[str, Any]) -> str:
    """One row per kernel; a library has all of a tile's, and its size stands in the first."""
    rows = [["tile", "mode", "arch", "reads", "kernel", "stages", "shared memory", "registers", "instr/MMA", "size"]]
    for tile in data["tiles"]:
        size = "missing" if tile["library"]["bytes"] is None else _number(tile["library"]["bytes"])
        for arch, pair in [(arch, pair) for arch, pairs in tile["archs"].items() for pair in pairs]:
            numbers = tile["archs"][arch][pair]
            row = [tile["name"], tile["mode"], arch, pair, numbers["function"]]
            row += [_number(numbers[name]) for name in ("stages", "smem_bytes", "registers", "instructions_per_mma")]
            rows.append([*row, size])
            size = ""
    sizes = [tile["library"]["bytes"] or 0 for tile in data["tiles"]]
    tail = f"mxfp4-moe {data['version']}: {len(data['tiles'])} tiles, {sum(sizes):,} bytes"
    if data["profile"]:
        tail += f", profile {data['profile']}, built with CUDA {(data['built_with'] or {}).get('cuda', 'unknown')}"
    else:
        tail += "; no build report, so only what can be proved"
    return "\n".join([*_aligned(rows, left=5), "", tail])


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.ljust(w) if place < left else c.rjust(w) for place, (c, w) in cells).rstrip())
    return lines


# ---- the proof -------------------------------------------------------------------------------------------------------


def explain_data(tile: Tile) -> dict[str, Any]:
    def verdict(arch: str, pair: str) -> dict[str, Any]:
        proof = prove(tile, arch, pair)
        return {
            "max_smem_bytes": max_smem_per_block(arch),
            "max_accumulator_registers": MAX_ACCUMULATORS,
            "legal": proof.legal,
            "refusals": list(proof.refusals),
            "proof": _proof_data(proof),
        }

    return {
        "schema": _SCHEMA,
        "name": tile.name,
        "m": tile.m,
        "n": tile.n,
        "mode": _mode(tile),
        "in_wheel": tile in wheel.built_tiles(),
        "archs": _by_kernel(wheel.kernels(), verdict),
    }


def _proof_data(proof: TileProof) -> dict[str, Any]:
    return {key: value for key, value in asdict(proof).items() if key not in ("tile", "arch", "pair", "refusals")}


def explain_text(tile: Tile) -> str:
    """One proof where all archs have the same numbers, else one for each; and one for each pair of formats."""
    groups: dict[TileProof, list[TileProof]] = {}
    for proof in (prove(tile, arch, pair) for arch, pair in wheel.kernels()):
        groups.setdefault(replace(proof, arch=""), []).append(proof)
    return "\n\n".join(_proof_text(alike[0], ", ".join(f"sm_{p.arch}" for p in alike)) for alike in groups.values())


def _proof_text(proof: TileProof, archs: str) -> str:
    tile = proof.tile
    roles = "A = weights, B = activations" if proof.weights_are_a else "A = activations, B = weights"
    if proof.reads_halves:
        roles += f", both {proof.pair.partition('_')[2]}"
    rows = [
        ("activations", proof.act_bytes),
        ("weights and scales", proof.weight_bytes),
        ("activation scales", proof.act_scale_bytes),
        ("barriers", proof.barrier_bytes),
        ("one stage", proof.stage_bytes + proof.barrier_bytes),
        ("activation table", proof.amax_bytes),
        ("tiles of warps", proof.kept_bytes),
        (_count(proof.stages, "stage"), proof.smem_bytes),
        ("a block may have", max_smem_per_block(proof.arch)),
    ]
    lines = [
        f"{tile.name} on {archs}, {proof.pair}: {proof.function}",
        f"  {_mode(tile)}: {roles}; physical tile {proof.physical_m} x {proof.physical_n}, K = 128 per stage",
        "  shared memory, bytes",
        *(f"    {name:<18}{size:>9,}" for name, size in rows),
        f"  stages: {proof.stages}, with {_count(proof.blocks_per_sm, 'block')} per SM",
        f"  warps: {proof.warps_m} x {proof.warps_n} MMA warps of {proof.warp_m} x {proof.warp_n}; "
        f"{proof.threads} threads with the producer's",
        f"  accumulators: {proof.accumulator_registers} fp32 registers per thread, of at most {MAX_ACCUMULATORS}",
    ]
    if proof.legal:
        here = tile in wheel.built_tiles() and any(pair == proof.pair for _, pair in wheel.kernels(tile))
        lines.append("  verdict: legal, " + ("in this wheel" if here else "not in this wheel"))
    else:
        lines.append("  verdict: refused")
        lines += [f"    - {refusal}" for refusal in proof.refusals]
        other = replace(tile, swap_ab=not tile.swap_ab)
        if all(prove(other, arch, pair).legal for arch, pair in wheel.kernels()):
            option = f"{tile.m},{tile.n}" + (",swap" if other.swap_ab else "")
            lines.append(f"  the {_mode(other)} tile of this shape is legal: --explain {option}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
