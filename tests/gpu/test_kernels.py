"""Each kernel of the layer alone, exactly where its arithmetic is exact. On a GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import HALVES, ops
from gpu_layers import ROUNDINGS, kernel_activation
from gpu_problems import bits, random_weights
from moe_cases import NUMBERS, ids_of, layer_of, ordinal, special_rows
from torch import Tensor

from mxfp4_moe import formats, reference
from mxfp4_moe.activations import Activation


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
@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu_step", "situ", "silu", "clamped_relu2"])
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
@pytest.mark.parametrize("tokens", [4, 8, 33, 4099])  # a thread has two columns up to 8, then eight; strips of biases
@pytest.mark.parametrize("experts", [6, 512])
def test_finalize_is_exact(
    experts: int, tokens: int, width: int, top_k: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    g = torch.Generator(device).manual_seed(width + top_k)
    ids = ids_of(tokens, top_k, experts, torch.int32, device)
    ids[3] = -1
    _, row_slot, slot_row = reference.route(ids, experts)
    row_expert = torch.where(row_slot >= 0, ids.flatten()[row_slot.long()], -1).to(torch.int32)
    rows = torch.randn(tokens * top_k, width, generator=g, device=device).to(reference.ROW_DTYPES[dtype])
    topk_weights = torch.rand(tokens, top_k, generator=g, device=device)
    bias = torch.randn(experts, width, generator=g, device=device) if with_bias else None
    out = ops().finalize(rows, slot_row, row_expert, topk_weights, bias)
    expected = reference.finalize(rows, topk_weights, slot_row, row_expert, bias)
    assert torch.equal(bits(out), bits(expected))
    assert not bits(out[3]).any()
