"""The answers as a matrix of variant, target and toolkit: as JSON and back, as text, as markdown, and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from .run import Results, Status, Verdict, Verdicts
from .variants import Isa, Variant, isa_text, parse_isa

SCHEMA = 1
_TARGET = "<target>"  # stands in JSON for the target that ptxas named, so that equal words are equal


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """Whose ptxas answered: `version` is '13.0.88', `isa` the newest PTX ISA version that it reads."""

    version: str
    isa: Isa

    @property
    def cuda(self) -> str:
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Matrix:
    toolkits: tuple[Toolkit, ...]  # oldest first
    targets: tuple[str, ...]
    variants: tuple[Variant, ...]
    verdicts: Mapping[Toolkit, Mapping[str, Verdicts]] = field(repr=False)

    def verdict(self, toolkit: Toolkit, target: str, variant: Variant) -> Verdict:
        return self.verdicts[toolkit][target][variant.name]

    def accepted(self, toolkit: Toolkit, name: str) -> list[str]:
        """The targets that accept the variant of this name."""
        return [target for target in self.targets if self.verdicts[toolkit][target][name].accepted]

    def toolkit(self, text: str) -> Toolkit | None:
        """The newest toolkit whose version is `text` or begins with it, such as '13', '13.0' or '13.0.88'."""
        fitting = [toolkit for toolkit in self.toolkits if f"{toolkit.version}.".startswith(f"{text}.")]
        return fitting[-1] if fitting else None


def from_results(results: Results, targets: Sequence[str], variants: Sequence[Variant]) -> Matrix:
    verdicts = {Toolkit(version=asked.label, isa=asked.isa): found for asked, found in results.items()}
    return Matrix(toolkits=tuple(verdicts), targets=tuple(targets), variants=tuple(variants), verdicts=verdicts)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def to_json(matrix: Matrix) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "toolkits": [{"version": toolkit.version, "ptx_isa": isa_text(toolkit.isa)} for toolkit in matrix.toolkits],
        "targets": list(matrix.targets),
        "variants": [
            {
                "name": variant.name,
                "category": variant.category,
                "section": variant.section,
                "ptx_isa": isa_text(variant.isa),
                "ptx": variant.ptx,
                **({"nowhere": variant.nowhere} if variant.nowhere else {}),
                "results": {toolkit.version: _results(matrix, toolkit, variant) for toolkit in matrix.toolkits},
            }
            for variant in matrix.variants
        ],
    }


def _results(matrix: Matrix, toolkit: Toolkit, variant: Variant) -> dict[str, Any]:
    """Targets by status; those that did not accept also by the words."""
    found: dict[str, Any] = {Status.ACCEPTED.value: matrix.accepted(toolkit, variant.name)}
    for target in matrix.targets:
        verdict = matrix.verdict(toolkit, target, variant)
        if not verdict.accepted:
            by_words = found.setdefault(verdict.status.value, {})
            by_words.setdefault(verdict.words.replace(target, _TARGET), []).append(target)
    return found


def from_json(data: Mapping[str, Any]) -> Matrix:
    """What `to_json` wrote."""
    toolkits = [Toolkit(version=row["version"], isa=parse_isa(row["ptx_isa"])) for row in data["toolkits"]]
    variants = [
        Variant(
            category=row["category"],
            section=row["section"],
            isa=parse_isa(row["ptx_isa"]),
            ptx=row["ptx"],
            nowhere=row.get("nowhere", ""),
        )
        for row in data["variants"]
    ]
    verdicts: dict[Toolkit, dict[str, Verdicts]] = {
        toolkit: {target: {} for target in data["targets"]} for toolkit in toolkits
    }
    for toolkit in toolkits:
        for variant, row in zip(variants, data["variants"], strict=True):
            results = row["results"][toolkit.version]
            for target in results[Status.ACCEPTED.value]:
                verdicts[toolkit][target][variant.name] = Verdict(Status.ACCEPTED)
            for status in (Status.REFUSED, Status.NOT_APPLICABLE):
                for words, targets in results.get(status.value, {}).items():
                    for target in targets:
                        verdicts[toolkit][target][variant.name] = Verdict(status, words.replace(_TARGET, target))
    return Matrix(toolkits=tuple(toolkits), targets=tuple(data["targets"]), variants=tuple(variants), verdicts=verdicts)


# ---- Rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant with what one or several toolkits say of it alike; `verdicts` are the newest one's, one per target."""

    variant: Variant
    toolkits: tuple[Toolkit, ...]
    verdicts: tuple[Verdict, ...]

    def label(self, matrix: Matrix) -> str:
        """The variant's name; where toolkits differ, with the CUDA releases whose row it is."""
        if self.toolkits == matrix.toolkits:
            return self.variant.name
        return f"{self.variant.name} (CUDA {', '.join(toolkit.cuda for toolkit in self.toolkits)})"


def rows(matrix: Matrix, variants: Sequence[Variant]) -> Iterator[Row]:
    """One row per variant, or several where toolkits give different verdicts."""
    for variant in variants:
        groups: dict[tuple[Status, ...], list[Toolkit]] = {}
        for toolkit in matrix.toolkits:
            statuses = tuple(matrix.verdict(toolkit, target, variant).status for target in matrix.targets)
            groups.setdefault(statuses, []).append(toolkit)
        for toolkits in groups.values():
            verdicts = tuple(matrix.verdict(toolkits[-1], target, variant) for target in matrix.targets)
            yield Row(variant=variant, toolkits=tuple(toolkits), verdicts=verdicts)


def by_category(matrix: Matrix) -> Iterator[tuple[str, list[Variant]]]:
    for category, variants in groupby(matrix.variants, key=lambda variant: variant.category):
        yield category, list(variants)


# ---- Text ------------------------------------------------------------------------------------------------------------


def text(matrix: Matrix) -> str:
    """A table per category. 'yes' is accepted, a number refused in the words below the table, '-' not applicable."""
    return "\n\n".join(_category_text(matrix, name, variants) for name, variants in by_category(matrix))


def _category_text(matrix: Matrix, category: str, variants: Sequence[Variant]) -> str:
    table = [[category, *(target.removeprefix("sm_") for target in matrix.targets)]]
    notes: dict[str, int] = {}
    for row in rows(matrix, variants):
        cells = [row.label(matrix)]
        for target, verdict in zip(matrix.targets, row.verdicts, strict=True):
            if verdict.status is Status.REFUSED:
                words = re.sub(rf"(\.target )?'{target}'", "this target", verdict.words)
                cells.append(str(notes.setdefault(words, len(notes) + 1)))
            else:
                cells.append("yes" if verdict.accepted else "-")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines += [f"  {number}: {words}" for words, number in notes.items()]
    lines += [f"  {sentence}" for sentence in _nowhere(variants, "")]
    return "\n".join(lines)


def _nowhere(variants: Sequence[Variant], quote: str) -> list[str]:
    """Why some variants are refused by all."""
    asked = [variant for variant in variants if variant.nowhere]
    return [f"{quote}{variant.name}{quote} is asked about, and refused: {variant.nowhere}." for variant in asked]


def legend(matrix: Matrix) -> str:
    """What was asked of whom, what the signs mean, and why something was not applicable."""
    toolkits = ", ".join(f"{toolkit.version} (PTX ISA {isa_text(toolkit.isa)})" for toolkit in matrix.toolkits)
    reasons: dict[str, list[str]] = {}
    for toolkit in matrix.toolkits:
        for target in matrix.targets:
            for verdict in matrix.verdicts[toolkit][target].values():
                if verdict.status is Status.NOT_APPLICABLE:
                    targets = reasons.setdefault(verdict.words.replace(target, _TARGET).split(":")[0], [])
                    targets += [target] if target not in targets else []
    lines = [
        f"{len(matrix.variants)} variants, ptxas {toolkits}",
        "yes: accepted; number: refused, in ptxas's words below the table; -: not applicable",
    ]
    for words, targets in reasons.items():
        of = f" ({', '.join(targets)})" if _TARGET in words else ""
        lines.append(f"  - {words.replace(_TARGET, 'such target')}{of}")
    return "\n".join(lines)


# ---- Markdown --------------------------------------------------------------------------------------------------------


def markdown(matrix: Matrix, heading: str = "##") -> str:
    """A section per category, a table per section of the PTX ISA manual. Cells are yes, no, or - for not applicable."""
    blocks = []
    for category, variants in by_category(matrix):
        blocks.append(f"{heading} {category}")
        for section, inside in groupby(variants, key=lambda variant: variant.section):
            blocks.append(f"{section}:")
            chosen = list(inside)
            blocks.append(_markdown_table(matrix, chosen))
            blocks += _nowhere(chosen, "`")
    return "\n\n".join(blocks) + "\n"


_CELLS = {Status.ACCEPTED: "yes", Status.REFUSED: "no", Status.NOT_APPLICABLE: "-"}


def _markdown_table(matrix: Matrix, variants: Sequence[Variant]) -> str:
    head = ["instruction", "PTX ISA", *(target.removeprefix("sm_") for target in matrix.targets)]
    rule = [":--", "--:", *[":-:"] * len(matrix.targets)]
    table = [head, rule]
    for row in rows(matrix, variants):
        name, _, which = row.label(matrix).partition(" ")
        label = f"`{name}`" + (f" {which}" if which else "")
        table.append([label, isa_text(row.variant.isa), *(_CELLS[verdict.status] for verdict in row.verdicts)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


# ---- Comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A variant with two different verdicts; `where` is what they have in common, a target or a toolkit."""

    variant: Variant
    where: str
    first: Verdict
    second: Verdict


def diff_targets(matrix: Matrix, first: str, second: str) -> list[Difference]:
    """What two targets are told differently, toolkit by toolkit."""
    return [
        Difference(variant=variant, where=f"CUDA {toolkit.cuda}", first=one, second=other)
        for variant in matrix.variants
        for toolkit in matrix.toolkits
        if (one := matrix.verdict(toolkit, first, variant)).status
        is not (other := matrix.verdict(toolkit, second, variant)).status
    ]


def diff_toolkits(matrix: Matrix, first: Toolkit, second: Toolkit) -> list[Difference]:
    """What two toolkits say differently, target by target."""
    return [
        Difference(variant=variant, where=target, first=one, second=other)
        for variant in matrix.variants
        for target in matrix.targets
        if (one := matrix.verdict(first, target, variant)).status
        is not (other := matrix.verdict(second, target, variant)).status
    ]


def diff_text(first: str, second: str, differences: Sequence[Difference]) -> str:
    """Each variant once, with the places in which its two verdicts are the same."""
    if not differences:
        return f"{first} and {second}: no difference"
    count = len({difference.variant for difference in differences})
    lines = [f"{first} and {second} differ in {count} {'variant' if count == 1 else 'variants'}"]
    groups: dict[tuple[Variant, Status, str, Status, str], list[str]] = {}
    for found in differences:
        key = (found.variant, found.first.status, found.first.words, found.second.status, found.second.words)
        groups.setdefault(key, []).append(found.where)
    for (variant, one, one_words, other, other_words), places in groups.items():
        lines.append(f"{variant.name} ({', '.join(places)})")
        lines.append(f"  {first}: {_said(one, one_words)}")
        lines.append(f"  {second}: {_said(other, other_words)}")
    return "\n".join(lines)


def _said(status: Status, words: str) -> str:
    return f"{status.value}: {words}" if words else status.value


def diff_json(first: str, second: str, differences: Sequence[Difference]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "first": first,
        "second": second,
        "differences": [
            {
                "name": found.variant.name,
                "where": found.where,
                "first": {"status": found.first.status.value, "words": found.first.words},
                "second": {"status": found.second.status.value, "words": found.second.words},
            }
            for found in differences
        ],
    }
