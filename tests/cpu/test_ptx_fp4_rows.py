"""The kernels of csrc/moe that write rows of MXFP4 and NVFP4, as PTX executed on the CPU: see test_ptx_moe.py."""

from __future__ import annotations

import pytest
import torch
from ptx_fp4_checks import KINDS, check_activation, check_quantize_permute

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "dtype", "tokens"),
    [
        *[(32, torch.bfloat16, 40), (96, torch.float16, 40), (160, torch.bfloat16, 40)],
        (2208, torch.bfloat16, 7),  # a block of the NVFP4 kernels goes around more than once
        (64, torch.float16, 514),  # a thread of the MXFP4 kernel has four tokens
    ],
)
def test_quantize_permute_to_fp4_is_exact(width: int, dtype: torch.dtype, tokens: int, kind: str) -> None:
    check_quantize_permute(width, dtype, tokens, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 96, 160, 1184])
def test_activation_to_fp4_is_exact(width: int, kind: str) -> None:
    check_activation(width, kind)
