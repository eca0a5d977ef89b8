"""Asking assemblers about variants, many in one call.

A call holds every variant that is still open, each in an entry function of its own on a line of its own. What ptxas
complains about is refused, in its words, and the rest is asked again until all of it is accepted. So a verdict of
"accepted" always comes from a call that succeeded, and the whole table costs a few calls per target.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum

from .assemblers import Answer, Assembler, assemble
from .variants import Isa, Variant, isa_text

# What a plain sm_90 .. sm_121 adds is a subset of these; the suffixes are where they differ (docs/architectures.md).
TARGETS = (
    *("sm_90a", "sm_100a", "sm_100f", "sm_103a", "sm_120", "sm_120a", "sm_120f", "sm_121", "sm_121a", "sm_121f"),
)


class Status(Enum):
    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True)
class Verdict:
    """What one assembler says of one variant on one target; `words` are ptxas's, or why it was not asked."""

    status: Status
    words: str = ""

    @property
    def accepted(self) -> bool:
        return self.status is Status.ACCEPTED


Verdicts = dict[str, Verdict]  # by the variant's name
Results = dict[Assembler, dict[str, Verdicts]]  # by assembler and target
Progress = Callable[[int, int, Assembler, str], None]  # done, of how many, and what has just been done

# As many as the largest statement has: of wgmma 128 sums and four operands.
_REGISTERS = {"p": ("pred", 8), "b": ("b8", 4), "h": ("b16", 16), "r": ("b32", 136), "d": ("b64", 32), "q": ("b128", 4)}


def source(statements: Sequence[str], target: str, isa: Isa) -> tuple[str, list[int]]:
    """A PTX file with an entry function for each statement, and the line on which each stands, counted from 1."""
    lines = [
        f".version {isa_text(isa)}",
        f".target {target}",
        ".address_size 64",
        ".extern .shared .align 1024 .b8 smem[];",
    ]
    places = []
    for number, statement in enumerate(statements):
        declared = [
            f".reg .{kind} %{letter}<{count}>;"
            for letter, (kind, count) in _REGISTERS.items()
            if any(f"%{letter}{digit}" in statement for digit in range(10))  # .b128 is younger than the rest
        ]
        lines.append(f".visible .entry probe{number}() {{ {' '.join(declared)}")
        lines.append(statement)
        places.append(len(lines))
        lines.append("ret; }")
    return "\n".join(lines) + "\n", places


def ask(assembler: Assembler, target: str, statements: Sequence[str]) -> list[Verdict]:
    """A verdict for each PTX statement, in their order. They are asked under the newest PTX ISA of the assembler."""
    if refusal := unknown_target(assembler, target):
        return [Verdict(Status.NOT_APPLICABLE, refusal)] * len(statements)
    verdicts: dict[int, Verdict] = {}
    while left := [number for number in range(len(statements)) if number not in verdicts]:
        text, places = source([statements[number] for number in left], target, assembler.isa)
        answer = assemble(assembler.path, target, text)
        if answer.accepted:
            verdicts |= dict.fromkeys(left, Verdict(Status.ACCEPTED))
        elif len(left) == 1:
            verdicts[left[0]] = _refused([words for _, words in answer.complaints])
        else:
            blamed = _blamed(answer, places)
            for place, words in blamed.items():
                verdicts[left[place]] = _refused(words)
            if not blamed:  # a complaint about nothing in particular: one by one
                for number in left:
                    verdicts[number] = ask(assembler, target, [statements[number]])[0]
    return [verdicts[number] for number in range(len(statements))]


def _blamed(answer: Answer, places: Sequence[int]) -> dict[int, list[str]]:
    """ptxas's words by statement, for the statements whose lines it names."""
    blamed: dict[int, list[str]] = {}
    for line, words in answer.complaints:
        if line in places:
            blamed.setdefault(places.index(line), []).append(words)
    return blamed


def _refused(words: Sequence[str]) -> Verdict:
    kept = [text for text in dict.fromkeys(words) if not text.startswith("Ptx assembly aborted")]
    return Verdict(Status.REFUSED, "; ".join(kept or words))


def unknown_target(assembler: Assembler, target: str) -> str:
    """Why this assembler has no such target, in its words; empty when it has."""
    text, _ = source([], target, assembler.isa)
    answer = assemble(assembler.path, target, text)
    return "" if answer.accepted else f"CUDA {assembler.cuda} has no {target}: {answer.complaints[0][1]}"


def probe(assembler: Assembler, target: str, variants: Sequence[Variant]) -> Verdicts:
    """A verdict for each variant, by name."""
    known = [variant for variant in variants if variant.isa <= assembler.isa]
    verdicts = dict(zip(known, ask(assembler, target, [variant.ptx for variant in known]), strict=True))
    for variant in variants:
        if variant.isa > assembler.isa:
            words = f"needs PTX ISA {isa_text(variant.isa)}, CUDA {assembler.cuda} reads {isa_text(assembler.isa)}"
            verdicts[variant] = Verdict(Status.NOT_APPLICABLE, words)
    return {variant.name: verdicts[variant] for variant in variants}


def probe_all(
    assemblers: Sequence[Assembler],
    questions: Mapping[str, Sequence[Variant]],
    *,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Results:
    """Each target's variants, asked of every assembler, in parallel; one worker per CPU by default.

    Raises:
        AssemblerError: an assembler cannot be run.
    """
    results: Results = {assembler: {} for assembler in assemblers}
    jobs = [(assembler, target) for assembler in assemblers for target in questions]
    with ThreadPoolExecutor(max_workers=workers or len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(probe, *job, questions[job[1]]): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                assembler, target = running[future]
                results[assembler][target] = future.result()
                if progress is not None:
                    progress(done, len(jobs), assembler, target)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {assembler: {target: results[assembler][target] for target in questions} for assembler in assemblers}
