"""The layer on the GPU: its kernels one by one against the reference, then the whole at gpt-oss-120b's size."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gpu_problems
import pytest
import torch
from gpu_layers import ROUNDINGS, exact_layer, kernel_activation, poison_memory, same
from gpu_problems import Call, bits, random_call, random_weights, relative_error
from moe_cases import NUMBERS, ids_of, layer_of, ordinal, special_rows
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import mxfp4_moe
from mxfp4_moe import _load, _wheel, formats, reference
from mxfp4_moe import ops as mxfp4_moe_ops
from mxfp4_moe.activations import Activation
from mxfp4_moe.bench.timing import Timer
from mxfp4_moe.tiles import Tile, load_manifest
from mxfp4_moe.weights import MoEWeights

pytestmark = pytest.mark.gpu

TILES = load_manifest().tiles
HALVES = (torch.bfloat16, torch.float16)
UNWRITTEN = 0xEE
TOP_K = 4
# Both sides quantize the same values twice and round the same rows to bfloat16; what is left is exp's last bits.
LAYER_TOLERANCE = 5e-3


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return gpu_problems.gpu()


@functools.cache
def gpt_oss() -> MoEWeights:
    return random_weights(128, 2880, 2880, gpu_problems.gpu())


@functools.cache
def small() -> MoEWeights:
    return random_weights(8, 160, 96, gpu_problems.gpu())


def ops() -> Any:
    return _load.moe_ops()


def run(call: Call, weights: MoEWeights, **options: Any) -> Tensor:
    return mxfp4_moe.fused_moe(*call.args(), weights, **options)


# ---- kernel by kernel ------------------------------------------------------------------------------------------------


def check_route(ids: Tensor, experts: int, tile_m: int) -> None:
    offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles = ops().route(ids, experts, tile_m)
    expected_offsets, expected_row_slot, expected_slot_row = reference.route(ids, experts)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(row_slot, expected_row_slot)
    assert torch.equal(slot_row, expected_slot_row)
    valid = int(offsets[-1])
    assert torch.equal(
        row_expert[:valid].long(), torch.arange(experts, device=ids.device).repeat_interleave(offsets.diff())
    )
    assert (row_expert[valid:] == -1).all()
    expected_tiles = reference.m_tiles(expected_offsets, tile_m)
    assert num_m_tiles.tolist() == [len(expected_tiles)]
    assert torch.equal(m_tiles[: len(expected_tiles)], expected_tiles)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [
        *[(0, 4, 8), (1, 1, 1), (1, 4, 128), (5, 4, 128), (33, 1, 2), (64, 4, 128), (257, 3, 5), (1024, 4, 128)],
        *[(100, 16, 1024), (300, 4, 1024), (7, 8, 513), (4096, 8, 256), (131_072, 4, 128)],
        # Up to 128 slots, one thread each sees all of them.
        *[(32, 4, 128), (129, 1, 128), (16, 8, 1024), (43, 3, 2), (127, 1, 3), (3, 1, 1024)],
        # One block up to 256 slots; beyond, on SM90, clusters of 4 and 8, whose last blocks may have nothing.
        *[(64, 4, 64), (257, 1, 64), (65, 4, 1024), (129, 4, 1), (1025, 1, 300), (515, 1, 2)],
    ],
)
def test_route_is_exact(tokens: int, top_k: int, experts: int, dtype: torch.dtype, device: torch.device) -> None:
    ids = ids_of(tokens, top_k, experts, dtype, device)
    for tile_m in (8, 64, 256):
        check_route(ids, experts, tile_m)


@pytest.mark.parametrize("tokens", [1, 32, 1000])
@pytest.mark.parametrize("expert", [0, 3, 7, -1, 8])
def test_route_when_all_go_the_same_way(expert: int, tokens: int, device: torch.device) -> None:
    check_route(torch.full((tokens, 4), expert, dtype=torch.int32, device=device), 8, 16)


def test_route_reads_all_64_bits(device: torch.device) -> None:
    ids = torch.tensor([[2**32 + 1, -(2**63), 2**63 - 1, 1, 2**31, -(2**31)]], device=device)
    check_route(ids, 4, 8)


@pytest.mark.parametrize("copies", [1, 67])  # a thread has one token, and four
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [32, 64, 96, 128, 160, 2880, 4096])
def test_quantize_permute_is_exact(width: int, dtype: torch.dtype, copies: int, device: torch.device) -> None:
    x = special_rows(width, dtype).repeat(copies, 1)
    top_k, experts = 3, 5
    ids = ids_of(len(x), top_k, experts, torch.int32, device)
    offsets, row_slot, slot_row = reference.route(ids, experts)
    codes, scales = ops().quantize_permute(x.to(device), slot_row, top_k)
    valid = int(offsets[-1])
    token = row_slot[:valid].cpu() // top_k
    expected_codes, expected_scales = formats.quantize_mxfp8(x)
    expected_words = formats.pack_row_scales(expected_scales[token])
    assert torch.equal(codes[:valid].cpu(), formats.interleave_k(expected_codes[token]))
    assert torch.equal(scales[:, :valid].cpu(), expected_words[:, :valid])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 160, 2880, 4096])
def test_permute_is_exact(width: int, swizzled: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Every code, and every scale byte: those above 248 become NaN blocks."""
    g = torch.Generator().manual_seed(width)
    tokens, top_k, experts = 133, 3, 5
    codes = torch.randint(0, 256, (tokens, width), generator=g, dtype=torch.uint8)
    scales = torch.randint(0, 256, (tokens, width // 32), generator=g, dtype=torch.uint8)
    given = formats.swizzle_scales(scales).flatten() if swizzled else scales
    ids = ids_of(tokens, top_k, experts, torch.int32, device)
    offsets, row_slot, slot_row = reference.route(ids, experts)
    hidden = codes.view(dtype).to(device).view(torch.uint8)
    out, out_scales = ops().permute(hidden, given.to(device), swizzled, slot_row, top_k)
    valid = int(offsets[-1])
    token = row_slot[:valid].cpu() // top_k
    expected, expected_scales = reference.mxfp8_rows(codes, given, "swizzled" if swizzled else "linear")
    assert torch.equal(out[:valid].cpu(), formats.interleave_k(expected[token]))
    words = formats.pack_row_scales(expected_scales[token])
    assert torch.equal(out_scales[:, :valid].cpu(), words[:, :valid])


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("activation", [a.value for a in Activation])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inter", [32, 96, 160, 2880])
def test_activation_is_close(
    inter: int, with_bias: bool, activation: str, numbers: str, rounding: torch.dtype | None, device: torch.device
) -> None:
    """exp may differ in its last bits, which moves a code to its neighbour when the value lies near a tie."""
    experts, rows = 5, 67
    weights = layer_of(experts, inter, activation, numbers, bias=with_bias, device=device)
    g = torch.Generator(device).manual_seed(inter)
    gemm1 = torch.randn(rows, weights.w13_rows, generator=g, device=device) * 4
    gemm1[0, 0], gemm1[1, 8], gemm1[2, 0] = float("nan"), float("nan"), float("inf")
    gemm1[3, 0], gemm1[3, 1], gemm1[3, 9] = -200.0, 200.0, 1e30
    row_expert = torch.arange(rows, device=device, dtype=torch.int32) % experts
    codes, scales = kernel_activation(gemm1, row_expert, weights, rounding)
    each = (weights.alpha, weights.beta, weights.limit)
    values = reference.activate(gemm1, row_expert, weights.w13_bias, activation, *each, rounding=rounding)
    expected_codes, expected_scales = formats.quantize_mxfp8(values)
    assert torch.equal(scales, expected_scales)
    assert (codes != expected_codes).float().mean() < 2e-3
    assert (ordinal(codes) - ordinal(expected_codes)).abs().max() <= 1
    if activation in ("relu", "relu2", "identity"):
        assert torch.equal(codes, expected_codes)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu_step", "silu"])
def test_activation_of_many_rows_is_that_of_few(activation: str, with_bias: bool, device: torch.device) -> None:
    """From 4096 rows on a block has eight, whose expert may change among them."""
    rows, inter = 4099, 160
    weights = layer_of(5, inter, activation, "per expert", bias=with_bias, device=device)
    g = torch.Generator(device).manual_seed(3)
    gemm1 = torch.randn(rows, weights.w13_rows, generator=g, device=device) * 4
    for row_expert in (
        torch.arange(rows, device=device, dtype=torch.int32) * 5 // rows,
        torch.randint(0, 5, (rows,), generator=g, device=device, dtype=torch.int32),
    ):
        codes, scales = kernel_activation(gemm1, row_expert, weights)
        for begin in range(0, rows, 2048):
            few = slice(begin, begin + 2048)
            few_codes, few_scales = kernel_activation(gemm1[few].contiguous(), row_expert[few].contiguous(), weights)
            assert torch.equal(codes[few], few_codes)
            assert torch.equal(scales[few], few_scales)


def test_activation_quantizes_exactly(device: torch.device) -> None:
    """sigmoid(128) is 1 in fp32, so the product is exact and the quantizer sees known bits, fp32 denormals too."""
    rows, inter = 40, 160
    g = torch.Generator(device).manual_seed(1)
    up = torch.randn(rows, inter, generator=g, device=device)
    up *= (
        torch.randint(-120, 100, (rows, inter // 32, 1), generator=g, device=device)
        .float()
        .exp2()
        .repeat_interleave(32, -1)
        .view(rows, inter)
    )
    up[1] = torch.randint(0, 1 << 23, (inter,), generator=g, device=device, dtype=torch.int32).view(torch.float32)
    up[2], up[3, :32] = 0.0, -0.0
    gemm1 = torch.stack([torch.full_like(up, 128.0).view(rows, -1, 8), up.view(rows, -1, 8)], dim=2).view(rows, -1)
    weights = random_weights(8, 32, inter, device, bias=False, activation="swiglu")
    codes, scales = kernel_activation(gemm1, torch.zeros(rows, dtype=torch.int32, device=device), weights)
    expected_codes, expected_scales = formats.quantize_mxfp8(up.cpu() * 128)
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rounding", HALVES)
def test_activation_rounds_exactly(rounding: torch.dtype, with_bias: bool, device: torch.device) -> None:
    """Without an exp every bit is known: ties, denormals, float16's overflow, and what is rounded before the bias."""
    rows, inter = 96, 160
    g = torch.Generator(device).manual_seed(7)
    gemm1 = torch.randn(rows, inter, generator=g, device=device)
    gemm1 *= torch.randint(-40, 18, (rows, 1), generator=g, device=device).float().exp2()
    step = 2.0 ** (-8 if rounding is torch.bfloat16 else -11)
    gemm1[0] = 1 + torch.arange(inter, device=device) * step  # every second one is a tie
    gemm1[1] = 65504 + torch.arange(inter, device=device) / 8  # past 65520 float16 is infinity
    gemm1[2] = torch.arange(inter, device=device) * 2.0**-25  # ties of float16's denormals
    row_expert = torch.arange(rows, device=device, dtype=torch.int32) % 5
    for activation in ("identity", "relu", "relu2"):
        weights = layer_of(5, inter, activation, "one for all", bias=with_bias, device=device)
        codes, scales = kernel_activation(gemm1, row_expert, weights, rounding)
        values = gemm1.to(rounding).float()
        if weights.w13_bias is not None:
            values += weights.w13_bias[row_expert]
        if activation != "identity":
            values = torch.where(values < 0, 0.0, values)  # -0 stays
        if activation == "relu2":
            values = values * values
        expected_codes, expected_scales = formats.quantize_mxfp8(values.to(rounding).float())
        assert torch.equal(codes, expected_codes), activation
        assert torch.equal(scales, expected_scales), activation
        assert bool((codes[1] == formats.E4M3_NAN).any()) == (rounding is torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 9, 16])
@pytest.mark.parametrize("width", [32, 2880])
@pytest.mark.parametrize("tokens", [4, 8, 33])  # a thread has two columns up to 8, then eight
def test_finalize_is_exact(
    tokens: int, width: int, top_k: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    experts = 6
    g = torch.Generator(device).manual_seed(width + top_k)
    ids = ids_of(tokens, top_k, experts, torch.int32, device)
    ids[3] = -1
    _, row_slot, slot_row = reference.route(ids, experts)
    row_expert = torch.where(row_slot >= 0, ids.flatten()[row_slot.long()], -1).to(torch.int32)
    rows = torch.randn(tokens * top_k, width, generator=g, device=device).to(dtype)
    topk_weights = torch.rand(tokens, top_k, generator=g, device=device)
    bias = torch.randn(experts, width, generator=g, device=device) if with_bias else None
    out = ops().finalize(rows, slot_row, row_expert, topk_weights, bias)
    expected = reference.finalize(rows, topk_weights, slot_row, row_expert, bias)
    assert torch.equal(bits(out), bits(expected))
    assert not bits(out[3]).any()


# ---- the whole layer -------------------------------------------------------------------------------------------------


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


def without_folding(weights: MoEWeights) -> MoEWeights:
    """The same weights, with which a layer runs the kernels that it shares with SM12x, on SM90 too."""
    plain = replace(weights)
    arguments, rare = plain.operator_arguments
    plain.__dict__["operator_arguments"] = (arguments, {**rare, "fold": False})
    return plain


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 257])
def test_every_tile_gives_the_same_bits_without_folding(tokens: int, rounding: bool) -> None:
    call, weights = random_call(tokens, TOP_K, gpt_oss()), without_folding(gpt_oss())
    expected = bits(run(call, gpt_oss(), intermediate_rounding=rounding))
    for tile in TILES:
        out = run(call, weights, tile_mn=tile.mn, intermediate_rounding=rounding)
        assert torch.equal(expected, bits(out)), tile.name


@pytest.mark.parametrize("whole", [False, True], ids=["one token", "all tokens"])
@pytest.mark.parametrize(("activation", "exponent"), [("relu", -76), ("swiglu", 45), ("swiglu_oai", 45), ("relu", 90)])
def test_activations_far_from_one(activation: str, exponent: int, whole: bool, device: torch.device) -> None:
    """Scales that folded activations cannot hold with the others', in GEMM1 or in both."""
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
        (8, 4, 2880, 2880, 40, True, "bfloat16"),
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


# ---- from logits -----------------------------------------------------------------------------------------------------


@functools.cache
def layer_of_experts(experts: int) -> MoEWeights:
    return random_weights(experts, 160, 96, gpu_problems.gpu(), seed=experts)


def check_from_logits(
    hidden_states: Tensor, logits: Tensor, top_k: int, weights: MoEWeights, renormalize: bool = True, **options: Any
) -> None:
    topk_weights, topk_ids = mxfp4_moe.topk_softmax(logits, top_k, renormalize)
    expected = mxfp4_moe.fused_moe(hidden_states, topk_weights, topk_ids, weights, **options)
    poison_memory(logits.device, 0xFF)
    out = mxfp4_moe.fused_moe_from_logits(hidden_states, logits, top_k, weights, renormalize=renormalize, **options)
    assert out.dtype == expected.dtype
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [8, 32, 128, 300])
# One kernel up to 512 tokens, on SM90 1024; up to 128 slots another.
@pytest.mark.parametrize("tokens", [0, 1, 5, 32, 33, 64, 65, 128, 300, 512, 513, 1024, 1025])
def test_from_logits_is_topk_softmax_and_fused_moe(
    tokens: int, experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    weights = layer_of_experts(experts)
    g = torch.Generator(device).manual_seed(tokens + experts)
    logits = (torch.randn(tokens, experts, generator=g, device=device) * 3).to(dtype)
    logits[::7] = logits[::7].round()  # ties
    x = random_call(tokens, 1, weights).hidden_states
    for top_k in (1, 4, 8):
        for renormalize in (True, False):
            check_from_logits(x, logits, top_k, weights, renormalize)


@pytest.mark.parametrize("top_k", [3, 16])
@pytest.mark.parametrize("tokens", [1, 512, 1025])
def test_from_logits_with_everything_else(tokens: int, top_k: int, device: torch.device) -> None:
    weights = layer_of_experts(32)
    logits = torch.randn(tokens, 32, device=device)
    logits[0, 5] = float("nan")
    call = random_call(tokens, 1, weights)
    codes, scale = formats.quantize_mxfp8(call.hidden_states)
    swizzled = formats.swizzle_scales(scale).flatten()
    check_from_logits(codes, logits, top_k, weights, hidden_states_scale=scale)
    check_from_logits(codes, logits, top_k, weights, hidden_states_scale=swizzled, scale_layout="swizzled")
    check_from_logits(call.hidden_states.half(), logits, top_k, weights, output_dtype=torch.bfloat16)
    check_from_logits(call.hidden_states, logits, top_k, weights, intermediate_rounding=True)
    for tile in TILES:
        check_from_logits(call.hidden_states, logits, top_k, weights, tile_mn=tile.mn)
    output = torch.empty_like(call.hidden_states)
    out = mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, top_k, weights, output=output)
    assert out is output
    assert torch.equal(bits(out), bits(mxfp4_moe.fused_moe_from_logits(call.hidden_states, logits, top_k, weights)))


@pytest.mark.parametrize("tokens", [1, 64, 513, 1025])
def test_from_logits_of_a_slice(tokens: int, device: torch.device) -> None:
    """The logits are the whole layer's; experts of other ranks contribute nothing."""
    whole = layer_of_experts(128)
    logits = torch.randn(tokens, 128, device=device)
    x = random_call(tokens, 1, whole).hidden_states
    for rank in range(4):
        check_from_logits(x, logits, TOP_K, whole.expert_parallel(rank, 4))
    with pytest.raises(ValueError, match=r"router_logits: expected one for each of the layer's 128 experts, got"):
        mxfp4_moe.fused_moe_from_logits(x, logits[:, :32].contiguous(), TOP_K, whole.expert_parallel(0, 4))


@pytest.mark.parametrize("tokens", [1, 64, 512, 1024])
def test_a_layer_from_logits_is_at_most_five_kernels(tokens: int, device: torch.device) -> None:
    weights = layer_of_experts(128)
    logits, x = torch.randn(tokens, 128, device=device), random_call(tokens, 1, weights).hidden_states
    kernels = Timer(device).kernels(
        lambda: mxfp4_moe.fused_moe_from_logits(x, logits, TOP_K, weights, tile_mn=(32, 128))
    )
    routed_apart = _wheel.served_as(torch.cuda.get_device_capability(device))[0] != 9 and tokens > 512
    assert len(kernels) == 5 + routed_apart, [kernel.name for kernel in kernels]


@pytest.mark.parametrize("tokens", [48, 600])
def test_from_logits_in_a_graph_and_compiled(tokens: int, device: torch.device) -> None:
    weights = layer_of_experts(128)
    static_x = torch.zeros(tokens, 160, dtype=torch.bfloat16, device=device)
    static_logits = torch.zeros(tokens, 128, device=device)
    output = torch.empty_like(static_x)
    mxfp4_moe.fused_moe_from_logits(static_x, static_logits, TOP_K, weights, output=output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mxfp4_moe.fused_moe_from_logits(static_x, static_logits, TOP_K, weights, output=output)
    compiled = torch.compile(mxfp4_moe.fused_moe_from_logits, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        static_x.copy_(random_call(tokens, 1, weights, seed=seed).hidden_states)
        static_logits.normal_()
        output.fill_(float("nan"))
        graph.replay()
        topk_weights, topk_ids = mxfp4_moe.topk_softmax(static_logits, TOP_K)
        expected = mxfp4_moe.fused_moe(static_x, topk_weights, topk_ids, weights)
        assert torch.equal(bits(output), bits(expected))
        assert torch.equal(bits(compiled(static_x, static_logits, TOP_K, weights)), bits(expected))
    torch._dynamo.reset()


# ---- loading and refusals --------------------------------------------------------------------------------------------


def test_prewarm_loads_every_tile() -> None:
    assert mxfp4_moe.prewarm_moe_tiles() == [tile.name for tile in TILES]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_module_of_a_tile(tile: Tile) -> None:
    module = mxfp4_moe.get_cutlass_fused_moe_module(tile_mn=tile.mn)
    assert module is mxfp4_moe.get_cutlass_fused_moe_module("120", tile.mn)
    call = random_call(16, 3, small())
    assert torch.equal(bits(module.fused_moe(*call.args(), small())), bits(run(call, small())))


def test_no_tokens() -> None:
    call = random_call(0, TOP_K, small())
    assert run(call, small()).shape == (0, 160)


def test_arguments_on_the_wrong_device_are_refused(device: torch.device) -> None:
    call = random_call(4, 2, small())
    x, w, ids = call.args()
    with pytest.raises(ValueError, match=rf"weights: expected MoEWeights on {device}, where hidden_states is, got cpu"):
        mxfp4_moe.fused_moe(x, w, ids, small().to("cpu"))
    with pytest.raises(ValueError, match=r"weights: expected MoEWeights on cpu, where hidden_states is, got cuda"):
        mxfp4_moe.fused_moe(x.cpu(), w.cpu(), ids.cpu(), small())
    with pytest.raises(ValueError, match=rf"topk_ids: expected .* on {device}, got int32 \[4, 2\] on cpu"):
        mxfp4_moe.fused_moe(x, w, ids.cpu(), small())
    with pytest.raises(ValueError, match=rf"topk_weights: expected .* on {device}, got float32 \[4, 2\] on cpu"):
        mxfp4_moe.fused_moe(x, w.cpu(), ids, small())
    with pytest.raises(ValueError, match=rf"output: expected .* on {device}, got bfloat16 \[4, 160\] on cpu"):
        mxfp4_moe.fused_moe(x, w, ids, small(), output=x.cpu())


def test_weights_in_another_word_order_are_refused(device: torch.device) -> None:
    x, w, ids = random_call(4, 2, small()).args()
    (other,) = (order for order in formats.WordOrder if order is not small().word_order)
    weights = replace(small(), word_order=other)
    message = rf"weights: expected word order '{small().word_order.value}' on {device}, got '{other.value}' of another"
    with pytest.raises(ValueError, match=message):
        mxfp4_moe.fused_moe(x, w, ids, weights)
    with pytest.raises(ValueError, match=message):
        mxfp4_moe.fused_moe_from_logits(x, torch.randn(4, 8, device=device), 2, weights)
    compiled = torch.compile(mxfp4_moe.fused_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        compiled(x, w, ids, weights)
    torch._dynamo.reset()


def test_data_off_a_16_byte_boundary_is_refused() -> None:
    x, w, ids = random_call(4, 2, small()).args()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x)
    with pytest.raises(RuntimeError, match=r"hidden_states: expected data aligned to 16 bytes, got 2 bytes past that"):
        mxfp4_moe.fused_moe(shifted, w, ids, small())
    with pytest.raises(RuntimeError, match=r"out: expected data aligned to 16 bytes, got 2 bytes past that"):
        mxfp4_moe.fused_moe(x, w, ids, small(), output=shifted)


def test_router_tensors_may_start_anywhere() -> None:
    """They are read element by element, so a view that starts at an odd place is fine."""
    call = random_call(9, 3, small())
    expected = run(call, small())
    shifted = []
    for x in (call.topk_weights, call.topk_ids):
        shifted.append(torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x))
    out = mxfp4_moe.fused_moe(call.hidden_states, shifted[0], shifted[1], small())
    assert torch.equal(bits(out), bits(expected))


def test_the_operator_checks_for_itself() -> None:
    """Callers may skip the Python layer; the operator then says what does not fit."""
    x, w, ids = random_call(4, 2, small()).args()
    layer = small()
    w13_bytes, w2_bytes = formats.weight_bytes(192, 160), formats.weight_bytes(160, 96)
    _load.load_tile(TILES[0])
    good: dict[str, Any] = {
        **{"hidden_states": x, "topk_weights": w, "topk_ids": ids, "w13": layer.w13, "w13_bias": None},
        **{"w2": layer.w2, "w2_bias": None, "intermediate_size": layer.intermediate_size, "activation": 1},
        **{"router_logits": None, "top_k": 0, "renormalize": True, "first_expert": 0},
        **{"alpha": 1.702, "beta": 1.0, "limit": 7.0, "alphas": None, "betas": None, "limits": None},
        **{"hidden_states_scale": None, "scale_is_swizzled": False, "tile_m": TILES[0].m, "tile_n": TILES[0].n},
        "out": torch.empty_like(x),
    }
    ops().fused_moe(**good)
    for change, message in (
        ({"tile_m": 7}, r"tile: expected one that is loaded, got \(7, "),
        ({"hidden_states": x.float()}, r"hidden_states: expected bfloat16 or float16 .*, got float32 \[4, 160\]"),
        ({"topk_weights": w.double()}, r"topk_weights: expected float32 \[4, 2\], got another dtype \[4, 2\]"),
        ({"topk_ids": ids.short()}, r"topk_ids: expected int32 or int64 \[tokens, top_k\]"),
        ({"w13": layer.w13[:, :-1]}, rf"w13: expected uint8 \[8, {w13_bytes}\], got uint8 \[8, {w13_bytes - 1}\]"),
        ({"w13": layer.w13[:, None]}, rf"w13: expected uint8 .*, got uint8 \[8, 1, {w13_bytes}\]"),
        ({"w2": layer.w2[:-1]}, rf"w2: expected uint8 \[8, {w2_bytes}\], got uint8 \[7, {w2_bytes}\]"),
        ({"intermediate_size": 64}, rf"w13: expected uint8 \[8, {formats.weight_bytes(128, 160)}\], got uint8 \[8, "),
        ({"intermediate_size": 100}, r"intermediate_size: expected a positive multiple of 32"),
        ({"router_logits": w, "top_k": 2}, r"router_logits: expected none beside topk_weights and topk_ids, got both"),
        ({"topk_ids": None}, r"topk_weights and topk_ids: expected both, or router_logits, got neither or one"),
        (
            {"w2_bias": torch.empty(8, 96, device=x.device)},
            r"w2_bias: expected float32 \[8, 160\], got float32 \[8, 96",
        ),
        ({"activation": 11}, r"activation: expected 0 to 10, got 11"),
        ({"limits": torch.ones(7, device=x.device)}, r"limit: expected float32 \[8\], got float32 \[7\]"),
        ({"hidden_states_scale": w}, r"hidden_states: expected uint8 \[tokens, hidden\] with hidden_states_scale, got"),
        ({"out": torch.empty_like(x).float()}, r"out: expected bfloat16 or float16 .*, got float32 \[4, 160\]"),
        ({"out": torch.empty(4, 320, device=x.device, dtype=x.dtype)[:, :160]}, r"out: expected a contiguous tensor"),
        ({"w2": layer.w2.cpu()}, r"w2: expected a tensor on cuda:\d+, got one on"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops().fused_moe(**{**good, **change})


def test_route_refuses_what_it_cannot_hold(device: torch.device) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for experts in (0, 1025):
        with pytest.raises(RuntimeError, match=rf"num_experts: expected 1 to 1024, got {experts}"):
            ops().route(ids, experts, 8)
    with pytest.raises(RuntimeError, match=r"tile_m: expected 1 to 1024, got 2000"):
        ops().route(ids, 4, 2000)
