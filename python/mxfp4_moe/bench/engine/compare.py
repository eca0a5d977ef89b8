"""Two arms in processes of their own, one after the other: an engine with our kernels, and with its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__

SCHEMA = 1
OURS = "mxfp4-moe"
_WE_RUN = "mxfp4-moe runs this model's experts: "
_SECONDS = 1800.0  # for one arm: loading, compiling, capturing, measuring


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine.

    Attributes:
        decode: numbers of sequences that decode at once, each of a prompt of 16 tokens.
        prefill: numbers of prompts of `prompt` tokens that are read at once.
        short, long: answers' tokens, whose difference in time is that of steps of decoding.
        repeats: the best of so many counts.
    """

    decode: Sequence[int] = (1, 8, 64)
    prefill: Sequence[int] = (1, 16)
    prompt: int = 1024
    short: int = 16
    long: int = 144
    repeats: int = 3

    @classmethod
    def dry(cls) -> Load:
        """So little that a CPU does it in a minute: whether it runs, not how fast."""
        return cls(decode=(1, 2), prefill=(1, 2), prompt=24, short=2, long=4, repeats=1)

    def as_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the two.

    Attributes:
        said: what mxfp4-moe said at its start, or "".
        result: as `serve` writes it.
    """

    name: str
    said: str
    result: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both arms, and what they were asked."""

    model: str
    load: Load
    keywords: Mapping[str, Any]
    arms: Sequence[Arm] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "schema": SCHEMA,
            "mxfp4_moe": __version__,
            "model": self.model,
            "load": self.load.as_dict(),
            "keywords": dict(self.keywords),
            "arms": [{"name": arm.name, "said": arm.said, **arm.result} for arm in self.arms],
        }


class ArmError(RuntimeError):
    """An arm ended badly, or was not the arm that it should have been."""


def compare(
    model: Path,
    load: Load,
    keywords: Mapping[str, Any],
    progress: Callable[[str], None],
    *,
    environment: Mapping[str, str] | None = None,
) -> Comparison:
    """Measures our arm and vLLM's own, each in a fresh process.

    Args:
        keywords: for vLLM's `LLM`, beside what `serve` sets.
        environment: more variables for both, such as MXFP4_MOE_ACTIVATIONS.

    Raises:
        ArmError: vLLM ended badly (with what it said last); or our kernels did not run in our arm, or ran in the other.
    """
    arms = []
    for name, switch in ((OURS, "auto"), ("vLLM", "off")):
        progress(f"{name}: starting vLLM")
        variables = {**os.environ, **(environment or {}), "MXFP4_MOE_ENGINES": switch}
        if name == OURS and "MXFP4_MOE_ENGINES" in os.environ:
            variables["MXFP4_MOE_ENGINES"] = os.environ["MXFP4_MOE_ENGINES"]  # "untested", for instance
        arm = _arm(name, model, load, keywords, variables)
        progress(f"{name}: first token after {arm.result['first_token_ms']:.0f} ms; {arm.said or 'own kernels'}")
        arms.append(arm)
    return Comparison(model=model.name, load=load, keywords=keywords, arms=arms)


def _arm(name: str, model: Path, load: Load, keywords: Mapping[str, Any], variables: Mapping[str, str]) -> Arm:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        task = {"model": str(model), "out": str(out), "keywords": dict(keywords), "load": load.as_dict()}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mxfp4_moe.bench.engine.serve", json.dumps(task)],
                env=dict(variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ArmError(f"{name}: no result in {_SECONDS:.0f} s") from error
        said = next((line.partition(_WE_RUN)[2] for line in done.stdout.splitlines() if _WE_RUN in line), "")
        if done.returncode or not out.exists():
            raise ArmError(f"{name}: vLLM ended with exit status {done.returncode}:\n{_last(done.stdout)}")
        if (name == OURS) != bool(said):
            wrong = "our kernels did not run" if name == OURS else "our kernels ran in vLLM's own arm"
            raise ArmError(f"{name}: {wrong}; what was said: {_about_us(done.stdout)}")
        return Arm(name=name, said=said, result=json.loads(out.read_text(encoding="utf-8")))


def _last(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _about_us(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if "mxfp4-moe" in line) or "nothing about mxfp4-moe"


def table(comparison: Comparison) -> str:
    """Both arms side by side, and ours as a multiple of the other."""
    ours, own = (arm.result for arm in comparison.arms)
    load = comparison.load
    rows = [("", OURS, f"vLLM {own['vllm']}", "ratio")]

    def row(what: str, a: float, b: float, unit: str, *, more_is_better: bool) -> None:
        ratio = a / b if more_is_better else b / a
        rows.append((what, f"{a:,.1f} {unit}", f"{b:,.1f} {unit}", f"{ratio:.2f}"))

    row("start", ours["start_s"], own["start_s"], "s", more_is_better=False)
    for key, what in (("first_token_ms", "first prompt"), ("second_token_ms", "second prompt")):
        row(f"{what} of {load.prompt} tokens", ours[key], own[key], "ms", more_is_better=False)
    for a, b in zip(ours["decode"], own["decode"], strict=True):
        row(f"decode, {a['sequences']} at once", a["tokens_per_s"], b["tokens_per_s"], "tokens/s", more_is_better=True)
    for a, b in zip(ours["prefill"], own["prefill"], strict=True):
        what = f"prefill, {a['prompts']} x {a['tokens']}"
        row(what, a["tokens_per_s"], b["tokens_per_s"], "tokens/s", more_is_better=True)
    widths = [max(len(line[i]) for line in rows) for i in range(4)]
    lines = []
    for what, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([what.ljust(widths[0]), *right]))
    return "\n".join([*lines, "", f"{ours['device']}, torch {ours['torch']}; {OURS}: {comparison.arms[0].said}"])
