"""What the tile kernel is made of (kernel.toml), and whether a target takes all of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from .assemblers import Assembler
from .run import Progress, Status, Verdict, Verdicts, probe_all
from .variants import Variant, read_table

TABLE = "kernel.toml"


@dataclass(frozen=True, kw_only=True)
class Path:
    """One of the kernel's two ways to multiply: its instructions, beyond plain scalar ones, in program order."""

    name: str  # "SM90" or "SM12x"
    instructions: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class KernelVerdict:
    """Whether a target takes the kernel. `first` is the first instruction that it does not take, and `words` why."""

    assembler: Assembler
    target: str
    path: Path
    status: Status
    first: str = ""
    words: str = ""

    @property
    def sentence(self) -> str:
        count = len(self.path.instructions)
        if self.status is Status.ACCEPTED:
            return f"yes: all {count} instructions of the {self.path.name} path assemble"
        if self.status is Status.NOT_APPLICABLE:
            return f"not applicable: {self.words}"
        return f"no: {self.first}, of the {self.path.name} path: {self.words.split('; ')[0]}"


@functools.cache
def load() -> dict[str, Path]:
    """The paths by name."""
    return {
        name: Path(
            name=name,
            # No PTX ISA version: an assembler that is too old for one shall say so itself.
            instructions=tuple(Variant(category="kernel", section=name, isa=(0, 0), ptx=ptx) for ptx in path["ptx"]),
        )
        for name, path in read_table(TABLE).items()
    }


def path_for(target: str) -> Path:
    """SM90 has no block-scaled MMA and a path of its own; every other target is held against the SM12x path."""
    return load()["SM90" if target.startswith("sm_90") else "SM12x"]


def judge(
    assemblers: Sequence[Assembler], targets: Sequence[str], progress: Progress | None = None
) -> list[KernelVerdict]:
    """A verdict for each assembler and target, in their order.

    Raises:
        AssemblerError: an assembler cannot be run.
    """
    questions = {target: path_for(target).instructions for target in targets}
    results = probe_all(assemblers, questions, progress=progress)
    return [_verdict(assembler, target, results[assembler][target]) for assembler in assemblers for target in targets]


def _verdict(assembler: Assembler, target: str, verdicts: Verdicts) -> KernelVerdict:
    refused = [(name, verdict) for name, verdict in verdicts.items() if not verdict.accepted]
    first, verdict = refused[0] if refused else ("", Verdict(Status.ACCEPTED))
    return KernelVerdict(
        assembler=assembler,
        target=target,
        path=path_for(target),
        status=verdict.status,
        first=first,
        words=verdict.words,
    )
