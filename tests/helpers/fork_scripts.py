"""What scripts for the SM120 fork do, by the names that they use: tiles, a smoke test, quantizers, a benchmark.

Each takes the device to run on. Their imports are one line here, of the drop-in.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from mxfp4_moe.flashinfer_api import (
    SM120_SUPPORTED_TILE_MN,
    ActivationType,
    block_scale_interleave,
    cutlass_fused_moe,
    get_cutlass_fused_moe_module,
    mxfp4_dequantize,
    mxfp4_quantize,
    mxfp8_dequantize_host,
    mxfp8_quantize,
    prewarm_moe_tiles,
    select_tile_mn_for_sm120,
)

BF16 = torch.bfloat16
HIDDEN = INTER = 256


def _backend(device: torch.device) -> str:
    if device.type == "cpu":
        return "121"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major * 10 + minor}"


def dummies(tokens: int, experts: int, top_k: int, device: torch.device) -> dict[str, Any]:
    """FP8 activations without scales, and weights of shape and type alone: zeros under scales of 2^-127."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ids = (torch.arange(tokens, dtype=torch.int32)[:, None] + torch.arange(top_k, dtype=torch.int32)) % experts
    ones = torch.ones(experts, dtype=torch.float32, device=device)
    return {
        "out": torch.full((tokens, HIDDEN), torch.nan, dtype=BF16, device=device),
        "x": torch.randn((tokens, HIDDEN), dtype=torch.float16).to(torch.float8_e4m3fn).to(device),
        "token_selected_experts": ids.to(torch.int32).to(device),
        "token_final_scales": torch.full((tokens, top_k), 1.0 / top_k, dtype=torch.float32, device=device),
        "fc1_expert_weights": zeros(experts, 2 * INTER, HIDDEN // 16, dtype=torch.int64),
        "fc2_expert_weights": zeros(experts, HIDDEN, INTER // 16, dtype=torch.int64),
        "quant_scales": [
            zeros(experts, 2 * INTER, HIDDEN // 128, dtype=torch.int32),
            ones,
            torch.ones((), dtype=torch.float32, device=device),
            zeros(experts, HIDDEN, INTER // 128, dtype=torch.int32),
            ones,
        ],
    }


def _run(module: Any, tensors: dict[str, Any]) -> Tensor:
    """The call as scripts make it: by position up to the ranks, the rest by name."""
    y = module.cutlass_fused_moe(
        tensors["out"],
        tensors["x"],
        tensors["token_selected_experts"],
        tensors["token_final_scales"],
        tensors["fc1_expert_weights"],
        None,
        tensors["fc2_expert_weights"],
        None,
        BF16,
        tensors["quant_scales"],
        None,
        None,
        None,
        None,
        *(1, 0, 1, 0, 1, 0),
        use_packed_weights=False,
        enable_alltoall=False,
        use_deepseek_fp8_block_scale=False,
        use_w4_group_scaling=False,
        use_mxfp8_act_scaling=False,
        min_latency_mode=False,
        tune_max_num_tokens=256,
        enable_pdl=False,
        activation_type=3,
    )
    assert isinstance(y, list)
    result: Tensor = y[0]
    return result


def tile_expansion(device: torch.device) -> None:
    """Every supported tile is a module; those that a tile count selects are among them."""
    assert len(set(SM120_SUPPORTED_TILE_MN)) == len(SM120_SUPPORTED_TILE_MN) >= 26
    for tokens in (1, 32, 128, 129, 256):
        assert select_tile_mn_for_sm120(tokens) in SM120_SUPPORTED_TILE_MN
    for tile_mn in SM120_SUPPORTED_TILE_MN:
        start = time.perf_counter()
        module = get_cutlass_fused_moe_module(backend="121", use_fast_build=False, tile_mn=tile_mn)
        assert module is get_cutlass_fused_moe_module(_backend(device), use_fast_build=True, tile_mn=tile_mn)
        assert module.tile.mn == tile_mn
        assert time.perf_counter() - start < 5.0, "something was compiled"
    if device.type == "cuda":
        assert len(prewarm_moe_tiles()) == len(SM120_SUPPORTED_TILE_MN)


def smoke(device: torch.device) -> None:
    """The module without a tile, and one call of it: zero weights make zeros, and into the tensor that was given."""
    tensors = dummies(2, 1, 1, device)
    y = _run(get_cutlass_fused_moe_module(_backend(device), use_fast_build=True), tensors)
    assert y is tensors["out"]
    assert y.shape == (2, HIDDEN)
    assert not y.any()


def fp4_smem_correctness(device: torch.device) -> None:
    """Round trips of both quantizers, and the interleave of one tile of scales."""
    x = (torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.1).to(BF16).to(device)
    packed, scales = mxfp4_quantize(x)
    values = mxfp4_dequantize(packed, scales)
    assert values.shape == x.shape
    assert (values - x.float().cpu()).abs().max() < 0.1
    codes, scales = mxfp8_quantize(x, True, 32)
    values = mxfp8_dequantize_host(codes.cpu().view(torch.uint8), scales.cpu().view(torch.uint8).reshape(-1), True)
    assert ((values - x.float().cpu()).abs() <= x.float().cpu().abs() / 16 + 2.0**-12).all()
    byte = torch.arange(512, dtype=torch.uint8).view(1, 128, 4).to(device)
    interleaved = block_scale_interleave(byte).cpu()
    assert interleaved.shape == (512,)
    row, column = 37, 2
    assert interleaved[row % 32 * 16 + row // 32 * 4 + column] == byte.cpu()[0, row, column]


def real_weights(experts: int, device: torch.device) -> dict[str, Any]:
    """3-D weights through mxfp4_quantize, viewed as the call wants them."""
    g = torch.Generator().manual_seed(0)
    made = {}
    for name, rows, k in (("fc1", 2 * INTER, HIDDEN), ("fc2", HIDDEN, INTER)):
        weight = (torch.randn(experts, rows, k, generator=g) / k**0.5).to(BF16).to(device)
        packed, scales = mxfp4_quantize(weight)
        made[name] = packed.view(torch.int64)
        made[f"{name}_scale"] = scales.view(experts, rows, -1).view(torch.int32)
    return made


def benchmark_sm120_tiles(
    device: torch.device, token_counts: tuple[int, ...]
) -> list[tuple[tuple[int, int], int, float]]:
    """Microseconds of every tile at every count; and every tile gives the same bits, those of the call without one."""
    experts, top_k = 8, 2
    weights = real_weights(experts, device)
    ones = torch.ones(experts, dtype=torch.float32, device=device)
    act = torch.ones((), dtype=torch.float32, device=device)
    scales = [weights["fc1_scale"], ones, act, weights["fc2_scale"], ones]
    found = []
    for tokens in token_counts:
        tensors = dummies(tokens, experts, top_k, device)
        tensors |= {"fc1_expert_weights": weights["fc1"], "fc2_expert_weights": weights["fc2"], "quant_scales": scales}
        (expected,) = cutlass_fused_moe(
            tensors["x"],
            tensors["token_selected_experts"],
            tensors["token_final_scales"],
            tensors["fc1_expert_weights"],
            tensors["fc2_expert_weights"],
            BF16,
            scales,
            activation_type=ActivationType.Swiglu,
            auto_tile_select=True,
        )
        assert expected.isfinite().all()
        assert expected.any(-1).all()
        for tile_mn in SM120_SUPPORTED_TILE_MN:
            module = get_cutlass_fused_moe_module(_backend(device), use_fast_build=True, tile_mn=tile_mn)
            tensors["out"].fill_(torch.nan)
            assert torch.equal(_run(module, tensors), expected), (tile_mn, tokens)
            start = time.perf_counter()
            _run(module, tensors)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append((tile_mn, tokens, (time.perf_counter() - start) * 1e6))
    return found
