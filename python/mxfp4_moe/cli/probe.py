"""What assemblers accept, instruction by instruction: no GPU, no torch, nothing is run.

Asks every ptxas that it finds (PATH, CUDA_HOME, CUDA_PATH, PyPI packages, --ptxas) about every variant in the table,
for every target, and prints the matrix. Exit status 0 when the question was answered, whatever the answer; 2 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..probe import kernel, matrix, variants
from ..probe.assemblers import Assembler, AssemblerError, find
from ..probe.run import TARGETS, Status, probe_all

HELP = "which instructions each target accepts, asked of every ptxas found"

_NONE = (
    "no ptxas: pip install nvidia-cuda-nvcc, or set CUDA_HOME to a toolkit, or name one with --ptxas PATH"
    " (docs/architectures.md has the answers of three)"
)


class _Refusal(Exception):
    """The question cannot be answered; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernel", action="store_true", help="whether each target takes all of the tile kernel")
    what.add_argument("--list", action="store_true", help="the variants in the table; asks nobody")
    what.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="what differs between two toolkits (12.9 13.0) or two targets"
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="SM",
        help=f"a target, or several with commas; repeatable; by default {', '.join(TARGETS)}",
    )
    parser.add_argument("--category", action="append", choices=variants.categories(), help="only these; repeatable")
    parser.add_argument(
        "--instruction",
        action="append",
        metavar="NAME",
        help="only variants whose name contains this, or matches it if it has a *; repeatable",
    )
    parser.add_argument("--ptxas", action="append", type=Path, metavar="PATH", help="one more ptxas; repeatable")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the answers for machines, with ptxas's words")
    form.add_argument("--markdown", action="store_true", help="the matrix as docs/architectures.md has it")


def run(arguments: argparse.Namespace) -> int:
    try:
        print(_answer(arguments))
    except (_Refusal, AssemblerError) as error:
        print(f"mxfp4-moe probe: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(arguments: argparse.Namespace) -> str:
    if arguments.markdown and (arguments.kernel or arguments.list or arguments.diff):
        raise _Refusal("--markdown is for the matrix, not for --kernel, --list or --diff")
    if arguments.kernel and (arguments.category or arguments.instruction):
        raise _Refusal("--kernel asks about all of the kernel: leave out --category and --instruction")
    chosen = _variants(arguments.category, arguments.instruction)
    if arguments.list:
        return _list(chosen, arguments.json)
    targets = _targets(arguments)
    assemblers = _assemblers(arguments.ptxas or [])
    progress = _Progress()
    if arguments.kernel:
        verdicts = kernel.judge(assemblers, targets, progress)
        progress.end()
        return _kernel(assemblers, verdicts, arguments.json)
    results = probe_all(assemblers, dict.fromkeys(targets, chosen), progress=progress)
    progress.end()
    found = matrix.from_results(results, targets, chosen)
    if arguments.diff:
        return _diff(found, *arguments.diff, as_json=arguments.json)
    if arguments.json:
        data = matrix.to_json(found)
        for row, assembler in zip(data["toolkits"], assemblers, strict=True):
            row |= {"path": str(assembler.path), "found": assembler.origin}
        return json.dumps(data, indent=1)
    if arguments.markdown:
        return matrix.markdown(found)
    return f"{matrix.legend(found)}\n\n{matrix.text(found)}"


# ---- What is asked, of whom ------------------------------------------------------------------------------------------


def _variants(categories: Sequence[str] | None, names: Sequence[str] | None) -> tuple[variants.Variant, ...]:
    chosen = tuple(
        variant
        for variant in variants.load()
        if (not categories or variant.category in categories)
        and (not names or any(_fits(variant.name, name) for name in names))
    )
    if not chosen:
        raise _Refusal("no variant fits --category and --instruction; --list shows all that there are")
    return chosen


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def _is_target(text: str) -> bool:
    return text.startswith("sm_")


def _targets(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.diff:
        sides = [_is_target(side) for side in arguments.diff]
        if any(sides) and not all(sides):
            raise _Refusal("--diff: expected two toolkits, such as 12.9 13.0, or two targets, such as sm_120a sm_120f")
        if all(sides):
            if arguments.target:
                raise _Refusal("--diff of two targets asks about these two: leave out --target")
            return tuple(arguments.diff)
    given = [target.strip() for text in arguments.target or [] for target in text.split(",")]
    for target in given:
        if not _is_target(target):
            raise _Refusal(f"--target: expected a name such as sm_120f, got {target!r}")
    return tuple(dict.fromkeys(given)) or TARGETS


def _assemblers(named: Sequence[Path]) -> list[Assembler]:
    found, faults = find(os.environ, named=named)
    for fault in faults:
        print(f"mxfp4-moe probe: left out: {fault}", file=sys.stderr)
    if not found:
        raise _Refusal(_NONE)
    return found


class _Progress:
    """One line on a terminal that is written over; nothing where nobody watches."""

    def __init__(self) -> None:
        self.width = 0

    def __call__(self, done: int, total: int, assembler: Assembler, target: str) -> None:
        if sys.stderr.isatty():
            line = f"{done} of {total}: CUDA {assembler.cuda}, {target}"
            self._write(line)

    def end(self) -> None:
        if self.width:
            self._write("")
            print(end="\r", file=sys.stderr, flush=True)

    def _write(self, line: str) -> None:
        print(f"\r{line:<{self.width}}", end="", file=sys.stderr, flush=True)
        self.width = len(line)


# ---- What is said ----------------------------------------------------------------------------------------------------


def _list(chosen: Sequence[variants.Variant], as_json: bool) -> str:
    if as_json:
        rows = [{**vars(variant), "isa": variants.isa_text(variant.isa), "name": variant.name} for variant in chosen]
        return json.dumps({"schema": matrix.SCHEMA, "variants": rows}, indent=1)
    widths = [max(len(getattr(variant, field)) for variant in chosen) for field in ("category", "name")]
    lines = [
        f"{variant.category:<{widths[0]}}  {variant.name:<{widths[1]}}  PTX ISA {variants.isa_text(variant.isa)}"
        f"  {variant.section}"
        for variant in chosen
    ]
    return "\n".join([*lines, "", f"{len(chosen)} variants"])


def _kernel(assemblers: Sequence[Assembler], verdicts: Sequence[kernel.KernelVerdict], as_json: bool) -> str:
    if as_json:
        data: dict[str, Any] = {
            "schema": matrix.SCHEMA,
            "paths": {name: [one.ptx for one in path.instructions] for name, path in kernel.load().items()},
            "toolkits": [
                {
                    "version": assembler.label,
                    "ptx_isa": variants.isa_text(assembler.isa),
                    "path": str(assembler.path),
                    "found": assembler.origin,
                    "targets": {
                        found.target: {
                            "kernel_path": found.path.name,
                            "status": found.status.value,
                            "first": found.first if found.status is Status.REFUSED else "",
                            "words": found.words,
                        }
                        for found in verdicts
                        if found.assembler == assembler
                    },
                }
                for assembler in assemblers
            ],
        }
        return json.dumps(data, indent=1)
    width = max(len(found.target) for found in verdicts)
    lines = []
    for assembler in assemblers:
        lines.append(f"ptxas {assembler.label} ({assembler.origin}: {assembler.path})")
        its = [found for found in verdicts if found.assembler == assembler]
        lines += [f"  {found.target:<{width}}  {found.sentence}" for found in its]
    return "\n".join(lines)


def _diff(found: matrix.Matrix, first: str, second: str, *, as_json: bool) -> str:
    if _is_target(first):
        differences = matrix.diff_targets(found, first, second)
    else:
        toolkits = [found.toolkit(text) for text in (first, second)]
        for text, toolkit in zip((first, second), toolkits, strict=True):
            if toolkit is None:
                have = ", ".join(toolkit.version for toolkit in found.toolkits)
                raise _Refusal(f"--diff: there is no ptxas {text} here, but {have}; --ptxas PATH names one more")
        one, other = (toolkit for toolkit in toolkits if toolkit is not None)
        differences = matrix.diff_toolkits(found, one, other)
        first, second = f"CUDA {one.version}", f"CUDA {other.version}"
    if as_json:
        return json.dumps(matrix.diff_json(first, second, differences), indent=1)
    return matrix.diff_text(first, second, differences)
