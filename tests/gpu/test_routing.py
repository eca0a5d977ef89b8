"""The router's kernel against plain torch, ids exactly and weights to float32's last bits."""

from __future__ import annotations

import gpu_problems
import pytest
import torch
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import reference
from mxfp4_moe._install import loading

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {"rtol": 3e-6, "atol": 1e-30}  # an exp, a sum of up to 1024 terms in another order, a division


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return gpu_problems.gpu()


def check(logits: Tensor, top_k: int) -> None:
    for renormalize in (True, False):
        weights, ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize)
        expected_weights, expected_ids = reference.topk_softmax(logits.cpu(), top_k, renormalize)
        assert torch.equal(ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected_weights, equal_nan=True, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 64, 65, 128, 200, 256, 257, 512, 513, 1000, 1024])
def test_against_plain_torch(experts: int, dtype: torch.dtype, device: torch.device) -> None:
    g = torch.Generator(device).manual_seed(experts)
    for tokens in (1, 3, 4, 5, 130):
        logits = (torch.randn(tokens, experts, generator=g, device=device) * 3).to(dtype)
        for top_k in sorted({1, min(4, experts), min(7, experts), min(32, experts)}):
            check(logits, top_k)


@pytest.mark.parametrize("experts", [5, 128, 1024])
def test_ties_go_to_the_lower_expert(experts: int, device: torch.device) -> None:
    g = torch.Generator(device).manual_seed(experts)
    logits = torch.randint(-1, 2, (60, experts), generator=g, device=device).float()
    logits[0], logits[1], logits[2] = 0.0, -0.0, -torch.inf
    logits[3, ::2] *= -0.0
    check(logits, min(32, experts))


def test_nan_and_infinity_spoil_their_own_token(device: torch.device) -> None:
    logits = torch.randn(9, 128, device=device)
    logits[1, 77], logits[2, 3], logits[3, 100], logits[4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[5, 10:20], logits[6], logits[7, :3] = torch.nan, torch.nan, -torch.nan
    check(logits, 4)
    weights, ids = mxfp4_moe.topk_softmax(logits, 4)
    assert ids[1, 0] == 77
    assert weights[[1, 5, 6, 7]].isnan().all()
    assert weights[[0, 3, 8]].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 1, 131_072])
def test_token_counts(tokens: int, device: torch.device) -> None:
    check(torch.randn(tokens, 128, device=device), 4)


def test_graph_and_view_that_starts_anywhere(device: torch.device) -> None:
    static = torch.zeros(1 + 33 * 65, device=device)[1:].view(33, 65)
    mxfp4_moe.topk_softmax(static, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = mxfp4_moe.topk_softmax(static, 4)
    for _ in range(3):
        static.normal_()
        graph.replay()
        expected_weights, expected_ids = reference.topk_softmax(static.cpu(), 4)
        assert torch.equal(ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected_weights, **TOLERANCE)


def test_the_operator_checks_for_itself(device: torch.device) -> None:
    kernel = loading.moe_ops().route_topk
    for logits, top_k, message in (
        (torch.zeros(2, 4), 1, r"router_logits: expected a CUDA tensor"),
        (torch.zeros(2, 4, device=device, dtype=torch.int32), 1, r"router_logits: expected float32, bfloat16 or"),
        (torch.zeros(2, 1025, device=device), 1, r"experts: expected 1 to 1024, got 1025"),
        (torch.zeros(2, 4, device=device), 5, r"top_k: expected 1 to 4, got 5"),
        (torch.zeros(2, 40, device=device), 33, r"top_k: expected 1 to 32, got 33"),
        (torch.zeros(4, 4, device=device).t()[:2], 1, r"router_logits: expected a contiguous tensor"),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=message if logits.is_cuda else "."):
            kernel(logits, top_k, True)
