"""Calls one right behind the other, whose kernels overlap: all tiles, many sizes, two layers, ids, logits, chains.

2,000 calls by default; MXFP4_MOE_CLOSE_CALLS=100000 for what a change of who may start early has to pass
(csrc/shared/launch.cuh, docs/decisions.md). Nothing runs between the calls of a batch, and the allocator gives one call
the memory that the one before has barely left.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import gpu_problems
import pytest
import torch
from gpu_cases import TILES, TOP_K, run
from gpu_problems import Call, bits, random_call, random_weights
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import Router
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

CALLS = int(os.environ.get("MXFP4_MOE_CLOSE_CALLS", "2000"))
BATCH = 40
SIZES = (1, 2, 3, 5, 8, 17, 32, 64, 65, 128, 200, 256, 300, 513, 1023, 1024)
LAYERS = ((128, 2880, 2880), (24, 512, 768))


@functools.cache
def layer(number: int) -> MoEWeights:
    return random_weights(*LAYERS[number], gpu_problems.gpu(), seed=number)


@dataclass(frozen=True)
class Case:
    """One or more calls with their inputs; `call` takes a tile. `wanted` are the bits of the last output."""

    name: str
    call: Callable[[tuple[int, int]], Tensor]
    wanted: Tensor


def made(name: str, call: Callable[[tuple[int, int]], Tensor]) -> Case:
    """With the bits of calls that stood alone: every tile gives them."""
    alone = []
    for tile in TILES[:3]:
        torch.cuda.synchronize()
        alone.append(bits(call(tile.mn)).clone())
    torch.cuda.synchronize()
    assert all(torch.equal(one, alone[0]) for one in alone)
    return Case(name, call, alone[0])


def from_ids(call: Call, weights: MoEWeights, tile: tuple[int, int]) -> Tensor:
    return run(call, weights, tile_mn=tile)


def from_logits(
    hidden: Tensor, logits: Tensor, rule: int | Router, weights: MoEWeights, tile: tuple[int, int]
) -> Tensor:
    return mxfp4_moe.fused_moe_from_logits(hidden, logits, rule, weights, tile_mn=tile)


def chained(call: Call, logits: Tensor, weights: MoEWeights, tile: tuple[int, int]) -> Tensor:
    """Two layers: the second one's hidden states are what the first one's last kernel writes."""
    first = from_logits(call.hidden_states, logits, TOP_K, weights, tile)
    return mxfp4_moe.fused_moe(first, call.topk_weights, call.topk_ids, weights, tile_mn=tile)


@functools.cache
def cases() -> list[Case]:
    found = []
    for number in range(len(LAYERS)):
        weights = layer(number)
        g = torch.Generator(weights.device).manual_seed(number)
        router = Router(top_k=TOP_K, scoring_func="sigmoid", routed_scaling_factor=1.5)
        for tokens in SIZES:
            call = random_call(tokens, TOP_K, weights)
            logits = torch.randn(tokens, weights.num_experts, generator=g, device=weights.device)
            what = f"layer {number}, {tokens} tokens"
            found.append(made(f"{what}, from ids", functools.partial(from_ids, call, weights)))
            found.append(made(f"{what}, chained", functools.partial(chained, call, logits, weights)))
            for rule in (TOP_K, router):
                found.append(
                    made(
                        f"{what}, from logits",
                        functools.partial(from_logits, call.hidden_states, logits, rule, weights),
                    )
                )
    return found


def differing(case: Case, out: Tensor) -> str:
    """What is wrong, or "": how many values, in which rows and columns."""
    wrong = (bits(out) != case.wanted).nonzero()
    if not len(wrong):
        return ""
    (row, column), (last_row, last_column) = wrong.amin(0).tolist(), wrong.amax(0).tolist()
    return f"{case.name}: {len(wrong)} values, rows {row} to {last_row}, columns {column} to {last_column}"


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_no_call_differs(tile: Tile) -> None:
    rng = random.Random(tile.name)
    wrong, left = [], -(-gpu_problems.fewer(CALLS) // len(TILES))
    while left > 0:
        chosen = rng.choices(cases(), k=min(BATCH, left))
        outs = [case.call(tile.mn) for case in chosen]
        for case, out in zip(chosen, outs, strict=True):
            if words := differing(case, out):
                wrong.append(f"{tile.name}, {words}")
        left -= len(chosen)
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong[:10])


def test_no_call_of_other_tiles_differs() -> None:
    """Each call of a batch with another tile."""
    rng = random.Random(0)
    wrong, left = [], gpu_problems.fewer(CALLS) // 10
    while left > 0:
        chosen = [(case, rng.choice(TILES)) for case in rng.choices(cases(), k=BATCH)]
        outs = [case.call(tile.mn) for case, tile in chosen]
        for (case, tile), out in zip(chosen, outs, strict=True):
            if words := differing(case, out):
                wrong.append(f"{tile.name}, {words}")
        left -= BATCH
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong[:10])


def test_no_call_of_a_graph_differs() -> None:
    """Launches of a graph follow closer than a host's; early starts are edges in it."""
    rng = random.Random(1)
    chosen = [(case, rng.choice(TILES)) for case in rng.choices(cases(), k=BATCH)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [case.call(tile.mn) for case, tile in chosen]
    wrong = []
    for _ in range(max(1, gpu_problems.fewer(CALLS) // 10 // BATCH)):
        for out in outs:
            out.zero_()
        graph.replay()
        for (case, tile), out in zip(chosen, outs, strict=True):
            if words := differing(case, out):
                wrong.append(f"{tile.name}, {words}")
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong[:10])


def test_a_difference_is_found() -> None:
    case = cases()[-1]
    out = case.call(TILES[0].mn)
    assert differing(case, out) == ""
    out[3, 5] += 1
    assert differing(case, out) == f"{case.name}: 1 values, rows 3 to 3, columns 5 to 5"
