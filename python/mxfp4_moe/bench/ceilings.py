"""What this GPU can do at best, measured with what torch offers: copy bandwidth, and the rate of dense matmuls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .timing import elapsed_us

_COPY_BYTES = 1 << 30
_MATMUL = 8192


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """10^9 bytes and 10^12 flops per second; None where torch has no such matmul on this GPU."""

    copy_gb_per_s: float  # device-to-device copy, bytes read plus bytes written
    bf16_tflops: float
    f16_tflops: float
    fp8_tflops: float | None  # E4M3 times E4M3, one scale for each tensor

    def as_dict(self) -> dict[str, float | None]:
        return {key: value if value is None else round(value, 1) for key, value in vars(self).items()}


def measure_ceilings(device: torch.device) -> Ceilings:
    """About a second, and 2 GB of the GPU's memory, or less where it has less."""
    return Ceilings(
        copy_gb_per_s=_copy_rate(device),
        bf16_tflops=_matmul_rate(device, torch.bfloat16),
        f16_tflops=_matmul_rate(device, torch.float16),
        fp8_tflops=_fp8_rate(device),
    )


def _copy_rate(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_COPY_BYTES, free // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / elapsed_us(lambda: target.copy_(source), 20).median / 1e3


def _square(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(_MATMUL, _MATMUL, device=device, dtype=torch.bfloat16).to(dtype)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    a, b = _square(device, dtype), _square(device, dtype)
    out = torch.empty_like(a)
    return _tflops(elapsed_us(lambda: torch.mm(a, b, out=out), 10).median)


def _fp8_rate(device: torch.device) -> float | None:
    a, b = (_square(device, torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), dtype=torch.float32, device=device)
    try:
        us = elapsed_us(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16), 10).median
    except (RuntimeError, ValueError, NotImplementedError):  # a GPU or a torch without it
        return None
    return _tflops(us)


def _tflops(us: float) -> float:
    return 2 * _MATMUL**3 / us / 1e6
