"""float16 outputs: rows of the second GEMM that float16 cannot hold, though what the router makes of them it can."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from moe_cases import with_large_rows
from torch import Tensor

from mxfp4_moe import MoEWeights, fused_moe, reference
from mxfp4_moe.problems import bits, random_call, random_weights
from mxfp4_moe.reference import chain

E, K, H, INTER, TOKENS = 6, 3, 96, 64, 21
LARGEST = 65504.0
CPU = torch.device("cpu")
# Of the norm: the sum is rounded once, to 11 bits; a value between the GEMMs may fall on the other side of an MXFP8
# tie.
TOLERANCE = 2.0**-9


def layer(seed: int, *, share: float = 2.0**-6) -> tuple[MoEWeights, tuple[Tensor, Tensor, Tensor]]:
    """Rows of some 10^5, and weights that bring their sums back to some 10^3."""
    weights = with_large_rows(random_weights(E, H, INTER, CPU, seed=seed))
    call = random_call(TOKENS, K, weights, seed=seed, dtype=torch.float16)
    return weights, (call.hidden_states, call.topk_weights * share, call.topk_ids)


def float64(weights: MoEWeights, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> np.ndarray:
    stored: dict[str, Any] = weights.to_mxfp4()._asdict()
    return oracles.dense_moe(x, topk_weights, topk_ids, stored)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_weighted_before_they_are_rounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, call = layer(seed)
    rows = float64(weights, call[0], torch.ones(TOKENS, 1), call[2][:, :1].contiguous())
    assert (np.abs(rows) > LARGEST).mean() > 0.05, "the case is none"
    expected = float64(weights, *call)
    assert np.abs(expected).max() < LARGEST / 2
    out = fused_moe(*call, weights)
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    assert np.linalg.norm(out.double().numpy() - expected) <= TOLERANCE * np.linalg.norm(expected)
    # Rounded first, they would be infinite.
    monkeypatch.setitem(chain.ROW_DTYPES, torch.float16, torch.float16)
    assert not fused_moe(*call, weights).isfinite().all()


def test_a_sum_beyond_float16_is_infinite_and_no_nan() -> None:
    weights, call = layer(0, share=1.0)
    expected = float64(weights, *call)
    out = fused_moe(*call, weights)
    beyond, within = np.abs(expected) > 1.01 * LARGEST, np.abs(expected) < 0.99 * LARGEST
    assert beyond.any()
    assert within.any()
    assert out[torch.from_numpy(within)].isfinite().all()
    assert out[torch.from_numpy(beyond)].tolist() == [math.copysign(math.inf, value) for value in expected[beyond]]


def test_bfloat16_rounds_its_rows_as_it_did() -> None:
    weights, (x, topk_weights, topk_ids) = layer(0)
    gemm2: list[Tensor] = []

    def finalize(rows: Tensor, *rest: Any) -> Tensor:
        gemm2.append(rows)
        return reference.finalize(rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "finalize", finalize)
        out = fused_moe(x, topk_weights, topk_ids, weights, output_dtype=torch.bfloat16)
        fused_moe(x, topk_weights, topk_ids, weights)
    halves, floats = gemm2
    assert (halves.dtype, floats.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(bits(halves), bits(floats.bfloat16()))
    offsets, row_slot, slot_row = reference.route(topk_ids, E)
    row_expert = torch.arange(E).repeat_interleave(offsets.diff())
    assert len(row_expert) == len(row_slot)
    expected = reference.finalize(floats.bfloat16(), topk_weights, slot_row, row_expert, weights.w2_bias)
    assert torch.equal(bits(out), bits(expected))
