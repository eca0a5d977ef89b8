"""One run of `mxfp4-moe bench`: ours over tiles and tokens, then each rival, with progress; results as they come."""

from __future__ import annotations

import datetime
import gc
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, fused_moe, fused_moe_from_logits, topk_softmax
from .._call.selection import manifest_tile, select
from .._install import driver, loading
from ..problems import relative_error
from ..weights import MoEWeights
from .ceilings import Ceilings, measure_ceilings
from .exact import MOST_TOKENS, exact_layer
from .host import fresh_process, host_us
from .inputs import CallInputs, LayerTensors, call_inputs, layer_tensors
from .report import OURS, Failure, Measurement, Results
from .rivals import TOLERANCE, Absent, Rival
from .shapes import MoEShape
from .timing import Timer

Progress = Callable[[str], None]
MakeCall = Callable[[CallInputs], Callable[[], Tensor]]
TileMN = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure. `tiles` has a pair for each tile and None for the package's own choice."""

    shape: MoEShape
    tokens: Sequence[int]
    tiles: Sequence[TileMN | None]
    rivals: Sequence[Rival]
    rival_folders: Sequence[Path]
    kernels: bool
    include_routing: bool
    host: bool
    replays: int
    inputs: int  # different calls that take turns
    command: Sequence[str]
    activation_format: str = "mxfp8"  # of our calls


def our_call(
    weights: MoEWeights, top_k: int, tile_mn: TileMN | None, include_routing: bool, activation_format: str = "mxfp8"
) -> MakeCall:
    """The layer through the public API, from logits or from the router's result on."""

    options: dict[str, Any] = {"tile_mn": tile_mn, "activation_format": activation_format}

    def make_call(inputs: CallInputs) -> Callable[[], Tensor]:
        x, logits = inputs.hidden_states, inputs.logits
        if activation_format == "fp16":
            x = x.half()
        if include_routing:

            def from_logits() -> Tensor:
                return fused_moe_from_logits(x, logits, top_k, weights, **options)

            return from_logits
        topk_weights, topk_ids = topk_softmax(logits, top_k)
        return lambda: fused_moe(x, topk_weights, topk_ids, weights, **options)

    return make_call


def run(plan: Plan, device: torch.device, progress: Progress, save: Callable[[Results], None]) -> Results:
    """Measures everything in the plan. A rival that is absent or wrong is a `Failure`; ours raises.

    Args:
        save: gets what there is after each implementation, so that a run which is ended leaves something.
    """
    with torch.cuda.device(device), torch.no_grad():
        return _Run(plan, device, progress, save).results()


class _Run:
    def __init__(self, plan: Plan, device: torch.device, progress: Progress, save: Callable[[Results], None]) -> None:
        self.plan, self.device, self.progress, self.save = plan, device, progress, save
        self.measurements: list[Measurement] = []
        self.failures: list[Failure] = []
        self.found: dict[str, str] = {}
        self.host: dict[str, float] = {}
        progress("ceilings: copy bandwidth and matmul rates")
        self.ceilings: Ceilings = measure_ceilings(device)
        self.timer = Timer(device)
        progress(f"weights: {plan.shape.words}")
        self.tensors: LayerTensors = layer_tensors(plan.shape, device)
        self.calls = {
            tokens: [call_inputs(plan.shape, tokens, device, seed) for seed in range(plan.inputs)]
            for tokens in plan.tokens
        }
        self.expected: dict[int, Tensor] = {}
        self.exact = {
            tokens: exact_layer(self.tensors, self.calls[tokens][0])
            for tokens in sorted(tokens for tokens in plan.tokens if tokens <= MOST_TOKENS)[-1:]
        }

    def results(self) -> Results:
        weights = self.tensors.prepared(self.plan.activation_format)
        self._ours(weights)
        self.save(self.so_far())
        for rival in self.plan.rivals:
            self._rival(rival)
            gc.collect()
            torch.cuda.empty_cache()
            self.save(self.so_far())
        if self.plan.kernels:  # last, because a profiler that has once been there may slow what comes after it
            self._kernels(weights)
            self.save(self.so_far())
        return self.so_far()

    def so_far(self) -> Results:
        return Results(
            shape=self.plan.shape,
            environment=environment(self.device, self.plan, self.timer.flush_bytes),
            ceilings=self.ceilings.as_dict(),
            measurements=tuple(self.measurements),
            failures=tuple(self.failures),
            rivals=self.found,
            host=self.host,
        )

    def _our_call(self, weights: MoEWeights, tile_mn: TileMN | None) -> MakeCall:
        plan = self.plan
        return our_call(weights, plan.shape.top_k, tile_mn, plan.include_routing, plan.activation_format)

    def _ours(self, weights: MoEWeights) -> None:
        plan = self.plan
        for tile_mn in plan.tiles:
            make_call = self._our_call(weights, tile_mn)
            for tokens in plan.tokens:
                calls = [make_call(inputs) for inputs in self.calls[tokens]]
                if tokens not in self.expected:
                    self.expected[tokens] = calls[0]()
                name = manifest_tile(tile_mn).name if tile_mn else chosen_tile(plan, tokens, self.device)
                exact = self._exact_error(tokens, calls[0]())
                self._measure(OURS, tokens, calls, name, automatic=tile_mn is None, exact=exact)
        if plan.host:
            self._host(weights)

    def _kernels(self, weights: MoEWeights) -> None:
        """The kernels of our calls, into the measurements that are there."""
        for place, m in enumerate(self.measurements):
            if not m.ours:
                continue
            self.progress(f"kernels: {m.tile}, {m.tokens} tokens")
            tile_mn = None if m.automatic else loading.manifest().tile(m.tile).mn
            make_call = self._our_call(weights, tile_mn)
            try:
                kernels = self.timer.kernels(make_call(self.calls[m.tokens][0]))
            except (ValueError, RuntimeError) as problem:
                reason = f"its kernels were not recorded: {_sentence(problem)}"
                self.failures.append(Failure(implementation=OURS, tokens=m.tokens, reason=reason))
                continue
            self.measurements[place] = replace(m, kernels=tuple(kernels))

    def _host(self, weights: MoEWeights) -> None:
        plan, tokens = self.plan, min(self.plan.tokens)
        self.progress("host time, and first calls in fresh processes")
        x, logits, top_k = self.calls[tokens][0].hidden_states, self.calls[tokens][0].logits, plan.shape.top_k
        topk_weights, topk_ids = topk_softmax(logits, top_k)
        calls: dict[str, Callable[[], object]] = {
            "fused_moe_from_logits_us": lambda: fused_moe_from_logits(x, logits, top_k, weights),
            "fused_moe_us": lambda: fused_moe(x, topk_weights, topk_ids, weights),
            "topk_softmax_us": lambda: topk_softmax(logits, top_k),
        }
        self.host = {"tokens": tokens}
        self.host |= {name: round(host_us(call, self.device).median, 1) for name, call in calls.items()}
        try:
            fresh = fresh_process(plan.shape, tokens, self.device.index)
            self.host |= {key: round(value, 1) for key, value in vars(fresh).items()}
        except (RuntimeError, ValueError) as error:
            self.failures.append(Failure(implementation="fresh process", tokens=tokens, reason=_sentence(error)))

    def _rival(self, rival: Rival) -> None:
        capability = torch.cuda.get_device_capability(self.device)
        try:
            found = rival.find(self.plan.rival_folders, capability)
        except Absent as absent:
            self.progress(f"{rival.name}: left out, {absent}")
            self.failures.append(Failure(implementation=rival.name, tokens=None, reason=str(absent)))
            return
        self.found[rival.name] = f"version {found.version}: {rival.description}"
        self.progress(f"{rival.name} {found.version}: preparing weights")
        try:
            make_call = rival.prepare(found, self.tensors)
        except Exception as error:  # whatever another package raises is its reason for not being measured
            self._failed(rival.name, None, f"its weights could not be prepared: {_sentence(error)}")
            return
        own = None if rival.layer is None else rival.layer(self.tensors)
        for tokens in self.plan.tokens:
            try:
                calls = [make_call(inputs) for inputs in self.calls[tokens]]
                expected = self.expected[tokens] if own is None else self._layer_of(own, tokens)
                out = calls[0]()
                distance = relative_error(out, expected)
                if not distance <= TOLERANCE:  # NaN too
                    self._failed(rival.name, tokens, f"it computes something else (relative error {distance:.3g})")
                    continue
                exact = None if own is not None else self._exact_error(tokens, out)
                self._measure(rival.name, tokens, calls, "", automatic=False, error=distance, exact=exact)
            except Exception as error:
                self._failed(rival.name, tokens, _sentence(error))

    def _layer_of(self, weights: MoEWeights, tokens: int) -> Tensor:
        """What a rival must compute that computes another layer than ours."""
        inputs = self.calls[tokens][0]
        return fused_moe_from_logits(inputs.hidden_states, inputs.logits, self.plan.shape.top_k, weights)

    def _exact_error(self, tokens: int, out: Tensor) -> float | None:
        return relative_error(out, self.exact[tokens]) if tokens in self.exact else None

    def _failed(self, name: str, tokens: int | None, reason: str) -> None:
        self.progress(f"{name}{'' if tokens is None else f', {tokens} tokens'}: left out, {reason}")
        self.failures.append(Failure(implementation=name, tokens=tokens, reason=reason))

    def _measure(
        self,
        name: str,
        tokens: int,
        calls: Sequence[Callable[[], Tensor]],
        tile: str,
        *,
        automatic: bool,
        error: float | None = None,
        exact: float | None,
    ) -> None:
        us = self.timer.measure(calls, self.plan.replays)
        active = sum(inputs.active_experts for inputs in self.calls[tokens]) / self.plan.inputs
        self.measurements.append(
            Measurement(
                implementation=name,
                tokens=tokens,
                tile=tile,
                automatic=automatic,
                active_experts=active,
                us=us,
                relative_error=error,
                exact_error=exact,
            )
        )
        self.progress(f"{name}{f' {tile}' if tile else ''}, {tokens} tokens: {us.median:.1f} us")


def chosen_tile(plan: Plan, tokens: int, device: torch.device) -> str:
    """The name of the tile that `fused_moe` takes for such a call."""
    sizes = (plan.shape.top_k, plan.shape.experts, plan.shape.hidden, plan.shape.intermediate)
    return select(tokens, *sizes, device.index, plan.activation_format).name


def about(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """The machine and the command, for a reader who wants to repeat a run."""
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "driver": driver.driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "mxfp4_moe": __version__,
        "command": shlex.join(command),
    }


def environment(device: torch.device, plan: Plan, flush_bytes: int) -> dict[str, Any]:
    """What a reader of the numbers must know to repeat them."""
    return {
        **about(device, plan.command),
        "activation_format": plan.activation_format,
        "method": (
            f"CUDA-graph replay behind an L2 cache flushed with {flush_bytes >> 20} MiB, {plan.inputs} inputs in "
            f"turn, median of {max(plan.replays, plan.inputs)}, "
            + ("from logits to output" if plan.include_routing else "without the router")
        ),
    }


def _sentence(error: BaseException) -> str:
    """An error of any package as one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
