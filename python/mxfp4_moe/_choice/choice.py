"""The automatic choice of a tile: a tuned table, else the cost model of SM90 or SM12x, else the rule by expected rows.

Standard library alone. Every tile gives the same bits, so the choice is about time and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._install import wheel
from ..tiles import MXFP4_MXFP8, Tile, prove, select_tile
from . import cost_model, sm90_model, tuned
from .facts import DeviceFacts, Layer

_SIGNIFICANT_BITS = 5


def choose_tile(tokens: int, layer: Layer, device: DeviceFacts, tiles: Sequence[Tile], pair: str = MXFP4_MXFP8) -> Tile:
    """The tile for a call of this many tokens.

    Args:
        tiles: the ones to choose among, which a table's must be in.
        pair: of formats. Tables are of MXFP8 activations; SM90's serve all pairs, whose kernels are nearly alike.
    """
    served = served_device(device)
    found = tuned.look_up(device, layer, tokens) if pair == MXFP4_MXFP8 or served.capability[0] == 9 else None
    if found is not None and found.gemm1 in tiles:
        return found.gemm1
    model = modelled(_rounded(tokens), layer, served, tuple(tiles), pair)
    return model or select_tile(tokens, layer.top_k, layer.experts, tiles)


@functools.cache
def served_device(device: DeviceFacts) -> DeviceFacts:
    """The GPU with the compute capability whose kernels it runs: what the model has to go by."""
    return replace(device, capability=wheel.served_as(device.capability))


def _rounded(tokens: int) -> int:
    """With five significant bits: the model takes half a millisecond, and need not be asked for each number anew."""
    shift = max(tokens.bit_length() - _SIGNIFICANT_BITS, 0)
    return tokens >> shift << shift


@functools.lru_cache(maxsize=1024)
def modelled(
    tokens: int, layer: Layer, device: DeviceFacts, tiles: tuple[Tile, ...], pair: str = MXFP4_MXFP8
) -> Tile | None:
    """The tile that the arch's model chooses; None where there is no model. `device`: as `served_device` has it."""
    if device.capability[0] == 9:
        return sm90_model.choose(tokens, layer, device, tiles, pair)
    if device.capability[0] == 12:
        arch = cost_model.arch_model(device.capability).arch
        return cost_model.choose(tokens, layer, device, tiles, loop_instructions(arch, pair), pair)
    return None


@functools.cache
def loop_instructions(arch: str, pair: str = MXFP4_MXFP8) -> dict[str, float]:
    """Tile name -> instructions of a warp in a K tile of the kernel for this pair, by the build report; else none."""
    return counted_instructions(wheel.read_report() or {}, arch, pair)


def counted_instructions(report: Mapping[str, Any], arch: str, pair: str) -> dict[str, float]:
    """`loop_instructions` by this report."""
    known = {}
    for tile in wheel.built_tiles():
        try:
            per_mma = report["tiles"][tile.name]["archs"][arch][pair]["main_loop"]["instructions_per_mma"]
        except (KeyError, TypeError):
            continue
        proof = prove(tile, arch, pair)
        known[tile.name] = per_mma * proof.mma_per_step * proof.steps_per_k_tile
    return known
