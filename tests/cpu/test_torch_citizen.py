"""The layer in torch's machinery on CPU: compiled, exported, checked as an operator, in inference mode, in threads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mxfp4_moe
from mxfp4_moe import formats
from mxfp4_moe._call import operators
from mxfp4_moe.weights import MoEWeights

E, H, INTER, TOP_K = 5, 64, 96, 3
PER_EXPERT = {name: torch.linspace(0.5, 3.0, E) for name in ("alpha", "beta", "limit")}
LAYERS: dict[str, dict[str, Any]] = {
    "gpt-oss": {},
    "per expert": PER_EXPERT,
    "no limit, no bias": {"limit": None},
    "not gated": {"activation": "relu2"},
}


class Layer(nn.Module):
    """A router and the experts behind it, as a model has them."""

    def __init__(self, weights: MoEWeights) -> None:
        super().__init__()
        self.router = nn.Linear(weights.hidden_size, weights.num_experts)
        self.weights = weights

    def forward(self, hidden_states: Tensor) -> Tensor:
        topk_weights, topk_ids = mxfp4_moe.topk_softmax(self.router(hidden_states.float()), TOP_K)
        return mxfp4_moe.fused_moe(hidden_states, topk_weights, topk_ids, self.weights)


def make_weights(name: str) -> MoEWeights:
    options = LAYERS[name]
    checkpoint = oracles.random_checkpoint(E, H, INTER, gated=options.get("activation") != "relu2")
    if name == "no limit, no bias":
        del checkpoint["w13_bias"], checkpoint["w2_bias"]
    return MoEWeights.from_mxfp4(**checkpoint, **options)


def make_layer(name: str = "gpt-oss") -> Layer:
    torch.manual_seed(0)
    return Layer(make_weights(name)).eval()


def hidden(tokens: int) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def operator_arguments(
    weights: MoEWeights, tokens: int = 7, scale_layout: str | None = None, output_dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """What `fused_moe` hands to `moe_layer`."""
    x: Tensor = hidden(tokens)
    scale = None
    if scale_layout is not None:
        x, scale = formats.quantize_mxfp8(x)
        scale = formats.swizzle_scales(scale).flatten() if scale_layout == "swizzled" else scale
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(torch.randn(tokens, E), TOP_K)
    each = [n if isinstance(n, Tensor) else None for n in (weights.alpha, weights.beta, weights.limit)]
    alpha, beta, limit = (None if isinstance(n, Tensor) else n for n in (weights.alpha, weights.beta, weights.limit))
    return (
        *(x, topk_weights, topk_ids, weights.w13, weights.w13_bias, weights.w2, weights.w2_bias),
        *(weights.hidden_size, weights.intermediate_size, weights.word_order.value, weights.activation.value),
        *(alpha or 0.0, beta or 0.0, limit, *each, scale, scale_layout or "linear", output_dtype),
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_whole_and_not_for_every_token_count(name: str) -> None:
    layer, counter = make_layer(name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 6, 7, 9, 33, 64, 100, 17):
        assert torch.equal(compiled(hidden(tokens)), layer(hidden(tokens))), tokens
    # One graph for the first count that is seen, one for all others.
    assert counter.frame_count <= 2
    for tokens in (0, 1, 2, 128):
        assert torch.equal(compiled(hidden(tokens)), layer(hidden(tokens))), tokens
    # torch itself sets 0 and 1 apart.
    assert counter.frame_count <= 4
    for graph in counter.graphs:
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert operators.moe_layer in calls
        assert operators.topk_softmax in calls


@torch.no_grad()
def test_compiles_with_weights_output_and_mxfp8_as_arguments() -> None:
    weights = make_weights("gpt-oss")
    x, scale = formats.quantize_mxfp8(hidden(6))
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(torch.randn(6, E), TOP_K)

    def call(weights: MoEWeights, output: Tensor | None) -> Tensor:
        return mxfp4_moe.fused_moe(
            x,
            topk_weights,
            topk_ids,
            weights,
            hidden_states_scale=scale,
            output_dtype=torch.float16,
            tile_mn=(128, 128),
            output=output,
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = call(weights, None)
    assert torch.equal(compiled(weights, None), expected)
    output = torch.zeros_like(expected)
    compiled(weights, output)
    assert torch.equal(output, expected)


def test_compiled_gives_no_gradient_and_says_so() -> None:
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(hidden(4).requires_grad_())
    assert torch.equal(out, layer(hidden(4)))
    with pytest.raises(RuntimeError, match="no gradient can be computed"):
        out.sum().backward()


def test_wrong_shapes_are_refused_while_the_graph_is_traced() -> None:
    compiled = torch.compile(make_layer(), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"hidden_states: expected bfloat16 or float16 \[T, 64\], got float32 \[4, 64\]"
    ):
        compiled(hidden(4).float())


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_exported_layer_is_the_layer(strict: bool) -> None:
    layer = make_layer()
    tokens = {"hidden_states": {0: torch.export.Dim("tokens", min=0)}}
    exported = torch.export.export(layer, (hidden(5),), dynamic_shapes=tokens, strict=strict)
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for count in (1, 5, 40):
        assert torch.equal(loaded(hidden(count)), layer(hidden(count)))


@pytest.mark.parametrize("name", LAYERS)
def test_opcheck_of_the_layer(name: str) -> None:
    torch.library.opcheck(operators.moe_layer, operator_arguments(make_weights(name)))


def test_opcheck_of_the_layer_with_intermediate_rounding() -> None:
    torch.library.opcheck(operators.moe_layer, (*operator_arguments(make_weights("gpt-oss")), True))


@torch.no_grad()
def test_compiles_with_intermediate_rounding() -> None:
    weights = make_weights("gpt-oss")
    args = (hidden(6), *mxfp4_moe.topk_softmax(torch.randn(6, E), TOP_K), weights)
    compiled = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
    out = compiled(*args, intermediate_rounding=True)
    assert torch.equal(out, mxfp4_moe.fused_moe(*args, intermediate_rounding=True))
    assert not torch.equal(out, compiled(*args))


@pytest.mark.parametrize("scale_layout", ["linear", "swizzled"])
def test_opcheck_of_the_layer_on_mxfp8(scale_layout: str) -> None:
    weights = make_weights("gpt-oss")
    torch.library.opcheck(
        operators.moe_layer, operator_arguments(weights, scale_layout=scale_layout, output_dtype=torch.float16)
    )


@pytest.mark.parametrize("renormalize", [False, True])
def test_opcheck_of_the_router(renormalize: bool) -> None:
    torch.library.opcheck(operators.topk_softmax, (torch.randn(6, 9), 4, renormalize))


def test_meta_tensors_give_shapes() -> None:
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in operator_arguments(make_weights("gpt-oss"))]
    out = operators.moe_layer(*meta)
    assert (out.shape, out.dtype, out.device.type) == ((7, H), torch.bfloat16, "meta")
    weights, ids = operators.topk_softmax(torch.empty(6, 9, device="meta"), 4, True)
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((6, 4), torch.float32, (6, 4), torch.int32)


def test_inference_mode() -> None:
    layer = make_layer()
    expected = layer(hidden(5))
    with torch.inference_mode():
        out = layer(hidden(5))
        assert out.is_inference()
        assert torch.equal(out, expected)
        output = torch.empty_like(out)
        topk_weights, topk_ids = mxfp4_moe.topk_softmax(layer.router(hidden(5).float()), TOP_K)
        mxfp4_moe.fused_moe(hidden(5), topk_weights, topk_ids, layer.weights, output=output)
        assert torch.equal(output, expected)


def test_threads_do_not_disturb_each_other() -> None:
    layers = {name: make_layer(name) for name in LAYERS}
    jobs = [(name, tokens) for tokens in range(1, 9) for name in LAYERS]
    expected = [layers[name](hidden(tokens)) for name, tokens in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: layers[job[0]](hidden(job[1])), jobs * 2))
    for out, wanted in zip(results, expected * 2, strict=True):
        assert torch.equal(out, wanted)
