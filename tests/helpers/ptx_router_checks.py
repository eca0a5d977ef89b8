"""What the routers' kernels must do, executed as SM12x's PTX: alone, and in one kernel with route.

Ids and weights are compared bit by bit with `reference.routers`: nothing in them is left open by the PTX ISA, since
every operation rounds on its own.
"""

from __future__ import annotations

import math

import router_cases as cases
import torch
from ptx import launch
from ptx.running import Run, execute
from ptx.workspace import intermediates
from ptx_moe_checks import TILE, layer_shapes
from torch import Tensor

from mxfp4_moe import Router, formats, reference
from mxfp4_moe.activations import Activation
from mxfp4_moe.problems import bits
from mxfp4_moe.reference import routers
from mxfp4_moe.routers import GroupScore, ScoringFunc

ROUTER_SOURCES = ("route", "route_few", "topk_softmax", "topk_experts")


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit by bit, but that a NaN is a NaN."""
    nans = actual.isnan()
    return nans.equal(expected.isnan()) and torch.equal(bits(actual[~nans]), bits(expected[~nans]))


def check_topk_experts(router: Router, logits: Tensor, given: Tensor | None = None) -> None:
    for source in ROUTER_SOURCES:
        launch.ptx_of_moe(source)
    bias = router.e_score_correction_bias
    rule = (ScoringFunc(router.scoring_func).code, router.num_expert_group, router.topk_group)
    rest = (GroupScore(router.group_score).code, router.routed_scaling_factor, given)
    recording = launch.shared_recorder().operator(
        "route_experts", logits, router.top_k, router.renormalize, bias, *rule, *rest
    )
    inputs = {"logits": logits} | ({} if bias is None else {"bias": bias}) | ({} if given is None else {"given": given})
    early = [name for name in inputs if name != "bias"]  # which was there before the layer
    done = execute(recording, [launch.ptx_of_moe(source) for source in ROUTER_SOURCES], inputs, early=early)
    weights, ids = done.results
    expected_weights, expected_ids = routers.select_experts(logits, router, given)
    assert torch.equal(ids, expected_ids)
    assert same(weights, expected_weights)


def check_scores(scoring_func: str) -> None:
    """The scores themselves, of 3072 logits of every size: their last bits are what experts are chosen by."""
    logits = cases.logits_of(96, 32, torch.float32)
    logits[32:] *= torch.linspace(-3, 5, 64).exp2()[:, None]
    given = torch.arange(32, dtype=torch.int32).repeat(96, 1)
    check_topk_experts(Router(top_k=32, scoring_func=scoring_func, renormalize=False), logits, given)


def check_route_of_router(router: Router, logits: Tensor, kernels: int = 1) -> None:
    """The first kernels of a layer whose experts are some of all: those from number 3 on."""
    tokens, experts = logits.shape
    first_expert, here, top_k = 3, experts - 5, router.top_k
    done = first_of_layer(kernels, logits, router, here, first_expert)
    expected_weights, ids = routers.select_experts(logits, router)
    offsets, _, slot_row = reference.route(ids - first_expert, here)
    valid, expected_tiles = int(offsets[-1]), reference.m_tiles(offsets, TILE.m)
    sizes = {"slots": tokens * top_k, "hidden": 32, "inter": 32, "experts": here, "tile_m": TILE.m}
    found = intermediates(done.recording, **sizes, gemm1_width=0, from_logits=True)
    assert torch.equal(found["slot_row"], slot_row)
    assert torch.equal(found["row_expert"][:valid].long(), torch.arange(here).repeat_interleave(offsets.diff()))
    assert (found["row_expert"][valid:] == -1).all()
    assert found["valid_rows"].tolist() == [valid]
    assert found["num_m_tiles"].tolist() == [len(expected_tiles)]
    assert torch.equal(found["m_tiles"][: len(expected_tiles)], expected_tiles)
    assert same(found["topk_weights"].view(tokens, top_k), expected_weights)


def first_of_layer(kernels: int, logits: Tensor, router: Router, experts: int, first_expert: int) -> Run:
    """Of a whole layer's launches, the first `kernels`; those that route read nothing of the layer but the logits."""
    recorder = launch.shared_recorder()
    sources = (*ROUTER_SOURCES, "quantize_permute", "finalize", "activation")
    ptx = [launch.ptx_of_moe(source) for source in sources]
    launch.ptx_of_tile(TILE)
    recorder.register_tile(TILE)
    hidden = torch.empty(len(logits), 32, dtype=torch.bfloat16)
    w13, w2 = (torch.empty(experts, formats.weight_bytes(*shape), dtype=torch.uint8) for shape in layer_shapes(hidden))
    numbers = (Activation.SWIGLU.code, 0.0, 0.0, math.inf, TILE.m, TILE.n)
    recording = recorder.operator(
        "fused_moe",
        *(hidden, None, None, logits, router.top_k, w13, None, w2, None, 32, *numbers, torch.empty_like(hidden)),
        first_expert=first_expert,
        **router.operator_arguments,
    )
    assert len(recording.launches) == 4 + kernels
    del recording.launches[kernels:]
    bias = router.e_score_correction_bias
    inputs = {"logits": logits, "hidden": hidden} | ({} if bias is None else {"bias": bias})
    return execute(recording, ptx, inputs, early=["logits", "hidden"])


def check_named(name: str, dtype: torch.dtype) -> None:
    experts, router = cases.router_named(name)
    check_topk_experts(router, cases.special_logits(experts, dtype))


def check_few_named(name: str, tokens: int) -> None:
    experts, router = cases.router_named(name)
    check_route_of_router(router, cases.special_logits(experts, torch.float32)[:tokens].contiguous())
