"""activation_format="bf16" on a GPU, and bfloat16 rows at the ends of their range: bit for bit, under every tile.

Where kernels read MXFP8 (SM12x, and a build that emulates it) these tests ask for the refusal alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import gpu_problems
import pytest
import torch
from gpu_cases import HALVES, TILES, TOP_K, ops, run
from gpu_layers import exact_layer, kernel_activation, kernel_activation_in_bf16, poison_memory, same
from gpu_problems import Call, GemmProblem, bits, random_call, random_weights, relative_error
from moe_cases import BF16, MXFP8_IN_BF16, ids_of, layer_of, rows_of, same_halves, special_rows
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._call import operators
from mxfp4_moe.activations import Activation
from mxfp4_moe.arithmetic import SM90_BF16
from mxfp4_moe.problems import arithmetic_here
from mxfp4_moe.tiles import Tile
from mxfp4_moe.weights import MoEWeights

DTYPES = (torch.float32, *HALVES)
FUSES = Tile.from_mn((32, 128))  # whose GEMM1 applies the activation
APART = Tile.from_mn((64, 32))  # whose GEMM1 does not

each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)


def reads_bf16() -> bool:
    return "bf16" in mxfp4_moe.activation_formats(gpu_problems.gpu())


@pytest.fixture(autouse=True)
def or_the_refusal(request: pytest.FixtureRequest) -> None:
    """Where there is no bf16, each test is the check that it is refused, before anything is launched."""
    device = gpu_problems.gpu()
    if reads_bf16() and formats.word_order_of(device, "bf16") is not formats.word_order_of(device):
        pytest.skip("bf16 has kernels of its own here: test_sm12x_bf16.py")
    assert reads_bf16() == (arithmetic_here(device) is SM90_BF16)
    if not reads_bf16():
        weights = random_weights(4, 64, 64, gpu_problems.gpu())
        with pytest.raises(
            ValueError, match=r"^activation_format: expected 'mxfp8', which is what the kernels for cuda"
        ):
            run(random_call(3, 2, weights), weights, activation_format="bf16")
        pytest.skip("refused, as it must be: this GPU's kernels read MXFP8")


# ---- GEMMs -----------------------------------------------------------------------------------------------------------


def any_bf16(rows: int, k: int, kind: str) -> Tensor:
    """bfloat16 rows by the ends of the range at which they lie; every bit pattern in "any"."""
    g = torch.Generator(gpu_problems.gpu()).manual_seed(k + len(kind))
    words = torch.randint(0, 1 << 16, (rows, k), generator=g, device=gpu_problems.gpu(), dtype=torch.int32)
    sign, magnitude = words & 0x8000, words & 0x7FFF
    if kind == "usual":
        return torch.randn(rows, k, generator=g, device=gpu_problems.gpu()).bfloat16()
    if kind == "finite":
        magnitude %= 0x7F80
    elif kind == "denormal":
        magnitude %= 0x180  # up to 2^-124
    elif kind == "huge":
        magnitude = 0x7F7F - magnitude % 0x180  # from 2^124 to the largest
    elif kind == "sparse":
        magnitude = torch.where(magnitude % 5 == 0, magnitude % 0x7F80, 0)
    return (sign | magnitude).to(torch.int16).view(torch.bfloat16)


KINDS = ("usual", "finite", "denormal", "huge", "sparse", "any")


@functools.lru_cache(maxsize=1)
def problem(kind: str, scales: tuple[int, int], k: int = 416, n: int = 272) -> GemmProblem:
    """Weight scales of the whole range, or those at its ends; bytes from 128 on take a way of their own."""
    device = gpu_problems.gpu()
    offsets = gpu_problems.offsets_of(gpu_problems.ROWS_PER_EXPERT, device)
    experts, rows = len(gpu_problems.ROWS_PER_EXPERT), int(offsets[-1]) + 5
    g = torch.Generator(device).manual_seed(sum(scales))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g, device=device, dtype=torch.uint8)

    packed, weight_scales = integers(0, 255, experts, n, k // 2), integers(*scales, experts, n, k // 32)
    return GemmProblem.with_oracle(any_bf16(rows, k, kind), None, packed, weight_scales, offsets)


@pytest.mark.parametrize("scales", [(117, 124), (0, 253), (0, 2), (120, 135), (246, 253)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_bf16_rows_and_all_weight_scales(kind: str, scales: tuple[int, int]) -> None:
    given = problem(kind, scales)
    valid = slice(given.valid)
    for tile in TILES:
        for dtype in DTYPES:
            out = given.run(tile, dtype)
            assert not given.stray(out), f"{tile.name}, {dtype}"
            # A NaN's bits are lost in the epilogue's conversion; where it stands is not.
            assert same(out[valid], given.expected[valid].to(dtype)), f"{tile.name}, {dtype}"


def test_those_problems_reach_the_ends() -> None:
    """Otherwise the test above would say less than it seems to."""
    denormal, huge = problem("denormal", (0, 2)).expected, problem("huge", (0, 253)).expected
    assert (denormal.abs() < 2.0**-126).all()
    assert problem("denormal", (117, 124)).expected.count_nonzero() > 1000
    assert huge.isinf().any()
    assert huge.isfinite().any()
    assert problem("any", (117, 124)).expected.isnan().any()


@each_tile
@pytest.mark.parametrize("byte", [0, 1, 2, 6, 246, 247, 248])
def test_mxfp8_rows_that_leave_bf16s_range(byte: int, tile: Tile) -> None:
    """Code times scale: below 2^-133 multiples of it, above 2^128 infinite. As `formats.mxfp8_to_bf16`, so the GEMM."""
    device, rows, n, k = gpu_problems.gpu(), 40, 48, 160
    g = torch.Generator(device).manual_seed(byte)
    codes = torch.randint(0, 127, (rows + 5, k), generator=g, device=device).to(torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, generator=g, device=device).to(torch.uint8) << 7
    given = GemmProblem.with_oracle(
        codes,
        torch.full((rows + 5, k // 32), byte, dtype=torch.uint8, device=device),
        torch.randint(0, 256, (1, n, k // 2), generator=g, device=device, dtype=torch.uint8),
        torch.full((1, n, k // 32), 127, dtype=torch.uint8, device=device),
        gpu_problems.offsets_of([rows], device),
    )
    made = given.act[0]
    assert made.isinf().any() == (byte >= 247)
    assert same(given.run(tile)[:rows], given.expected[:rows])


# ---- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_format", [MXFP8_IN_BF16, BF16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [32, 96, 160, 2880])
def test_quantize_permute_to_bf16_is_exact(width: int, dtype: torch.dtype, row_format: int) -> None:
    device = gpu_problems.gpu()
    for tokens, top_k in ((9, 5), (9, 1), (700, 3)):
        x = special_rows(width, dtype).repeat(-(-tokens // 9), 1)[:tokens].contiguous()
        ids = ids_of(tokens, top_k, 6, torch.int32, device)
        offsets, row_slot, slot_row = reference.route(ids, 6)
        valid = int(offsets[-1])
        rows, scales = ops().quantize_permute(x.to(device), slot_row, top_k, row_format)
        expected, _ = rows_of(x, row_format)
        assert scales.numel() == 0
        assert same_halves(rows[:valid].cpu(), expected[row_slot[:valid].cpu() // top_k])


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("width", [32, 160, 2880])
def test_permute_to_bf16_is_exact(width: int, swizzled: bool) -> None:
    device, tokens, top_k = gpu_problems.gpu(), 300, 3
    g = torch.Generator(device).manual_seed(width)
    codes = torch.randint(0, 256, (tokens, width), generator=g, device=device, dtype=torch.uint8)
    scales = torch.randint(0, 256, (tokens, width // 32), generator=g, device=device, dtype=torch.uint8)
    given = formats.swizzle_scales(scales).flatten() if swizzled else scales
    offsets, row_slot, slot_row = reference.route(ids_of(tokens, top_k, 6, torch.int32, device), 6)
    valid = int(offsets[-1])
    rows, none = ops().permute(codes, given, swizzled, slot_row, top_k, MXFP8_IN_BF16)
    expected = formats.mxfp8_to_bf16(*reference.mxfp8_rows(codes, given, "swizzled" if swizzled else "linear"))
    assert none.numel() == 0
    assert expected.isinf().any()
    assert same_halves(rows[:valid], expected[row_slot[:valid] // top_k])
    with pytest.raises(RuntimeError, match="rows: expected 0 or 1, these are quantized, got 2"):
        ops().permute(codes, given, swizzled, slot_row, top_k, BF16)


@pytest.mark.parametrize("rounding", [None, *HALVES], ids=str)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_activation_to_bf16_is_its_mxfp8_and_its_values(activation: str, rounding: torch.dtype | None) -> None:
    """Of the same sums: the MXFP8 rows times their scales; and, where no exp stands, the values rounded."""
    device, rows, inter = gpu_problems.gpu(), 70, 160
    weights = layer_of(5, inter, activation, "one for all", bias=True, device=device)
    g = torch.Generator(device).manual_seed(2)
    gemm1 = torch.randn(rows, weights.w13_rows, generator=g, device=device) * 4
    gemm1[3] *= 2.0**-100
    gemm1[4, 8], gemm1[5, 0] = torch.nan, torch.inf
    row_expert = torch.arange(rows, device=device, dtype=torch.int32) % 5
    quantized, _ = kernel_activation_in_bf16(gemm1, row_expert, weights, rounding, MXFP8_IN_BF16)
    assert same_halves(quantized, formats.mxfp8_to_bf16(*kernel_activation(gemm1, row_expert, weights, rounding)))
    out, _ = kernel_activation_in_bf16(gemm1, row_expert, weights, rounding, BF16)
    numbers = (weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, weights.w13_bias, activation, *numbers, rounding=rounding)
    if activation in ("relu", "relu2", "identity"):
        assert same_halves(out, values.bfloat16())
    else:
        finite = values.isfinite()
        torch.testing.assert_close(out.float()[finite], values[finite], rtol=2.0**-7, atol=1e-30)
        assert torch.equal(out.isnan(), values.isnan())
    assert not torch.equal(out, quantized)


# ---- layers ----------------------------------------------------------------------------------------------------------


@functools.cache
def layer(activation: str, bias: bool, hidden: int = 672, inter: int = 416) -> MoEWeights:
    return random_weights(8, hidden, inter, gpu_problems.gpu(), bias=bias, activation=activation)


@functools.cache
def wanted(activation: str, bias: bool, name: str, tokens: int, dtype: torch.dtype) -> tuple[Call, Tensor]:
    """A call and what it must give; where hidden states are float16 with intermediate rounding."""
    weights = layer(activation, bias)
    call = random_call(tokens, TOP_K, weights, seed=tokens, dtype=dtype)
    rounds = dtype is torch.float16
    return call, exact_layer(call, weights, intermediate_rounding=rounds, activation_format=name)


@each_tile
@pytest.mark.parametrize("name", ["mxfp8", "bf16"])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu_oai", True), ("relu2", True)])
def test_layers_bit_for_bit(activation: str, bias: bool, name: str, tile: Tile) -> None:
    weights = layer(activation, bias)
    for tokens in (1, 8, 33, 130):
        for dtype in HALVES:
            call, expected = wanted(activation, bias, name, tokens, dtype)
            rounds = dtype is torch.float16
            poison_memory(weights.device, 0xFF)
            out = run(call, weights, tile_mn=tile.mn, intermediate_rounding=rounds, activation_format=name)
            assert same(out, expected), f"{tokens} tokens, {dtype}"


@pytest.mark.parametrize("output_dtype", HALVES)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_every_activation(activation: str, output_dtype: torch.dtype) -> None:
    weights = layer(activation, True, 160, 96)
    call = random_call(65, 3, weights, dtype=torch.float16)
    options: dict[str, Any] = {"output_dtype": output_dtype, "activation_format": "bf16"}
    for tile in (FUSES, APART):
        out = run(call, weights, tile_mn=tile.mn, **options)
        assert same(out, exact_layer(call, weights, **options)), tile.name
    assert relative_error(out, reference.fused_moe(*call.args(), weights, **options)) <= 5e-3


@pytest.mark.parametrize("numbers", ["no limit", "per expert"])
def test_numbers_of_the_activation(numbers: str) -> None:
    weights = layer_of(5, 160, "swiglu_oai", numbers, bias=True, device=gpu_problems.gpu())
    call = random_call(33, 3, weights)
    for tile in (FUSES, APART):
        out = run(call, weights, tile_mn=tile.mn, activation_format="bf16")
        assert same(out, exact_layer(call, weights, activation_format="bf16")), tile.name


@pytest.mark.parametrize("activation_format", ["mxfp8", "bf16"])
@pytest.mark.parametrize(
    ("activation", "exponent"),
    [("relu", -133), ("relu", -126), ("relu", -76), ("swiglu", 45), ("swiglu_oai", 110), ("relu", 90), ("relu", 118)],
)
def test_hidden_states_at_the_ends_of_the_range(activation: str, exponent: int, activation_format: str) -> None:
    """Denormal rows, denormal sums, values near the largest: in GEMM1, in the activation, and in GEMM2."""
    weights = random_weights(8, 160, 96, gpu_problems.gpu(), activation=activation, bias=False)
    call = random_call(65, 3, weights)
    far = replace(call, hidden_states=(call.hidden_states.double() * 2.0**exponent).bfloat16())
    expected = exact_layer(far, weights, activation_format=activation_format)
    assert expected.isfinite().all()
    for tile in TILES:
        out = run(far, weights, tile_mn=tile.mn, activation_format=activation_format)
        assert same(out, expected), tile.name


@functools.cache
def gpt_oss() -> MoEWeights:
    return random_weights(128, 2880, 2880, gpu_problems.gpu())


@each_tile
def test_batch_invariance(tile: Tile) -> None:
    call = random_call(1024, TOP_K, gpt_oss())
    expected = bits(run(call, gpt_oss(), tile_mn=(128, 128), activation_format="bf16"))
    assert torch.equal(bits(run(call, gpt_oss(), tile_mn=tile.mn, activation_format="bf16")), expected)
    shuffle = torch.Generator().manual_seed(tile.m * 1000 + tile.n)
    for size in (1, 7, 64, 511):
        chosen = torch.randperm(1024, generator=shuffle)[:size].to(call.topk_ids.device)
        batch = Call(
            hidden_states=call.hidden_states[chosen],
            topk_weights=call.topk_weights[chosen],
            topk_ids=call.topk_ids[chosen],
        )
        out = bits(run(batch, gpt_oss(), tile_mn=tile.mn, activation_format="bf16"))
        assert torch.equal(out, expected[chosen]), f"batch of {size}"


@pytest.mark.parametrize("tokens", [5, 257])
def test_gpt_oss_layer_bit_for_bit(tokens: int) -> None:
    call = random_call(tokens, TOP_K, gpt_oss())
    for activation_format in ("mxfp8", "bf16"):
        out = run(call, gpt_oss(), activation_format=activation_format)
        assert same(out, exact_layer(call, gpt_oss(), activation_format=activation_format)), activation_format


def test_every_way_to_the_layer() -> None:
    """From logits, compiled, in a graph, into a given output."""
    weights = layer("swiglu_oai", True)
    x = random_call(40, TOP_K, weights).hidden_states
    logits = torch.randn(40, 8, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    routing = mxfp4_moe.topk_softmax(logits, TOP_K)
    expected = mxfp4_moe.fused_moe(x, *routing, weights, activation_format="bf16")
    assert not torch.equal(bits(expected), bits(mxfp4_moe.fused_moe(x, *routing, weights)))
    from_logits = mxfp4_moe.fused_moe_from_logits(x, logits, TOP_K, weights, activation_format="bf16")
    assert torch.equal(bits(from_logits), bits(expected))
    compiled = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(bits(compiled(x, *routing, weights, activation_format="bf16")), bits(expected))
    torch._dynamo.reset()
    module = mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=(64, 128))
    assert torch.equal(bits(module.fused_moe(x, *routing, weights, activation_format="bf16")), bits(expected))
    output, graph = torch.empty_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mxfp4_moe.fused_moe(x, *routing, weights, activation_format="bf16", output=output)
    output.fill_(float("nan"))
    graph.replay()
    assert torch.equal(bits(output), bits(expected))


def test_opcheck() -> None:
    weights = layer("swiglu_oai", True, 160, 96)
    x, topk_weights, topk_ids = random_call(9, 3, weights).args()
    torch.library.opcheck(
        operators.moe_layer,
        (
            *(x, topk_weights, topk_ids, weights.w13, weights.w13_bias, weights.w2, weights.w2_bias),
            *(weights.hidden_size, weights.intermediate_size, weights.word_order.value, "swiglu_oai"),
            *(weights.alpha, weights.beta, weights.limit, None, None, None, None, "linear", torch.float16),
            *(False, 0, "bf16"),
        ),
    )


def test_it_is_many_times_closer_to_the_exact_layer() -> None:
    """The exact layer in float64, of the same weights and hidden states."""
    weights = random_weights(4, 1024, 512, gpu_problems.gpu(), bias=False)
    call = random_call(64, 2, weights)
    packed = weights.to_mxfp4()
    w13, w2 = (
        formats.dequantize_mxfp4(packed.w13, packed.w13_scale).double(),
        formats.dequantize_mxfp4(packed.w2, packed.w2_scale).double(),
    )
    exact = torch.zeros(64, 1024, dtype=torch.float64, device=weights.device)
    for j in range(2):
        sums = torch.einsum("th,tnh->tn", call.hidden_states.double(), w13[call.topk_ids[:, j].long()])
        gate, up = sums[:, 0::2].clamp(max=7.0), sums[:, 1::2].clamp(-7.0, 7.0)
        middle = gate / (1 + (-1.702 * gate).exp()) * (up + 1.0)
        rows = torch.einsum("ti,thi->th", middle, w2[call.topk_ids[:, j].long()])
        exact += call.topk_weights[:, j, None].double() * rows
    errors = {name: relative_error(run(call, weights, activation_format=name), exact) for name in ("bf16", "mxfp8")}
    assert errors["bf16"] < 4e-3
    assert errors["mxfp8"] > 8 * errors["bf16"]


def test_operators_refuse_what_does_not_fit() -> None:
    weights = layer("swiglu_oai", True, 160, 96)
    given = gpu_problems.random_problem(96, 80, weights.device)
    call = random_call(5, 2, weights)
    codes, scales = formats.quantize_mxfp8(call.hidden_states)
    with pytest.raises(ValueError, match="activation_format: expected 'mxfp8' for hidden_states that are MXFP8"):
        run(replace(call, hidden_states=codes), weights, hidden_states_scale=scales, activation_format="bf16")
    grouped_gemm = mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=(8, 128)).grouped_gemm
    tiles = torch.zeros(1, 4, dtype=torch.int32, device=weights.device)
    out = torch.empty(len(given.rows), 80, device=weights.device)
    arguments = (given.weight, tiles, tiles[0, :1], out)
    assert given.row_scales is not None
    with pytest.raises(
        RuntimeError, match="act_scale: expected none for the rows that this GPU's kernel reads, got one"
    ):
        grouped_gemm(given.act[0], formats.pack_row_scales(given.row_scales), *arguments)
    with pytest.raises(RuntimeError, match="act: expected bfloat16"):
        grouped_gemm(given.rows, None, *arguments)
