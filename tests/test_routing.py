"""topk_softmax on CPU tensors against lists and float64; the kernel is compared in test_gpu_routing.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mxfp4_moe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Few different values, so that ties are common; -0 and +0 are one value.
LOGITS = st.sampled_from([-math.inf, -3.5, -1.0, -0.0, 0.0, 0.25, 1.0, 2.0, 60.0])


def by_hand(row: list[float], top_k: int, renormalize: bool) -> tuple[list[float], list[int]]:
    """One token, in float64: best first, of equals the lower expert."""
    chosen = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
    over = [row[e] for e in chosen] if renormalize else row
    largest = max(over)
    if largest == -math.inf:
        return [math.nan] * top_k, chosen
    total = math.fsum(math.exp(x - largest) for x in over)
    return [math.exp(row[e] - largest) / total for e in chosen], chosen


@given(data=st.data(), experts=st.integers(1, 40), tokens=st.integers(0, 4), renormalize=st.booleans())
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_lists(data: Any, experts: int, tokens: int, renormalize: bool, dtype: torch.dtype) -> None:
    rows = data.draw(st.lists(st.lists(LOGITS, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    top_k = data.draw(st.integers(1, min(16, experts)))
    logits = torch.tensor(rows, dtype=dtype).reshape(tokens, experts)
    weights, ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (tokens, top_k)
    assert weights.is_contiguous()
    assert ids.is_contiguous()
    for t, row in enumerate(rows):
        expected_weights, expected_ids = by_hand(row, top_k, renormalize)
        assert ids[t].tolist() == expected_ids
        # exp and a sum of at most 40 terms, each rounded to float32.
        torch.testing.assert_close(
            weights[t].double(), torch.tensor(expected_weights).double(), rtol=5e-6, atol=1e-30, equal_nan=True
        )


@pytest.mark.parametrize("experts", [1, 128, 1024])
def test_against_torch_topk(experts: int) -> None:
    logits = torch.randn(50, experts, generator=torch.Generator().manual_seed(0))
    top_k = min(16, experts)
    values, expected = logits.topk(top_k)
    weights, ids = mxfp4_moe.topk_softmax(logits, top_k)
    assert torch.equal(ids.long(), expected)
    torch.testing.assert_close(weights, values.softmax(-1))
    weights, ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize=False)
    assert torch.equal(ids.long(), expected)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, expected))


def test_nan_and_infinity_spoil_their_own_token() -> None:
    logits = torch.zeros(5, 8)
    logits[:, 2] = 1.0
    logits[1, 5], logits[2, 6], logits[3] = math.nan, math.inf, -math.inf
    for renormalize in (True, False):
        weights, ids = mxfp4_moe.topk_softmax(logits, 3, renormalize)
        assert ids.tolist() == [[2, 0, 1], [5, 2, 0], [6, 2, 0], [0, 1, 2], [2, 0, 1]]
        # A +inf leaves exp(-inf) = 0 for the others and inf - inf for itself.
        assert weights[1].isnan().all()
        assert weights[2].isnan().any()
        assert weights[3].isnan().all()
        assert weights[[0, 4]].isfinite().all()


def test_no_gradient_flows() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    assert not mxfp4_moe.topk_softmax(logits, 2)[0].requires_grad


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        ([[1.0]], 1, TypeError, r"router_logits: expected float32 or bfloat16 or float16 \[T, E\], got list"),
        (torch.zeros(2, 4).double(), 1, TypeError, r"router_logits: expected .*, got float64 \[2, 4\]"),
        (torch.zeros(4), 1, ValueError, r"router_logits: expected .* \[T, E\], got float32 \[4\]"),
        (torch.zeros(2, 0), 1, ValueError, r"router_logits: expected 1 to 1024 experts, got 0"),
        (torch.zeros(2, 1025), 1, ValueError, r"router_logits: expected 1 to 1024 experts, got 1025"),
        (torch.zeros(4, 2).t(), 1, ValueError, r"router_logits: expected a contiguous tensor, got strides \[1, 2\]"),
        (torch.zeros(2, 4, device="meta"), 1, ValueError, r"router_logits: expected a CUDA or CPU tensor, got .* meta"),
        (torch.zeros(2, 4), 0, ValueError, r"top_k: expected 1 to 4 of 4 experts, got 0"),
        (torch.zeros(2, 4), 5, ValueError, r"top_k: expected 1 to 4 of 4 experts, got 5"),
        (torch.zeros(2, 64), 17, ValueError, r"top_k: expected 1 to 16 of 64 experts, got 17"),
        (torch.zeros(2, 4), 2.0, TypeError, r"top_k: expected an integer, got 2.0"),
        (torch.zeros(2, 4), True, TypeError, r"top_k: expected an integer, got True"),
    ],
)
def test_refuses(logits: Any, top_k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        mxfp4_moe.topk_softmax(logits, top_k)
    assert "\n" not in str(caught.value)
