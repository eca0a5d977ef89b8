"""The kernels of csrc/moe that write rows of MXFP4 and NVFP4, as PTX executed on the CPU: see test_ptx_moe.py."""

from __future__ import annotations

import pytest
import torch
from fp4_cases import KINDS
from ptx import launch
from ptx.running import EXECUTED
from ptx_fp4_checks import check_activation, check_activation_is_close, check_e2m1, check_quantize_permute

from mxfp4_moe.activations import Activation

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("arch", ["120f", "90a"])
def test_conversions_to_e2m1_are_exact(arch: str) -> None:
    """SM12x has an instruction for it; SM90 computes the same."""
    check_e2m1(arch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "dtype", "tokens"),
    [
        *[(32, torch.bfloat16, 40), (96, torch.float16, 40), (160, torch.bfloat16, 40)],
        (2208, torch.bfloat16, 7),  # a block of the NVFP4 kernels goes around more than once
    ],
)
def test_quantize_permute_to_fp4_is_exact(width: int, dtype: torch.dtype, tokens: int, kind: str) -> None:
    check_quantize_permute(width, dtype, tokens, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 96, 160, 1184])
def test_activation_to_fp4_is_exact(width: int, kind: str) -> None:
    check_activation(width, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_permute_to_fp4_reads_hidden_states_while_route_runs(kind: str) -> None:
    check_quantize_permute(32, torch.float16, 12, kind, behind_route=True)


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (32, torch.bfloat16)])
def test_more_tokens_to_mxfp4(width: int, dtype: torch.dtype) -> None:
    """From 513 tokens on a thread has four."""
    check_quantize_permute(width, dtype, 514, "mxfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_sm90_makes_the_same_rows(kind: str) -> None:
    check_quantize_permute(96, torch.bfloat16, 20, kind, arch="90a")
    check_activation(96, kind, arch="90a", most=1)


@pytest.mark.parametrize("kind", KINDS)
def test_sm90_reads_the_values_in_bf16(kind: str) -> None:
    """Codes times scales, signs of zeros, infinities beyond bfloat16 and poison among them."""
    for width, dtype, tokens in ((32, torch.bfloat16, 40), (96, torch.float16, 40), (160, torch.bfloat16, 40)):
        check_quantize_permute(width, dtype, tokens, kind, arch="90a", folded=True)
    check_quantize_permute(2208, torch.bfloat16, 5, kind, arch="90a", folded=True)
    for width in (32, 96, 160):
        check_activation(width, kind, arch="90a", folded=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", HALVES)
def test_activation_is_rounded_before_fp4(rounding: torch.dtype, kind: str) -> None:
    check_activation(96, kind, activation="relu", rounding=rounding, bias=True, most=1)


@pytest.mark.parametrize("activation", [a.value for a in Activation])
def test_activation_to_nvfp4_is_close(activation: str) -> None:
    """An exp's last bits move a code to its neighbour, and a block's scale to its own, and nothing else."""
    check_activation_is_close(activation)


def test_every_kernel_was_executed(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or any("::" in word for word in request.config.args):
        pytest.skip("says something only where all tests of this file ran before it")
    units = ("quantize_permute", "nvfp4_permute", "fp4_activation")
    kernels = {kernel for unit in units for kernel in launch.entries(launch.ptx_of_moe(unit))}
    kernels = {
        kernel for kernel in kernels if "quantize_permute_kernel" not in kernel or "RowKindE1E" in kernel
    }  # MXFP4's
    assert kernels - EXECUTED == set()
    assert len(kernels) == 4 + 2 + len(Activation)


@pytest.mark.ptx_full
@pytest.mark.parametrize("arch", ["120f", "90a"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 64, 96, 128, 160, 1056, 2080])
def test_more_rows_of_fp4(width: int, kind: str, arch: str) -> None:
    check_activation(width, kind, arch=arch, activation="relu2", bias=True, most=20)
    for dtype in HALVES:
        check_quantize_permute(width, dtype, 60 if width < 1000 else 20, kind, arch)
