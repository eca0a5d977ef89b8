"""The quantizers' kernels on a GPU: csrc/moe/mxfp8_quantize.cu and fp4_quantize.cu, each one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._call import launch
from .._call.transforms import refuse_transforms
from .._install import errors, loading
from .modes import TheirNames


def mxfp8(rows: Tensor, padded_k: int, layout: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, padded K], and scales, flat, of bfloat16, float16 or float32 [R, K]."""
    return _run("mxfp8_quantize", "mxfp8_quantize", rows, padded_k, layout)


def fp4(what: str, rows: Tensor, global_scale: Tensor | None, layout: int) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [R, K/2], and scales, flat, of bfloat16 or float16 [R, K]: NVFP4, or MXFP4 without a scale.

    Args:
        what: the caller's name, for the error.
        global_scale: float32 [] on the same device; nobody waits for it. All scales are NaN unless it is finite and
            above 0.
    """
    refuse_transforms(what, rows)
    given = None if global_scale is None else global_scale.reshape(1)
    return _run("fp4_quantize", what, rows, given, layout)


def _run(operator: str, what: str, rows: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    rows = rows.contiguous()
    if rows.data_ptr() % 16:  # the kernels load vectors
        rows = rows.clone()
    try:
        codes, scales = _operator(operator, rows.device.index)(rows, *args)
    except RuntimeError as error:
        errors.explain(f"{what} cannot run on {rows.device}", error)
        raise
    return codes, scales


@functools.cache
def _operator(operator: str, device_index: int) -> Any:
    """It, once this device is known to be supported."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    with TheirNames():
        launch.check_capability(torch.cuda.get_device_capability(device_index), name)
    return getattr(loading.moe_ops(), operator).default
