"""On a GPU: what is set for all of torch changes no bit, wrong outputs are refused compiled as eager, numbers are read
when weights are made and never by a call.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import mxfp4_moe
from mxfp4_moe.problems import bits, random_call, random_weights

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@contextlib.contextmanager
def setting(set_to: Callable[[], object], set_back: Callable[[], object]) -> Iterator[None]:
    try:
        set_to()
        yield
    finally:
        set_back()


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "default dtype": lambda: setting(
        lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default device": lambda: setting(lambda: torch.set_default_device("cpu"), lambda: torch.set_default_device(None)),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cuda", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "deterministic, filled": lambda: setting(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "tf32": lambda: setting(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "flush denormal": lambda: setting(lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)),
}


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("state", STATES)
def test_a_setting_changes_no_bit(state: str, tokens: int) -> None:
    weights = random_weights(4, 256, 128, DEVICE, limit=torch.full((4,), 7.0, device=DEVICE))
    call = random_call(tokens, 2, weights)
    logits = torch.randn(tokens, 4, device=DEVICE)
    expected = (
        mxfp4_moe.fused_moe(*call.args(), weights),
        mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, 2, weights),
    )
    with STATES[state]():
        again = random_weights(4, 256, 128, DEVICE, limit=weights.limit)
        assert torch.equal(again.w13, weights.w13)
        results = (
            mxfp4_moe.fused_moe(*call.args(), again),
            mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, 2, again),
        )
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(bits(result.clone()), bits(wanted))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty_like(x, dtype=torch.float32),
        lambda x: torch.empty_like(x, dtype=torch.int32),
        lambda x: torch.empty(5, *x.shape, dtype=x.dtype, device=x.device),
        lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"),
        lambda x: torch.empty(x.shape[1], x.shape[0], dtype=x.dtype, device=x.device).t(),
    ],
)
@pytest.mark.parametrize("name", ["fused_moe", "module", "from_logits"])
def test_a_wrong_output_is_refused_compiled_as_eager(make: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    weights = random_weights(4, 256, 128, DEVICE)
    call = random_call(6, 2, weights)
    logits = torch.randn(6, 4, device=DEVICE)
    module = mxfp4_moe.get_cutlass_fused_moe_module()
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fused_moe": lambda out: mxfp4_moe.fused_moe(*call.args(), weights, output=out),
        "module": lambda out: module.fused_moe(*call.args(), weights, output=out),
        "from_logits": lambda out: mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, 2, weights, output=out),
    }
    output = make(call.hidden_states)
    said = []
    for run in (calls[name], torch.compile(calls[name], backend="aot_eager")):
        torch._dynamo.reset()
        with pytest.raises((TypeError, ValueError), match=r"^output: expected") as caught:
            run(output)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_numbers_on_a_gpu_are_read_when_weights_are_made(value: float) -> None:
    weights = random_weights(4, 256, 128, DEVICE)
    limit = torch.tensor([7.0, 7.0, value, 7.0], device=DEVICE)
    with pytest.raises(ValueError, match=r"^limit: expected finite numbers above 0, got .* for expert 2$"):
        replace(weights, limit=limit)


def test_a_call_waits_for_no_number() -> None:
    weights = random_weights(4, 256, 128, DEVICE, limit=torch.full((4,), 7.0, device=DEVICE))
    call = random_call(6, 2, weights)
    mxfp4_moe.fused_moe(*call.args(), weights)
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # the mode says of itself that it is a prototype, once it is set
        warnings.simplefilter("ignore", UserWarning)
        with setting(
            lambda: torch.cuda.set_sync_debug_mode("error"), lambda: torch.cuda.set_sync_debug_mode("default")
        ):
            mxfp4_moe.fused_moe(*call.args(), weights)
