"""Any router on CPU tensors: select_experts and the layer behind it. GPU: tests/gpu/test_routers.py.

Against float64 from the definition (helpers/router_cases.py), and against transformers' own routers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import router_cases as cases
import torch
from hypothesis import given
from hypothesis import strategies as st

import mxfp4_moe
from mxfp4_moe import Router, select_experts
from mxfp4_moe._call import operators
from mxfp4_moe.reference import routers as reference
from mxfp4_moe.routers import GroupScore, ScoringFunc
from mxfp4_moe.weights import MoEWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORINGS = [scoring.value for scoring in ScoringFunc]
# Few different values, so that ties are common; -0 and +0 are one value. Scores of unequal ones are far apart.
LOGITS = st.sampled_from([-80.0, -3.5, -1.0, -0.0, 0.0, 0.25, 1.0, 2.0, 6.0])
BIASES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 3.0])


# ---- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(cases.ROUTERS))
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    experts, router = cases.router_named(name)
    logits = cases.logits_of(60, experts, dtype)
    weights, ids = select_experts(logits, router)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (60, router.top_k)
    assert weights.is_contiguous()
    assert ids.is_contiguous()
    assert cases.check_by_definition(logits, router, weights, ids) < 20

    # What another rule would give is something else, by ids or by weights.
    other = cases.router_of(experts, router.top_k, SCORINGS[SCORINGS.index(router.scoring_func) - 1], bias=False)
    with pytest.raises(AssertionError):
        cases.check_by_definition(logits, other, weights, ids)


@given(data=st.data(), scoring_func=st.sampled_from(SCORINGS), groups=st.sampled_from([1, 1, 2, 4]))
@pytest.mark.parametrize("with_bias", [False, True])
def test_ties_against_lists(data: Any, scoring_func: str, groups: int, with_bias: bool) -> None:
    each = data.draw(st.integers(2, 9))
    experts, kept = groups * each, data.draw(st.integers(1, groups))
    bias = data.draw(st.lists(BIASES, min_size=experts, max_size=experts))
    router = Router(
        top_k=data.draw(st.integers(1, min(kept * each, 32))),
        scoring_func=scoring_func,
        e_score_correction_bias=torch.tensor(bias) if with_bias else None,
        renormalize=data.draw(st.booleans()),
        num_expert_group=groups,
        topk_group=kept,
        group_score=data.draw(st.sampled_from(list(GroupScore))),
        routed_scaling_factor=data.draw(st.sampled_from([1.0, 2.5])),
    )
    rows = data.draw(st.lists(st.lists(LOGITS, min_size=experts, max_size=experts), min_size=1, max_size=3))
    # A softmax over other rows gives equal logits equal scores, and unequal ones scores that may be close to 0.
    weights, ids = select_experts(torch.tensor(rows), router)
    for t, row in enumerate(rows):
        choice = cases.by_definition(row, router)
        if choice.margin >= cases.LEAST_MARGIN:
            assert ids[t].tolist() == choice.ids
            expected = torch.tensor(choice.weights).double()
            torch.testing.assert_close(weights[t].double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", ["DeepSeek-V4-Flash", "DeepSeek-V3", "Qwen3-MoE", "softmax with a bias"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_that_are_given_are_weighed(name: str, dtype: torch.dtype) -> None:
    """Hash routing: a table says each token's experts, whatever their scores."""
    experts, router = cases.router_named(name)
    logits = cases.logits_of(9, experts, torch.float32)
    table = torch.stack([torch.randperm(experts)[: router.top_k] for _ in range(9)]).to(dtype)
    table[2, 0], table[3] = -1, experts
    weights, ids = select_experts(logits, router, topk_ids=table)
    assert ids.dtype is torch.int32
    assert ids.data_ptr() != table.data_ptr()
    for t, row in enumerate(logits.double().tolist()):
        choice = cases.by_definition(row, router, ids=table[t].tolist())
        assert ids[t].tolist() == [e if 0 <= e < experts else -1 for e in choice.ids]
        torch.testing.assert_close(weights[t].double(), torch.tensor(choice.weights).double(), **cases.TOLERANCE)


def test_the_bias_of_an_expert_takes_it_out_or_puts_it_first_and_reaches_no_weight() -> None:
    bias = torch.zeros(8)
    bias[3], bias[5] = -math.inf, math.inf
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0, 4.0, -5.0, 3.0, -1.0]])
    weights, ids = select_experts(logits, Router(top_k=3, scoring_func="sigmoid", e_score_correction_bias=bias))
    assert ids.tolist() == [[5, 4, 6]]
    scores = torch.tensor([-5.0, 4.0, 3.0]).double().sigmoid()
    torch.testing.assert_close(weights[0].double(), scores / scores.sum(), rtol=1e-6, atol=0.0)


def test_nan_and_infinity_stay_with_their_token() -> None:
    for scoring_func in SCORINGS:
        logits = torch.zeros(5, 8)
        logits[:, 2] = 1.0
        logits[1, 5], logits[2, 6], logits[3] = math.nan, math.inf, -math.inf
        for renormalize in (True, False):
            router = Router(
                top_k=3, scoring_func=scoring_func, renormalize=renormalize, e_score_correction_bias=torch.zeros(8)
            )
            weights, ids = select_experts(logits, router)
            assert weights[[0, 4]].isfinite().all()
            assert ids[[0, 4]].tolist() == [[2, 0, 1]] * 2
            if scoring_func != "softmax":  # whose sum is over all, so that all scores are NaN and lower experts first
                assert ids.tolist() == [[2, 0, 1], [5, 2, 0], [6, 2, 0], [0, 1, 2], [2, 0, 1]]
                assert weights[1].isnan().tolist() == [True, renormalize, renormalize]
                assert (weights[3] == 0).all()
            else:
                assert weights[1:4].isnan().all(1).tolist() == [True, True, True]


def test_groups_with_a_nan_are_kept() -> None:
    logits = torch.full((1, 8), 2.0)
    logits[0, 5], logits[0, :4] = math.nan, 3.0
    router = Router(top_k=2, scoring_func="sigmoid", num_expert_group=4, topk_group=1)
    assert select_experts(logits, router)[1].tolist() == [[5, 4]]


# ---- its arithmetic --------------------------------------------------------------------------------------------------


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    unit = np.spacing(np.maximum(np.abs(expected.numpy()).astype(np.float32), np.finfo(np.float32).tiny))
    return float(((actual.double() - expected).abs().numpy() / unit).max())


def test_scores_are_within_a_few_ulps() -> None:
    x = torch.cat([torch.linspace(-87, 100, 300_001), torch.randn(100_000, generator=torch.Generator().manual_seed(0))])
    y, t = -x.abs().clamp(max=87), torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    assert ulps(reference.exp_of_negative(y), y.double().exp()) < 1.2
    assert ulps(reference.log1p_of_fraction(t), t.double().log1p()) < 2
    assert ulps(reference.scores(x, ScoringFunc.SIGMOID), x.double().sigmoid()) < 2.4
    softplus = x.double().clamp(min=0) + x.double().abs().neg().exp().log1p()
    assert ulps(reference.scores(x, ScoringFunc.SQRTSOFTPLUS), softplus.sqrt()) < 2


def test_scores_at_the_ends() -> None:
    ends = torch.tensor([math.nan, math.inf, -math.inf, -87.5, -1e30, 1e30, 0.0, -0.0])
    assert reference.scores(ends, ScoringFunc.SIGMOID).nan_to_num(7.0).tolist() == [7, 1, 0, 0, 0, 1, 0.5, 0.5]
    found = reference.scores(ends, ScoringFunc.SQRTSOFTPLUS)
    assert found[0].isnan()
    assert found[1:5].tolist() == [math.inf, 0, 0, 0]
    assert found[5] == torch.tensor(1e30).sqrt()
    torch.testing.assert_close(found[6:], torch.full((2,), math.log(2) ** 0.5))


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_scaled_is_topk_softmax_times_the_factor(renormalize: bool) -> None:
    logits = cases.logits_of(40, 128, torch.float32)
    weights, ids = mxfp4_moe.topk_softmax(logits, 8, renormalize)
    same = select_experts(logits, Router(top_k=8, renormalize=renormalize))
    assert torch.equal(same[0], weights)
    assert torch.equal(same[1], ids)
    scaled = select_experts(logits, Router(top_k=8, renormalize=renormalize, routed_scaling_factor=4.0))
    assert torch.equal(scaled[1], ids)
    torch.testing.assert_close(scaled[0], weights * 4, rtol=3e-6, atol=0.0)


# ---- against transformers' own code ----------------------------------------------------------------------------------


def transformers_router(name: str, experts: int, router: Router, hidden: int) -> tuple[Any, dict[str, Any]]:
    """The class by its name and what its config must say."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    classes = {
        "DeepSeek-V3": DeepseekV3TopkRouter,
        "Ling": DeepseekV3TopkRouter,
        "MiMo-V2": DeepseekV3TopkRouter,
        "Kimi-K3": DeepseekV3TopkRouter,
        "DeepSeek-V4-Flash": DeepseekV4TopKRouter,
        "DeepSeek-V4-Pro": DeepseekV4TopKRouter,
        "MiniMax-M3": MiniMaxM3VLTopKRouter,
        "Qwen3-MoE": Qwen3MoeTopKRouter,
    }
    return classes[name], {
        "num_experts_per_tok": router.top_k,
        "num_local_experts": experts,
        "num_experts": experts,
        "hidden_size": hidden,
        "routed_scaling_factor": router.routed_scaling_factor,
        "n_group": router.num_expert_group,
        "topk_group": router.topk_group,
        "norm_topk_prob": router.renormalize,
        "scoring_func": ScoringFunc(router.scoring_func).value,
    }


@pytest.mark.parametrize(
    "name",
    ["DeepSeek-V3", "Ling", "MiMo-V2", "Kimi-K3", "DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "MiniMax-M3", "Qwen3-MoE"],
)
def test_against_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    experts, router = cases.router_named(name)
    hidden = 16
    kind, config = transformers_router(name, experts, router, hidden)
    theirs = kind(SimpleNamespace(**config)).float()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        theirs.weight.normal_(generator=g)
        if router.e_score_correction_bias is not None:
            theirs.e_score_correction_bias.copy_(router.e_score_correction_bias)
        logits, expected_weights, expected_ids = theirs(torch.randn(50, hidden, generator=g))
    weights, ids = select_experts(logits.contiguous(), router)
    if name == "MiniMax-M3":  # whose block scales what the experts give
        expected_weights = expected_weights * router.routed_scaling_factor
    agreed = 0
    for t, row in enumerate(logits.double().tolist()):
        if cases.by_definition(row, router).margin < cases.LEAST_MARGIN:
            continue
        theirs_of = dict(zip(expected_ids[t].tolist(), expected_weights[t].tolist(), strict=True))
        assert set(ids[t].tolist()) == set(theirs_of)
        ordered = torch.tensor([theirs_of[e] for e in ids[t].tolist()])
        torch.testing.assert_close(weights[t], ordered, rtol=5e-6, atol=1e-30)
        agreed += 1
    assert agreed > 30


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k: expected 1 to 32, got 0"),
        ({"top_k": 33}, ValueError, "top_k: expected 1 to 32, got 33"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an integer, got 2.0"),
        ({"top_k": True}, TypeError, "top_k: expected an integer, got True"),
        ({"scoring_func": "tanh"}, ValueError, "scoring_func: expected one of 'softmax', 'sigmoid', 'sqrtsoftplus'"),
        ({"group_score": "min"}, ValueError, "group_score: expected one of 'top2_sum', 'max', got 'min'"),
        ({"renormalize": 1}, TypeError, "renormalize: expected a bool, got 1"),
        ({"num_expert_group": 33}, ValueError, "num_expert_group: expected 1 to 32, got 33"),
        ({"num_expert_group": 2, "topk_group": 3}, ValueError, "topk_group: expected 1 to 2, got 3"),
        ({"routed_scaling_factor": "2"}, TypeError, "routed_scaling_factor: expected a number, got '2'"),
        ({"routed_scaling_factor": math.inf}, ValueError, "routed_scaling_factor: expected a finite number, got inf"),
        ({"e_score_correction_bias": [0.0]}, TypeError, r"e_score_correction_bias: expected float32 \[E\], got list"),
        (
            {"e_score_correction_bias": torch.zeros(4).bfloat16()},
            TypeError,
            r"e_score_correction_bias: expected float32 \[E\], got bfloat16 \[4\]",
        ),
        ({"e_score_correction_bias": torch.zeros(8)[::2]}, ValueError, "e_score_correction_bias: expected a contig"),
    ],
)
def test_a_router_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        Router(**{"top_k": 2, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("experts", "router", "ids", "error", "message"),
    [
        (8, 2, None, TypeError, "router: expected a Router, got int"),
        (2, Router(top_k=3), None, ValueError, "top_k: expected 1 to 2 of 2 experts, got 3"),
        (
            8,
            Router(top_k=1, e_score_correction_bias=torch.zeros(7)),
            None,
            ValueError,
            r"e_score_correction_bias: expected float32 \[8\], got float32 \[7\]",
        ),
        (8, Router(top_k=1, num_expert_group=3), None, ValueError, "num_expert_group: expected a divisor of 8 exp"),
        (8, Router(top_k=1, num_expert_group=8), None, ValueError, "num_expert_group: expected groups of two exp"),
        (
            8,
            Router(top_k=3, num_expert_group=4),
            None,
            ValueError,
            "topk_group: expected groups with 3 experts together, got 1 of 2 each",
        ),
        (8, Router(top_k=2), torch.zeros(4, 3, dtype=torch.int32), ValueError, r"topk_ids: expected .* \[4, 2\], got"),
        (8, Router(top_k=2), torch.zeros(4, 2), TypeError, r"topk_ids: expected int32 or int64 \[4, 2\], got float32"),
    ],
)
def test_a_call_refuses(experts: int, router: Any, ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as caught:
        select_experts(torch.zeros(4, experts), router, ids)
    assert "\n" not in str(caught.value)
    if ids is None and isinstance(router, Router) and router.top_k <= experts:
        call = make_call(experts, 4)
        with pytest.raises(error, match=f"^{message}"):
            mxfp4_moe.fused_moe_from_logits(call["hidden_states"], call["router_logits"], router, call["weights"])


def test_the_groups_of_a_maximum_may_have_one_expert() -> None:
    router = Router(top_k=2, scoring_func="sigmoid", num_expert_group=8, topk_group=3, group_score="max")
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0, -1.0, 4.0, 0.5, 0.25]])
    assert select_experts(logits, router)[1].tolist() == [[1, 5]]


# ---- in the layer, in graphs, and when a gradient is asked for -------------------------------------------------------


def make_call(experts: int, tokens: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(experts)
    return {
        "hidden_states": torch.randn(tokens, 64, generator=g).bfloat16(),
        "router_logits": torch.randn(tokens, experts, generator=g),
        "weights": MoEWeights.from_mxfp4(**oracles.random_checkpoint(experts, 64, 32)),
    }


ROUTERS_OF_TWELVE = [
    cases.router_of(12, 3, "sigmoid", num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
    cases.router_of(12, 2, "sqrtsoftplus", renormalize=False),
    cases.router_of(12, 4, "softmax"),
    cases.router_of(12, 4, "softmax", bias=False),
]


@pytest.mark.parametrize("router", ROUTERS_OF_TWELVE, ids=lambda router: router.scoring_func.value)
def test_from_logits_is_select_experts_and_fused_moe(router: Router) -> None:
    call = make_call(12, 7)
    x, logits, weights = call.values()
    expected = mxfp4_moe.fused_moe(x, *select_experts(logits, router), weights)
    assert torch.equal(mxfp4_moe.fused_moe_from_logits(x, logits, router, weights), expected)
    part = weights.expert_parallel(1, 3)
    expected = mxfp4_moe.fused_moe(x, *select_experts(logits, router), part)
    assert torch.equal(mxfp4_moe.fused_moe_from_logits(x, logits, router, part), expected)


@pytest.mark.parametrize("router", ROUTERS_OF_TWELVE, ids=lambda router: router.scoring_func.value)
def test_in_a_graph(router: Router) -> None:
    call = make_call(12, 7)
    x, logits, weights = call.values()
    ids = select_experts(logits, router)[1]

    def layer(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = mxfp4_moe.fused_moe_from_logits(x, logits, router, weights)
        return out, *select_experts(logits, router), *select_experts(logits, router, ids)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(logits), layer(logits), strict=True):
        assert torch.equal(mine, theirs)
    torch._dynamo.reset()
    bias = router.e_score_correction_bias
    rule = (router.scoring_func.value, router.renormalize, router.num_expert_group, router.topk_group)  # type: ignore[union-attr]
    rest = (router.top_k, *rule, router.group_score.value, router.routed_scaling_factor)  # type: ignore[union-attr]
    torch.library.opcheck(operators.select_experts, (logits, None, bias, *rest))
    torch.library.opcheck(operators.select_experts, (logits, ids, bias, *rest))


def test_a_gradient_is_refused() -> None:
    logits = torch.randn(5, 12, requires_grad=True)
    router = ROUTERS_OF_TWELVE[0]
    for function in (select_experts, torch.compile(select_experts, fullgraph=True, backend="aot_eager")):
        weights, ids = function(logits, router)
        assert weights.requires_grad
        with pytest.raises(RuntimeError, match="select_experts: no gradient can be computed through it"):
            weights.sum().backward()
        assert not ids.requires_grad
    torch._dynamo.reset()


def test_no_tokens() -> None:
    for router in ROUTERS_OF_TWELVE:
        weights, ids = select_experts(torch.zeros(0, 12), router)
        assert weights.shape == ids.shape == (0, router.top_k)
