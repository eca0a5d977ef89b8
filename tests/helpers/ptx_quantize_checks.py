"""What csrc/moe/mxfp8_quantize.cu must do, executed as SM12x's PTX; as ptx_moe_checks.py for the layer's kernels."""

from __future__ import annotations

import torch
from ptx_moe_checks import operator
from quantize_cases import expected, rows_of


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
