"""Calls with NVFP4 weights in torch's machinery: the same operator as MXFP4's, and the eager call's bits.

All pairs of formats, with the checkpoint's scales of inputs and without, of both kinds of scales.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from layers import bits
from layers import make_weights as mxfp4_weights
from nvfp4_cases import random_nvfp4, with_biases
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mxfp4_moe
from mxfp4_moe import get_cutlass_fused_moe_module
from mxfp4_moe._call import operators
from mxfp4_moe.weights import MoEWeights

E, H, INTER, K = 3, 64, 96, 2
FORMATS = {"nvfp4": torch.bfloat16, "bf16": torch.float16, "fp16": torch.float16}
LAYERS: dict[str, dict[str, Any]] = {
    "multiply": {},
    "divide": {"kind": "divide"},
    "dynamic": {"inputs": False},
    "dynamic, divide": {"kind": "divide", "inputs": False},
    "not gated": {"kind": "divide", "gated": False},
    "no kernels": {"inter": 80},
}
MODULE = get_cutlass_fused_moe_module(tile_mn=(8, 128))


def weights_of(name: str, seed: int = 0) -> MoEWeights:
    options = LAYERS[name]
    made = with_biases(random_nvfp4(**{"hidden": H, "inter": INTER, "seed": seed} | options))
    return MoEWeights.from_nvfp4(**made, activation="swiglu" if options.get("gated", True) else "relu2")


def call_of(activation_format: str, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and ids of which some are of no expert."""
    g = torch.Generator().manual_seed(1000 * seed + tokens)
    x = torch.randn(tokens, H, generator=g).to(FORMATS[activation_format])
    return x, torch.rand(tokens, K, generator=g), torch.randint(-1, E + 1, (tokens, K), generator=g)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(bits(one), bits(other))


class Layer(nn.Module):
    def __init__(self, weights: MoEWeights, activation_format: str) -> None:
        super().__init__()
        self.weights, self.activation_format = weights, activation_format

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return mxfp4_moe.fused_moe(
            x, topk_weights, topk_ids, self.weights, activation_format=self.activation_format, output_dtype=x.dtype
        )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ALL = pytest.mark.parametrize(("name", "activation_format"), list(itertools.product(LAYERS, FORMATS)))
PAIRS = pytest.mark.parametrize("activation_format", FORMATS)


# ---- compiled --------------------------------------------------------------------------------------------------------


@ALL
def test_compiles_whole_and_not_for_every_token_count(name: str, activation_format: str) -> None:
    layer, counter = Layer(weights_of(name), activation_format), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outs = []
    for tokens in (5, 6, 33, 17):
        call = call_of(activation_format, tokens)
        outs.append(layer(*call))
        assert outs[-1].isfinite().all()
        assert outs[-1].any()
        assert same(compiled(*call), outs[-1]), tokens
    # One graph for the first count that is seen, one for all others.
    assert counter.frame_count <= 2
    for tokens in (0, 1):
        call = call_of(activation_format, tokens)
        assert same(compiled(*call), layer(*call)), tokens
    assert counter.frame_count <= 4  # torch itself sets 0 and 1 apart
    for graph in counter.graphs:
        assert operators.moe_layer in [node.target for node in graph.graph.nodes]


@PAIRS
def test_weights_are_an_argument_of_a_graph(activation_format: str) -> None:
    """One graph for all of a kind: a layer's weights are tensors in it, no constants."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled, call = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend=counter), call_of(activation_format, 7)
    outs = []
    for seed in range(3):
        weights = weights_of("multiply", seed)
        outs.append(mxfp4_moe.fused_moe(*call, weights, activation_format=activation_format))
        assert same(compiled(*call, weights, activation_format=activation_format), outs[-1])
    assert not same(outs[0], outs[1])
    assert counter.frame_count == 1
    for name in ("dynamic", "divide"):
        expected = mxfp4_moe.fused_moe(*call, weights_of(name), activation_format=activation_format)
        assert same(compiled(*call, weights_of(name), activation_format=activation_format), expected), name


def from_logits(x: Tensor, logits: Tensor, weights: MoEWeights, **options: Any) -> Tensor:
    return mxfp4_moe.fused_moe_from_logits(x, logits, K, weights, **options)


def from_router(x: Tensor, logits: Tensor, weights: MoEWeights, **options: Any) -> Tensor:
    router = mxfp4_moe.Router(top_k=K, scoring_func="sigmoid")
    return mxfp4_moe.fused_moe_from_logits(x, logits, router, weights, **options)


def through_module(x: Tensor, logits: Tensor, weights: MoEWeights, **options: Any) -> Tensor:
    return MODULE.fused_moe(x, *mxfp4_moe.topk_softmax(logits, K), weights, **options)


@pytest.mark.parametrize("run", [from_logits, from_router, through_module])
@PAIRS
def test_every_call_and_the_output_that_it_is_given(run: Callable[..., Tensor], activation_format: str) -> None:
    weights, (x, _, _) = weights_of("multiply"), call_of(activation_format, 6)
    logits = torch.randn(6, E, generator=torch.Generator().manual_seed(3))
    options = {"activation_format": activation_format, "output_dtype": torch.float16, "intermediate_rounding": True}
    expected = run(x, logits, weights, **options)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert same(compiled(x, logits, weights, **options), expected)
    output = torch.full_like(expected, float("nan"))
    compiled(x, logits, weights, output=output, **options)
    assert same(output, expected)


@PAIRS
def test_a_part_of_a_layer(activation_format: str) -> None:
    call, whole = call_of(activation_format, 9), weights_of("multiply")
    for part in (whole.expert_parallel(1, 2), whole.tensor_parallel(0, 2)):
        layer = Layer(part, activation_format)
        assert same(torch.compile(layer, fullgraph=True, backend="aot_eager")(*call), layer(*call))
        torch._dynamo.reset()


@PAIRS
def test_a_backward_pass_says_so(activation_format: str) -> None:
    layer, (x, topk_weights, topk_ids) = Layer(weights_of("multiply"), activation_format), call_of(activation_format, 4)
    expected = layer(x, topk_weights, topk_ids)

    def behind_another(x: Tensor) -> Tensor:
        return layer(x * 1, topk_weights, topk_ids)

    for run in (behind_another, torch.compile(behind_another, fullgraph=True, backend="aot_eager")):
        result = run(x.clone().requires_grad_())
        assert same(result.detach(), expected)
        with pytest.raises(RuntimeError, match="^fused_moe: no gradient can be computed through it, since FP4 weights"):
            result.float().sum().backward()


# ---- exported, recorded, fake ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "activation_format", "strict"),
    [(*one, False) for one in itertools.product(LAYERS, FORMATS)] + [("divide", each, True) for each in FORMATS],
)
def test_an_exported_program_is_the_layer_also_from_a_file(name: str, activation_format: str, strict: bool) -> None:
    layer = Layer(weights_of(name), activation_format)
    count = {0: torch.export.Dim("tokens", min=0)}
    exported = torch.export.export(
        layer, call_of(activation_format, 5), dynamic_shapes=(count, count, count), strict=strict
    )
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for tokens in (1, 5, 40):
        call = call_of(activation_format, tokens, seed=1)
        assert same(loaded(*call), layer(*call)), tokens


def test_an_exported_program_checks_its_output() -> None:
    weights, (x, topk_weights, topk_ids) = weights_of("multiply"), call_of("nvfp4", 5)

    class WithOutput(nn.Module):
        def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, output: Tensor) -> Tensor:
            return mxfp4_moe.fused_moe(x, topk_weights, topk_ids, weights, output=output)

    output = torch.full_like(x, float("nan"))
    program = torch.export.export(WithOutput(), (x, topk_weights, topk_ids, output), strict=False).module()
    program(x, topk_weights, topk_ids, output)
    assert same(output, mxfp4_moe.fused_moe(x, topk_weights, topk_ids, weights))
    for other in (output.float(), output[:3]):
        before = other.clone()
        with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError), match=r"\boutput\b"):
            program(x, topk_weights, topk_ids, other)
        assert torch.equal(other, before)


@pytest.mark.parametrize(
    ("name", "activation_format", "mode"),
    [(*one, "fake") for one in itertools.product(LAYERS, FORMATS)]
    + [("divide", *one) for one in itertools.product(FORMATS, ("real", "symbolic"))],
)
def test_make_fx_records_the_operator(name: str, activation_format: str, mode: str) -> None:
    layer, call = Layer(weights_of(name), activation_format), call_of(activation_format, 6)
    graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(*call)
    (node,) = (node for node in graph.graph.nodes if "moe_layer" in str(node.target))
    arguments = dict(zip(operators.LayerCall._fields, node.args, strict=False)) | node.kwargs
    assert arguments["weight_format"] == "nvfp4"
    for argument, given in layer.weights.operator_arguments[1].items():
        if argument != "weight_format":
            unit = 128 if activation_format == "fp16" and argument in ("w13_factors", "w2_factors") else 1
            assert torch.equal(getattr(graph, arguments[argument].target), given * unit), argument
    assert same(graph(*call), layer(*call))


@pytest.mark.parametrize("of_weights", ["real", "fake", "meta"])
@pytest.mark.parametrize("active", [True, False])
@PAIRS
def test_fake_tensors_give_shapes(activation_format: str, active: bool, of_weights: str) -> None:
    mode, plain = FakeTensorMode(), random_nvfp4(hidden=H, inter=INTER)
    call = [mode.from_tensor(tensor) for tensor in call_of(activation_format, 7)]
    with mode:
        fakes = MoEWeights.from_nvfp4(**{name: mode.from_tensor(tensor) for name, tensor in plain.items()})
    if of_weights == "meta":
        meta = MoEWeights.from_nvfp4(**{name: tensor.to("meta") for name, tensor in plain.items()})
        assert meta.fp16_factors()[0].shape == fakes.fp16_factors()[0].shape == (E, 2)
        return
    weights = fakes if of_weights == "fake" else MoEWeights.from_nvfp4(**plain)
    if active:
        with mode:
            out = mxfp4_moe.fused_moe(*call, weights, activation_format=activation_format)
    else:
        out = mxfp4_moe.fused_moe(*call, weights, activation_format=activation_format)
    assert type(out).__name__ == "FakeTensor"
    assert (out.shape, out.dtype) == ((7, H), FORMATS[activation_format])


# ---- the operator ----------------------------------------------------------------------------------------------------


def arguments_of(layer: Layer, call: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> operators.LayerCall:
    """What a traced call hands to the operator, with its real tensors."""
    given: list[operators.LayerCall] = []
    record = lambda *arguments: given.append(operators.LayerCall(*arguments)) or arguments[0]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(operators, "moe_layer", record)
        patch.setattr("mxfp4_moe._call.fused_moe.in_graph", lambda _: True)
        layer(*call)
    return given[0]


@ALL
def test_opcheck(name: str, activation_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call = Layer(weights_of(name), activation_format), call_of(activation_format, 7)
    arguments = arguments_of(layer, call, monkeypatch)
    torch.library.opcheck(operators.moe_layer, arguments)
    assert same(operators.moe_layer(*arguments), layer(*call))
    meta = [each.to("meta") if isinstance(each, Tensor) else each for each in arguments]
    assert operators.moe_layer(*meta).shape == (7, H)


@PAIRS
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["multiply", "divide"])
def test_scales_are_made_again_bit_for_bit(
    kind: str, gated: bool, activation_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many experts: for some, what divides is not the reciprocal of what multiplies."""
    plain = random_nvfp4(kind, experts=200, hidden=H, inter=32, gated=gated)
    for name in [name for name in plain if name.endswith("input_global_scale")]:  # which are reciprocals so far
        plain[name] = 400 * (0.5 + torch.rand(plain[name].shape, generator=torch.Generator().manual_seed(0)))
    layer = Layer(MoEWeights.from_nvfp4(**plain, activation="swiglu" if gated else "relu2"), activation_format)
    given = layer.weights.tensor_scales
    again = arguments_of(layer, call_of(activation_format, 2), monkeypatch).tensor_scales()
    assert given is not None
    assert again is not None
    pairs = [(given.factors(), again.factors()), (given.input_factors(), again.input_factors())]
    pairs.append((given.input_global_scales(), again.input_global_scales()))
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    factors, global_scales = again.input_factors(), again.input_global_scales()
    assert factors is not None
    assert global_scales is not None
    assert torch.equal(factors[0].reciprocal(), global_scales[0]) == (kind == "multiply")
    assert torch.equal(factors[0], global_scales[0].reciprocal()) == (kind == "divide")


def test_the_operator_refuses_factors_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(Layer(weights_of("multiply"), "nvfp4"), call_of("nvfp4", 7), monkeypatch)
    for changed, words in (
        ({"w13_factors": None}, r"w13_factors: expected float32 \[3, 2\], got NoneType"),
        ({"w2_factors": torch.ones(E)}, r"w2_factors: expected float32 \[3, 2\], got float32 \[3\]"),
        ({"w2_input_factors": None}, r"w2_input_factors: expected float32 \[3\], got NoneType"),
        ({"w13_input_global_scales": torch.ones(E, 2)}, r"w13_input_global_scales: expected float32 \[3\], got"),
        ({"weight_format": "nvfp5"}, "'nvfp5' is not a valid WeightFormat"),
        ({"activation_format": "mxfp4"}, "activation_format: expected 'nvfp4' or 'bf16' or 'fp16' with nvfp4 weights"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            operators.moe_layer(*arguments._replace(**changed))


def test_a_program_of_before_nvfp4_weights_finds_its_operator() -> None:
    """What it has stored is the arguments up to the format of activations: none of the later ones has to be there."""
    schema = operators.moe_layer._schema
    names = [argument.name for argument in schema.arguments]
    before = names[: names.index("activation_format") + 1]
    assert all(argument.has_default_value() for argument in schema.arguments[len(before) :])
    # With the factors of "fp16", which were the last ones.
    assert names[len(before) : len(before) + 2] == ["w13_factors", "w2_factors"]
    weights, g = mxfp4_weights(), torch.Generator().manual_seed(0)
    x = torch.randn(5, weights.hidden_size, generator=g).half()
    topk_weights, topk_ids = torch.rand(5, 2, generator=g), torch.randint(0, 4, (5, 2), generator=g)
    stored = (
        *(x, topk_weights, topk_ids, weights.w13, weights.w13_bias, weights.w2, weights.w2_bias),
        *(weights.hidden_size, weights.intermediate_size, weights.word_order.value, "swiglu_oai"),
        *(weights.alpha, weights.beta, weights.limit, None, None, None, None, "linear", torch.float16, False, 4),
    )
    for name, factors in (("bf16", ()), ("fp16", weights.fp16_factors())):
        expected = mxfp4_moe.fused_moe(x, topk_weights, topk_ids, weights, activation_format=name)
        assert same(operators.moe_layer(*stored, name, *factors), expected)


# ---- what is refused, and in which words -----------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format of other weights": ({"activation_format": "mxfp8"}, ValueError, "activation_format: expected 'nvfp4' or"),
    "no format": ({"activation_format": "fp8"}, ValueError, "activation_format: expected 'mxfp8', 'bf16'"),
    "hidden states of fp16": ({"activation_format": "fp16"}, TypeError, "hidden_states: expected float16"),
    "MXFP8 hidden states": (
        {"hidden_states": torch.zeros(5, H, dtype=torch.uint8), "hidden_states_scale": torch.zeros(5, 2).byte()},
        ValueError,
        "activation_format: expected 'mxfp8' for hidden_states that are MXFP8 already, got 'nvfp4'",
    ),
    "width": ({"hidden_states": torch.zeros(5, 96).bfloat16()}, ValueError, "hidden_states: expected bfloat16"),
    "output": ({"output": torch.zeros(5, H)}, TypeError, r"output: expected bfloat16 \[5, 64\], got float32"),
    "tile": ({"tile_mn": (192, 128)}, ValueError, "tile_mn: expected a tile of the manifest"),
}


@pytest.mark.parametrize("name", BAD)
def test_compiled_and_exported_calls_are_refused_as_eager_ones(name: str) -> None:
    change, kind, words = BAD[name]
    x, topk_weights, topk_ids = call_of("nvfp4", 5)
    call = {"hidden_states": x, "topk_weights": topk_weights, "topk_ids": topk_ids} | change
    weights = weights_of("multiply")
    with pytest.raises(kind, match=f"^{words}") as eager:
        mxfp4_moe.fused_moe(**call, weights=weights)
    with pytest.raises(kind) as compiled:
        torch.compile(mxfp4_moe.fused_moe, backend="aot_eager")(**call, weights=weights)
    assert str(compiled.value) == str(eager.value)

    class Called(nn.Module):
        def forward(self, **tensors: Tensor) -> Tensor:
            return mxfp4_moe.fused_moe(**tensors, **constants, weights=weights)

    tensors = {key: value for key, value in call.items() if isinstance(value, Tensor)}
    constants: dict[str, Any] = {key: value for key, value in call.items() if key not in tensors}
    with pytest.raises(Exception, match=r".") as exported:
        torch.export.export(Called(), (), tensors, strict=False)
    assert str(eager.value) in str(exported.value)


# ---- "fp16", whose factors are of no values --------------------------------------------------------------------------


def test_fp16_needs_no_call_before() -> None:
    """The factors are made with the weights; nothing of w13 and w2 is in them."""
    weights = weights_of("multiply")
    factors = weights._fp16_in_graph()
    assert all(one is two for one, two in zip(weights.fp16_factors(), factors, strict=True))
    weights.w13.add_(1)
    assert all(one is two for one, two in zip(weights.fp16_factors(), factors, strict=True))
    moved = replace(weights, word_order=weights.word_order)
    assert moved._fp16_in_graph()[0] is not factors[0]
    assert torch.equal(moved._fp16_in_graph()[0], factors[0])


def test_fp16_is_captured_without_a_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("multiply")
    expected = weights.fp16_factors()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert weights.fp16_factors() is expected
    monkeypatch.setattr(MoEWeights, "device", torch.device("cuda", 1))
    weights._made_with_nvfp4()  # of weights that are made in a capture nothing is read
    assert weights.fp16_factors() is expected


@pytest.mark.parametrize("which", ["w13_scale_2", "w2_scale_2"])
def test_an_fp16_factor_that_float32_does_not_hold_is_refused_in_the_same_words(which: str) -> None:
    layer = random_nvfp4(hidden=H, inter=INTER)
    layer[which].view(-1)[1] = 2.0**121
    call = call_of("fp16", 5)
    for weights in (MoEWeights.from_nvfp4(**layer), MoEWeights.from_nvfp4(**layer).to("cpu")):
        with pytest.raises(ValueError, match=r"^weights: expected NVFP4 scales per tensor below 2\^121 ") as eager:
            mxfp4_moe.fused_moe(*call, weights, activation_format="fp16")
        with pytest.raises(ValueError, match=r"^weights: ") as compiled:
            torch.compile(mxfp4_moe.fused_moe, backend="aot_eager")(*call, weights, activation_format="fp16")
        assert str(compiled.value) == str(eager.value)
        with pytest.raises(ValueError, match=r"scales per tensor below 2\^121"):
            weights.to("cpu", activation_format="fp16")
        torch._dynamo.reset()
        expected = mxfp4_moe.fused_moe(*call, weights, activation_format="bf16")
        compiled_bf16 = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
        assert same(compiled_bf16(*call, weights, activation_format="bf16"), expected)


@PAIRS
def test_factors_below_2_to_the_minus_126_keep_their_bits_where_a_program_flushes_them(
    activation_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = random_nvfp4(hidden=H, inter=INTER, inputs=False)
    for name in ("w13_scale_2", "w2_scale_2"):
        plain[name] *= 2.0**-124
    layer, call = Layer(MoEWeights.from_nvfp4(**plain), activation_format), call_of(activation_format, 5)
    arguments = arguments_of(layer, call, monkeypatch)
    assert torch.set_flush_denormal(True), "this processor cannot"
    try:
        again = MoEWeights.from_nvfp4(**plain)
        scales, factors = arguments.tensor_scales(), again.fp16_factors()
    finally:
        torch.set_flush_denormal(False)
    assert scales is not None
    assert layer.weights.tensor_scales is not None
    for one, other in zip(scales.factors(), layer.weights.tensor_scales.factors(), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        assert ((one > 0) & (one < 2.0**-126)).any()
    for one, other in zip(factors, layer.weights.fp16_factors(), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
