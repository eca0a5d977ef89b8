"""In which format weights are, and how each format's bytes are kept.

Both are kept as the kernels read them (`weight_layout`). Matrices whose K is a multiple of NVFP4's 16 but not of 32
have no kernels, and are kept plainly: an expert's codes, then its scales. Whoever holds prepared weights asks their
format for sizes, rows and blocks, so that another layout changes this file alone.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from .._arguments import require_count, require_multiple, require_tensor
from . import weight_layout
from .numbers import BLOCK
from .nvfp4 import NVFP4_BLOCK
from .weight_layout import ACTIVATION_NAMES, ACTIVATIONS_IN_WORDS, MXFP4_SCALE_WORDS, NVFP4_SCALE_WORDS, WordOrder


class WeightFormat(str, Enum):
    """The format of a layer's weights."""

    MXFP4 = "mxfp4"  # E2M1, an E8M0 scale for each 32
    NVFP4 = "nvfp4"  # E2M1, an E4M3 scale for each 16, float32 scales for each expert

    @property
    def block(self) -> int:
        """Values that share a scale; sizes are multiples of it."""
        return BLOCK if self is WeightFormat.MXFP4 else NVFP4_BLOCK

    @property
    def scale_words(self) -> int:
        """Words of scales that a row has in a K tile of 128 (`weight_layout`)."""
        return MXFP4_SCALE_WORDS if self is WeightFormat.MXFP4 else NVFP4_SCALE_WORDS

    @property
    def code(self) -> int:
        """The number by which the kernels know it: Mxfp4MoeWeightFormat of csrc/tile_abi.h."""
        return 0 if self is WeightFormat.MXFP4 else 1

    @property
    def default_activations(self) -> str:
        """The activation format of a call that names none."""
        return self.activations[0]

    @property
    def activations(self) -> tuple[str, ...]:
        """The activation formats that go with it, the default first."""
        return ("mxfp8", "bf16", "mxfp4", "fp16") if self is WeightFormat.MXFP4 else ("nvfp4", "bf16", "fp16")

    def activations_named(self, name: object) -> str:
        """The one of `activations` that a caller names; None for the default.

        Raises:
            TypeError, ValueError: no name of a format, or of one that goes with other weights.
        """
        if name is None:
            return self.default_activations
        if not isinstance(name, str):
            raise TypeError(f"activation_format: expected a name such as 'bf16', got {name!r}")
        if name in self.activations:
            return self.activations[self.activations.index(name)]  # of an enum's member, its value
        if name in ACTIVATION_NAMES:
            raise ValueError(
                f"activation_format: expected {' or '.join(map(repr, self.activations))} with {self.value} weights, "
                f"got {name!r}; without one a call takes {self.default_activations!r}"
            )
        raise ValueError(f"activation_format: expected {ACTIVATIONS_IN_WORDS}, got {name!r}")

    def shard_block(self, size: int) -> int:
        """Where a dimension of this size may be cut: between 32 values, which kernels need, or between blocks."""
        return BLOCK if size % BLOCK == 0 else self.block

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of one expert's prepared weight [n, k], block scales included.

        Args:
            n: rows.
            k: K in values, a multiple of `block`.
        """
        if self._has_kernels(k):
            return weight_layout.weight_bytes(n, k, self.scale_words)
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
            order: of the codes in words; where they are kept plainly it means nothing.
        """
        if self._has_kernels(k):
            weight_layout.write_rows(weight, n, k, first, packed, scales, order, self.scale_words)
            return
        codes, of_blocks = self._plain(weight, n, k)
        codes[first : first + len(packed)] = packed
        of_blocks[first : first + len(scales)] = scales

    def read_rows(self, weight: Tensor, n: int, k: int, rows: slice, order: WordOrder) -> tuple[Tensor, Tensor]:
        """The inverse: packed uint8 [rows, k/2] and scales uint8 [rows, k/block].

        Args:
            rows: begin and end; begin is a multiple of 64.
        """
        if self._has_kernels(k):
            return weight_layout.read_rows(weight, n, k, rows, order, self.scale_words)
        codes, of_blocks = self._plain(weight, n, k)
        return codes[rows].clone(), of_blocks[rows].clone()

    def reorder(self, weight: Tensor, n: int, k: int, old: WordOrder, new: WordOrder) -> Tensor:
        """One expert's prepared weight with the codes of its words in another order; a copy."""
        if self._has_kernels(k):
            return weight_layout.reorder_words(weight, n, k, old, new, self.scale_words)
        return weight.clone()

    def _has_kernels(self, k: int) -> bool:
        return self is WeightFormat.MXFP4 or k % BLOCK == 0

    def _plain(self, weight: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        require_tensor("weight", weight, torch.uint8, (self.weight_bytes(n, k),))
        end = n * k // 2
        return weight[:end].view(n, k // 2), weight[end:].view(n, k // NVFP4_BLOCK)
