"""topk_softmax and fused_moe_from_logits on CPU tensors; GPU: tests/gpu/test_routing.py and tests/gpu/test_moe.py.

topk_softmax against lists and float64, the layer against the two calls that it stands for.
"""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe.weights import MoEWeights

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
    top_k = data.draw(st.integers(1, min(32, experts)))
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
        (torch.zeros(2, 64), 33, ValueError, r"top_k: expected 1 to 32 of 64 experts, got 33"),
        (torch.zeros(2, 4), 2.0, TypeError, r"top_k: expected an integer, got 2.0"),
        (torch.zeros(2, 4), True, TypeError, r"top_k: expected an integer, got True"),
    ],
)
def test_refuses(logits: Any, top_k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        mxfp4_moe.topk_softmax(logits, top_k)
    assert "\n" not in str(caught.value)


# ---- the layer from logits -------------------------------------------------------------------------------------------

E, H, INTER, T, K = 6, 64, 32, 5, 2


def make_weights() -> MoEWeights:
    return MoEWeights.from_mxfp4(**oracles.random_checkpoint(E, H, INTER))


def make_call() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(T, H, generator=g).bfloat16(),
        "router_logits": torch.randn(T, E, generator=g),
        "top_k": K,
        "weights": make_weights(),
    }


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits_is_topk_softmax_and_fused_moe(dtype: torch.dtype, renormalize: bool) -> None:
    call = make_call()
    x, logits, weights = call["hidden_states"], call["router_logits"].to(dtype), call["weights"]
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(logits, K, renormalize)
    for options in ({}, {"output_dtype": torch.float16}, {"intermediate_rounding": True}, {"tile_mn": (8, 128)}):
        expected = mxfp4_moe.fused_moe(x, topk_weights, topk_ids, weights, **options)
        out = mxfp4_moe.fused_moe_from_logits(x, logits, K, weights, renormalize=renormalize, **options)
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    codes, scale = formats.quantize_mxfp8(x)
    given = mxfp4_moe.fused_moe_from_logits(
        codes, logits, K, weights, renormalize=renormalize, hidden_states_scale=scale
    )
    assert torch.equal(given, mxfp4_moe.fused_moe(x, topk_weights, topk_ids, weights))
    output = torch.empty_like(x)
    assert mxfp4_moe.fused_moe_from_logits(x, logits, K, weights, output=output) is output


def test_from_logits_the_ranks_add_up() -> None:
    call = make_call()
    whole = mxfp4_moe.fused_moe_from_logits(**call)
    parts = [
        mxfp4_moe.fused_moe_from_logits(**{**call, "weights": call["weights"].expert_parallel(rank, 3)})
        for rank in range(3)
    ]
    torch.testing.assert_close(sum(part.float() for part in parts), whole.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"weights": {}}, TypeError, r"weights: expected MoEWeights, got dict"),
        (lambda c: {"hidden_states": [1.0]}, TypeError, r"hidden_states: expected .* \[T, H\], got list"),
        (
            lambda c: {"hidden_states": c["hidden_states"].float()},
            TypeError,
            r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float32 \[5, 64\]",
        ),
        (
            lambda c: {"hidden_states": c["hidden_states"][:, :32].contiguous()},
            ValueError,
            r"hidden_states: expected bfloat16 or float16 \[T, 64\], got bfloat16 \[5, 32\]",
        ),
        (lambda c: {"hidden_states": c["hidden_states"][0]}, ValueError, r"router_logits: expected \[64, 6\], as many"),
        (lambda c: {"router_logits": [[1.0]]}, TypeError, r"router_logits: expected .* \[T, E\], got list"),
        (
            lambda c: {"router_logits": c["router_logits"][:4]},
            ValueError,
            r"router_logits: expected \[5, 6\], as many rows as hidden_states, on cpu, got \[4, 6\] on cpu",
        ),
        (
            lambda c: {"router_logits": c["router_logits"].to("meta")},
            ValueError,
            r"router_logits: expected \[5, 6\], .* on cpu, got \[5, 6\] on meta",
        ),
        (
            lambda c: {"router_logits": c["router_logits"][:, :5].contiguous()},
            ValueError,
            r"router_logits: expected one for each of the layer's 6 experts, got \[5, 5\]",
        ),
        (
            lambda c: {"router_logits": torch.zeros(5, 2), "weights": c["weights"].expert_parallel(0, 3)},
            ValueError,
            r"router_logits: expected one for each of the layer's 6 experts, got \[5, 2\]",
        ),
        (lambda c: {"top_k": 7}, ValueError, r"top_k: expected 1 to 6 of 6 experts, got 7"),
        (lambda c: {"top_k": 2.0}, TypeError, r"top_k: expected an integer, got 2.0"),
        (lambda c: {"output": torch.empty(5, 32)}, TypeError, r"output: expected bfloat16 \[5, 64\], got float32"),
        (lambda c: {"output_dtype": torch.float32}, TypeError, r"output_dtype: expected torch.bfloat16 or"),
        (lambda c: {"tile_mn": (7, 7)}, ValueError, r"tile_mn: expected a tile of the manifest"),
    ],
)
def test_from_logits_refuses(change: Any, error: type[Exception], message: str) -> None:
    call = make_call()
    with pytest.raises(error, match=f"^{message}") as caught:
        mxfp4_moe.fused_moe_from_logits(**{**call, **change(call)})
    assert "\n" not in str(caught.value)
