"""What csrc/moe/mxfp8_quantize.cu and fp4_quantize.cu must do, executed as SM12x's PTX.

As ptx_moe_checks.py for the layer's kernels.
"""

from __future__ import annotations

import torch
from ptx_moe_checks import operator
from quantize_cases import expected, expected_fp4, rows_of


def check_mxfp8_quantize(rows: int, width: int, padded: int, dtype: torch.dtype, layout: int) -> None:
    """Every byte of both results, padding included, is as `expected` says, and was written."""
    x = rows_of(rows, width, dtype)
    done = operator(["mxfp8_quantize"], "mxfp8_quantize", x, padded, layout, input=x, early=["input"])
    codes, scales = done.results
    expected_codes, expected_scales = expected(x, padded, layout)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    assert done.written(codes).all()
    assert done.written(scales).all()


def check_fp4_quantize(rows: int, width: int, dtype: torch.dtype, layout: int, global_scale: float | None) -> None:
    """The same: NVFP4, or MXFP4 without a global scale."""
    x = rows_of(rows, -(-width // 32) * 32, dtype)[:, :width].contiguous()
    scale = None if global_scale is None else torch.tensor([global_scale])
    inputs = {"input": x, "global_scale": scale}
    done = operator(["fp4_quantize"], "fp4_quantize", x, scale, layout, **inputs, early=["input"])
    packed, scales = done.results
    expected_packed, expected_scales = expected_fp4(x, scale, layout)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(scales, expected_scales)
    assert done.written(packed).all()
    assert done.written(scales).all()
