"""Compiled, exported and captured calls with NVFP4 weights on a GPU: the eager call's bits.

Where a wheel has no kernels of a pair of formats, each test says so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import gpu_problems
import pytest
import torch
from gpu_cases import TOP_K, require_pair
from nvfp4_cases import random_nvfp4, with_biases
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call import operators
from mxfp4_moe.arithmetic import of_arch
from mxfp4_moe.problems import bits, random_call, relative_error
from mxfp4_moe.weights import MoEWeights

FORMATS = ("nvfp4", "bf16", "fp16")
KINDS = ("multiply", "divide", "dynamic")
EXPERTS, HIDDEN, INTER = 16, 160, 96
TOLERANCE = 2e-2  # torch's exp has other last bits, which make another code of FP4 now and then
DTYPES = {"nvfp4": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=FORMATS)
def activation_format(request: pytest.FixtureRequest) -> str:
    require_pair(f"nvfp4_{request.param}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_cpu(kind: str) -> MoEWeights:
    scales = {"kind": "divide"} if kind == "divide" else {"inputs": kind != "dynamic"}
    layer = random_nvfp4(experts=EXPERTS, hidden=HIDDEN, inter=INTER, **scales)
    return MoEWeights.from_nvfp4(**with_biases(layer))


class Layer(nn.Module):
    """Weights in the word order of the format's kernels, without a call before; a random call for them."""

    def __init__(self, kind: str, activation_format: str) -> None:
        super().__init__()
        self.activation_format = activation_format
        self.weights = on_cpu(kind).to(gpu_problems.gpu(), activation_format)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return mxfp4_moe.fused_moe(
            x, topk_weights, topk_ids, self.weights, activation_format=self.activation_format, output_dtype=x.dtype
        )

    def call(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        dtype = DTYPES[self.activation_format]
        return random_call(tokens, TOP_K, self.weights, dtype=dtype, seed=seed).args()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_for_every_token_count_and_captured(kind: str, activation_format: str) -> None:
    layer, counter = Layer(kind, activation_format), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 6, 33, 300, 17):
        call = layer.call(tokens)
        expected = layer(*call)
        assert expected.any()
        assert expected.isfinite().all()
        assert torch.equal(bits(compiled(*call)), bits(expected)), tokens
    assert counter.frame_count <= 2
    call, others = layer.call(40), layer.call(40, seed=1)
    compiled(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compiled(*call)
    for given, new in zip(call, others, strict=True):
        given.copy_(new)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(bits(captured), bits(layer(*others)))
    assert counter.frame_count <= 2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_reference(kind: str, activation_format: str) -> None:
    """The bits above are those of the layer: a factor that is missing, or another's, is far off."""
    layer, tokens = Layer(kind, activation_format), 33
    call = layer.call(tokens)
    arch = "90a" if formats.word_order_of(gpu_problems.gpu()) is formats.WordOrder.PAIRS else "120f"
    rule, on_host = of_arch(arch, f"nvfp4_{activation_format}"), [x.cpu() for x in call]
    expected = reference.fused_moe(*on_host, on_cpu(kind), activation_format=activation_format, arithmetic=rule)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*call).cpu(), expected) <= TOLERANCE


@torch.no_grad()
def test_nvfp4_in_fp16_is_captured_without_a_call_before() -> None:
    require_pair("nvfp4_fp16")
    layer, again = Layer("multiply", "fp16"), Layer("multiply", "fp16")
    call = layer.call(9)
    expected = layer(*call)  # loads the kernels
    graph, output = torch.cuda.CUDAGraph(), torch.full_like(expected, float("nan"))
    with torch.cuda.graph(graph):
        mxfp4_moe.fused_moe(*call, again.weights, activation_format="fp16", output=output)
    graph.replay()
    assert torch.equal(bits(output), bits(expected))


@torch.no_grad()
def test_from_logits_into_a_given_output(activation_format: str) -> None:
    layer = Layer("multiply", activation_format)
    x, _, _ = layer.call(40)
    logits = torch.randn(40, EXPERTS, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    expected = mxfp4_moe.fused_moe_from_logits(x, logits, TOP_K, layer.weights, activation_format=activation_format)
    compiled = torch.compile(mxfp4_moe.fused_moe_from_logits, fullgraph=True, backend="aot_eager")
    output = torch.full_like(expected, float("nan"))
    compiled(x, logits, TOP_K, layer.weights, activation_format=activation_format, output=output)
    assert torch.equal(bits(output), bits(expected))


@torch.no_grad()
# torch 2.11's own torch.export.load.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_exported_to_a_file(activation_format: str) -> None:
    layer, count = Layer("divide", activation_format), {0: torch.export.Dim("tokens", min=0)}
    exported = torch.export.export(layer, layer.call(5), dynamic_shapes=(count, count, count), strict=False)
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for tokens in (1, 5, 300):
        call = layer.call(tokens, seed=tokens)
        assert torch.equal(bits(loaded(*call)), bits(layer(*call))), tokens


def test_opcheck_and_fake_tensors(activation_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("multiply", activation_format)
    call, given = layer.call(9), []
    with monkeypatch.context() as patch:
        patch.setattr(operators, "moe_layer", lambda *arguments: given.append(arguments) or arguments[0])
        patch.setattr("mxfp4_moe._call.fused_moe.in_graph", lambda _: True)
        layer(*call)
    torch.library.opcheck(operators.moe_layer, given[0])
    mode = FakeTensorMode()
    out = layer(*(mode.from_tensor(x) for x in call))
    assert (type(out).__name__, out.shape, out.dtype) == ("FakeTensor", (9, HIDDEN), call[0].dtype)
    assert out.device == call[0].device


def test_words_of_another_device_are_refused_when_the_graph_runs(activation_format: str) -> None:
    """As of MXFP4: what depends on the GPU is no part of a trace."""
    layer = Layer("multiply", activation_format)
    orders = [order for order in type(layer.weights.word_order) if order is not layer.weights.word_order]
    layer.weights = MoEWeights(**layer.weights.__getstate__() | {"word_order": orders[0]})
    call = layer.call(4)
    with pytest.raises(ValueError, match="weights: expected word order") as eager:
        layer(*call)
    with pytest.raises(ValueError, match="weights: expected word order") as compiled:
        torch.compile(layer, fullgraph=True, backend="aot_eager")(*call)
    assert str(compiled.value) == str(eager.value)
