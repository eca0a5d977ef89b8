"""torch's transforms around a call: what is supported gives the same result, the rest is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import H, K, T, make_call, make_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_moe
from mxfp4_moe import MoEWeights, flashinfer_api, formats
from mxfp4_moe._call import operators

CALL = make_call()
WEIGHTS, X = CALL["weights"], CALL["hidden_states"]
LOGITS = torch.randn(T, WEIGHTS.num_experts, generator=torch.Generator().manual_seed(0))
ROUTER = mxfp4_moe.Router(top_k=K, scoring_func="sigmoid", e_score_correction_bias=torch.zeros(WEIGHTS.num_experts))
CALLS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "fused_moe": (lambda x: mxfp4_moe.fused_moe(**{**CALL, "hidden_states": x}), X),
    "fused_moe_from_logits": (lambda x: mxfp4_moe.fused_moe_from_logits(x, LOGITS, K, WEIGHTS), X),
    "topk_softmax": (lambda x: mxfp4_moe.topk_softmax(x, K)[0], LOGITS),
    "select_experts": (lambda x: mxfp4_moe.select_experts(x, ROUTER)[0], LOGITS),
    "mxfp8_quantize": (lambda x: flashinfer_api.mxfp8_quantize(x)[1], X),
}


def with_tangent(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, torch.ones_like(x)))


REFUSED: dict[str, tuple[Callable[[Callable[[Tensor], Any], Tensor], Any], str]] = {
    "jit.trace": (lambda call, x: torch.jit.trace(call, (x,)), r"torch\.jit\.trace would record one call's routing"),
    "vmap": (lambda call, x: torch.vmap(call)(torch.stack([x, x])), r"torch\.func's transforms \(vmap, grad, jvp\)"),
    "grad": (lambda call, x: torch.func.grad(lambda y: call(y).sum())(x), r"torch\.func's transforms"),
    "jvp": (lambda call, x: torch.func.jvp(call, (x,), (x,)), r"torch\.func's transforms"),
    "jacrev": (lambda call, x: torch.func.jacrev(call)(x), r"torch\.func's transforms"),
    "forward mode": (with_tangent, "no gradient can be computed through it"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_no_kernel_can_follow_is_refused_by_name(transform: str, name: str) -> None:
    call, x = CALLS[name]
    apply, words = REFUSED[transform]
    before = call(x)
    with pytest.raises(RuntimeError, match=rf"^{name}: .*{words}|^{name}: {words}") as caught:
        apply(call, x)
    assert "\n" not in str(caught.value)
    assert torch.equal(call(x), before), "the call after it is as ever"


def test_forward_mode_without_a_tangent_is_no_gradient() -> None:
    with forward_ad.dual_level():
        assert torch.equal(CALLS["fused_moe"][0](X), CALLS["fused_moe"][0](X.clone()))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("active", [True, False])
def test_fake_tensors_give_shapes(name: str, active: bool) -> None:
    """Under their mode or without it, beside weights that are real."""
    mode = FakeTensorMode()
    fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in CALL.items()}
    x, logits = fake["hidden_states"], mode.from_tensor(LOGITS)
    calls: dict[str, Callable[[], Tensor]] = {
        "fused_moe": lambda: mxfp4_moe.fused_moe(**fake),
        "fused_moe_from_logits": lambda: mxfp4_moe.fused_moe_from_logits(x, logits, K, WEIGHTS),
        "topk_softmax": lambda: mxfp4_moe.topk_softmax(logits, K)[0],
        "select_experts": lambda: mxfp4_moe.select_experts(logits, ROUTER)[0],
        "mxfp8_quantize": lambda: flashinfer_api.mxfp8_quantize(x)[1],
    }
    if active:
        with mode:
            out = calls[name]()
    else:
        out = calls[name]()
    real = CALLS[name][0](CALLS[name][1])
    assert type(out).__name__ == "FakeTensor"
    assert (out.shape, out.dtype, out.device) == (real.shape, real.dtype, real.device)


def test_fake_tensors_are_checked_as_real_ones() -> None:
    mode = FakeTensorMode()
    fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in CALL.items()}
    with mode, pytest.raises(TypeError, match=r"^output: expected bfloat16 \[6, 64\], got float32 \[6, 64\]$"):
        mxfp4_moe.fused_moe(**fake, output=torch.empty(T, H))
    with mode, pytest.raises(TypeError, match=r"^topk_ids: expected int32 or int64 \[6, k\], got float32 \[6, 2\]$"):
        mxfp4_moe.fused_moe(**fake | {"topk_ids": fake["topk_weights"]})


@pytest.mark.parametrize("per_expert", [False, True])
def test_weights_without_values_can_be_prepared(per_expert: bool) -> None:
    options = {"limit": torch.full((WEIGHTS.num_experts,), 7.0)} if per_expert else {}
    whole = make_weights(**options)
    plain = whole.to_mxfp4()._asdict()
    mode = FakeTensorMode()
    with mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in plain.items()}
        fake = MoEWeights.from_mxfp4(**fakes, **{name: mode.from_tensor(each) for name, each in options.items()})
    meta = MoEWeights.from_mxfp4(
        **{name: tensor.to("meta") for name, tensor in plain.items()},
        **{name: each.to("meta") for name, each in options.items()},
    )
    for made in (fake, meta):
        for name in ("w13", "w2", "w13_bias", "w2_bias"):
            assert getattr(made, name).shape == getattr(whole, name).shape
            assert getattr(made, name).dtype == getattr(whole, name).dtype
    for kind in formats.WeightFormat:
        floats = MoEWeights.from_float(
            torch.empty(2, 64, 64, dtype=torch.bfloat16, device="meta"),
            torch.empty(2, 64, 32, device="meta"),
            format=kind,
        )
        assert floats.w2.shape == (2, kind.weight_bytes(64, 32))


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_the_operator(mode: str) -> None:
    def call(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return mxfp4_moe.fused_moe(x, topk_weights, topk_ids, WEIGHTS)

    arguments = (X, CALL["topk_weights"], CALL["topk_ids"])
    graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(*arguments)
    assert operators.moe_layer in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(*arguments), call(*arguments))


def test_a_first_call_imports_no_compiler() -> None:
    """torch._dynamo takes 1.4 s, and a caller who compiles nothing has no use for it."""
    program = """
import sys, torch, mxfp4_moe
weights = mxfp4_moe.MoEWeights.from_float(torch.randn(4, 128, 64), torch.randn(4, 64, 64))
hidden_states, logits = torch.randn(5, 64, dtype=torch.bfloat16), torch.randn(5, 4)
mxfp4_moe.fused_moe_from_logits(hidden_states, logits, 2, weights)
mxfp4_moe.fused_moe(hidden_states, *mxfp4_moe.topk_softmax(logits, 2), weights, tile_mn=(64, 64))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
