"""The whole layer on a GPU: against the reference, bit by bit across tiles, in graphs, streams, threads, compiled."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gpu_problems
import pytest
import torch
from gpu_cases import HALVES, TILES, TOP_K, run, small
from gpu_layers import exact_layer, poison_memory, same
from gpu_problems import Call, bits, random_call, random_weights, relative_error
from moe_cases import layer_of, with_large_rows
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call import operators as mxfp4_moe_ops
from mxfp4_moe.activations import Activation
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

UNWRITTEN = 0xEE
# Both sides quantize the same values twice and round the same rows to bfloat16; what is left is exp's last bits.
LAYER_TOLERANCE = 5e-3
NUMBERS = (("alpha", 0.5, 2.0), ("beta", 0.5, 4.0), ("limit", 1.0, 25.0))


@functools.cache
def gpt_oss() -> MoEWeights:
    return random_weights(128, 2880, 2880, gpu_problems.gpu())


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 64, 257, 1024])
def test_gpt_oss_layer_is_close_to_the_reference(tokens: int) -> None:
    call = random_call(tokens, TOP_K, gpt_oss())
    out = run(call, gpt_oss())
    assert torch.equal(bits(out), bits(run(call, gpt_oss()))), "a second run gave other bits"
    assert relative_error(out, reference.fused_moe(*call.args(), gpt_oss())) <= LAYER_TOLERANCE


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 257])
def test_every_tile_gives_the_same_bits(tokens: int, rounding: bool) -> None:
    call = random_call(tokens, TOP_K, gpt_oss())
    expected = bits(run(call, gpt_oss(), intermediate_rounding=rounding))
    for tile in TILES:
        out = run(call, gpt_oss(), tile_mn=tile.mn, intermediate_rounding=rounding)
        assert torch.equal(expected, bits(out)), tile.name


@pytest.mark.parametrize("tokens", [1, 8, 65, 300])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu_step", "situ"])
def test_every_tile_activates_as_the_kernel_does(
    activation: str, rounding: bool, tokens: int, device: torch.device
) -> None:
    """In GEMM1's epilogue or behind stored sums; each expert has its own numbers."""
    each = {name: torch.linspace(low, high, 8, device=device) for name, low, high in NUMBERS}
    weights = random_weights(8, 160, 96, device, activation=activation, **each)
    call = random_call(tokens, 3, weights)
    expected = exact_layer(call, weights, intermediate_rounding=rounding)
    for tile in TILES:
        assert same(run(call, weights, tile_mn=tile.mn, intermediate_rounding=rounding), expected), tile.name


@pytest.mark.parametrize("tokens", [1, 8, 65, 300])
def test_float16_rows_beyond_its_range(tokens: int, device: torch.device) -> None:
    """Every tile weighs them first: in fp32, as the reference does."""
    weights = with_large_rows(random_weights(8, 160, 96, device))
    call = random_call(tokens, 3, weights, dtype=torch.float16)
    call = replace(call, topk_weights=call.topk_weights / 64)
    rows = reference.fused_moe(call.hidden_states, torch.ones_like(call.topk_weights), call.topk_ids, weights)
    assert rows.isinf().any(), "the case is none"
    expected = exact_layer(call, weights)
    assert expected.isfinite().all()
    for tile in TILES:
        assert same(run(call, weights, tile_mn=tile.mn), expected), tile.name


@pytest.mark.parametrize("whole", [False, True], ids=["one token", "all tokens"])
@pytest.mark.parametrize(("activation", "exponent"), [("relu", -76), ("swiglu", 45), ("swiglu_oai", 45), ("relu", 90)])
def test_activations_far_from_one(activation: str, exponent: int, whole: bool, device: torch.device) -> None:
    """Scales far below and above 1, in GEMM1 or in both."""
    weights = random_weights(8, 160, 96, device, activation=activation, bias=False)
    call = random_call(65, 3, weights)
    hidden = call.hidden_states.clone()
    hidden[slice(None) if whole else 3] *= 2.0**exponent
    far = replace(call, hidden_states=hidden)
    expected = exact_layer(far, weights)
    assert expected.isfinite().all()
    assert expected[3].count_nonzero() > 100
    for tile in TILES:
        assert same(run(far, weights, tile_mn=tile.mn), expected), tile.name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_intermediate_rounding(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    weights = random_weights(8, 160, 96, device, activation=activation)
    call = random_call(65, 3, weights, dtype=dtype)
    out = run(call, weights, intermediate_rounding=True)
    assert same(out, exact_layer(call, weights, intermediate_rounding=True))
    expected = reference.fused_moe(*call.args(), weights, intermediate_rounding=True)
    assert relative_error(out, expected) <= LAYER_TOLERANCE
    assert not torch.equal(bits(out), bits(run(call, weights)))
    compiled = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(bits(compiled(*call.args(), weights, intermediate_rounding=True)), bits(out))
    torch._dynamo.reset()


@pytest.mark.parametrize("output_dtype", HALVES)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inter", "tokens", "bias", "given"),
    [
        (1, 1, 32, 32, 1, True, "bfloat16"),
        (3, 2, 96, 160, 7, True, "float16"),
        (8, 3, 160, 96, 65, False, "swizzled"),
        (9, 16, 64, 64, 130, True, "linear"),
        (8, 4, 2880, 2880, 10, True, "bfloat16"),
    ],
)
def test_layers_of_other_shapes(
    experts: int,
    top_k: int,
    hidden: int,
    inter: int,
    tokens: int,
    bias: bool,
    given: str,
    activation: str,
    output_dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Bit by bit with the kernel's activation; and close to the reference with torch's exp."""
    weights = random_weights(experts, hidden, inter, device, bias=bias, activation=activation)
    if top_k > experts:
        top_k, repeats = experts, -(-top_k // experts)
    else:
        repeats = 1
    dtype = torch.float16 if given == "float16" else torch.bfloat16
    call = random_call(tokens, top_k, weights, dtype=dtype, ids=torch.int64)
    # Experts that occur more than once in a token.
    call = Call(
        hidden_states=call.hidden_states,
        topk_weights=call.topk_weights.repeat(1, repeats),
        topk_ids=call.topk_ids.repeat(1, repeats),
    )
    options: dict[str, Any] = {"output_dtype": output_dtype}
    if given in reference.SCALE_LAYOUTS:
        codes, scales = formats.quantize_mxfp8(call.hidden_states)
        call = replace(call, hidden_states=codes.view(torch.float8_e4m3fn))
        scales = formats.swizzle_scales(scales).flatten() if given == "swizzled" else scales
        options |= {"hidden_states_scale": scales, "scale_layout": given}
    out = run(call, weights, **options)
    assert out.dtype == output_dtype
    assert same(out, exact_layer(call, weights, **options))
    # A code that falls to the other side of a tie moves one of few values by up to an eighth where I is small.
    tolerance = LAYER_TOLERANCE if tokens * inter > 1000 else 0.1
    assert relative_error(out, reference.fused_moe(*call.args(), weights, **options)) <= tolerance


def test_numbers_of_each_expert(device: torch.device) -> None:
    weights = layer_of(5, 160, "swiglu_oai", "per expert", bias=True, device=device)
    call = random_call(33, 3, weights)
    out = run(call, weights)
    assert same(out, exact_layer(call, weights))
    assert relative_error(out, reference.fused_moe(*call.args(), weights)) <= LAYER_TOLERANCE


@pytest.mark.parametrize(("hidden", "inter"), [(2880, 32), (32, 1440)])
def test_products_of_sizes_past_31_bits(hidden: int, inter: int, device: torch.device) -> None:
    """Rows times hidden, and rows times GEMM1's width, are past 2^31; the last tokens come out as they do alone."""
    weights = random_weights(8, hidden, inter, device)
    call = random_call(190_000, 4, weights)
    assert 190_000 * 4 * max(hidden, 2 * inter) > 2**31
    out = run(call, weights)
    for t in (0, 1, 95_000, 186_413, 189_998, 189_999):
        assert torch.equal(bits(out[t : t + 1]), bits(run(call.token(t), weights))), f"token {t}"


def test_token_alone_equals_token_in_a_batch() -> None:
    call = random_call(64, TOP_K, gpt_oss())
    out = run(call, gpt_oss())
    for t in range(0, 64, 7):
        assert torch.equal(bits(out[t : t + 1]), bits(run(call.token(t), gpt_oss()))), f"token {t}"


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_batch_invariance(tile: Tile) -> None:
    """A token has the same bits alone, in any batch up to 1024, at any position, under every tile."""
    call = random_call(1024, TOP_K, gpt_oss())
    expected = bits(run(call, gpt_oss(), tile_mn=(128, 128)))
    assert torch.equal(bits(run(call, gpt_oss(), tile_mn=tile.mn)), expected)
    shuffle = torch.Generator().manual_seed(tile.m * 1000 + tile.n)
    for size in (1, 2, 7, 33, 64, 200, 511, 1023):
        chosen = torch.randperm(1024, generator=shuffle)[:size].to(call.topk_ids.device)
        batch = Call(
            hidden_states=call.hidden_states[chosen],
            topk_weights=call.topk_weights[chosen],
            topk_ids=call.topk_ids[chosen],
        )
        out = bits(run(batch, gpt_oss(), tile_mn=tile.mn))
        assert torch.equal(out, expected[chosen]), f"batch of {size}"


@pytest.mark.parametrize("tile_mn", [(8, 64), (8, 128), (32, 128), (64, 128), (64, 256), (256, 8), (256, 16)])
def test_calls_that_follow_each_other_closely(tile_mn: tuple[int, int]) -> None:
    """Kernels of one call overlap with each other and with the next call's; what one writes, the next must see.

    Twice it did not: reads through the read-only path served what an earlier kernel had left there, and finalize,
    started early, read before GEMM2's last tiles were stored.
    """
    calls = [random_call(tokens, TOP_K, gpt_oss()) for tokens in (1023, 300, 64, 1024, 5)]
    expected = [run(call, gpt_oss(), tile_mn=(128, 128)) for call in calls]
    for _ in range(gpu_problems.fewer(20)):
        outs = [run(call, gpt_oss(), tile_mn=tile_mn) for call in calls]
        for out, bits_wanted in zip(outs, expected, strict=True):
            assert torch.equal(bits(out), bits(bits_wanted))


def test_ids_that_are_no_expert_contribute_nothing() -> None:
    call = random_call(64, TOP_K, gpt_oss())
    call.topk_ids[::3, 1] = -1
    call.topk_ids[1::3, 2] = 128
    call.topk_ids[5] = 2**31 - 1
    out = run(call, gpt_oss())
    assert relative_error(out, reference.fused_moe(*call.args(), gpt_oss())) <= LAYER_TOLERANCE
    assert not bits(out[5]).any()
    call.topk_ids[:] = -1
    assert not bits(run(call, gpt_oss())).any()


def test_output_is_written_and_returned() -> None:
    call = random_call(16, TOP_K, small())
    expected = run(call, small())
    output = torch.full_like(expected, float("nan"))
    assert run(call, small(), output=output) is output
    assert torch.equal(bits(output), bits(expected))
    assert run(call, small(), output=call.hidden_states) is call.hidden_states
    assert torch.equal(bits(call.hidden_states), bits(expected))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_token(poison: float) -> None:
    call = random_call(64, TOP_K, gpt_oss())
    call.topk_ids[:16] = call.topk_ids[3]  # neighbours of the poisoned rows, in the same tiles
    clean = run(call, gpt_oss())
    call.hidden_states[3, 1000] = poison
    others = torch.arange(64, device=clean.device) != 3
    for tile in TILES:
        out = run(call, gpt_oss(), tile_mn=tile.mn)
        assert out[3].isnan().all(), tile.name
        assert torch.equal(bits(out[others]), bits(clean[others])), tile.name


def test_current_stream_is_respected(device: torch.device) -> None:
    """The inputs arrive late on the stream; work on another stream would read the zeros before them."""
    call = random_call(64, TOP_K, gpt_oss())
    expected = run(call, gpt_oss())
    late = Call(
        hidden_states=torch.zeros_like(call.hidden_states),
        topk_weights=torch.zeros_like(call.topk_weights),
        topk_ids=torch.zeros_like(call.topk_ids),
    )
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # cycles, about 0.1 s
        for target, source in zip(late.args(), call.args(), strict=True):
            target.copy_(source)
        out = run(late, gpt_oss())
        result = out.clone()
    stream.synchronize()
    assert torch.equal(bits(result), bits(expected))


def test_graph_replays_with_other_inputs_and_routing(device: torch.device) -> None:
    calls = [random_call(48, TOP_K, gpt_oss(), seed=seed) for seed in range(3)]
    calls[2].topk_ids[:] = calls[2].topk_ids[:1]  # all tokens to the same experts
    calls[2].topk_ids[7] = -1
    expected = [run(call, gpt_oss()) for call in calls]
    static = Call(**{name: torch.empty_like(x) for name, x in vars(calls[0]).items()})
    output = torch.empty_like(static.hidden_states)
    for target, source in zip(static.args(), calls[0].args(), strict=True):
        target.copy_(source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, gpt_oss(), output=output)
    for call, wanted in zip((*calls, *calls), (*expected, *expected), strict=True):
        for target, source in zip(static.args(), call.args(), strict=True):
            target.copy_(source)
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(bits(output), bits(wanted))


def test_memory_goes_back_to_torch(device: torch.device) -> None:
    call = random_call(64, TOP_K, gpt_oss())
    run(call, gpt_oss())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    for _ in range(3):
        run(call, gpt_oss())
    assert torch.cuda.memory_allocated(device) == before


def test_threads_and_streams_do_not_disturb_each_other(device: torch.device) -> None:
    layers = [small(), random_weights(5, 96, 64, device, activation="relu2"), gpt_oss()]
    calls = [(random_call(tokens, 3, w, seed=tokens), w) for tokens in (1, 17, 64) for w in layers]
    expected = [run(call, w).clone() for call, w in calls]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(number: int) -> None:
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            for turn in range(20):
                i = (turn * 5 + number) % len(calls)
                call, weights = calls[i]
                poison_memory(device, 0xFF)
                out = run(call, weights, tile_mn=TILES[(turn + number) % len(TILES)].mn if turn % 2 else None)
                if not bool((bits(out) == bits(expected[i])).all()):
                    wrong.append(f"thread {number}, turn {turn}, call {i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


@torch.no_grad()
def test_compiles_whole_and_not_for_every_token_count(device: torch.device) -> None:
    torch._dynamo.reset()
    counter, weights = CompileCounterWithBackend("aot_eager"), small()

    def layer(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        topk_weights, topk_ids = mxfp4_moe.topk_softmax(router_logits, 3)
        return mxfp4_moe.fused_moe(hidden_states, topk_weights, topk_ids, weights)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 6, 33, 64, 300, 17):
        x = random_call(tokens, 3, weights).hidden_states
        logits = torch.randn(tokens, 8, device=device)
        assert torch.equal(bits(compiled(x, logits)), bits(layer(x, logits))), tokens
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("given", ["bfloat16", "linear", "swizzled"])
def test_opcheck(given: str, device: torch.device) -> None:
    weights = layer_of(5, 160, "swiglu_oai", "per expert", bias=True, device=device)
    x, topk_weights, topk_ids = random_call(9, 3, weights).args()
    scale = None
    if given != "bfloat16":
        x, scale = formats.quantize_mxfp8(x)
        scale = formats.swizzle_scales(scale).flatten() if given == "swizzled" else scale
    torch.library.opcheck(
        mxfp4_moe_ops.moe_layer,
        (
            *(x, topk_weights, topk_ids, weights.w13, weights.w13_bias, weights.w2, weights.w2_bias),
            *(weights.hidden_size, weights.intermediate_size, weights.word_order.value, "swiglu_oai", 0.0, 0.0, None),
            *(weights.alpha, weights.beta, weights.limit, scale, "swizzled" if given == "swizzled" else "linear"),
            torch.float16,
        ),
    )
    torch.library.opcheck(mxfp4_moe_ops.topk_softmax, (torch.randn(9, 5, device=device), 3, True))


def test_inference_mode_and_any_device_index() -> None:
    """The current device stays what it is, whatever device the tensors are on."""
    call = random_call(9, 3, small())
    expected = run(call, small()).cpu()
    current = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        with torch.inference_mode():
            there = Call(**{name: x.to(f"cuda:{index}") for name, x in vars(call).items()})
            out = run(there, small().to(f"cuda:{index}"))
        assert out.device.index == index
        assert torch.equal(bits(out.cpu()), bits(expected))
        assert torch.cuda.current_device() == current
