"""MXFP4_MOE_VERIFY=1: the check passes a layer that is right, and stops at one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import oracles
import pytest
import torch
from torch import Tensor
from weight_cases import H, I

import mxfp4_moe
from mxfp4_moe import engines, reference
from mxfp4_moe.integrations import _engines
from mxfp4_moe.integrations._engines.register import forget
from mxfp4_moe.integrations._engines.verify import verify_layer
from mxfp4_moe.weights import MoEWeights

VLLM, TOP_K = _engines.engine("vllm"), 2
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def layer(**changes: Tensor) -> MoEWeights:
    return MoEWeights.from_mxfp4(**{**oracles.random_checkpoint(4, H, I, seed=2), **changes})


def modular(weights: MoEWeights) -> Run:
    return lambda hidden, topk_weights, topk_ids, logits: mxfp4_moe.fused_moe(hidden, topk_weights, topk_ids, weights)


def monolithic(weights: MoEWeights) -> Run:
    return lambda hidden, topk_weights, topk_ids, logits: mxfp4_moe.fused_moe_from_logits(
        hidden, logits, TOP_K, weights
    )


def verify(run: Run, weights: MoEWeights, **more: Tensor) -> None:
    cpu = torch.device("cpu")
    verify_layer(VLLM, run, weights, "layer 0", dtype=torch.bfloat16, top_k=TOP_K, device=cpu, **more)


@pytest.mark.parametrize("kind", [modular, monolithic])
def test_a_layer_that_is_right(kind: Callable[[MoEWeights], Run], capsys: pytest.CaptureFixture[str]) -> None:
    verify(kind(layer()), layer())
    assert "mxfp4-moe verified layer 0 in vLLM: the bits of fused_moe, 0.0e+00" in capsys.readouterr().err


def test_a_part_whose_experts_are_not_consecutive() -> None:
    raw = {name: tensor[::2].contiguous() for name, tensor in oracles.random_checkpoint(4, H, I, seed=2).items()}
    part = engines.prepare_layer(**raw, num_global_experts=4)
    expert_map = torch.tensor([0, -1, 1, -1], dtype=torch.int32)

    def run(hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, logits: Tensor) -> Tensor:
        return mxfp4_moe.fused_moe(hidden, topk_weights, engines.local_ids(topk_ids, expert_map), part)

    verify(run, part, expert_map=expert_map)


def wrong_order() -> Run:
    return modular(MoEWeights.from_mxfp4(**oracles.random_checkpoint(4, H, I, seed=2), gate_up_order="gate_up"))


def wrong_bit() -> Run:
    scales = oracles.random_checkpoint(4, H, I, seed=2)["w2_scale"].clone()
    scales[0, 0, 0] += 1
    return modular(layer(w2_scale=scales))


def without_bias() -> Run:
    return modular(replace(layer(), w2_bias=None))


def other_limit() -> Run:
    return modular(replace(layer(), limit=1.0))


def shifted_ids() -> Run:
    return modular(replace(layer(), first_expert=1, num_global_experts=5))


@pytest.mark.parametrize("wrong", [wrong_order, wrong_bit, without_bias, other_limit, shifted_ids])
def test_a_layer_that_is_not_right(wrong: Callable[[], Run]) -> None:
    with pytest.raises(RuntimeError, match=r"layer 0: \d+ of 17 tokens have other bits in vLLM than from fused_moe"):
        verify(wrong(), layer())


def test_kernels_that_are_far_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways agree, and both are wrong: what a self-test would say too."""
    exact, calls = reference.fused_moe, []

    def off(*arguments: Tensor, **keywords: object) -> Tensor:
        calls.append(1)
        result: Tensor = exact(*arguments, **keywords)  # type: ignore[arg-type]
        return result * 1.02 if len(calls) == 3 else result  # the third is the check's own

    monkeypatch.setattr(reference, "fused_moe", off)
    with pytest.raises(RuntimeError, match=r"within 0.005 of the reference, got 2.0\de-02"):
        verify(modular(layer()), layer())
