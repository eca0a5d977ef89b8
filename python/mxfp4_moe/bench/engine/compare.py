"""Two arms in processes of their own: an engine with our kernels, and with its own, in the order A B B A.

What the second of two runs finds of the first is no property of kernels. So each run has empty caches of its own for
what engines compile (Triton's, torch's, vLLM's, the driver's), and each arm runs once before and once after the other:
a host or a GPU that gets slower or warmer in the meantime does so for both.
"""

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
from ..statistics import Summary, summarize

SCHEMA = 2
OURS = "mxfp4-moe"
_WE_RUN = "mxfp4-moe runs this model's experts: "
_SECONDS = 1800.0  # for one run: loading, compiling, capturing, measuring
# FlashInfer's stays where it is: it holds what FlashInfer has downloaded.
_CACHES = (
    *("CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"),
    "VLLM_CACHE_ROOT",
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine.

    Attributes:
        decode: numbers of sequences that decode at once, each of a prompt of 16 tokens.
        prefill: numbers of prompts of `prompt` tokens that are read at once.
        short, long: answers' tokens, whose difference in time is that of steps of decoding.
        repeats: measurements in a run.
        rounds: of both arms; every other one begins with the engine's own.
    """

    decode: Sequence[int] = (1, 8, 64)
    prefill: Sequence[int] = (1, 16)
    prompt: int = 1024
    short: int = 16
    long: int = 144
    repeats: int = 5
    rounds: int = 2

    @classmethod
    def dry(cls) -> Load:
        """So little that a CPU does it in a minute: whether it runs, not how fast."""
        return cls(decode=(1, 2), prefill=(1, 2), prompt=24, short=2, long=4, repeats=1, rounds=1)

    def as_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the two.

    Attributes:
        said: what mxfp4-moe said at its start, or "".
        runs: as `serve` writes them.
    """

    name: str
    said: str
    runs: Sequence[Mapping[str, Any]]

    def once(self, key: str) -> Summary:
        """What a run measures once: start_s, first_token_ms, second_token_ms."""
        return summarize([run[key] for run in self.runs])

    def rates(self, kind: str) -> list[tuple[str, Summary]]:
        """Tokens a second of "decode" or "prefill", from all runs' measurements, by what was asked."""
        found = []
        for entries in zip(*(run[kind] for run in self.runs), strict=True):
            first = entries[0]
            if kind == "decode":
                what, tokens, times = f"decode, {first['sequences']} at once", first["sequences"], "ms_per_step"
            else:
                what, times = f"prefill, {first['prompts']} x {first['tokens']}", "ms"
                tokens = first["prompts"] * first["tokens"]
            found.append((what, summarize([tokens / ms * 1e3 for entry in entries for ms in entry[times]])))
        return found


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
            "arms": [
                {
                    "name": arm.name,
                    "said": arm.said,
                    "tokens_per_s": {
                        what: {name: getattr(rate, name) for name in ("median", "low", "high", "count")}
                        for kind in ("decode", "prefill")
                        for what, rate in arm.rates(kind)
                    },
                    "runs": list(arm.runs),
                }
                for arm in self.arms
            ],
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
    """Measures our arm and vLLM's own, each run in a fresh process with empty caches.

    Args:
        keywords: for vLLM's `LLM`, beside what `serve` sets.
        environment: more variables for both, such as MXFP4_MOE_ACTIVATIONS.

    Raises:
        ArmError: vLLM ended badly (with what it said last); or our kernels did not run in our arm, or ran in the other.
    """
    switches = {OURS: os.environ.get("MXFP4_MOE_ENGINES", "auto"), "vLLM": "off"}  # "untested", for instance
    runs: dict[str, list[Any]] = {name: [] for name in switches}
    said = dict.fromkeys(switches, "")
    for number in range(load.rounds):
        for name in list(switches)[:: -1 if number % 2 else 1]:
            progress(f"{name}: starting vLLM, {number + 1} of {load.rounds}")
            variables = {**os.environ, **(environment or {}), "MXFP4_MOE_ENGINES": switches[name]}
            result, said[name] = _run(name, model, load, keywords, variables)
            runs[name].append(result)
            progress(f"{name}: {_in_one_line(Arm(name=name, said=said[name], runs=[result]))}")
    arms = [Arm(name=name, said=said[name], runs=runs[name]) for name in switches]
    return Comparison(model=model.name, load=load, keywords=keywords, arms=arms)


def _run(
    name: str, model: Path, load: Load, keywords: Mapping[str, Any], variables: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """A run's result, and what mxfp4-moe said of it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = {variable: str(Path(folder) / variable.lower()) for variable in _CACHES}
        out = Path(folder) / "result.json"
        task = {"model": str(model), "out": str(out), "keywords": dict(keywords), "load": load.as_dict()}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "mxfp4_moe.bench.engine.serve", json.dumps(task)],
                env={**variables, **caches},
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
        return json.loads(out.read_text(encoding="utf-8")), said


def _in_one_line(run: Arm) -> str:
    """What one run measured, so that whoever ends the comparison early has that."""
    rates = [f"{what}: {rate.median:,.0f} tokens/s" for kind in ("decode", "prefill") for what, rate in run.rates(kind)]
    return "; ".join(
        [f"first token after {run.once('first_token_ms').median:.0f} ms", *rates, run.said or "own kernels"]
    )


def _last(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])


def _about_us(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if "mxfp4-moe" in line) or "nothing about mxfp4-moe"


def table(comparison: Comparison) -> str:
    """Both arms side by side: medians, the distance of their quartiles, and ours as a multiple of the other."""
    ours, own = comparison.arms
    run = ours.runs[0]
    rows: list[tuple[str, ...]] = [("", OURS, "spread", f"vLLM {run['vllm']}", "spread", "ratio")]

    def row(what: str, a: Summary, b: Summary, unit: str, *, more_is_better: bool) -> None:
        ratio = a.median / b.median if more_is_better else b.median / a.median
        cells = [cell for one in (a, b) for cell in (f"{one.median:,.1f} {unit}", f"{one.spread:.0%}")]
        rows.append((what, *cells, f"{ratio:.2f}"))

    prompt = f"prompt of {comparison.load.prompt} tokens"
    for key, what, unit in (
        ("start_s", "start", "s"),
        ("first_token_ms", f"first {prompt}", "ms"),
        ("second_token_ms", f"second {prompt}", "ms"),
    ):
        row(what, ours.once(key), own.once(key), unit, more_is_better=False)
    for kind in ("decode", "prefill"):
        for (what, a), (_, b) in zip(ours.rates(kind), own.rates(kind), strict=True):
            row(what, a, b, "tokens/s", more_is_better=True)
    widths = [max(len(line[i]) for line in rows) for i in range(6)]
    lines = []
    for what, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([what.ljust(widths[0]), *right]))
    return "\n".join([*lines, "", f"{run['device']}, torch {run['torch']}; {OURS}: {ours.said}"])
