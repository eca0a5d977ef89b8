"""Mistakes, one at a time, in a tile's PTX, its source or its launch; and what notices each.

`./ci/test.sh -s tests/cpu/test_ptx_mutations.py` prints the table of mutations.py. A mistake counts as caught when the
executor reports a fault or a result differs, under one of a few seeds: orders of warps and of copies.
"""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import torch

from mxfp4_moe.activations import Activation
from mxfp4_moe.tiles import MXFP4_MXFP8, Tile, load_manifest, prove
from wheelbuild import ROOT
from wheelbuild.kernel_ptx import compile_source_to_ptx
from wheelbuild.plan import kernel_defines

from . import gemm, launch
from .faults import Fault
from .gemm import Epilogue, Gemm
from .launch import Launch
from .machine import Machine

SEEDS = range(4)
ROWS = (3, 0, 9)

Edit = Callable[[str], str]


@dataclass(frozen=True)
class Mutation:
    """One mistake; exactly one of ptx, source and launch is given."""

    name: str
    _: KW_ONLY
    pair: str = MXFP4_MXFP8
    tile: str = "m8n64_swap"
    ptx: Edit | None = None
    source: tuple[str, str, str] | None = None  # file under csrc, old text, new text
    launch: Callable[[Launch], Launch] | None = None
    dtype: torch.dtype = torch.float32
    ready: bool = False  # whether the launch says that the m-tiles are there
    activates: bool = False  # runs GEMM1's activation instead of storing the sums
    activation: Activation = Activation.SWIGLU_OAI
    harmless: bool = False  # changes neither results nor order: must not be noticed


def once(pattern: str, to: str, *, number: int = 0) -> Edit:
    """Replaces one match of a pattern; there must be one."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text, re.DOTALL))
        assert len(found) > number, f"{pattern!r}: {len(found)} matches"
        match = found[number]
        changed = text[: match.start()] + match.expand(to) + text[match.end() :]
        assert changed != text, pattern
        return changed

    return edit


def box(which: int, **fields: int) -> Callable[[Launch], Launch]:
    """Changes a tensor map of the launch: "rows" of its box or its "swizzle". 0: activations, 1: scales, 2: weights."""

    def change(one: Launch) -> Launch:
        maps = bytearray(one.params[0])
        for name, value in fields.items():
            at, size = {"rows": (100, 4), "swizzle": (118, 2), "columns": (96, 4)}[name]
            maps[which * 128 + at : which * 128 + at + size] = value.to_bytes(size, "little")
        assert bytes(maps) != one.params[0]
        return replace(one, params=(bytes(maps), *one.params[1:]))

    return change


@functools.cache
def tile_of(name: str) -> Tile:
    return load_manifest().tile(name)


def compiled(tile: Tile, source: tuple[str, str, str], pair: str = MXFP4_MXFP8, arch: str = "120f") -> str:
    """The tile's PTX after an edit of its sources; the old text must be there once."""
    file, old, new = source
    text = (ROOT / "csrc" / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file}: {old!r} is there {text.count(old)} times"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "csrc", root / "csrc")
        (root / "csrc" / file).write_text(text.replace(old, new), encoding="utf-8")
        defines = kernel_defines(tile, arch, pair)
        source_of_tile = Path("csrc/tile/tile.cu")
        return compile_source_to_ptx(source_of_tile, arch, defines, f"mutant of {file}", root=Path(folder))


@functools.cache
def problem_of(tile: Tile, activates: bool, pair: str = MXFP4_MXFP8) -> gemm.GemmProblem:
    """More K tiles than stages, a tail in K and in N, an expert without rows."""
    k = prove(tile, "120f", pair).stages * 128 + 32
    if activates:
        return gemm.usual_problem(160, 192, ROWS, pair=pair)
    return gemm.any_problem(k, 144, ROWS, pair)


@functools.cache
def epilogue(activation: Activation) -> Epilogue:
    g = torch.Generator().manual_seed(0)
    return Epilogue(
        activation=activation,
        rounding=torch.bfloat16,
        bias=torch.randn(len(ROWS), 192, generator=g),
        alpha=torch.tensor([1.702, 1.0, 0.5]),
        beta=torch.tensor([1.0, 0.5, 2.0]),
        limit=torch.tensor([7.0, 1.0, 3.0]),
    )


@functools.cache
def activated(tile: Tile, activation: Activation, pair: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tile itself makes of `epilogue`; test_ptx_tiles.py compares that with the reference."""
    return Gemm(problem_of(tile, True, pair), tile, Machine()).run_activated(epilogue(activation))


def notices(mutation: Mutation, seeds: Sequence[int] = SEEDS) -> str:
    """What noticed it, in a line; empty if nothing did."""
    tile = tile_of(mutation.tile)
    ptx = launch.ptx_of_tile(tile, pair=mutation.pair)  # teaches the recorder its kernel
    if mutation.source is not None:
        ptx = compiled(tile, mutation.source, mutation.pair)
    if mutation.ptx is not None:
        ptx = mutation.ptx(ptx)
    for seed in seeds:
        # Copies that land late in some runs and soon in others.
        machine = Machine(seed=seed, lateness=(1.0, 30.0, 0.2, 300.0)[seed % 4])
        if found := _noticed(mutation, tile, machine, ptx):
            return found
    return ""


def _noticed(mutation: Mutation, tile: Tile, machine: Machine, ptx: str) -> str:
    problem = problem_of(tile, mutation.activates, mutation.pair)
    run = Gemm(problem, tile, machine)
    options = {"m_tiles_are_ready": mutation.ready, "change": lambda _: ptx, "change_launch": mutation.launch}
    try:
        if mutation.activates:
            outputs = run.run_activated(epilogue(mutation.activation), **options)
            pairs = zip(outputs, activated(tile, mutation.activation, mutation.pair), strict=True)
            wrong = sum(int((out != expected).sum()) for out, expected in pairs)
            return f"results: {wrong} bytes of codes and scales differ" if wrong else ""
        mismatch = problem.mismatch(run.run(mutation.dtype, **options))
        return f"results: {mismatch.split(',')[0]}" if mismatch else ""
    except Fault as fault:
        place = fault.place.split(", ", 2)[-1]
        return f"{fault.kind.value}: {fault.text.splitlines()[0]}" + (f" [{place}]" if place else "")


def table(rows: Sequence[tuple[Mutation, str]]) -> str:
    """A line for each mutation: its name, where it was made, and what noticed it."""
    lines = []
    for number, (mutation, found) in enumerate(rows, 1):
        where = "PTX" if mutation.ptx else "source" if mutation.source else "launch" if mutation.launch else "seed"
        expected = "not noticed, as it must be" if mutation.harmless else "NOT NOTICED"
        lines.append(f"{number:3}  {mutation.name:58}  {mutation.tile:10}  {where:6}  {found or expected}")
    return "\n".join(lines)
