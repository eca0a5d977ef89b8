"""The call: check every argument, choose a tile, run the layer. CPU tensors run `reference.fused_moe`.

Nothing is launched before the last check has passed, and nothing is compiled, ever. The path of a good call is kept
short: comparisons that succeed, two cached look-ups, one operator.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _load, reference
from .formats import require_tensor
from .tiles import Tile, arch_runs_on, select_tile
from .weights import Activation, MoEWeights

DEFAULT_TILE_MN = (128, 128)  # for callers that turn the automatic choice off and name no tile

_HALVES = (torch.bfloat16, torch.float16)
_IDS = (torch.int32, torch.int64)
_FLOAT32 = (torch.float32,)
_ACTIVATION_CODES = {Activation.SWIGLU: 0, Activation.SWIGLU_OAI: 1}  # csrc/moe/moe.h, enum Activation
_SWAPPED_M = (8, 16, 32)


def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    tile_mn: tuple[int, int] | None = None,
    auto_tile_select: bool = True,
    output: Tensor | None = None,
) -> Tensor:
    """One MoE layer with MXFP4 weights: sum over a token's experts of topk_weight * (w2 . act(w13 . x + b13) + b2).

    T tokens, k experts per token, E experts, H hidden size. Activations are quantized to MXFP8 before each of the two
    GEMMs. A token's result depends on nothing but that token: the same bits in every batch and with every tile.
    For inference: no gradient flows. Work is queued on the current CUDA stream, without synchronization; CUDA graphs
    capture it. All tensors are contiguous and on one device.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0. A NaN or infinity makes its own token NaN, and no other.
        topk_weights: float32 [T, k], the router weights.
        topk_ids: int32 or int64 [T, k], k >= 1. An id < 0 or >= E contributes nothing; a token with no valid id is
            zero. An expert may occur more than once in a token.
        weights: prepared weights on the same device.
        tile_mn: GEMM tile (M, N) of the wheel's manifest, for measurements; every tile gives the same result.
        auto_tile_select: without tile_mn, choose the tile by the expected rows per expert; False takes (128, 128).
        output: tensor like hidden_states to write the result to; may be hidden_states itself.

    Returns:
        [T, H] in the dtype of hidden_states: `output` where it was given.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape, device or stride; a tile that is not in the manifest; weights on
            another device.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch; data
            not aligned to 16 bytes.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected bfloat16 or float16 [T, H], got {type(hidden_states).__name__}")
    device = hidden_states.device
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"hidden_states: expected a CUDA or CPU tensor, got one on {device}")
    if weights.device != device:
        raise ValueError(
            f"weights: expected MoEWeights on {device}, where hidden_states is, got {weights.device}; "
            f"weights.to('{device}') copies them there"
        )
    tokens = hidden_states.shape[0] if hidden_states.dim() == 2 else 0
    _check("hidden_states", hidden_states, _HALVES, (tokens, weights.hidden_size), ("T", weights.hidden_size), device)
    top_k = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.dim() == 2 else 0
    _check("topk_ids", topk_ids, _IDS, (tokens, top_k), (tokens, "k"), device)
    if top_k == 0:
        raise ValueError(f"topk_ids: expected [{tokens}, k] with k at least 1, got k = 0")
    _check("topk_weights", topk_weights, _FLOAT32, (tokens, top_k), (tokens, top_k), device)
    if output is not None:
        shape = (tokens, weights.hidden_size)
        _check("output", output, (hidden_states.dtype,), shape, shape, device)
    if tile_mn is not None:
        tile = manifest_tile(tile_mn)
    elif auto_tile_select:
        tile = _select(tokens, top_k, weights.num_experts)
    else:
        tile = manifest_tile(DEFAULT_TILE_MN)

    if device.type == "cpu":
        with torch.no_grad():
            result = reference.fused_moe(hidden_states, topk_weights, topk_ids, weights)
            return result if output is None else output.copy_(result)
    op = _operator(device.index, tile)
    if output is None:
        output = torch.empty_like(hidden_states, requires_grad=False)
    op(
        hidden_states,
        topk_weights,
        topk_ids,
        weights.w13,
        weights.w13_scale,
        weights.w13_bias,
        weights.w2,
        weights.w2_scale,
        weights.w2_bias,
        _ACTIVATION_CODES[weights.activation],
        weights.alpha,
        weights.beta,
        math.inf if weights.limit is None else weights.limit,
        tile.m,
        tile.n,
        output,
    )
    return output


@dataclass(frozen=True)
class FusedMoEModule:
    """One tile of the wheel with the calls that use it; from `get_cutlass_fused_moe_module`."""

    tile: Tile

    @property
    def grouped_gemm(self) -> Any:
        """The tile's own torch operator, (act, act_scale, weight, weight_scale, m_tiles, num_m_tiles, out) -> None.

        Layouts as in csrc/tile_abi.h. The first use loads the tile.

        Raises:
            RuntimeError: the tile does not load here; the message says what it was built for and what is here.
        """
        return _load.load_tile(self.tile)

    def fused_moe(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        weights: MoEWeights,
        *,
        output: Tensor | None = None,
    ) -> Tensor:
        """`mxfp4_moe.fused_moe` with this tile."""
        return fused_moe(hidden_states, topk_weights, topk_ids, weights, tile_mn=self.tile.mn, output=output)


def get_cutlass_fused_moe_module(backend: str = "120", tile_mn: tuple[int, int] = DEFAULT_TILE_MN) -> FusedMoEModule:
    """The module of one prebuilt tile, the same object for the same arguments; nothing is compiled.

    With a CUDA build of torch the tile is loaded now, otherwise on first use.

    Args:
        backend: "120", the block-scaled MXFP8 x MXFP4 kernels: SM120, SM121 and, in this wheel, SM90.
        tile_mn: (M, N). Native tiles have M % 64 == 0, swapped ones M in 8, 16, 32 with N >= 64; N is 8 to 256; and
            the tile must be in the wheel's manifest.

    Raises:
        TypeError: tile_mn is no pair of integers.
        ValueError: another backend, or a tile that breaks these rules; the message names the rule.
        RuntimeError: the tile's extension does not fit this torch.
    """
    if backend != "120":
        raise ValueError(f"backend: expected '120' (SM120, SM121 and SM90; there is no other), got {backend!r}")
    m, n = _pair(tile_mn)
    if m % 64 != 0 and m not in _SWAPPED_M:
        raise ValueError(f"tile_mn: expected M a multiple of 64, or 8, 16 or 32 (swapped operands), got {(m, n)}")
    if m in _SWAPPED_M and n < 64:
        raise ValueError(f"tile_mn: expected N of at least 64 for a swapped tile (M = {m}), got {(m, n)}")
    if not 8 <= n <= 256:
        raise ValueError(f"tile_mn: expected N from 8 to 256, got {(m, n)}")
    return _module(manifest_tile((m, n)))


def prewarm_moe_tiles() -> list[str]:
    """Loads every tile of the wheel, so that no later call has to; call it at start-up.

    Returns:
        The tiles' names, in the manifest's order.

    Raises:
        RuntimeError: an extension does not fit this torch; the message says what it was built for and what is here.
    """
    tiles = _load.manifest().tiles
    for tile in tiles:
        _load.load_tile(tile)
    return [tile.name for tile in tiles]


def manifest_tile(tile_mn: tuple[int, int]) -> Tile:
    """The manifest's tile of this shape.

    Raises:
        TypeError: no pair of integers.
        ValueError: not in the manifest; the message lists what is.
    """
    tile = Tile.from_mn(_pair(tile_mn))
    tiles = _load.manifest().tiles
    if tile not in tiles:
        having = ", ".join(str(t.mn) for t in tiles)
        raise ValueError(f"tile_mn: expected a tile of the manifest ({having}), got {tile.mn}")
    return tile


def check_capability(capability: tuple[int, int], name: str) -> None:
    """Refuses a GPU that the wheel has no machine code for.

    Args:
        capability: the GPU's compute capability.
        name: the GPU in words, for the message.

    Raises:
        RuntimeError: one sentence with the GPU's arch, the wheel's archs, and CUDA and torch versions.
    """
    archs = _load.manifest().archs
    if not any(arch_runs_on(arch, capability) for arch in archs):
        having = ", ".join(f"sm_{arch}" for arch in archs)
        raise RuntimeError(
            f"hidden_states: expected a tensor on a GPU that this wheel has machine code for ({having}), got one on "
            f"{name}, which is sm_{capability[0]}{capability[1]}; the wheel was built for {_load.built_for()}, "
            f"you have {_load.environment()}"
        )


def _check(
    name: str,
    value: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    shown_shape: tuple[int | str, ...],
    device: torch.device,
) -> None:
    """One tensor argument; the way through for a good one is short, the words are found only for a bad one."""
    if (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.shape == shape
        and value.device == device
        and value.is_contiguous()
    ):
        return
    require_tensor(name, value, dtypes, shown_shape, device)
    raise ValueError(
        f"{name}: expected a contiguous tensor, got strides {list(value.stride())} for shape {list(value.shape)}"
    )


def _pair(tile_mn: object) -> tuple[int, int]:
    if (
        not isinstance(tile_mn, (tuple, list))
        or len(tile_mn) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in tile_mn)
    ):
        raise TypeError(f"tile_mn: expected a pair of integers (M, N), got {tile_mn!r}")
    return (tile_mn[0], tile_mn[1])


@functools.lru_cache(maxsize=4096)
def _select(tokens: int, top_k: int, experts: int) -> Tile:
    return select_tile(tokens, top_k, experts, _load.manifest().tiles)


@functools.cache
def _operator(device_index: int, tile: Tile) -> Any:
    """The layer's operator, once this device is known to be supported and the tile is loaded."""
    name = f"{torch.cuda.get_device_name(device_index)} (cuda:{device_index})"
    check_capability(torch.cuda.get_device_capability(device_index), name)
    _load.load_tile(tile)
    return _load.moe_ops().fused_moe.default


@functools.cache
def _module(tile: Tile) -> FusedMoEModule:
    if torch.version.cuda is not None:
        _load.load_tile(tile)
    return FusedMoEModule(tile)
