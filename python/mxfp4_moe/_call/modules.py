"""Tiles as modules: one with the calls that use it, and all of them loaded at start-up."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._install import loading
from ..tiles import Tile
from ..weights import MoEWeights
from .fused_moe import fused_moe
from .selection import manifest_tile, pair

_SWAPPED_M = (8, 16, 32)
_BACKENDS = ("120", "121", "90")

SM120_SUPPORTED_TILE_MN: tuple[
    tuple[int, int], ...
]  # (M, N) of every tile in the wheel's manifest, read when asked for


@dataclass(frozen=True)
class FusedMoEModule:
    """One tile of the wheel with the calls that use it; from `get_cutlass_fused_moe_module`."""

    tile: Tile

    @property
    def grouped_gemm(self) -> Any:
        """The tile's own torch operator, (act, act_scale, weight, m_tiles, num_m_tiles, out) -> None.

        Layouts as in csrc/tile_abi.h; act_scale is None where act is bfloat16, as SM90's tiles read it. The first use
        loads the tile.

        Raises:
            RuntimeError: the tile does not load here; the message says what it was built for and what is here.
        """
        return loading.load_tile(self.tile)

    def fused_moe(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        weights: MoEWeights,
        *,
        hidden_states_scale: Tensor | None = None,
        scale_layout: str = "linear",
        output_dtype: torch.dtype | None = None,
        output: Tensor | None = None,
        intermediate_rounding: bool = False,
        activation_format: str | None = None,
    ) -> Tensor:
        """`mxfp4_moe.fused_moe` with this tile."""
        return fused_moe(
            hidden_states,
            topk_weights,
            topk_ids,
            weights,
            hidden_states_scale=hidden_states_scale,
            scale_layout=scale_layout,
            output_dtype=output_dtype,
            tile_mn=self.tile.mn,
            output=output,
            intermediate_rounding=intermediate_rounding,
            activation_format=activation_format,
        )


def module_tile(backend: str, tile_mn: tuple[int, int]) -> Tile:
    """The tile that arguments of `get_cutlass_fused_moe_module` name.

    Raises:
        TypeError, ValueError: as there.
    """
    if backend not in _BACKENDS:
        raise ValueError(
            "backend: expected '120' or '121' (SM120, SM121 and SM90, for which '90' may stand; there is no other), "
            f"got {backend!r}"
        )
    m, n = pair(tile_mn)
    if m <= 0:
        raise ValueError(f"tile_mn: expected M above 0, got {(m, n)}")
    if m % 64 != 0 and m not in _SWAPPED_M:
        raise ValueError(f"tile_mn: expected M a multiple of 64, or 8, 16 or 32 (swapped operands), got {(m, n)}")
    if m in _SWAPPED_M and n < 64:
        raise ValueError(f"tile_mn: expected N of at least 64 for a swapped tile (M = {m}), got {(m, n)}")
    if not 8 <= n <= 256:
        raise ValueError(f"tile_mn: expected N from 8 to 256, got {(m, n)}")
    return manifest_tile((m, n))


def load_module_tile(tile: Tile) -> None:
    """Loads a tile where that is possible; with a CPU build of torch it is not, and its first use says so."""
    if torch.version.cuda is not None:
        loading.load_tile(tile)


def __getattr__(name: str) -> Any:
    if name != "SM120_SUPPORTED_TILE_MN":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuple(tile.mn for tile in loading.manifest().tiles)


def prewarm_moe_tiles() -> list[str]:
    """Loads every tile of the wheel, so that no later call has to; call it at start-up.

    A tile that does not load is left out with a warning: calls that want it take the nearest one.

    Returns:
        The loaded tiles' names, in the manifest's order.

    Raises:
        RuntimeError: no extension fits this torch; the message says what they were built for and what is here.
    """
    loading.moe_ops()
    loaded, errors = [], []
    for tile in loading.manifest().tiles:
        try:
            loading.load_tile(tile)
            loaded.append(tile.name)
        except loading.LoadError as error:
            errors.append(error)
    if errors and not loaded:
        raise errors[0]
    if errors:
        warnings.warn("; ".join(map(str, errors)), RuntimeWarning, stacklevel=2)
    return loaded
