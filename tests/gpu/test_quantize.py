"""The drop-in's quantizers on a GPU: every byte, in graphs, and how many kernels each is."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import ops
from quantize_cases import LAYOUTS, expected, expected_fp4, rows_of

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import SfLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def poison_allocator(rows: int, device: torch.device) -> None:
    """What the allocator hands out next was written to."""
    poison = [torch.full((rows * 4096,), 0xAB, dtype=torch.uint8, device=device) for _ in range(2)]
    del poison


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "padded"),
    [(1, 32, 32), (1, 2880, 2944), (9, 96, 256), (64, 2880, 2880), (130, 160, 160), (515, 128, 128), (700, 2880, 3072)],
)
def test_every_byte(rows: int, width: int, padded: int, dtype: torch.dtype, layout: int, device: torch.device) -> None:
    x = rows_of(rows, width, dtype)
    poison_allocator(rows, device)
    codes, scales = ops().mxfp8_quantize(x.to(device), padded, layout)
    expected_codes, expected_scales = expected(x, padded, layout)
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_call_is_the_same_on_cpu_and_gpu(dtype: torch.dtype, layout: SfLayout, device: torch.device) -> None:
    x = rows_of(131, 160, dtype).view(131, 5, 32)
    here, there = (fi.mxfp8_quantize(x.to(where), alignment=64, sf_swizzle_layout=layout) for where in ("cpu", device))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8).cpu())


def test_more_rows_than_a_grid_has(device: torch.device) -> None:
    """Rows past 65535 groups of four, and none at all."""
    rows = 4 * 65535 + 9
    x = rows_of(9, 32, torch.bfloat16).repeat(-(-rows // 9), 1)[:rows].contiguous().to(device)
    codes, scales = ops().mxfp8_quantize(x, 32, 2)
    expected_codes, expected_scales = expected(x[:9], 32, 2)
    assert torch.equal(codes.cpu(), expected_codes.repeat(-(-rows // 9), 1)[:rows])
    assert torch.equal(scales.cpu(), expected_scales.repeat(-(-rows // 9))[:rows])
    codes, scales = fi.mxfp8_quantize(x[:0])
    assert codes.shape == (0, 32)
    assert scales.numel() == 0


def test_in_a_graph(device: torch.device) -> None:
    x = rows_of(33, 96, torch.bfloat16).to(device)
    fi.mxfp8_quantize(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = fi.mxfp8_quantize(x)
    x.copy_(x.flip(0))
    codes.view(torch.uint8).fill_(0xAB)
    scales.fill_(0xAB)
    graph.replay()
    expected_codes, expected_scales = expected(x, 96, 0)
    assert torch.equal(codes.view(torch.uint8).cpu(), expected_codes)
    assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("layout", list(SfLayout))
def test_one_launch(layout: SfLayout, device: torch.device) -> None:
    x = rows_of(33, 96, torch.bfloat16).to(device)
    fi.mxfp8_quantize(x, sf_swizzle_layout=layout)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        fi.mxfp8_quantize(x, sf_swizzle_layout=layout)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "mxfp8_quantize_kernel" in kernels[0]


# ---- FP4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("global_scale", [None, 1.0, 0.37, 2.0**-130])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (9, 160), (64, 288), (130, 64), (515, 96)])
def test_every_byte_of_fp4(
    rows: int, width: int, dtype: torch.dtype, global_scale: float | None, layout: int, device: torch.device
) -> None:
    x = rows_of(rows, width, dtype)
    scale = None if global_scale is None else torch.tensor([global_scale])
    poison_allocator(rows, device)
    made = ops().fp4_quantize(x.to(device), None if scale is None else scale.to(device), layout)
    for actual, wanted in zip(made, expected_fp4(x, scale, layout), strict=True):
        assert torch.equal(actual.cpu(), wanted)


@pytest.mark.parametrize("layout", list(SfLayout))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp4_calls_are_the_same_on_cpu_and_gpu(dtype: torch.dtype, layout: SfLayout, device: torch.device) -> None:
    x, scale = rows_of(131, 160, dtype).view(131, 5, 32), torch.tensor(2.5)
    linear, short = layout is SfLayout.layout_linear, layout is SfLayout.layout_8x4
    for call in (
        lambda x: fi.mxfp4_quantize(x, sfLayout=layout),
        lambda x: fi.nvfp4_quantize(x, scale.to(x.device), sfLayout=layout),
        lambda x: fi.nvfp4_quantize(x, 2.5, sfLayout=layout),
        lambda x: fi.fp4_quantize(x, scale.to(x.device), 16, False, not linear, short, True),
        lambda x: fi.fp4_quantize(x, None, 32, True, not linear, short),
    ):
        for a, b in zip(call(x), call(x.to(device)), strict=True):
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("nvfp4", [False, True])
def test_fp4_in_a_graph_is_one_launch(nvfp4: bool, device: torch.device) -> None:
    x, scale = rows_of(33, 96, torch.bfloat16).to(device), torch.tensor(2.5, device=device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return fi.nvfp4_quantize(x, scale) if nvfp4 else fi.mxfp4_quantize(x)

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    assert "fp4_quantize_kernel" in kernels[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    x.copy_(x.flip(0))
    for tensor in made:
        tensor.fill_(0xAB)
    graph.replay()
    wanted_packed, wanted_scales = expected_fp4(x, scale if nvfp4 else None, 0)
    assert torch.equal(made[0].cpu(), wanted_packed)
    assert torch.equal(made[1].flatten().cpu(), wanted_scales)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_global_scale_on_the_gpu_makes_every_scale_nan(scale: float, device: torch.device) -> None:
    x = rows_of(9, 32, torch.bfloat16).to(device)
    _, scales = fi.nvfp4_quantize(x, torch.tensor(scale, device=device), sfLayout=SfLayout.layout_linear)
    assert (scales == 0x7F).all()
