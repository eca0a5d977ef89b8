"""The drop-in's quantizers beside FlashInfer's arithmetic, bit by bit: where they are the same, and where not.

flashinfer_arithmetic.py has that arithmetic; FlashInfer's own kernels need a GPU that is not here.
"""

from __future__ import annotations

import flashinfer_arithmetic as theirs
import numpy as np
import pytest
import torch

from mxfp4_moe import flashinfer_api as fi
from mxfp4_moe.flashinfer_api import SfLayout

DTYPES = [torch.bfloat16, torch.float16]
FLAT = SfLayout.layout_linear


def blocks_of_every_amax(dtype: torch.dtype) -> torch.Tensor:
    """[N, 32]: each finite magnitude of the dtype once the largest, beside values of all sizes below, of both signs."""
    info = torch.finfo(dtype)
    amax = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    amax = amax[amax.isfinite()].float()
    g = torch.Generator().manual_seed(0)
    parts = torch.rand(len(amax), 32, generator=g) * torch.randint(-30, 1, (len(amax), 32), generator=g).exp2()
    signs = torch.randint(0, 2, (len(amax), 32), generator=g) * 2.0 - 1
    x = (parts * amax[:, None]).to(dtype).float() * signs
    x[:, 5], x[:, 6] = amax, torch.where(amax == info.max, 0.0, -0.0)
    return x.to(dtype)


def ours_mxfp8(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = fi.mxfp8_quantize(x, sf_swizzle_layout=FLAT)
    return codes.view(torch.uint8).numpy(), scales.numpy()


def ours_mxfp4(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    packed, scales = fi.mxfp4_quantize(x, sfLayout=FLAT)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).numpy(), scales.flatten().numpy()


def has_subnormals(values: np.ndarray) -> np.ndarray:
    """Of each block, whether fp32 has one of its values as a subnormal."""
    return ((values != 0) & (np.abs(values) < 2.0**-126)).any(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp8_is_the_same(dtype: torch.dtype) -> None:
    x = blocks_of_every_amax(dtype)
    values = x.float().numpy()
    amax = np.abs(values).max(-1)
    codes, scales = ours_mxfp8(x)
    same = ~has_subnormals(values) & ((amax >= 448 * 2.0**-126) | (amax == 0))
    assert same.mean() > 0.85
    below, exact, above = theirs.near(448)
    for rcp in (below, exact):
        their_codes, their_scales = theirs.mxfp8(values, rcp)
        assert (scales == their_scales)[same].all()
        assert (codes == their_codes)[same].all()
    # If rcp.approx rounded 1/448 up once more, amax = 448 * 2^e would get the next scale, and no other would change.
    their_codes, their_scales = theirs.mxfp8(values, above)
    other = (scales != their_scales) & same
    assert (np.frexp(amax[other])[0] == 448 / 512).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp8_zeros(dtype: torch.dtype) -> None:
    zeros = torch.tensor([[0.0, -0.0] * 16, [-0.0] * 32, [0.0] * 32]).to(dtype)
    codes, scales = ours_mxfp8(zeros)
    their_codes, their_scales = theirs.mxfp8(zeros.float().numpy(), theirs.near(448)[1])
    assert (codes == their_codes).all()
    assert (scales == their_scales).all()
    assert (codes == 0x80).sum() == 48


def test_mxfp8_differs_on_purpose() -> None:
    """Subnormals are numbers here, and what is not finite stays so."""
    x = torch.full((4, 32), 2.0**-120, dtype=torch.bfloat16)  # amax below 448 * 2^-127
    x[1] = 2.0**-118  # between there and 448 * 2^-126
    x[2], x[2, 0] = 2.0**-127, 2.0**-110  # one large value among subnormals
    x[3, 0] = torch.inf
    codes, scales = ours_mxfp8(x)
    their_codes, their_scales = theirs.mxfp8(x.float().numpy(), theirs.near(448)[1])
    decoded = fi.mxfp8_dequantize_host(torch.from_numpy(codes), torch.from_numpy(scales), False)
    assert torch.equal(decoded[0], x[0].float())
    assert not their_codes[0].any()
    assert torch.equal(decoded[1], x[1].float())
    assert not their_codes[1].any()
    assert their_scales.tolist()[:2] == [0, 0]
    assert scales.tolist()[:2] == [0, 1]
    assert (codes[2, 1:] == 1).all()
    assert not their_codes[2, 1:].any()
    assert decoded[3].isnan().all()
    assert their_codes[3, 0] == 0x7E
    assert not their_codes[3, 1:].any()
    nan = torch.full((1, 32), 1.0, dtype=torch.bfloat16)
    nan[0, 3] = torch.nan
    assert (ours_mxfp8(nan)[0] == 0x7F).all()
    assert theirs.mxfp8(nan.float().numpy(), theirs.near(448)[1])[0][0, 3] == 0x7E


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_the_same(dtype: torch.dtype) -> None:
    x = blocks_of_every_amax(dtype)
    values = x.float().numpy()
    amax = np.abs(values).max(-1)
    codes, scales = ours_mxfp4(x)
    same = ~has_subnormals(values) & ((amax >= 6 * 2.0**-126) | (amax == 0))
    assert same.mean() > 0.85
    below, exact, above = theirs.near(6)
    for rcp in (below, exact):
        their_codes, their_scales = theirs.mxfp4(values, rcp)
        assert (scales == their_scales)[same].all()
        assert (codes == their_codes)[same].all()
    other = (scales != theirs.mxfp4(values, above)[1]) & same
    assert (np.frexp(amax[other])[0] == 0.75).all()
