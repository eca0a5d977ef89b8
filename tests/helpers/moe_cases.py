"""Inputs for the layer's small kernels, the hard ones among them: for tests/gpu/test_moe.py and test_ptx_moe.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4_moe import formats
from mxfp4_moe.problems import random_weights
from mxfp4_moe.weights import MoEWeights


def ids_of(tokens: int, top_k: int, experts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator(device).manual_seed(tokens * top_k + experts)
    return torch.randint(-2, experts + 2, (tokens, top_k), generator=g, device=device, dtype=dtype)


def special_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Every kind of value: magnitudes far apart, any bit pattern, denormals, zeros of both signs, NaN and infinity."""
    g = torch.Generator().manual_seed(width)

    def patterns(high: int) -> Tensor:
        return torch.randint(0, high, (width,), generator=g, dtype=torch.int32).to(torch.int16).view(dtype)

    x = torch.randn(9, width, generator=g)
    x *= torch.randint(-20, 12, (9, width // 32, 1), generator=g).float().exp2().expand(-1, -1, 32).reshape(9, width)
    x = x.to(dtype)
    x[1] = patterns(1 << 16)
    x[2] = patterns(0x80 if dtype is torch.bfloat16 else 0x400)  # denormals
    x[3] = patterns(0x7F80 if dtype is torch.bfloat16 else 0x7C00)  # finite, all exponents
    x[4, :16], x[4, 16:32] = 0.0, -0.0
    x[5, 0], x[6, width - 1], x[7, width // 2] = float("nan"), float("inf"), -float("inf")
    x[8] = torch.finfo(dtype).max
    return x


def ordinal(codes: Tensor) -> Tensor:
    """E4M3 codes as integers in the order of their values: neighbours differ by one."""
    magnitude = (codes & 0x7F).int()
    return torch.where(codes >= 0x80, -magnitude, magnitude)


MXFP8, MXFP8_IN_BF16, BF16 = ROW_FORMATS = range(3)  # csrc/moe/kernels.h, RowFormat
FP16 = 7


def rows_of(values: Tensor, row_format: int) -> tuple[Tensor, Tensor | None]:
    """What the rows that GEMMs read are made of: codes and scales in plain order, or 16-bit floats alone."""
    if row_format in (BF16, FP16):
        return values.to(torch.bfloat16 if row_format == BF16 else torch.float16), None
    codes, scales = formats.quantize_mxfp8(values)
    return (codes, scales) if row_format == MXFP8 else (formats.mxfp8_to_bf16(codes, scales), None)


def same_halves(actual: Tensor, expected: Tensor) -> bool:
    """Equal bits; a NaN equals any other, for conversions make their own."""
    nan = actual.isnan() & expected.isnan()
    return bool(((actual.view(torch.int16) == expected.view(torch.int16)) | nan).all())


NUMBERS: dict[str, dict[str, Any]] = {
    "one for all": {"limit": 7.0},
    "no limit": {"limit": None},
    "per expert": {
        "alpha": [1.702, 1.0, 0.5, 2.0, 1.0],
        "beta": [1.0, 0.0, -2.0, 1.0, 0.5],
        "limit": [7, 1, 3, 0.5, 9],
    },
}


def with_large_rows(weights: MoEWeights, exponent: int = 16) -> MoEWeights:
    """The same layer, the outputs of its experts times 2^exponent (but for their biases)."""
    stored = weights.to_mxfp4()._asdict()
    stored["w2_scale"] = stored["w2_scale"] + exponent
    numbers = {name: getattr(weights, name) for name in ("activation", "alpha", "beta", "limit", "gate_up_order")}
    return MoEWeights.from_mxfp4(**stored, **numbers)


def layer_of(
    experts: int, inter: int, activation: str, numbers: str, *, bias: bool, device: torch.device
) -> MoEWeights:
    each = {
        n: torch.tensor(v, device=device).float() if isinstance(v, list) else v for n, v in NUMBERS[numbers].items()
    }
    if activation == "situ" and "beta" in each:
        each["beta"] = each["beta"].abs() + 0.5  # a bound there
    return random_weights(experts, 32, inter, device, bias=bias, activation=activation, **each)
