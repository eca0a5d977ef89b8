"""FlashInfer's NVFP4 quantizer, by its names: `formats.quantize_nvfp4` in the layouts that its callers want.

On the GPU one kernel, elsewhere plain torch. What differs from FlashInfer on purpose is said in `formats.nvfp4`:
reciprocals are rounded to nearest, and a NaN or an infinity makes its block of 16 NaN.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from .._arguments import describe, require_tensor
from .._call.transforms import in_graph
from .._torch_state import exact
from ..formats import NVFP4_BLOCK, quantize_nvfp4
from . import quantize_kernels
from .scale_layouts import SfLayout, padded_blocks, sf_layout, store_scales

HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *HALVES)


class Omitted(Enum):
    """For an argument that FlashInfer tells from None."""

    OMITTED = 0


OMITTED = Omitted.OMITTED


@exact
def nvfp4_quantize(
    a: Tensor,
    a_global_sf: Tensor | float,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: Tensor | None = None,
    out_scale: Tensor | None = None,
    nvfp4_4over6: object = OMITTED,
) -> tuple[Tensor, Tensor]:
    """NVFP4: packed E2M1 codes and one E4M3 scale per 16 values, under a global scale.

    On the GPU one kernel, which a CUDA graph captures, if the global scale is a tensor there.

    Args:
        a: bfloat16 or float16 [M, K], K a multiple of 16; or [..., M, K], whose leading dimensions are more rows, in
            the scales too.
        a_global_sf: a number, or float32, bfloat16 or float16 with one: 2688 / amax of the tensor.
        sfLayout: layout of the scales.
        sf_vec_size: 16.
        enable_pdl, backend: taken and not needed; "cuda" or "cute-dsl".
        others: modes that are not here; anything but their defaults is refused.

    Returns:
        packed uint8 [..., M, K/2] (low nibble = even k), scales uint8 [rows padded to 128 (or 8), K/16 padded to 4]
        swizzled, or [rows, K/16] linear; on the device of a (FlashInfer moves them to the GPU).

    Raises:
        NotImplementedError: a mode that is not here.
        TypeError, ValueError: another type, dtype or shape; a global scale that is not finite and above 0, if it is not
            on a GPU, where nobody waits for it and all scales become NaN; a layout or a backend that FlashInfer does
            not have.
        RuntimeError: as `mxfp8_quantize`.
    """
    for name, asked, what in (
        ("do_shuffle", do_shuffle, "TensorRT-LLM's shuffled rows"),
        ("per_token_activation", per_token_activation, "global scales of tokens"),
        ("expanded_idx_to_permuted_idx", expanded_idx_to_permuted_idx is not None, "global scales of tokens"),
        ("out_scale", out_scale is not None, "global scales of tokens"),
        ("sf_vec_size", sf_vec_size != NVFP4_BLOCK, "NVFP4 with other blocks than 16"),
    ):
        if asked:
            raise NotImplementedError(f"{name}: this library's quantizer has no {what}; leave it at its default")
    if backend not in ("cuda", "cute-dsl"):
        raise ValueError(f"backend: expected 'cuda' or 'cute-dsl', got {backend!r}")
    refuse_4over6(nvfp4_4over6)
    if not isinstance(a_global_sf, Tensor):
        if isinstance(a_global_sf, bool) or not isinstance(a_global_sf, (int, float)):
            raise TypeError(f"a_global_sf: expected a number or a tensor with one, got {type(a_global_sf).__name__}")
        a_global_sf = torch.tensor(a_global_sf, dtype=torch.float32, device="cpu")
    return quantized("a", a, "a_global_sf", a_global_sf, False, sf_layout("sfLayout", sfLayout), "nvfp4_quantize")


def quantized(
    name: str, x: Tensor, of_scale: str, global_scale: Tensor | None, inverse: bool, layout: SfLayout, what: str
) -> tuple[Tensor, Tensor]:
    """`nvfp4_quantize`, by the names of whoever asks.

    Args:
        global_scale: one number; None for 1.
        inverse: whether its reciprocal is meant.
        what: the caller's own name.
    """
    require_tensor(name, x, HALVES)
    if x.dim() < 2 or x.shape[-1] == 0 or x.shape[-1] % NVFP4_BLOCK:
        raise ValueError(f"{name}: expected [..., M, K] with K a multiple of {NVFP4_BLOCK}, got {describe(x)}")
    if global_scale is None:
        scale = torch.ones((), dtype=torch.float32, device=x.device)
    else:
        require_tensor(of_scale, global_scale, _FLOATS)
        if global_scale.numel() != 1:
            raise ValueError(f"{of_scale}: expected one number, got {describe(global_scale)}")
        scale = global_scale.detach().to(torch.float32).reshape(())
        scale = scale.reciprocal() if inverse else scale
    rows, in_kernel = x.detach().reshape(-1, x.shape[-1]), x.is_cuda and not in_graph(x)
    if not (in_kernel and scale.is_cuda) and not bool(scale.isfinite() & (scale > 0)):
        raise ValueError(f"{of_scale}: expected a finite number above 0, got {scale.item():g}")
    scale = scale.to(x.device)
    if in_kernel:
        packed, stored = quantize_kernels.fp4(what, rows, scale, int(layout))
    else:
        packed, scales = quantize_nvfp4(rows, scale)
        stored = store_scales(scales, layout)
    return packed.view(*x.shape[:-1], x.shape[-1] // 2), stored.view(
        -1, padded_blocks(x.shape[-1] // NVFP4_BLOCK, layout)
    )


def refuse_4over6(recipe: object) -> None:
    """FlashInfer's search for a better scale of each block, 6 or 4 for the largest value, is not here."""
    if recipe is not OMITTED and recipe is not None:
        raise NotImplementedError(
            f"nvfp4_4over6: this library has NVFP4's own recipe only, which is None, got {recipe!r}; leave it out"
        )
