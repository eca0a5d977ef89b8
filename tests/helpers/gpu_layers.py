"""What a layer on the GPU must give bit by bit, and memory that forgives nothing. For tests/gpu."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from fp4_cases import in_bf16, quantized, row_format
from gpu_problems import Call, bits
from moe_cases import BF16, MXFP8
from torch import Tensor

import mxfp4_moe
from mxfp4_moe import formats, reference
from mxfp4_moe._install import loading
from mxfp4_moe.problems import arithmetic_here
from mxfp4_moe.weights import MoEWeights

ROUNDINGS = (None, torch.bfloat16, torch.float16)  # by the operator's number


def kernel_activation(
    gemm1: Tensor, row_expert: Tensor, weights: MoEWeights, rounding: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel between the GEMMs: codes uint8 [R, I] in plain order, scales uint8 [R, I/32], of all rows."""
    rows = gemm1.shape[0]
    codes, scales = _activation(gemm1, row_expert, weights, rounding, MXFP8)
    inter = codes.shape[1]
    padding = scales.transpose(0, 1)[:rows].flatten(1)[:, inter // 32 :]
    assert not padding.any(), "scale bytes past the row must be zero"
    return formats.deinterleave_k(codes), formats.unpack_row_scales(scales, rows, inter)


def kernel_activation_in_bf16(
    gemm1: Tensor, row_expert: Tensor, weights: MoEWeights, rounding: torch.dtype | None, row_format: int
) -> tuple[Tensor, None]:
    """The same as rows for SM90: bfloat16 [R, I], of MXFP8 values or of values as they come, and no scales."""
    rows, scales = _activation(gemm1, row_expert, weights, rounding, row_format)
    assert rows.dtype is torch.bfloat16
    assert scales.numel() == 0
    return rows, None


def _activation(
    gemm1: Tensor, row_expert: Tensor, weights: MoEWeights, rounding: torch.dtype | None, row_format: int
) -> tuple[Tensor, Tensor]:
    offsets = torch.full((weights.num_experts + 1,), len(gemm1), dtype=torch.int32, device=gemm1.device)
    each = [n if isinstance(n, Tensor) else None for n in (weights.alpha, weights.beta, weights.limit)]
    alpha, beta, limit = (0.0 if isinstance(n, Tensor) else n for n in (weights.alpha, weights.beta, weights.limit))
    made: tuple[Tensor, Tensor] = loading.moe_ops().activation(
        gemm1.contiguous(),
        row_expert.to(torch.int32),
        offsets,
        weights.w13_bias,
        weights.activation.code,
        alpha,
        beta,
        math.inf if limit is None else limit,
        *each,
        rounding=ROUNDINGS.index(rounding),
        rows=row_format,
    )
    return made


def exact_formats(device: torch.device) -> list[str]:
    """The formats of activations here of which `exact_layer` knows the bits. Of fp16: test_fp16.py."""
    known = {"mxfp8", "bf16"}
    if torch.cuda.get_device_capability(device)[0] == 9 and formats.word_order_of(device) is formats.WordOrder.PAIRS:
        known.add("mxfp4")  # SM90's kernels multiply its values in bfloat16
    return [name for name in mxfp4_moe.activation_formats(device) if name in known]


def exact_layer(
    call: Call,
    weights: MoEWeights,
    *,
    intermediate_rounding: bool = False,
    activation_format: str = "mxfp8",
    sums_on: str | torch.device | None = None,
    **options: Any,
) -> Tensor:
    """The reference with the kernel's own activation, whose exp is not torch's: the layer's bits, no tolerance.

    `sums_on`: where all but the activation is computed, by default the call's device: "cpu" under compute-sanitizer,
    which slows each of torch's many kernels down.
    """
    device = weights.device
    there = device if sums_on is None else torch.device(sums_on)
    dtype = options.get("output_dtype")
    if dtype is None:
        dtype = reference.default_output_dtype(call.hidden_states, options.get("hidden_states_scale"))
    rounding = dtype if intermediate_rounding else None
    in_halves = None
    if activation_format == "mxfp4":
        rows = in_bf16(quantized(call.hidden_states.cpu(), "mxfp4", torch.empty(0)))
        call = replace(call, hidden_states=rows.to(call.hidden_states.device))
        activation_format, in_halves = "bf16", row_format("mxfp4", folded=True)
        options["output_dtype"] = dtype
    elif activation_format == "bf16":
        in_halves = BF16

    def between(gemm1: Tensor, row_expert: Tensor) -> tuple[Tensor, Tensor | None]:
        given = (gemm1.to(device), row_expert.to(device), weights, rounding)
        rows, scales = kernel_activation(*given) if in_halves is None else kernel_activation_in_bf16(*given, in_halves)
        return rows.to(there), None if scales is None else scales.to(there)

    return reference.layer(
        *(x.to(there) for x in call.args()),
        weights.to(there),
        between,
        activation_format=activation_format,
        arithmetic=arithmetic_here(device),
        **{name: x.to(there) if isinstance(x, Tensor) else x for name, x in options.items()},
    ).to(device)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal bits; any NaN equals any other, because an MMA makes its own."""
    nan = actual.isnan() & expected.isnan()
    return actual.dtype == expected.dtype and bool(((bits(actual) == bits(expected)) | nan).all())


def poison_memory(device: torch.device, byte: int) -> None:
    """Fills what torch's allocator will hand out next on this stream: 64 MiB at once, and its small blocks."""
    blocks = [torch.full((64 << 20,), byte, dtype=torch.uint8, device=device)]
    blocks += [torch.full((256 << 10,), byte, dtype=torch.uint8, device=device) for _ in range(24)]
    del blocks
