"""FlashInfer's quantizers and scale layouts."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe import formats
from mxfp4_moe.flashinfer_api import SfLayout

BF16 = torch.bfloat16


class TestQuantizers:
    def x(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        g = torch.Generator().manual_seed(2)
        return (torch.randn(*shape, generator=g) * torch.exp2(torch.randint(-9, 9, shape, generator=g))).to(dtype)

    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    @pytest.mark.parametrize("shape", [(130, 96), (1, 32), (0, 64), (2, 5, 160)])
    def test_mxfp8(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        x = self.x(*shape, dtype=dtype)
        codes, scales = oracles.mxfp8_quantize(x.float().numpy())
        ours, linear = fi.mxfp8_quantize(x, False)
        assert ours.dtype == torch.float8_e4m3fn
        assert ours.shape == shape
        assert (ours.view(torch.uint8).numpy() == codes).all()
        assert linear.shape == (scales.size,)
        assert (linear.numpy() == scales.ravel()).all()
        again, swizzled = fi.mxfp8_quantize(x)
        assert torch.equal(again.view(torch.uint8), ours.view(torch.uint8))
        rows = x.numel() // shape[-1]
        assert swizzled.shape == (-(-rows // 128) * 128 * -(-shape[-1] // 128) * 4,)
        for layout, stored in ((True, swizzled), (False, linear)):
            values = fi.mxfp8_dequantize_host(ours.view(rows, shape[-1]), stored, layout)
            assert values.dtype == torch.float32
            assert (values.numpy() == oracles.mxfp8_values(codes, scales).reshape(rows, shape[-1])).all()

    def test_mxfp8_alignment_pads_with_zeros(self) -> None:
        x = self.x(3, 96)
        codes, scales = fi.mxfp8_quantize(x, False, 128)
        assert codes.shape == (3, 128)
        assert scales.shape == (12,)
        plain, plain_scales = fi.mxfp8_quantize(x, sf_swizzle_layout=SfLayout.layout_linear)
        assert torch.equal(codes[:, :96].view(torch.uint8), plain.view(torch.uint8))
        assert not codes[:, 96:].view(torch.uint8).any()
        assert torch.equal(scales.view(3, 4)[:, :3].flatten(), plain_scales)
        assert not scales.view(3, 4)[:, 3].any()

    @pytest.mark.parametrize("layout", [SfLayout.layout_128x4, SfLayout.layout_linear])
    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    def test_mxfp4(self, layout: SfLayout, dtype: torch.dtype) -> None:
        """The scale is the smallest power of two that keeps amax / scale at 6 or below, so each value is nearest."""
        x = self.x(130, 160, dtype=dtype)
        x[3] = 0
        x[4, :32] = -6 * 2.0**-3
        packed, scales = fi.mxfp4_quantize(x, sfLayout=layout)
        assert packed.dtype == scales.dtype == torch.uint8
        assert packed.shape == (130, 80)
        assert scales.shape == ((256, 8) if layout is SfLayout.layout_128x4 else (130, 5))
        plain = (
            scales if layout is SfLayout.layout_linear else formats.unswizzle_scales(scales.view(2, 2, 512), 130, 160)
        )
        amax = x.float().unflatten(-1, (-1, 32)).abs().amax(-1).numpy()
        scale = np.exp2(plain.numpy().astype(np.float64) - 127)
        assert (amax <= 6 * scale).all()
        assert ((amax > 3 * scale) | (amax == 0)).all()
        assert plain[4, 0] == 127 - 3
        values = fi.mxfp4_dequantize(packed, scales, layout)
        assert values.dtype == torch.float32
        assert (values.numpy() == oracles.mxfp4_values(packed.numpy(), plain.numpy())).all()
        steps = np.repeat(scale, 32, -1)
        magnitude = np.abs(x.float().numpy()) / steps
        spacing = np.select([magnitude <= 2, magnitude <= 4], [0.5, 1.0], 2.0)
        assert (np.abs(values.numpy() - x.float().numpy()) <= steps * spacing / 2).all()
        assert not packed[3].any()

    @pytest.mark.parametrize("shape", [(130, 5), (3, 130, 5), (1, 4)])
    def test_block_scale_interleave(self, shape: tuple[int, ...]) -> None:
        scales = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        flat = fi.block_scale_interleave(scales)
        experts = scales.view(-1, *shape[-2:])
        per_expert = flat.view(len(experts), -1)
        assert per_expert.shape[1] == -(-shape[-2] // 128) * 128 * -(-shape[-1] // 4) * 4
        for e, row, block in np.ndindex(*experts.shape):
            assert per_expert[e, oracles.scale_offset(row, block, 32 * shape[-1])] == experts[e, row, block]

    def test_refuses(self) -> None:
        with pytest.raises(TypeError, match="input: expected bfloat16 or float16 tensor, got float32"):
            fi.mxfp8_quantize(torch.zeros(2, 32))
        with pytest.raises(ValueError, match="input: expected a last dimension that is a multiple of 32"):
            fi.mxfp8_quantize(torch.zeros(2, 40, dtype=BF16))
        with pytest.raises(ValueError, match="alignment: expected a multiple of 32, got 48"):
            fi.mxfp8_quantize(torch.zeros(2, 32, dtype=BF16), alignment=48)
        with pytest.raises(NotImplementedError, match="sf_swizzle_layout: layout_8x4 is not in this library"):
            fi.mxfp8_quantize(torch.zeros(2, 32, dtype=BF16), sf_swizzle_layout=SfLayout.layout_8x4)
        with pytest.raises(ValueError, match=r"scale_tensor: expected \[1, 1, 512\] bytes of scales for \[2, 32\]"):
            fi.mxfp8_dequantize_host(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8))
        with pytest.raises(ValueError, match="a: expected finite values"):
            fi.mxfp4_quantize(torch.full((2, 32), torch.inf, dtype=BF16))
        with pytest.raises(ValueError, match="a: expected K a multiple of 32"):
            fi.mxfp4_quantize(torch.zeros(2, 40, dtype=BF16))
        with pytest.raises(ValueError, match="sfLayout: expected an SfLayout, got 3"):
            fi.mxfp4_quantize(torch.zeros(2, 32, dtype=BF16), sfLayout=3)
        with pytest.raises(ValueError, match=r"unswizzled_sf: expected uint8 \[N, K/32\] or \[E, N, K/32\], got uint8"):
            fi.block_scale_interleave(torch.zeros(4, dtype=torch.uint8))
