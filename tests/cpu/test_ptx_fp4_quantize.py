"""The drop-in's quantizer to FP4 as PTX executed on the CPU: see test_ptx_moe.py."""

from __future__ import annotations

import pytest
import torch
from ptx import launch
from ptx.running import EXECUTED
from ptx_moe_checks import HALVES, operator
from ptx_quantize_checks import check_fp4_quantize
from quantize_cases import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("global_scale", [None, 0.37])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [(9, 160, torch.bfloat16), (130, 64, torch.float16), (515, 32, torch.bfloat16), (514, 32, torch.float16)],
)
def test_fp4_quantize_is_exact(
    rows: int, width: int, dtype: torch.dtype, global_scale: float | None, layout: int
) -> None:
    """From 513 rows on a lane has several."""
    check_fp4_quantize(rows, width, dtype, layout, global_scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [16, 48, 144, 272])
def test_nvfp4_of_half_blocks_of_32(width: int, layout: int) -> None:
    check_fp4_quantize(9, width, torch.bfloat16, layout, 3.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan, torch.inf, -torch.inf])
def test_a_senseless_global_scale_makes_every_scale_nan(scale: float) -> None:
    """Nobody looks at it on the host, which would wait for the GPU."""
    x, given = torch.randn(3, 32).bfloat16(), torch.tensor([scale])
    done = operator(["fp4_quantize"], "fp4_quantize", x, given, 2, input=x, global_scale=given)
    assert (done.results[1] == 0x7F).all()


@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-149, torch.finfo(torch.float32).max])
def test_nvfp4_of_global_scales_at_the_ends(scale: float) -> None:
    """Of the first two the reciprocal is no number."""
    check_fp4_quantize(9, 32, torch.bfloat16, 0, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 32)}, "input: expected bfloat16 or float16 with 2 dimensions, got float32"),
        ({0: torch.zeros(2, 48).half(), 1: None}, "k: expected a positive multiple of 32, got 48"),
        ({0: torch.zeros(2, 40).half()}, "k: expected a positive multiple of 16, got 40"),
        ({0: torch.zeros(2, 0).half()}, "k: expected a positive multiple of 16, got 0"),
        ({0: torch.zeros(65).half()[1:].view(2, 32)}, "input: expected data aligned to 16 bytes, got 2 bytes past"),
        ({1: torch.zeros(2)}, r"global_scale: expected float32 \[1\]"),
        ({2: 3}, "layout: expected 0 to 2, got 3"),
    ],
)
def test_fp4_quantize_checks_for_itself(change: dict[int, object], message: str) -> None:
    launch.ptx_of_moe("fp4_quantize")
    arguments: dict[int, object] = {0: torch.zeros(2, 32).half(), 1: torch.ones(1), 2: 0}
    assert len(launch.shared_recorder().operator("fp4_quantize", *arguments.values()).launches) == 1
    with pytest.raises(launch.RefusedError, match=message):
        launch.shared_recorder().operator("fp4_quantize", *(arguments | change).values())


def test_fp4_quantize_of_no_rows_launches_nothing() -> None:
    recording = launch.shared_recorder().operator("fp4_quantize", torch.zeros(0, 64).half(), None, 0)
    packed, scales = recording.results
    assert not recording.launches
    assert packed.shape == (0, 32)
    assert scales.shape == (0,)


def test_every_kernel_was_executed(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or any("::" in word for word in request.config.args):
        pytest.skip("says something only where all tests of this file ran before it")
    kernels = set(launch.entries(launch.ptx_of_moe("fp4_quantize")))
    assert kernels - EXECUTED == set()
    assert len(kernels) == 4 * len(HALVES)
