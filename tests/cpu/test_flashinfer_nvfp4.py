"""FlashInfer's NVFP4 names: quantizers and their layouts, and the six quant_scales of its MoE call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fp4_oracles
import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import SfLayout

BF16 = torch.bfloat16


def offset(layout: SfLayout, row: int, block: int, blocks: int) -> int:
    """Byte of a scale, from the layouts' definitions."""
    if layout is SfLayout.layout_linear:
        return row * blocks + block
    columns = -(-blocks // 4)
    if layout is SfLayout.layout_8x4:
        return (row // 8 * columns + block // 4) * 32 + row % 8 * 4 + block % 4
    return oracles.scale_offset(row, block, 32 * blocks)


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (130, 80), (128, 128)])
def test_bytes_in_every_layout(layout: SfLayout, dtype: torch.dtype, rows: int, k: int) -> None:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    scale = (448 * 6) / x.float().abs().max()
    packed, scales = fi.nvfp4_quantize(x, scale, layout)
    expected = fp4_oracles.nvfp4_quantize(x.float().numpy(), np.full(rows, scale.numpy()))
    assert np.array_equal(packed.numpy(), expected[0])
    height = {SfLayout.layout_linear: 1, SfLayout.layout_8x4: 8, SfLayout.layout_128x4: 128}[layout]
    columns = k // 16 if layout is SfLayout.layout_linear else -(-k // 64) * 4
    assert scales.shape == (-(-rows // height) * height, columns)
    flat, left = scales.flatten().clone(), 0
    for r in range(rows):
        for c in range(k // 16):
            assert flat[offset(layout, r, c, k // 16)] == expected[1][r, c]
            flat[offset(layout, r, c, k // 16)] = 0
            left += 1
    assert not flat.any(), "padding is zero"
    if layout is SfLayout.layout_128x4:
        linear = fi.nvfp4_quantize(x, scale, SfLayout.layout_linear)[1]
        assert torch.equal(fi.nvfp4_block_scale_interleave(linear), scales.flatten())


@pytest.mark.parametrize(("swizzled", "short"), [(True, False), (True, True), (False, False)])
def test_fp4_quantize_is_nvfp4(swizzled: bool, short: bool) -> None:
    x = torch.randn(130, 160, generator=torch.Generator().manual_seed(0)).to(BF16)
    layout = SfLayout.layout_linear if not swizzled else SfLayout.layout_8x4 if short else SfLayout.layout_128x4
    scale = torch.tensor([64.0])
    packed, scales = fi.nvfp4_quantize(x, 64.0, layout)
    for found in (
        fi.fp4_quantize(x, scale, 16, False, swizzled, short),
        fi.fp4_quantize(x, scale.to(BF16), is_sf_swizzled_layout=swizzled, is_sf_8x4_layout=short, nvfp4_4over6=None),
        fi.fp4_quantize(x, 1 / scale, 16, False, swizzled, short, is_global_scale_inversed=True),
    ):
        assert torch.equal(found[0], packed)
        assert torch.equal(found[1], scales)
    columns = fi.fp4_quantize(x.contiguous().T, scale, 16, False, swizzled, short)
    assert torch.equal(columns[0], packed.T)
    assert torch.equal(columns[1], scales.T)
    one = fi.fp4_quantize(x, None, 16, False, swizzled, short)
    assert torch.equal(one[1], fi.nvfp4_quantize(x, 1.0, layout)[1])
    three = fi.nvfp4_quantize(x.view(2, 65, 160), scale, layout)
    assert three[0].shape == (2, 65, 80)
    assert torch.equal(three[1], scales)


def half(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=BF16)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: fi.nvfp4_quantize(half(2, 40), 1.0),
            ValueError,
            r"a: expected \[\.\.\., M, K\] with K a multiple of 16",
        ),
        (lambda: fi.nvfp4_quantize(half(16), 1.0), ValueError, r"a: expected \[\.\.\., M, K\]"),
        (lambda: fi.nvfp4_quantize(torch.ones(2, 16), 1.0), TypeError, "a: expected bfloat16 or float16"),
        (lambda: fi.nvfp4_quantize(half(2, 16), "1"), TypeError, "a_global_sf: expected a number or a tensor with"),
        (lambda: fi.nvfp4_quantize(half(2, 16), torch.ones(2)), ValueError, "a_global_sf: expected one number, got"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 0.0),
            ValueError,
            "a_global_sf: expected a finite number above 0, got 0",
        ),
        (lambda: fi.nvfp4_quantize(half(2, 16), math.nan), ValueError, "a_global_sf: expected a finite number above 0"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, 7), ValueError, "sfLayout: expected an SfLayout, got 7"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, do_shuffle=True), NotImplementedError, "do_shuffle: this library"),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, sf_vec_size=32), NotImplementedError, "sf_vec_size: this library"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, per_token_activation=True),
            NotImplementedError,
            "per_token_activation: this library's quantizer has no global scales of tokens",
        ),
        (lambda: fi.nvfp4_quantize(half(2, 16), 1.0, out_scale=torch.ones(1)), NotImplementedError, "out_scale: this"),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, nvfp4_4over6=1),
            NotImplementedError,
            "nvfp4_4over6: this library",
        ),
        (
            lambda: fi.nvfp4_quantize(half(2, 16), 1.0, backend="cake"),
            ValueError,
            "backend: expected 'cuda' or 'cute-d",
        ),
        (lambda: fi.fp4_quantize(half(2, 16), torch.ones(2)), ValueError, "global_scale: expected one number"),
        (lambda: fi.fp4_quantize(half(2, 24), torch.ones(1)), ValueError, "input: expected .* multiple of 16"),
        (lambda: fi.fp4_quantize(half(2, 16), nvfp4_4over6=1), NotImplementedError, "nvfp4_4over6: this library"),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
