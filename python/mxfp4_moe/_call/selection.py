"""The tile of a call: the one that was named, or the automatic choice for its sizes and GPU."""

from __future__ import annotations

import functools

import torch

from .._choice.choice import choose_tile
from .._choice.facts import DeviceFacts, Layer, from_properties
from .._install import loading
from ..formats import WeightFormat
from ..tiles import Tile, pair_of, select_tile
from ..weights import MoEWeights
from .activation_format import tiles_of

DEFAULT_TILE_MN = (128, 128)  # for callers that turn the automatic choice off and name no tile


def tile_of_call(
    tile_mn: tuple[int, int] | None,
    auto_tile_select: bool,
    tokens: int,
    top_k: int,
    weights: MoEWeights,
    device: torch.device,
    activation_format: str = "mxfp8",
) -> Tile:
    """The tile that was named, or the automatic choice.

    Raises:
        TypeError, ValueError: as `manifest_tile`; a tile that has no kernel for these activations on the device.
    """
    if tile_mn is not None:
        tile = manifest_tile(tile_mn)
        if activation_format != "mxfp8" and device.index is not None:
            having = tiles_of(activation_format, device.index, weights.weight_format)
            if having and tile not in having:  # where there are none, the launch says why
                listed = ", ".join(str(other.mn) for other in having)
                raise ValueError(
                    f"tile_mn: expected a tile with a kernel for activation_format {activation_format!r} on {device} "
                    f"({listed}), got {tile.mn}"
                )
        return tile
    if not auto_tile_select:
        return manifest_tile(DEFAULT_TILE_MN)
    # num_global_experts: of a slice too, which has its share of rows
    sizes = weights.num_global_experts, weights.hidden_size, weights.intermediate_size
    return select(tokens, top_k, *sizes, device.index, activation_format, weights.weight_format)


def check_tile(tile_mn: tuple[int, int] | None) -> None:
    """Refuses a tile that `tile_of_call` would; also while a graph is traced.

    Raises:
        TypeError, ValueError: as `manifest_tile`.
    """
    if tile_mn is not None and pair(tile_mn) not in _having():
        raise _unknown_tile(tile_mn)


def _having() -> tuple[tuple[int, int], ...]:
    """The manifest's tiles, which a trace takes as they are: it cannot read files."""
    return tuple(tile.mn for tile in loading.manifest().tiles)


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: 1.4 s of every first call.
_having._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unknown_tile(tile_mn: tuple[int, int]) -> ValueError:
    having = ", ".join(map(str, _having()))
    return ValueError(f"tile_mn: expected a tile of the manifest ({having}), got {tuple(tile_mn)}")


def manifest_tile(tile_mn: tuple[int, int]) -> Tile:
    """The manifest's tile of this shape.

    Raises:
        TypeError: no pair of integers.
        ValueError: not in the manifest; the message lists what is.
    """
    tile = Tile.from_mn(pair(tile_mn))
    if tile not in loading.manifest().tiles:
        raise _unknown_tile(tile.mn)
    return tile


@functools.lru_cache(maxsize=4096)
def select(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    device_index: int | None,
    activation_format: str = "mxfp8",
    weight_format: WeightFormat = WeightFormat.MXFP4,
) -> Tile:
    """The tile of an automatic choice; without a GPU the simple rule's."""
    tiles = loading.manifest().tiles
    if device_index is not None and activation_format != "mxfp8":
        tiles = tiles_of(activation_format, device_index, weight_format) or tiles
    if device_index is None or tokens == 0:
        return select_tile(tokens, top_k, experts, tiles)
    pair = pair_of(activation_format, weight_format.value)
    layer = Layer(experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)
    return choose_tile(tokens, layer, device_facts(device_index), tiles, pair)


@functools.cache
def device_facts(device_index: int) -> DeviceFacts:
    """What the choice of a tile knows of this GPU."""
    return from_properties(torch.cuda.get_device_properties(device_index))


def pair(tile_mn: object) -> tuple[int, int]:
    """The argument as (M, N), or a TypeError."""
    if (
        not isinstance(tile_mn, (tuple, list))
        or len(tile_mn) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in tile_mn)
    ):
        raise TypeError(f"tile_mn: expected a pair of integers (M, N), got {tile_mn!r}")
    return (tile_mn[0], tile_mn[1])
