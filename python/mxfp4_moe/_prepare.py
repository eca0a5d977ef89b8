"""Weights on their way into the kernels' layout and back: where an expert's rows come from, and how they are written.

A `Source` gives the rows of one expert as MXFP4, whatever they are stored as; `prepare` writes them as the kernels read
them. Rows pass in a few pieces per expert, so that the scratch for quantizing and moving bits stays small.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .formats import BLOCK, quantize_mxfp4, rotate_words, swizzle_scales, unrotate_words, unswizzle_scales

Rows = Callable[[Tensor], tuple[Tensor, Tensor]]  # row numbers [n] -> packed [n, K/2], scales [n, K/32]
Source = Callable[[int, int, int], Rows]  # (expert, first k, past the last k) -> the rows of that expert

WEIGHT_SCALE_MAX = 253  # csrc/tile/mma_mx.cuh doubles weight scales on their way
_PIECES = 8  # per expert: quantizing needs up to 25 bytes of scratch per value
_PROGRESS_AFTER_S = 2.0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- sources: where an expert's rows come from -----------------------------------------------------------------------


def mxfp4_source(name: str, packed: Callable[[int], Tensor], scales: Callable[[int], Tensor]) -> Source:
    """Of packed [N, K/2] or [N, K/32, 16] and scales [N, K/32] per expert; name is that of the scales."""

    def expert(e: int, begin: int, end: int) -> Rows:
        expert_scales = scales(e)
        _refuse_scales(name, expert_scales, e)
        blocks = packed(e).flatten(1)[:, begin // 2 : end // 2]
        expert_scales = expert_scales[:, begin // BLOCK : end // BLOCK]
        return lambda rows: (blocks[rows], expert_scales[rows])

    return expert


def float_source(name: str, weight: Tensor) -> Source:
    def expert(e: int, begin: int, end: int) -> Rows:
        values = weight[e][:, begin:end]

        def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
            try:
                return quantize_mxfp4(values[rows])
            except ValueError as error:  # dtype and shape are known to be right
                raise ValueError(f"{name}: expected finite values, got NaN or infinity in expert {e}") from error

        return quantize

    return expert


def flashinfer_source(name: str, words: Tensor, swizzled: Tensor, n: int, k: int) -> Source:
    packed = words.view(torch.uint8)
    tiles = swizzled.view(torch.uint8).view(len(swizzled), ceil_div(n, 128), ceil_div(k, 128), 512)
    return mxfp4_source(name, packed.__getitem__, lambda e: unswizzle_scales(tiles[e], n, k))


def _refuse_scales(name: str, scales: Tensor, expert: int) -> None:
    """255 is no number; a weight under 2^127 (254) is infinite in bfloat16, and on SM90 the kernels have no room for it."""
    if bool((scales > WEIGHT_SCALE_MAX).any()):
        row, block = (scales > WEIGHT_SCALE_MAX).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected E8M0 bytes 0..{WEIGHT_SCALE_MAX} (2^126), got {int(scales[row, block])} at "
            f"[{expert}, {row}, {block}]"
        )


# ---- preparing one expert, and back ----------------------------------------------------------------------------------


def empty(experts: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    packed = torch.empty((experts, n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((experts, ceil_div(n, 128), ceil_div(k, 128), 512), dtype=torch.uint8, device=device)
    return packed, scales


def prepare(source: Rows, rows: Tensor, packed: Tensor, swizzled: Tensor) -> None:
    """Writes one expert: prepared row i is the source's row rows[i]."""
    n, half_k = packed.shape
    scales = torch.empty((n, half_k // 16), dtype=torch.uint8, device=packed.device)
    for piece in _pieces(n):
        plain, scales[piece] = source(rows[piece])
        packed[piece] = rotate_words(plain)
    swizzled.copy_(swizzle_scales(scales))


def restore(prepared: Tensor, prepared_scales: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `prepare` for all experts: plain row i is the prepared row rows[i]."""
    experts, n, half_k = prepared.shape
    packed = torch.empty_like(prepared)
    scales = torch.empty((experts, n, half_k // 16), dtype=torch.uint8, device=prepared.device)
    for e in range(experts):
        scales[e] = unswizzle_scales(prepared_scales[e], n, half_k * 2)[rows]
        for piece in _pieces(n):
            packed[e, piece] = unrotate_words(prepared[e][rows[piece]])
    return packed, scales


def _pieces(n: int) -> Iterator[slice]:
    step = ceil_div(n, _PIECES)
    return (slice(begin, min(begin + step, n)) for begin in range(0, n, step))


def slice_scales(swizzled: Tensor, n: int, k: int, rows: slice, blocks: slice) -> Tensor:
    """Swizzled scales [E, ...] of n rows and K = k -> those of some rows and k-blocks, swizzled anew."""
    parts = [swizzle_scales(unswizzle_scales(expert, n, k)[rows, blocks]) for expert in swizzled]
    return torch.stack(parts)


def with_progress(experts: int) -> Iterator[int]:
    """0 .. experts - 1, with a bar on a terminal's stderr once that takes longer than two seconds."""
    start, shown = time.monotonic(), False
    terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        for e in range(experts):
            yield e
            if terminal and time.monotonic() - start > _PROGRESS_AFTER_S:
                bar = "#" * (30 * (e + 1) // experts)
                print(f"\rMoE weights [{bar:<30}] {e + 1}/{experts} experts", end="", file=sys.stderr, flush=True)
                shown = True
    finally:
        if shown:
            print(file=sys.stderr)
