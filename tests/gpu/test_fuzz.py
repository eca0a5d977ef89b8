"""Random layer calls against what their bits must be, in memory full of poison; no call may leave memory behind.

300 calls by default; MXFP4_MOE_FUZZ_CALLS=10000 for the full run, MXFP4_MOE_FUZZ_SEED for another one. A failure names
the call by seed and number, which is all that it depends on.
"""

from __future__ import annotations

import functools
import gc
import os
import random
from dataclasses import dataclass, field, replace
from typing import Any

import gpu_problems
import torch
from gpu_layers import exact_formats, exact_layer, poison_memory, same
from gpu_problems import Call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe.activations import Activation
from mxfp4_moe.tiles import load_manifest
from mxfp4_moe.weights import MoEWeights

CALLS = int(os.environ.get("MXFP4_MOE_FUZZ_CALLS", "300"))
SEED = int(os.environ.get("MXFP4_MOE_FUZZ_SEED", "0"))
LAYERS = 4 * len(Activation)
REPLAYS = 3


@functools.cache
def layer(number: int) -> MoEWeights:
    rng, device = random.Random(f"layer {SEED} {number}"), gpu_problems.gpu()
    activation = list(Activation)[number % len(Activation)]
    experts = rng.choice([1, 2, 3, 5, 8, 16, 33])
    numbers: dict[str, Any] = {"limit": rng.choice([None, 7.0, 0.5])}
    if rng.random() < 0.4:
        numbers = {name: torch.rand(experts, device=device) * 3 + 0.1 for name in ("alpha", "beta", "limit")}
    return random_weights(
        experts,
        32 * rng.randint(1, 9),
        32 * rng.randint(1, 9),
        device,
        bias=rng.random() < 0.6,
        seed=number,
        activation=activation,
        **numbers,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the fuzzer, several when it is a graph's: the inputs of each replay."""

    weights: MoEWeights
    calls: list[Call]
    scales: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    tile_mn: tuple[int, int] | None
    byte: int
    side_stream: bool
    with_output: bool

    def options_of(self, i: int) -> dict[str, Any]:
        scale = self.scales[i]
        return self.options if scale is None else {**self.options, "hidden_states_scale": scale}

    def expected(self) -> list[Tensor]:
        return [exact_layer(call, self.weights, **self.options_of(i)) for i, call in enumerate(self.calls)]

    def run(self, call: Call, scale: Tensor | None, output: Tensor | None) -> Tensor:
        return mxfp4_moe.fused_moe(
            *call.args(),
            self.weights,
            **self.options,
            hidden_states_scale=scale,
            tile_mn=self.tile_mn,
            output=output,
        )

    def empty_output(self) -> Tensor:
        x = self.calls[0].hidden_states
        return torch.full_like(x, float("nan"), dtype=self.options["output_dtype"])


def random_ids(rng: random.Random, tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """Routings of every kind: any expert, all tokens to one, few experts, ids that are none."""
    kind = rng.choice(["any", "any", "one", "few", "with invalid", "none"])
    low, high = {
        "any": (0, experts),
        "one": (0, 1),
        "few": (0, min(2, experts)),
        "with invalid": (-2, experts + 2),
        "none": (experts, experts + 3),
    }[kind]
    ids = torch.randint(low, high, (tokens, top_k), generator=g, device=g.device)
    if kind in ("one", "few"):
        ids = experts - 1 - ids
    return ids.to(rng.choice([torch.int32, torch.int64]))


def make_case(number: int) -> Case:
    rng, device = random.Random(f"call {SEED} {number}"), gpu_problems.gpu()
    g = torch.Generator(device).manual_seed(rng.randrange(2**40))
    weights = layer(rng.randrange(LAYERS))
    tokens = rng.choice([0, 1, 1, 2, 3, rng.randint(4, 40), rng.randint(4, 40), rng.randint(41, 300)])
    top_k = rng.choice([1, 2, 3, 4, 5, 8, 16])
    graph = tokens > 0 and rng.random() < 0.2
    given = rng.choice([torch.bfloat16, torch.float16, "linear", "swizzled"])
    options: dict[str, Any] = {
        "output_dtype": rng.choice([torch.bfloat16, torch.float16]),
        "intermediate_rounding": rng.random() < 0.3,
    }
    if not isinstance(given, str):
        options["activation_format"] = rng.choice(exact_formats(device))
    calls, scales = [], []
    for _ in range(REPLAYS if graph else 1):
        magnitude = 2.0 ** rng.randint(-6, 4)
        hidden = torch.randn(tokens, weights.hidden_size, generator=g, device=device) * magnitude
        if tokens and rng.random() < 0.1:
            poisoned = (rng.randrange(tokens), rng.randrange(weights.hidden_size))
            hidden[poisoned] = rng.choice([float("nan"), float("inf"), -float("inf")])
        scale = None
        if isinstance(given, str):
            hidden, scale = formats.quantize_mxfp8(hidden)
            scale = formats.swizzle_scales(scale).flatten() if given == "swizzled" else scale
            options["scale_layout"] = given
        else:
            hidden = hidden.to(given)
        ids = random_ids(rng, tokens, top_k, weights.num_experts, g)
        if calls:
            ids = ids.to(calls[0].topk_ids.dtype)
        topk_weights = torch.randn(tokens, top_k, generator=g, device=device)
        calls.append(Call(hidden_states=hidden, topk_weights=topk_weights, topk_ids=ids))
        scales.append(scale)
    return Case(
        weights=weights,
        calls=calls,
        scales=scales,
        options=options,
        tile_mn=rng.choice([None, *(tile.mn for tile in load_manifest().tiles)]),
        byte=rng.choice([0xFF, 0x7F, 0x7E, 0x00, 0x80, rng.randrange(256)]),
        side_stream=rng.random() < 0.4,
        with_output=rng.random() < 0.5,
    )


def run_once(case: Case) -> list[Tensor]:
    poison_memory(case.weights.device, case.byte)
    return [case.run(case.calls[0], case.scales[0], case.empty_output() if case.with_output else None)]


def run_graph(case: Case) -> list[Tensor]:
    """Captured once, replayed with the inputs and routings of each call."""
    static = Call(**{name: x.clone() for name, x in vars(case.calls[0]).items()})
    scale = None if case.scales[0] is None else case.scales[0].clone()
    output = case.empty_output()
    case.run(static, scale, output)  # the first use of a tile loads it, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        poison_memory(case.weights.device, case.byte)  # part of the graph: every replay starts from it
        case.run(static, scale, output)
    results = []
    for call, given in zip(case.calls, case.scales, strict=True):
        for target, source in zip(static.args(), call.args(), strict=True):
            target.copy_(source)
        if scale is not None and given is not None:
            scale.copy_(given)
        output.fill_(float("nan"))
        graph.replay()
        results.append(output.clone())
    torch.cuda.synchronize()
    return results


def check(number: int, stream: torch.cuda.Stream) -> str:
    """Empty, or what is wrong with the call of this number."""
    case = make_case(number)
    expected = case.expected()
    run = run_graph if len(case.calls) > 1 else run_once
    if case.side_stream:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            results = run(case)
        stream.synchronize()
    else:
        results = run(case)
    for i, (out, wanted) in enumerate(zip(results, expected, strict=True)):
        if not same(out, wanted):
            shown = replace(case, calls=[], scales=[])
            shape = list(case.calls[0].topk_ids.shape)
            rows = (out != wanted).any(1).nonzero().flatten().tolist()
            return f"seed {SEED}, call {number}, input {i}: topk_ids {shape}, {shown}: wrong tokens {rows[:8]}"
    return ""


def live_memory() -> tuple[int, int]:
    gc.collect()
    torch.cuda.synchronize()
    statistics = torch.cuda.memory_stats()
    return statistics["allocated_bytes.all.current"], statistics["allocation.all.current"]


def test_random_calls_have_their_bits_and_leave_nothing_behind() -> None:
    device = gpu_problems.gpu()
    mxfp4_moe.prewarm_moe_tiles()
    for number in range(LAYERS):
        layer(number)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    wrong = [message for number in range(min(20, CALLS)) if (message := check(number, stream))]
    before = live_memory()
    wrong += [message for number in range(20, CALLS) if (message := check(number, stream))]
    assert not wrong, f"{len(wrong)} of {CALLS} calls:\n" + "\n".join(wrong[:10])
    assert live_memory() == before
