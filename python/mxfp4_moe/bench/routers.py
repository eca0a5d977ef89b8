"""The routers of the models that are known, timed: ours beside torch's operations by the definition and vLLM's kernels.

From logits to topk_weights and topk_ids, in CUDA graphs behind an emptied L2 cache, as the layer is timed. What a rival
computes is compared with ours before it is timed. Results are JSON as the layer's: environment, measurements, failures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checkpoints.config import expert_config
from .._checkpoints.models import MODELS
from .._checkpoints.router import config_fields, has_bias, router_scheme
from ..problems import relative_error
from ..routers import GroupScore, Router, ScoringFunc
from ..routing import select_experts
from .report import OURS, Failure
from .rivals.packages import Absent, find_vllm_moe_library
from .statistics import Summary
from .timing import Timer

SCHEMA = 1
TOLERANCE = 1e-2  # of a token's weights as a row over all experts: a choice that is too close for both to agree is rare
DEFINITION, COMPILED, VLLM = "torch", "torch.compile", "vllm"
DESCRIPTIONS = {
    DEFINITION: "written here by the definition, as the operations that transformers' routers do",
    COMPILED: "the same under torch.compile, as vLLM does it where it has no kernel",
    VLLM: "vLLM's kernels (topk_softmax, topk_sigmoid, grouped_topk, topk_hash_softplus_sqrt)",
}

Routed = tuple[Tensor, Tensor]
Call = Callable[[], Routed]
MakeCall = Callable[[Tensor, Router], Call]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A model's router; its bias is made up."""

    model: str
    experts: int
    router: Router

    def words(self) -> dict[str, Any]:
        """What JSON says of it."""
        fields = {name: getattr(self.router, name) for name in Router.__dataclass_fields__}
        fields["e_score_correction_bias"] = self.router.e_score_correction_bias is not None
        return {"model": self.model, "experts": self.experts, **fields}


@dataclass(frozen=True, kw_only=True)
class Plan:
    rules: Sequence[Rule]
    tokens: Sequence[int]
    rivals: Sequence[str]
    rival_folders: Sequence[Path]
    replays: int
    inputs: int
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    implementation: str
    rule: Rule
    tokens: int
    us: Summary
    relative_error: float | None = None  # against ours, of rivals


def rules(device: torch.device, names: Sequence[str] | None = None) -> list[Rule]:
    """One for each router of docs/models.md that differs from those before it.

    Raises:
        ValueError: a name that no model has.
    """
    known = [model.name for model in MODELS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"models: expected all, or some of {'; '.join(known)}, got {name!r}")
    found: dict[str, Rule] = {}
    for model in MODELS:
        if names is not None and model.name not in names:
            continue
        stated = expert_config(Path("config.json"), model.config)
        scheme = router_scheme(stated)
        fields = config_fields(stated, scheme)
        key = f"{model.num_experts} {sorted(fields.items())}"
        if has_bias(stated, scheme):
            g = torch.Generator(device).manual_seed(model.num_experts)
            fields["e_score_correction_bias"] = (
                torch.randn(model.num_experts, generator=g, dtype=torch.float32, device=device) * 0.1
            )
        found.setdefault(key, Rule(model=model.name, experts=model.num_experts, router=Router(**fields)))
    return list(found.values())


# ---- who is timed ----------------------------------------------------------------------------------------------------


def by_definition(logits: Tensor, router: Router) -> Routed:
    """Any router as models write it in torch: scores, bias, groups masked, topk, gather, renormalize, scale."""
    logits = logits.float()
    if router.scoring_func == ScoringFunc.SOFTMAX:
        scores = logits.softmax(-1)
    elif router.scoring_func == ScoringFunc.SIGMOID:
        scores = logits.sigmoid()
    else:
        scores = torch.nn.functional.softplus(logits).sqrt()
    bias = router.e_score_correction_bias
    choices = scores if bias is None else scores + bias
    if router.num_expert_group > 1:
        groups = choices.view(len(choices), router.num_expert_group, choices.shape[1] // router.num_expert_group)
        best = groups.amax(-1) if router.group_score == GroupScore.MAX else groups.topk(2, dim=-1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(router.topk_group, dim=-1, sorted=False)[1], 1)
        dropped = (kept == 0).repeat_interleave(groups.shape[-1], dim=1)
        choices = choices.masked_fill(dropped, float("-inf"))
    ids = choices.topk(router.top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    if router.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, ids.to(torch.int32)


def _make_definition(logits: Tensor, router: Router) -> Call:
    return lambda: by_definition(logits, router)


def _make_compiled(logits: Tensor, router: Router) -> Call:
    """Compiled for these sizes alone: beyond some of them torch gives up and runs the function as it is."""
    torch.compiler.reset()
    compiled = torch.compile(by_definition, dynamic=False)
    return lambda: compiled(logits, router)


def vllm_calls(ops: Any) -> MakeCall:
    """vLLM's kernel for a rule, as its routers call it."""

    def make_call(logits: Tensor, router: Router) -> Call:
        tokens, bias = len(logits), router.e_score_correction_bias
        weights = torch.empty(tokens, router.top_k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(tokens, router.top_k, dtype=torch.int32, device=logits.device)
        source = torch.empty_like(ids)
        renormalize, factor = router.renormalize, float(router.routed_scaling_factor)
        if router.num_expert_group > 1:
            rule = (router.num_expert_group, router.topk_group, router.top_k, renormalize, factor, bias, 1)
            return lambda: ops.grouped_topk(logits, *rule)
        if router.scoring_func == ScoringFunc.SQRTSOFTPLUS:
            arguments = (weights, ids, source, logits, renormalize, factor, bias, None, None)
            return lambda: (ops.topk_hash_softplus_sqrt(*arguments), (weights, ids))[1]
        kernel = ops.topk_softmax if router.scoring_func == ScoringFunc.SOFTMAX else ops.topk_sigmoid

        def call() -> Routed:
            kernel(weights, ids, source, logits, renormalize, bias)
            return (weights if factor == 1.0 else weights * factor), ids

        return call

    return make_call


def find(name: str, folders: Sequence[Path]) -> tuple[str, MakeCall]:
    """A rival's version and its calls.

    Raises:
        Absent: it is not here.
    """
    if name != VLLM:
        return torch.__version__, _make_definition if name == DEFINITION else _make_compiled
    library = find_vllm_moe_library(folders)
    torch.ops.load_library(str(library.path))  # type: ignore[no-untyped-call]
    return library.version, vllm_calls(torch.ops._moe_C)


def choose(text: str) -> tuple[str, ...]:
    """The rivals that the option names: "all", "none", or names with commas between.

    Raises:
        ValueError: a name that no rival has.
    """
    if text in ("all", "none"):
        return tuple(DESCRIPTIONS) if text == "all" else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in DESCRIPTIONS:
            raise ValueError(f"rivals: expected all, none, or some of {', '.join(DESCRIPTIONS)}, got {name!r}")
    return names


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    environment: Mapping[str, Any]
    rivals: dict[str, str]
    measurements: list[Measurement]
    failures: list[Failure]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "rivals": dict(self.rivals),
            "measurements": [
                {
                    "implementation": m.implementation,
                    "router": m.rule.words(),
                    "tokens": m.tokens,
                    "us": m.us.as_dict(),
                    "relative_error": None if m.relative_error is None else round(m.relative_error, 7),
                }
                for m in self.measurements
            ],
            "failures": [vars(failure) for failure in self.failures],
        }

    def table(self) -> str:
        """Microseconds; a row for each router and number of tokens, a column for each implementation."""
        names = list(dict.fromkeys(m.implementation for m in self.measurements))
        rows = [["router", "tokens", *names], ["---"] * (2 + len(names))]
        for key in dict.fromkeys((m.rule.model, m.tokens) for m in self.measurements):
            times = {m.implementation: m.us.median for m in self.measurements if (m.rule.model, m.tokens) == key}
            rows.append([key[0], f"{key[1]}", *(f"{times[name]:.1f}" if name in times else "" for name in names)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(plan: Plan, device: torch.device, progress: Callable[[str], None]) -> Results:
    """Measures everything in the plan; a rival that is absent, raises or computes something else is a `Failure`."""
    results = Results(plan.environment, {}, [], [])
    makers: dict[str, MakeCall] = {OURS: lambda logits, router: lambda: select_experts(logits, router)}
    for name in plan.rivals:
        try:
            version, makers[name] = find(name, plan.rival_folders)
            results.rivals[name] = f"version {version}: {DESCRIPTIONS[name]}"
        except Absent as absent:
            progress(f"{name}: left out, {absent}")
            results.failures.append(Failure(implementation=name, tokens=None, reason=str(absent)))
    timer = Timer(device)
    with torch.no_grad():
        for rule in plan.rules:
            for tokens in plan.tokens:
                inputs = [_logits(rule.experts, tokens, device, seed) for seed in range(plan.inputs)]
                expected = _dense(select_experts(inputs[0], rule.router), rule.experts)
                for name, make_call in makers.items():
                    measured = _measure(name, make_call, rule, inputs, expected, timer, plan.replays)
                    if isinstance(measured, Failure):
                        progress(f"{name}, {rule.model}, {tokens} tokens: left out, {measured.reason}")
                        results.failures.append(replace(measured, tokens=tokens))
                    else:
                        progress(f"{name}, {rule.model}, {tokens} tokens: {measured.us.median:.1f} us")
                        results.measurements.append(measured)
    return results


def _measure(
    name: str,
    make_call: MakeCall,
    rule: Rule,
    inputs: Sequence[Tensor],
    expected: Tensor,
    timer: Timer,
    replays: int,
) -> Measurement | Failure:
    error = None
    try:
        calls = [make_call(logits, rule.router) for logits in inputs]
        if name != OURS:
            error = relative_error(_dense(calls[0](), rule.experts), expected)
            if not error <= TOLERANCE:  # NaN too
                reason = f"{rule.model}: it computes something else (relative error {error:.3g})"
                return Failure(implementation=name, tokens=None, reason=reason)
        us = timer.measure(calls, replays)
    except Exception as problem:  # whatever another package raises is its reason for not being measured
        if name == OURS:
            raise
        lines = str(problem).strip().splitlines()
        reason = f"{rule.model}: {type(problem).__name__}: {lines[0][:300] if lines else ''}"
        return Failure(implementation=name, tokens=None, reason=reason)
    return Measurement(implementation=name, rule=rule, tokens=len(inputs[0]), us=us, relative_error=error)


def _logits(experts: int, tokens: int, device: torch.device, seed: int) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, experts, generator=g, dtype=torch.float32, device=device) * 2


def _dense(routed: Routed, experts: int) -> Tensor:
    """[T, E]: whose order of choices does not matter."""
    weights, ids = routed
    return torch.zeros(len(weights), experts, dtype=torch.float32, device=weights.device).scatter_(
        1, ids.long(), weights.float()
    )


def write(results: Results, path: Path) -> None:
    """As JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")
