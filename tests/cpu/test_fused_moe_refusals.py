"""What the public call refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from layers import INTER, E, H, T, make_call, mxfp8
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, get_cutlass_fused_moe_module, reference
from mxfp4_moe._call import checks, operators
from mxfp4_moe._call.checks import MAX_SLOTS, check_limits, check_word_order
from mxfp4_moe._call.launch import check_capability
from mxfp4_moe.weights import MoEWeights


def too_many_experts() -> MoEWeights:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1025, *shape, dtype=torch.uint8)

    return MoEWeights(
        w13=zeros(formats.weight_bytes(64, 64)),
        w2=zeros(formats.weight_bytes(64, 32)),
        hidden_size=64,
        intermediate_size=32,
    )


BAD: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    (
        "weights type",
        lambda c: {"weights": {"w13": c["weights"].w13}},
        TypeError,
        r"weights: expected MoEWeights, got dict",
    ),
    (
        "activation format of no kernel",
        lambda c: {"activation_format": "fp8"},
        ValueError,
        r"activation_format: expected 'mxfp8', 'bf16', 'mxfp4', 'nvfp4' or 'fp16', got 'fp8'",
    ),
    (
        "activation format of other hidden states",
        lambda c: {"activation_format": "fp16"},
        TypeError,
        r"hidden_states: expected float16 for activation_format 'fp16', got bfloat16, .*; pass .*='bf16', or .*",
    ),
    (
        "activation format of MXFP8 rows",
        lambda c: mxfp8(c) | {"activation_format": "bf16"},
        ValueError,
        r"activation_format: expected 'mxfp8' for hidden_states that are MXFP8 already, got 'bf16'; .*",
    ),
    (
        "hidden_states type",
        lambda c: {"hidden_states": c["hidden_states"].tolist()},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, H\], got list",
    ),
    (
        "hidden_states float32",
        lambda c: {"hidden_states": c["hidden_states"].float()},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float32 \[6, 64\]",
    ),
    (
        "hidden_states float8 without its scales",
        lambda c: {"hidden_states": c["hidden_states"].to(torch.float8_e4m3fn)},
        TypeError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float8_e4m3fn \[6, 64\]",
    ),
    (
        "hidden_states width",
        lambda c: {"hidden_states": c["hidden_states"][:, :33].contiguous()},
        ValueError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got bfloat16 \[6, 33\]",
    ),
    (
        "hidden_states dimensions",
        lambda c: {"hidden_states": c["hidden_states"][None]},
        ValueError,
        r"hidden_states: expected bfloat16 or float16 \[T, 64\], got bfloat16 \[1, 6, 64\]",
    ),
    (
        "hidden_states stride",
        lambda c: {"hidden_states": c["hidden_states"].t().contiguous().t()},
        ValueError,
        r"hidden_states: expected a contiguous tensor, got strides \[1, 6\] for shape \[6, 64\]",
    ),
    (
        "hidden_states device",
        lambda c: {"hidden_states": c["hidden_states"].to("meta")},
        ValueError,
        r"hidden_states: expected a CUDA or CPU tensor, got one on meta",
    ),
    (
        "weights device",
        lambda c: {"weights": c["weights"].to("meta")},
        ValueError,
        r"weights: expected MoEWeights on cpu, where hidden_states is, got meta; weights.to\('cpu'\)",
    ),
    (
        "topk_ids dtype",
        lambda c: {"topk_ids": c["topk_ids"].to(torch.int16)},
        TypeError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int16 \[6, 2\]",
    ),
    (
        "topk_ids tokens",
        lambda c: {"topk_ids": c["topk_ids"][:5]},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int64 \[5, 2\]",
    ),
    (
        "topk_ids flat",
        lambda c: {"topk_ids": c["topk_ids"].flatten()},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\], got int64 \[12\]",
    ),
    (
        "topk_ids empty",
        lambda c: {"topk_ids": c["topk_ids"][:, :0], "topk_weights": c["topk_weights"][:, :0]},
        ValueError,
        r"topk_ids: expected \[6, k\] with k at least 1, got k = 0",
    ),
    (
        "topk_ids stride",
        lambda c: {"topk_ids": torch.cat([c["topk_ids"]] * 2, 1)[:, ::2]},
        ValueError,
        r"topk_ids: expected a contiguous tensor, got strides \[4, 2\] for shape \[6, 2\]",
    ),
    (
        "topk_ids device",
        lambda c: {"topk_ids": c["topk_ids"].to("meta")},
        ValueError,
        r"topk_ids: expected int32 or int64 \[6, k\] on cpu, got int64 \[6, 2\] on meta",
    ),
    (
        "topk_ids type",
        lambda c: {"topk_ids": c["topk_ids"].tolist()},
        TypeError,
        r"topk_ids: expected int32 or int64 \[6, k\], got list",
    ),
    (
        "topk_weights dtype",
        lambda c: {"topk_weights": c["topk_weights"].bfloat16()},
        TypeError,
        r"topk_weights: expected float32 \[6, 2\], got bfloat16 \[6, 2\]",
    ),
    (
        "topk_weights shape",
        lambda c: {"topk_weights": c["topk_weights"][:, :1].contiguous()},
        ValueError,
        r"topk_weights: expected float32 \[6, 2\], got float32 \[6, 1\]",
    ),
    (
        "topk_weights device",
        lambda c: {"topk_weights": c["topk_weights"].to("meta")},
        ValueError,
        r"topk_weights: expected float32 \[6, 2\] on cpu, got float32 \[6, 2\] on meta",
    ),
    (
        "output dtype",
        lambda c: {"output": torch.empty(T, H, dtype=torch.float16)},
        TypeError,
        r"output: expected bfloat16 \[6, 64\], got float16 \[6, 64\]",
    ),
    (
        "output shape",
        lambda c: {"output": torch.empty(T + 1, H, dtype=torch.bfloat16)},
        ValueError,
        r"output: expected bfloat16 \[6, 64\], got bfloat16 \[7, 64\]",
    ),
    (
        "output stride",
        lambda c: {"output": torch.empty(T, 2 * H, dtype=torch.bfloat16)[:, :H]},
        ValueError,
        r"output: expected a contiguous tensor, got strides \[128, 1\] for shape \[6, 64\]",
    ),
    (
        "output device",
        lambda c: {"output": c["hidden_states"].to("meta")},
        ValueError,
        r"output: expected bfloat16 \[6, 64\] on cpu, got bfloat16 \[6, 64\] on meta",
    ),
    (
        "output of the input's dtype where another was asked for",
        lambda c: {"output": c["hidden_states"], "output_dtype": torch.float16},
        TypeError,
        r"output: expected float16 \[6, 64\], got bfloat16 \[6, 64\]",
    ),
    (
        "output_dtype",
        lambda c: {"output_dtype": torch.float32},
        TypeError,
        r"output_dtype: expected torch.bfloat16 or torch.float16, got torch.float32",
    ),
    (
        "bfloat16 with scales",
        lambda c: mxfp8(c) | {"hidden_states": c["hidden_states"]},
        TypeError,
        r"hidden_states: expected uint8 or float8_e4m3fn \[T, 64\], got bfloat16 \[6, 64\]",
    ),
    (
        "scale layout",
        lambda c: mxfp8(c) | {"scale_layout": "128x4"},
        ValueError,
        r"scale_layout: expected 'linear' or 'swizzled', got '128x4'",
    ),
    (
        "scales of the other layout",
        lambda c: mxfp8(c) | {"scale_layout": "swizzled"},
        ValueError,
        r"hidden_states_scale: expected uint8 \[512\], got uint8 \[6, 2\]",
    ),
    (
        "scales' shape",
        lambda c: mxfp8(c, "swizzled") | {"scale_layout": "linear"},
        ValueError,
        r"hidden_states_scale: expected uint8 \[6, 2\], got uint8 \[512\]",
    ),
    (
        "scales' dtype",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(6, 2)},
        TypeError,
        r"hidden_states_scale: expected uint8 \[6, 2\], got float32 \[6, 2\]",
    ),
    (
        "scales' device",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(6, 2, dtype=torch.uint8, device="meta")},
        ValueError,
        r"hidden_states_scale: expected uint8 \[6, 2\] on cpu, got uint8 \[6, 2\] on meta",
    ),
    (
        "scales' stride",
        lambda c: mxfp8(c) | {"hidden_states_scale": torch.ones(2, 6, dtype=torch.uint8).t()},
        ValueError,
        r"hidden_states_scale: expected a contiguous tensor, got strides \[1, 6\] for shape \[6, 2\]",
    ),
    (
        "too many experts",
        lambda c: {"weights": too_many_experts()},
        ValueError,
        r"weights: expected at most 1024 experts, got 1025",
    ),
    (
        "tile not in the manifest",
        lambda c: {"tile_mn": (192, 128)},
        ValueError,
        r"tile_mn: expected a tile of the manifest \(.*\(128, 128\).*\), got \(192, 128\)",
    ),
    (
        "tile no pair",
        lambda c: {"tile_mn": 128},
        TypeError,
        r"tile_mn: expected a pair of integers \(M, N\), got 128",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(reference, "fused_moe", lambda *_, **__: pytest.fail("computed before the last check"))
    call = make_call()
    call |= change(call)
    with pytest.raises(error, match=message) as caught:
        mxfp4_moe.fused_moe(**call)
    assert "\n" not in str(caught.value)


LOGITS = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
TILE_MODULE = get_cutlass_fused_moe_module(tile_mn=(8, 128))


def through_module(**call: Any) -> Tensor:
    return TILE_MODULE.fused_moe(**call)


def from_logits(**call: Any) -> Tensor:
    """With random logits in place of topk_ids and topk_weights, whose refusals are `fused_moe`'s alone."""
    (tokens, top_k) = call.pop("topk_ids").shape
    del call["topk_weights"]
    return mxfp4_moe.fused_moe_from_logits(router_logits=LOGITS[:tokens], top_k=top_k, **call)


def refusal(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[type[Exception], str] | None:
    """What was raised, and in which words; None for a call that goes through."""
    try:
        call(**arguments)
    except Exception as error:
        return type(error), str(error)
    return None


class Exported(torch.nn.Module):
    """A call with its tensors as inputs, for torch.export; the rest are constants."""

    def __init__(self, call: Callable[..., Tensor], constants: dict[str, Any]) -> None:
        super().__init__()
        self.call, self.constants = call, constants

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.call(**tensors, **self.constants)


CALLS = {"fused_moe": mxfp4_moe.fused_moe, "module": through_module, "from_logits": from_logits}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("change", [b[1] for b in BAD], ids=[b[0] for b in BAD])
def test_compiled_and_exported_calls_are_refused_as_eager_ones(
    change: Callable[[dict[str, Any]], dict[str, Any]], name: str
) -> None:
    """The same exception in the same words; a graph that must be whole, or is exported, has the words in torch's."""
    call = make_call()
    changed = change(call)
    if name == "from_logits" and {"topk_ids", "topk_weights"} & changed.keys():
        return  # no arguments of this call
    if name == "module" and "output" not in changed:
        return  # it hands its arguments to fused_moe
    call |= changed
    torch._dynamo.reset()
    eager = refusal(CALLS[name], call)
    assert eager is not None
    assert refusal(torch.compile(CALLS[name], backend="aot_eager"), call) == eager
    torch._dynamo.reset()
    whole = refusal(torch.compile(CALLS[name], backend="aot_eager", fullgraph=True), call)
    assert whole is not None
    assert repr(eager[1])[1:-1] in whole[1].replace("\\'", "'")
    if isinstance(call["hidden_states"], Tensor):
        tensors = {key: value for key, value in call.items() if isinstance(value, Tensor)}
        constants = {key: value for key, value in call.items() if key not in tensors}
        exported = refusal(
            lambda **_: torch.export.export(Exported(CALLS[name], constants), (tensors,), strict=False), call
        )
        assert exported is not None
        assert eager[1] in exported[1]


def test_an_exported_program_refuses_another_output_than_it_was_exported_with() -> None:
    call = make_call()
    weights = call.pop("weights")
    output = torch.zeros(T, H, dtype=torch.bfloat16)
    program = torch.export.export(
        Exported(mxfp4_moe.fused_moe, {"weights": weights}), (call | {"output": output},), strict=False
    ).module()
    program(call | {"output": output})
    assert torch.equal(output, mxfp4_moe.fused_moe(**call, weights=weights))
    for other in (output.float(), output.int(), output[None].expand(2, T, H).contiguous(), output[:3]):
        before = other.clone()
        with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError), match=r"\boutput\b"):
            program(call | {"output": other})
        assert torch.equal(other, before)


def test_the_operator_that_writes_an_exported_programs_output() -> None:
    result = torch.randn(T, H).bfloat16()
    torch.library.opcheck(operators.write_output, (torch.zeros_like(result), result))


def test_k_that_is_no_multiple_of_32_is_refused_with_the_weights() -> None:
    hidden, inter = 48, 64
    with pytest.raises(ValueError, match=r"w13: expected H .* a multiple of 32, got 48"):
        MoEWeights.from_mxfp4(
            torch.zeros(2, 2 * inter, hidden // 2, dtype=torch.uint8),
            torch.zeros(2, 2 * inter, 2, dtype=torch.uint8),
            torch.zeros(2, hidden, inter // 2, dtype=torch.uint8),
            torch.zeros(2, hidden, inter // 32, dtype=torch.uint8),
        )


@pytest.mark.parametrize("capability", [(9, 0), (12, 0), (12, 1)])
def test_supported_gpus(capability: tuple[int, int]) -> None:
    check_capability(capability, "a GPU")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (10, 0), (10, 3), (11, 0)])
def test_unsupported_gpu_is_named_with_archs_and_versions(capability: tuple[int, int]) -> None:
    arch = f"sm_{capability[0]}{capability[1]}"
    with pytest.raises(RuntimeError, match=rf"\(sm_90a, sm_120f\), got one on Old GPU, which is {arch}; ") as caught:
        check_capability(capability, "Old GPU")
    assert f"torch {torch.__version__}" in str(caught.value)
    assert "the wheel was built for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_refuses_another_word_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are the only thing in which devices differ, so nothing else would tell."""
    orders = {0: formats.WordOrder.PAIRS, 1: formats.WordOrder.CONTAINERS}
    monkeypatch.setattr(checks, "word_order_of", lambda d, activation_format: orders[d.index])
    for index, order in orders.items():
        check_word_order(order, torch.device("cuda", index))
        with pytest.raises(ValueError, match=rf"^weights: expected word order '{order.value}' on cuda:{index}, got .*"):
            check_word_order(orders[1 - index], torch.device("cuda", index))


@pytest.mark.parametrize("activation", ["swiglu_oai", "relu"])
def test_cpu_reads_either_word_order(activation: str) -> None:
    gated = activation != "relu"
    checkpoint = oracles.random_checkpoint(E, H, INTER, gated=gated)
    weights = MoEWeights.from_mxfp4(**checkpoint, activation=activation)
    sizes = {"w13": (weights.w13_rows, H), "w2": (H, INTER)}
    old, new = formats.WordOrder.CONTAINERS, formats.WordOrder.PAIRS
    pairs = {
        name: torch.stack([formats.reorder_words(expert, *size, old, new) for expert in getattr(weights, name)])
        for name, size in sizes.items()
    }
    call = make_call() | {"weights": weights}
    expected = mxfp4_moe.fused_moe(**call)
    assert torch.equal(mxfp4_moe.fused_moe(**call | {"weights": replace(weights, **pairs, word_order=new)}), expected)
    assert not torch.equal(mxfp4_moe.fused_moe(**call | {"weights": replace(weights, **pairs)}), expected)


def test_limits_are_stated_before_anything_is_allocated() -> None:
    check_limits(1024, MAX_SLOTS, 1)
    with pytest.raises(ValueError, match=r"weights: expected at most 1024 experts, got 1025"):
        check_limits(1025, 1, 1)
    with pytest.raises(ValueError, match=r"topk_ids: expected at most 2147482623 slots .*, got 1073741312 \* 2"):
        check_limits(1, (MAX_SLOTS + 1) // 2, 2)
