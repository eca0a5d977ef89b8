"""Weights into the kernels' layout and back, expert by expert.

Rows pass in a few pieces per expert, so that the scratch for quantizing and moving bits stays small.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import WEIGHT_BLOCK_ROWS, WeightFormat, WordOrder
from .sources import Rows, ceil_div

_PIECES = 8  # per expert: quantizing needs up to 25 bytes of scratch per value
_PROGRESS_AFTER_S = 2.0
_MXFP4 = WeightFormat.MXFP4


def empty(experts: int, n: int, k: int, device: torch.device, kind: WeightFormat = _MXFP4) -> Tensor:
    return torch.empty((experts, kind.weight_bytes(n, k)), dtype=torch.uint8, device=device)


def prepare(source: Rows, rows: Tensor, k: int, order: WordOrder, weight: Tensor, kind: WeightFormat = _MXFP4) -> None:
    """Writes one expert: prepared row i is the source's row rows[i]."""
    n = len(rows)
    for piece in pieces_of(n):
        # Where an expert has few blocks, quantizing takes smaller steps yet.
        parts = [source(rows[some]) for some in _spans(piece.start, piece.stop, ceil_div(n, _PIECES))]
        packed, scales = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        del parts
        kind.write_rows(weight, n, k, piece.start, packed, scales, order)


def restore(
    weight: Tensor, rows: Tensor, k: int, order: WordOrder, kind: WeightFormat = _MXFP4
) -> tuple[Tensor, Tensor]:
    """The inverse of `prepare` for all experts: plain row rows[i] is the prepared row i."""
    experts, n = len(weight), len(rows)
    packed = torch.empty((experts, n, k // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((experts, n, k // kind.block), dtype=torch.uint8, device=weight.device)
    for e in range(experts):
        for piece in pieces_of(n):
            packed[e, rows[piece]], scales[e, rows[piece]] = kind.read_rows(weight[e], n, k, piece, order)
    return packed, scales


def cut(
    weight: Tensor, n: int, k: int, order: WordOrder, rows: slice, columns: slice, kind: WeightFormat = _MXFP4
) -> Tensor:
    """Prepared weights of all experts -> those of some rows and some k (whole blocks), prepared anew."""
    size, width = len(range(n)[rows]), len(range(k)[columns])
    result = empty(len(weight), size, width, weight.device, kind)
    bytes_ = slice(columns.start // 2, columns.stop // 2)
    blocks = slice(columns.start // kind.block, columns.stop // kind.block)
    for e in range(len(weight)):
        packed, scales = kind.read_rows(weight[e], n, k, slice(0, n), order)
        kind.write_rows(result[e], size, width, 0, packed[rows, bytes_], scales[rows, blocks], order)
    return result


def move(
    weight: Tensor,
    device: torch.device,
    n: int,
    k: int,
    old: WordOrder,
    new: WordOrder,
    kind: WeightFormat = _MXFP4,
) -> Tensor:
    """Prepared weights of all experts on another device and in its word order; reordered on the GPU of the two."""
    result = torch.empty_like(weight, device=device)
    for source, target in zip(weight, result, strict=True):
        target.copy_(kind.reorder(source if source.is_cuda else source.to(device), n, k, old, new))
    return result


def pieces_of(n: int) -> Iterator[slice]:
    """Rows [0, n) in about _PIECES pieces of whole blocks."""
    step = ceil_div(ceil_div(n, _PIECES), WEIGHT_BLOCK_ROWS) * WEIGHT_BLOCK_ROWS
    return _spans(0, n, step)


def _spans(begin: int, end: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, end)) for i in range(begin, end, step))


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
