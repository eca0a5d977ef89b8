"""In which format weights are, and how each format's bytes are kept.

MXFP4 is kept as the kernels read it (`weight_layout`). NVFP4 has no GPU kernels yet and is kept plainly: an expert's
codes, then its scales. Whoever holds prepared weights asks their format for sizes, rows and blocks, so that another
layout changes this file alone.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from .._arguments import require_count, require_multiple, require_tensor
from . import weight_layout
from .numbers import BLOCK
from .nvfp4 import NVFP4_BLOCK
from .weight_layout import WordOrder


class WeightFormat(str, Enum):
    """The format of a layer's weights."""

    MXFP4 = "mxfp4"  # E2M1, an E8M0 scale for each 32
    NVFP4 = "nvfp4"  # E2M1, an E4M3 scale for each 16, float32 scales for each expert

    @property
    def block(self) -> int:
        """Values that share a scale; sizes are multiples of it."""
        return BLOCK if self is WeightFormat.MXFP4 else NVFP4_BLOCK

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of one expert's prepared weight [n, k], block scales included.

        Args:
            n: rows.
            k: K in values, a multiple of `block`.
        """
        if self is WeightFormat.MXFP4:
            return weight_layout.weight_bytes(n, k)
        require_count("n", n)
        require_multiple("k", k, NVFP4_BLOCK)
        return n * (k // 2 + k // NVFP4_BLOCK)

    def write_rows(
        self, weight: Tensor, n: int, k: int, first: int, packed: Tensor, scales: Tensor, order: WordOrder
    ) -> None:
        """Writes some rows into one expert's prepared weight.

        Args:
            weight: uint8 [weight_bytes(n, k)].
            first: the first row to write, a multiple of 64.
            packed: uint8 [rows, k/2], low nibble = even k; rows is a multiple of 64, or they end at row n.
            scales: uint8 [rows, k/block].
            order: of the codes in words; NVFP4 has one alone.
        """
        if self is WeightFormat.MXFP4:
            weight_layout.write_rows(weight, n, k, first, packed, scales, order)
            return
        codes, of_blocks = self._plain(weight, n, k)
        codes[first : first + len(packed)] = packed
        of_blocks[first : first + len(scales)] = scales

    def read_rows(self, weight: Tensor, n: int, k: int, rows: slice, order: WordOrder) -> tuple[Tensor, Tensor]:
        """The inverse: packed uint8 [rows, k/2] and scales uint8 [rows, k/block].

        Args:
            rows: begin and end; begin is a multiple of 64.
        """
        if self is WeightFormat.MXFP4:
            return weight_layout.read_rows(weight, n, k, rows, order)
        codes, of_blocks = self._plain(weight, n, k)
        return codes[rows].clone(), of_blocks[rows].clone()

    def _plain(self, weight: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        require_tensor("weight", weight, torch.uint8, (self.weight_bytes(n, k),))
        end = n * k // 2
        return weight[:end].view(n, k // 2), weight[end:].view(n, k // NVFP4_BLOCK)
