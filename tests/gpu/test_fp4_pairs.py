"""Layers and GEMMs of FP4 activations and of NVFP4 weights: SM90's, which read FP4 rows in bfloat16, and SM12x's.

A wheel of profile `full` has them, or SM12x's emulated build; where there is nothing to ask, each test says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import gpu_problems
import pytest
import torch
from gpu_cases import require_pair

import mxfp4_moe
from mxfp4_moe import pair_problems, reference
from mxfp4_moe._call.activation_format import tiles_of
from mxfp4_moe._call.launch import layer_operator_for
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.formats import WeightFormat, WordOrder
from mxfp4_moe.problems import bits, random_call, random_weights, relative_error
from mxfp4_moe.weights import MoEWeights

PAIRS = ("mxfp4_mxfp4", "nvfp4_nvfp4", "nvfp4_bf16")
TOLERANCE = 2e-2  # torch's exp has other last bits, which make another code of FP4 now and then
HIDDEN, INTER, EXPERTS = 160, 96, 16


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> str:
    require_pair(request.param)
    return str(request.param)


def device() -> torch.device:
    return gpu_problems.gpu()


def kind_of(pair: str) -> WeightFormat:
    return WeightFormat(pair.split("_")[0])


def acts_of(pair: str) -> str:
    return pair.split("_")[1]


def rule_of(pair: str) -> str:
    """The arch whose rule the kernels here have."""
    return "90a" if mxfp4_moe.formats.word_order_of(device()) is WordOrder.PAIRS else "120f"


def layers(pair: str) -> Iterator[MoEWeights]:
    """In the order of bare calls; of NVFP4 rows with the checkpoint's scales, and with the rows' own."""
    if kind_of(pair) is WeightFormat.MXFP4:
        yield random_weights(EXPERTS, HIDDEN, INTER, device())
    else:
        for inputs in (True, False):
            yield pair_problems.random_nvfp4_weights(EXPERTS, HIDDEN, INTER, device(), inputs=inputs)


def test_every_tile_has_the_published_rules_bits(pair: str) -> None:
    rule = of_arch(rule_of(pair), pair)
    problems = [pair_problems.random_problem(pair, k, n, device(), rule) for k, n in ((96, 80), (640, 272))]
    for what, k, n in (("one-hot", 160, 144), ("sparse", 2880, 512), ("integers", 2880, 272)):
        problems.append(pair_problems.exact_problem(pair, what, k, n, device()))
    tiles = tiles_of(acts_of(pair), device().index, kind_of(pair))
    assert tiles
    for tile in tiles:
        for problem in problems:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert not problem.check(tile, dtype), f"{tile.name}, {dtype}"


@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_layers(pair: str, tokens: int) -> None:
    """Close to the reference, the same bits from every tile, and of a token alone."""
    rule, acts = of_arch(rule_of(pair), pair), acts_of(pair)
    for given in layers(pair):
        call = random_call(tokens, 4, given)
        expected = reference.fused_moe(*call.args(), given, activation_format=acts, arithmetic=rule)
        weights = given.to(device(), activation_format=acts)
        outs = []
        for tile in tiles_of(acts, device().index, kind_of(pair)):
            assert layer_operator_for(acts, device().index, tile, kind_of(pair))[1] == tile
            outs.append(mxfp4_moe.fused_moe(*call.args(), weights, activation_format=acts, tile_mn=tile.mn))
            assert relative_error(outs[-1], expected) <= TOLERANCE, tile.name
            assert torch.equal(bits(outs[-1]), bits(outs[0])), tile.name
        one = call.token(tokens // 2)
        alone = mxfp4_moe.fused_moe(*one.args(), weights, activation_format=acts)
        assert torch.equal(bits(alone[0]), bits(outs[0][tokens // 2]))
        graph, static = torch.cuda.CUDAGraph(), torch.empty_like(outs[0])
        with torch.cuda.graph(graph):
            mxfp4_moe.fused_moe(*call.args(), weights, activation_format=acts, output=static)
        static.fill_(float("nan"))
        graph.replay()
        assert torch.equal(bits(static), bits(outs[0])), "captured"


def test_logits_and_a_slice_of_experts(pair: str) -> None:
    acts = acts_of(pair)
    for given in layers(pair):
        weights = given.to(device(), activation_format=acts)
        hidden = torch.randn(33, HIDDEN, device=device()).bfloat16()
        logits = torch.randn(33, EXPERTS, device=device())
        topk_weights, ids = mxfp4_moe.topk_softmax(logits, 4)
        whole = mxfp4_moe.fused_moe(hidden, topk_weights, ids, weights, activation_format=acts)
        same = mxfp4_moe.fused_moe_from_logits(hidden, logits, 4, weights, activation_format=acts)
        assert torch.equal(bits(whole), bits(same))
        parts = [weights.expert_parallel(rank, 4) for rank in range(4)]
        sums = sum(
            mxfp4_moe.fused_moe(hidden, topk_weights, ids, part, activation_format=acts).float() for part in parts
        )
        assert relative_error(sums, whole) <= 1e-2


def test_bits_come_back_from_the_gpu(pair: str) -> None:
    for given in layers(pair):
        weights = given.to(device(), activation_format=acts_of(pair))
        if kind_of(pair) is WeightFormat.MXFP4:
            pairs = zip(weights.to_mxfp4(), given.to("cpu").to_mxfp4(), strict=True)
        else:
            pairs = zip(weights.to_nvfp4(), given.to("cpu").to_nvfp4(), strict=True)
        for ours, wanted in pairs:
            assert (ours is None) == (wanted is None)
            assert ours is None or torch.equal(ours.cpu(), wanted)


def test_weights_in_another_order_are_refused(pair: str) -> None:
    if rule_of(pair) == "90a":
        pytest.skip("SM90's kernels read one order")
    given = next(layers(pair))
    weights = given.to(device(), activation_format="mxfp8" if acts_of(pair) != "nvfp4" else "bf16")
    call = random_call(3, 2, weights)
    with pytest.raises(ValueError, match=rf"activation_format='{acts_of(pair)}'\) converts them"):
        mxfp4_moe.fused_moe(*call.args(), weights, activation_format=acts_of(pair))
