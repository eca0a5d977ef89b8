"""FlashInfer's quantizers and scale layouts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from quantize_cases import expected, rows_of

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe import formats
from mxfp4_moe.flashinfer_api import SfLayout, quantizers
from mxfp4_moe.problems import bits

BF16 = torch.bfloat16


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


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

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    def test_mxfp4_keeps_poison_in_its_block(self, poison: float) -> None:
        x = self.x(2, 96)
        x[1, 40] = poison
        packed, scales = fi.mxfp4_quantize(x, sfLayout=SfLayout.layout_linear)
        values = fi.mxfp4_dequantize(packed, scales, SfLayout.layout_linear)
        assert values[1, 32:64].isnan().all()
        assert values.isnan().sum() == 32

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda: fi.mxfp8_quantize(torch.zeros(2, 32, dtype=torch.float64)),
                TypeError,
                "input: expected float32 or",
            ),
            (lambda: fi.mxfp8_quantize(half(2, 40)), ValueError, "input: expected a last dimension that is a multiple"),
            (lambda: fi.mxfp8_quantize(half(2, 0)), ValueError, "input: expected a last dimension that is a multiple"),
            (lambda: fi.mxfp8_quantize(half(2, 32), alignment=48), ValueError, "alignment: expected a multiple of 32"),
            (
                lambda: fi.mxfp8_quantize(half(2, 32), alignment="x"),
                TypeError,
                "alignment: expected an integer, got str",
            ),
            (
                lambda: fi.mxfp8_quantize(half(2, 32), backend="cutile"),
                ValueError,
                "backend: expected one of 'cuda', 'c",
            ),
            (
                lambda: fi.mxfp8_quantize(half(2, 32), sf_swizzle_layout=7),
                ValueError,
                "sf_swizzle_layout: expected an S",
            ),
            (
                lambda: fi.mxfp8_dequantize_host(codes(2, 32), codes(2)),
                ValueError,
                r"scale_tensor: expected \[128, 4\] bytes of scales for \[2, 32\] in layout_128x4, got uint8 \[2\]",
            ),
            (
                lambda: fi.mxfp8_dequantize_host(codes(2, 40), codes(2)),
                ValueError,
                "input: expected K a multiple of 32",
            ),
            (lambda: fi.mxfp4_quantize(half(2, 40)), ValueError, r"a: expected \[..., M, K\] with K a multiple of 32"),
            (lambda: fi.mxfp4_quantize(half(32)), ValueError, r"a: expected \[..., M, K\] with K a multiple of 32"),
            (lambda: fi.mxfp4_quantize(half(2, 32), sfLayout=3), ValueError, "sfLayout: expected an SfLayout, got 3"),
            (lambda: fi.mxfp4_quantize(half(2, 32), "x"), ValueError, "backend: expected one of"),
            (lambda: fi.mxfp4_dequantize(codes(2, 16), codes(9)), ValueError, "a_sf: expected"),
            (lambda: fi.mxfp4_dequantize(codes(2, 12), codes(9)), ValueError, "a_fp4: expected K a multiple of 32"),
            (
                lambda: fi.mxfp4_dequantize_host(codes(2, 16), codes(2, 1), 5),
                ValueError,
                "group_size: expected an even",
            ),
            (
                lambda: fi.mxfp4_dequantize_host(codes(2, 16), codes(2, 2)),
                ValueError,
                r"scale: expected uint8 \[2, 1\]",
            ),
            (
                lambda: fi.fp4_quantize(half(2, 32), None, 32, False),
                NotImplementedError,
                "sf_vec_size, sf_use_ue8m0: this library has NVFP4, .* got sf_vec_size=32 with sf_use_ue8m0=False",
            ),
            (
                lambda: fi.fp4_quantize(half(2, 32), torch.full((1,), 2.0), 32, True),
                NotImplementedError,
                "global_scale: this library has no global scales of MXFP4",
            ),
            (
                lambda: fi.fp4_quantize(half(2, 32), None, 32, True, nvfp4_4over6=1),
                ValueError,
                "nvfp4_4over6: expected N",
            ),
            (lambda: fi.fp4_quantize(half(2, 32), None, 32, True, backend="x"), ValueError, "backend: expected one of"),
            (lambda: fi.block_scale_interleave(codes(4)), ValueError, r"unswizzled_sf: expected \[N, K/32\] or \[E, N"),
            (
                lambda: fi.block_scale_interleave(torch.zeros(4, 4)),
                TypeError,
                "unswizzled_sf: expected uint8 or bfloat",
            ),
            (
                lambda: fi.block_scale_interleave(codes(4, 4), out=codes(4)),
                ValueError,
                r"out: expected uint8 \[512\] on cpu, got uint8 \[4\]|out: expected uint8 \[512\], got uint8 \[4\]",
            ),
            (
                lambda: fi.block_scale_interleave(codes(4, 4), out=codes(1024)[::2]),
                ValueError,
                r"out: expected a contiguous tensor, got strides \[2\]",
            ),
        ],
    )
    def test_refuses(self, call: Callable[[], object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^({message})"):
            call()


class TestLayouts:
    """Each against offsets written down one by one, and back."""

    @pytest.mark.parametrize("layout", list(SfLayout))
    @pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
    @pytest.mark.parametrize(("rows", "width", "alignment"), [(1, 32, 32), (9, 160, 64), (130, 96, 128), (0, 64, 32)])
    def test_mxfp8_every_byte(
        self, rows: int, width: int, alignment: int, dtype: torch.dtype, layout: SfLayout
    ) -> None:
        x = rows_of(9, width, dtype).repeat(15, 1)[:rows]
        padded = -(-width // alignment) * alignment
        found, scales = fi.mxfp8_quantize(x, alignment=alignment, sf_swizzle_layout=layout)
        expected_codes, expected_scales = expected(x, padded, int(layout))
        assert found.shape == (rows, padded)
        assert torch.equal(found.view(torch.uint8), expected_codes)
        assert torch.equal(scales, expected_scales)
        if rows:
            values = fi.mxfp8_dequantize_host(found, scales, sf_swizzle_layout=layout)
            linear = fi.mxfp8_quantize(x, False, alignment)[1]
            assert torch.equal(bits(values), bits(fi.mxfp8_dequantize_host(found, linear, False)))

    def test_mxfp8_zeros_keep_their_signs(self) -> None:
        zeros = torch.tensor([0.0, -0.0] * 16)
        found, scales = fi.mxfp8_quantize(zeros.view(1, 32), False)
        assert found.view(torch.uint8).flatten().tolist() == [0, 0x80] * 16
        assert scales.tolist() == [0]
        packed, _ = fi.mxfp4_quantize(zeros.to(BF16).view(1, 32), sfLayout=SfLayout.layout_linear)
        assert packed.flatten().tolist() == [0x80] * 16

    @pytest.mark.parametrize("layout", list(SfLayout))
    def test_mxfp4_of_three_dimensions_is_of_all_rows(self, layout: SfLayout) -> None:
        x = torch.randn(3, 128, 96, generator=torch.Generator().manual_seed(0)).to(BF16)
        packed, scales = fi.mxfp4_quantize(x, sfLayout=layout)
        flat, flat_scales = fi.mxfp4_quantize(x.view(-1, 96), sfLayout=layout)
        assert packed.shape == (3, 128, 48)
        assert torch.equal(packed.view(-1, 48), flat)
        assert torch.equal(scales, flat_scales)
        for expert, part in zip(x, scales.view(3, 128, -1), strict=True):
            assert torch.equal(part, fi.mxfp4_quantize(expert, sfLayout=layout)[1])

    @pytest.mark.parametrize(("swizzled", "short"), [(True, False), (True, True), (False, False)])
    def test_fp4_quantize_is_mxfp4(self, swizzled: bool, short: bool) -> None:
        x = torch.randn(130, 160, generator=torch.Generator().manual_seed(0)).to(BF16)
        layout = SfLayout.layout_linear if not swizzled else SfLayout.layout_8x4 if short else SfLayout.layout_128x4
        packed, scales = fi.mxfp4_quantize(x, sfLayout=layout)
        one = torch.ones(1)
        for given in (None, one):
            found = fi.fp4_quantize(x, given, 32, True, swizzled, short)
            assert torch.equal(found[0], packed)
            assert torch.equal(found[1], scales)
        columns = fi.fp4_quantize(x.contiguous().T, None, 32, True, swizzled, short)
        assert torch.equal(columns[0], packed.T)
        assert torch.equal(columns[1], scales.T)
        values = fi.mxfp4_dequantize(packed, scales, layout)
        linear = fi.mxfp4_quantize(x, sfLayout=SfLayout.layout_linear)[1]
        assert torch.equal(values, fi.mxfp4_dequantize_host(packed, linear))

    def test_mxfp4_dequantize_host_of_other_groups(self) -> None:
        g = torch.Generator().manual_seed(0)
        packed = torch.randint(0, 256, (3, 12), generator=g, dtype=torch.uint8)
        scales = torch.randint(120, 134, (3, 4), generator=g, dtype=torch.uint8)
        values = fi.mxfp4_dequantize_host(packed, scales, 6)
        plain = oracles.e2m1_values(packed.numpy()) * np.repeat(np.exp2(scales.numpy().astype(float) - 127), 6, -1)
        assert (values.numpy() == plain).all()
        assert not values[values == 0].signbit().any()

    @pytest.mark.parametrize("shape", [(130, 5), (3, 130, 5)])
    def test_interleave_bfloat16_and_out(self, shape: tuple[int, ...]) -> None:
        scales = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        flat = fi.block_scale_interleave(scales)
        wide = fi.block_scale_interleave(scales.to(BF16))
        assert wide.dtype is BF16
        assert torch.equal(wide, flat.to(BF16))
        for like in (flat, wide):
            out = torch.full_like(like, 7)
            assert fi.nvfp4_block_scale_interleave(scales.to(like.dtype), out=out) is out
            assert torch.equal(out, like)


class TestInGraphs:
    @pytest.mark.parametrize("layout", list(SfLayout))
    def test_compiled_is_eager_and_one_operator(self, layout: SfLayout) -> None:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        call = torch.compile(
            lambda x: fi.mxfp8_quantize(x, alignment=64, sf_swizzle_layout=layout), backend=backend, fullgraph=True
        )
        x = rows_of(9, 160, BF16)
        for a, b in zip(call(x), fi.mxfp8_quantize(x, alignment=64, sf_swizzle_layout=layout), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        (graph,) = graphs
        assert "quantize_mxfp8" in graph.code

    def test_operator_is_what_torch_wants(self) -> None:
        torch.library.opcheck(quantizers._quantize_mxfp8, (torch.randn(9, 96), 128, 1))  # a NaN is not itself

    def test_gradients_are_refused(self) -> None:
        x = torch.randn(2, 32, requires_grad=True)
        codes_of, _ = fi.mxfp8_quantize(x)
        with pytest.raises(RuntimeError, match="^mxfp8_quantize: no gradient can be computed through it"):
            codes_of.float().sum().backward()
        with torch.no_grad():
            assert not fi.mxfp8_quantize(x)[0].requires_grad
