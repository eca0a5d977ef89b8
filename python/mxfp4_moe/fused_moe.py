"""The call: check every argument, choose a tile, run the layer. CPU tensors run `reference.fused_moe`.

Nothing is launched before the last check has passed, and nothing is compiled, ever. The path of a good call is kept
short: comparisons that succeed, two cached look-ups, one operator.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _load, _wheel, ops, reference
from ._troubles import DOCTOR
from .choice import choose_tile
from .facts import DeviceFacts, Layer, from_properties
from .formats import BLOCK, WordOrder, require_tensor, word_order_of
from .tiles import Tile, select_tile
from .weights import MoEWeights, split_number

MAX_EXPERTS = 1024  # csrc/moe/kernels.h, kMaxExperts
MAX_SLOTS = 2**31 - 1 - 1024  # tokens * top_k: rows are counted in int32; csrc/moe/checks.h, kMaxSlots
DEFAULT_TILE_MN = (128, 128)  # for callers that turn the automatic choice off and name no tile

_HALVES = (torch.bfloat16, torch.float16)
_MXFP8 = (torch.uint8, torch.float8_e4m3fn)
_UINT8 = (torch.uint8,)
_IDS = (torch.int32, torch.int64)
_FLOAT32 = (torch.float32,)
_SWAPPED_M = (8, 16, 32)


def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    *,
    hidden_states_scale: Tensor | None = None,
    scale_layout: str = "linear",
    output_dtype: torch.dtype | None = None,
    tile_mn: tuple[int, int] | None = None,
    auto_tile_select: bool = True,
    output: Tensor | None = None,
    intermediate_rounding: bool = False,
) -> Tensor:
    """One MoE layer with MXFP4 weights: sum over a token's experts of topk_weight * (w2 . act(w13 . x + b13) + b2).

    T tokens, k experts per token, E experts, H hidden size. Activations are quantized to MXFP8 before each of the two
    GEMMs. A token's result depends on nothing but that token: the same bits in every batch and with every tile.
    For inference: no gradient flows. Work is queued on the current CUDA stream, without synchronization; CUDA graphs
    capture it, and any number of threads and streams may call at once. All tensors are contiguous and on one device.
    In a function under torch.compile or torch.export the call is one operator, `mxfp4_moe::moe_layer`, which chooses
    its tile when it runs: tile_mn and auto_tile_select mean nothing there.

    Limits: E up to 1024, T * k up to 2^31 - 1025; H and I are multiples of 32; products of sizes may pass 2^31.

    Args:
        hidden_states: bfloat16 or float16 [T, H]; T may be 0. A NaN or infinity makes its own token NaN, and no other.
            With hidden_states_scale: MXFP8, uint8 or float8_e4m3fn [T, H] (E4M3 codes; a NaN code, the same).
        topk_weights: float32 [T, k], the router weights; NaN and infinities reach their own token, and no other.
        topk_ids: int32 or int64 [T, k], k >= 1, ids of the whole layer's experts. An id of no expert in weights
            contributes nothing; a token with no valid id is zero. An expert may occur more than once in a token.
        weights: prepared weights on the same device.
        hidden_states_scale: uint8 E8M0 scales of MXFP8 hidden states, one for each 32 values (OCP MX v1.0). Bytes 0 to
            248 (2^121) count as they are; 249 to 254, which no finite bfloat16 needs, count as NaN, as does 255.
        scale_layout: "linear", [T, H/32]; or "swizzled", 128x4 with T padded to 128 and H/32 to 4 (as
            `formats.swizzle_scales`), flat, ceil(T/128) * ceil(H/128) * 512 bytes.
        output_dtype: bfloat16 or float16; by default the dtype of hidden_states, bfloat16 where they are MXFP8.
        tile_mn: GEMM tile (M, N) of the wheel's manifest, for measurements; every tile gives the same result. This
            one and the automatic choice give way to the nearest tile, with one warning, where the GPU's self-test
            blocked the tile or its library does not load.
        auto_tile_select: without tile_mn, choose the tile (`choice.choose_tile`) by the GPU's tuned table, else on
            SM12x by a cost model, else by the expected rows per expert; False takes (128, 128).
        output: tensor [T, H] of the output dtype to write the result to; may be hidden_states itself.
        intermediate_rounding: round GEMM1's values, before their bias, and the activation's to the output dtype, as
            FlashInfer does; there a value beyond float16's range becomes an infinity, which makes its token NaN unless
            the activation clamps it. Without it they stay in float32 until MXFP8, which is closer to the exact layer.

    Returns:
        [T, H] in the output dtype: `output` where it was given.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: an argument of another shape, device or stride; a tile that is not in the manifest; weights on
            another device, or in another's word order; more experts or slots than the limits.
        RuntimeError: a GPU that the wheel has no machine code for; an extension that does not fit this torch; data
            not aligned to 16 bytes.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    if torch.compiler.is_compiling():
        result = _traced(
            hidden_states,
            topk_weights,
            topk_ids,
            weights,
            hidden_states_scale,
            scale_layout,
            output_dtype,
            intermediate_rounding,
        )
        return result if output is None else output.copy_(result)
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: expected bfloat16 or float16 [T, H], got {type(hidden_states).__name__}")
    device = check_devices(hidden_states, weights)
    output_dtype = check_call(
        hidden_states,
        topk_weights,
        topk_ids,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        weights.hidden_size,
        device,
    )
    tokens, top_k = topk_ids.shape
    check_limits(weights.num_experts, tokens, top_k)
    check_output(output, output_dtype, tokens, weights.hidden_size, device)
    tile = tile_of_call(tile_mn, auto_tile_select, tokens, top_k, weights, device)

    if hidden_states.is_cpu:
        with torch.no_grad():
            result = reference.fused_moe(
                hidden_states,
                topk_weights,
                topk_ids,
                weights,
                hidden_states_scale=hidden_states_scale,
                scale_layout=scale_layout,
                output_dtype=output_dtype,
                intermediate_rounding=intermediate_rounding,
            )
            return result if output is None else output.copy_(result)
    if output is None:
        output = torch.empty_like(hidden_states, dtype=output_dtype)
    run(
        tile,
        hidden_states,
        hidden_states_scale,
        scale_layout,
        (topk_weights, topk_ids, None, 0),
        weights,
        output,
        intermediate_rounding,
    )
    return output


def run(
    tile: Tile,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    routing: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    weights: MoEWeights,
    output: Tensor,
    intermediate_rounding: bool,
    renormalize: bool = True,
) -> None:
    """Launches a checked call on the GPU; routing: topk_weights and topk_ids, or router_logits and top_k.

    What an argument costs on its way through torch's dispatcher is most of the operator's time, and one that is left
    to its default costs little: so the rare ones are named only where they say something.
    """
    op, tile = _operator(hidden_states.device.index, tile)
    arguments, rare = weights.operator_arguments
    if hidden_states_scale is not None:
        hidden_states = hidden_states.view(torch.uint8)
        rare = {**rare, "hidden_states_scale": hidden_states_scale, "scale_is_swizzled": scale_layout == "swizzled"}
    if intermediate_rounding or not renormalize:
        rare = {**rare, "intermediate_rounding": intermediate_rounding, "renormalize": renormalize}
    try:
        op(hidden_states, *routing, *arguments, tile.m, tile.n, output, **rare)
    except RuntimeError as error:
        _load.explain(f"fused_moe cannot run on {hidden_states.device}", error)
        raise


def _traced(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    intermediate_rounding: bool,
) -> Tensor:
    """The call as a compiled graph sees it (ops.py): tensors and constants, and no tile that would tie it to T."""
    if output_dtype is None:
        output_dtype = reference.default_output_dtype(hidden_states, hidden_states_scale)
    alpha, alphas = split_number(weights.alpha, 0.0)
    beta, betas = split_number(weights.beta, 0.0)
    limit, limits = split_number(weights.limit, None)
    result: Tensor = ops.moe_layer(
        hidden_states.detach(),
        topk_weights.detach(),
        topk_ids - weights.first_expert if weights.first_expert else topk_ids,
        weights.w13,
        weights.w13_bias,
        weights.w2,
        weights.w2_bias,
        weights.hidden_size,
        weights.intermediate_size,
        weights.word_order.value,
        weights.activation.value,
        alpha,
        beta,
        limit,
        alphas,
        betas,
        limits,
        hidden_states_scale,
        scale_layout,
        output_dtype,
        intermediate_rounding,
    )
    return result


@dataclass(frozen=True)
class FusedMoEModule:
    """One tile of the wheel with the calls that use it; from `get_cutlass_fused_moe_module`."""

    tile: Tile

    @property
    def grouped_gemm(self) -> Any:
        """The tile's own torch operator, (act, act_scale, weight, m_tiles, num_m_tiles, out) -> None.

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
        hidden_states_scale: Tensor | None = None,
        scale_layout: str = "linear",
        output_dtype: torch.dtype | None = None,
        output: Tensor | None = None,
        intermediate_rounding: bool = False,
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
        )


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

    A tile that does not load is left out with a warning: calls that want it take the nearest one.

    Returns:
        The loaded tiles' names, in the manifest's order.

    Raises:
        RuntimeError: no extension fits this torch; the message says what they were built for and what is here.
    """
    _load.moe_ops()
    loaded, errors = [], []
    for tile in _load.manifest().tiles:
        try:
            _load.load_tile(tile)
            loaded.append(tile.name)
        except _load.LoadError as error:
            errors.append(error)
    if errors and not loaded:
        raise errors[0]
    if errors:
        warnings.warn("; ".join(map(str, errors)), RuntimeWarning, stacklevel=2)
    return loaded


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


def check_devices(hidden_states: Tensor, weights: MoEWeights) -> torch.device:
    """The device of a call.

    Raises:
        ValueError: neither CUDA nor CPU, or not where the weights are; weights in another device's word order.
    """
    device, on_gpu = hidden_states.device, hidden_states.is_cuda
    if not on_gpu and not hidden_states.is_cpu:
        raise ValueError(f"hidden_states: expected a CUDA or CPU tensor, got one on {device}")
    if weights.device != device:
        raise ValueError(
            f"weights: expected MoEWeights on {device}, where hidden_states is, got {weights.device}; "
            f"weights.to('{device}') copies them there"
        )
    if on_gpu:
        check_word_order(weights.word_order, device)
    return device


def check_word_order(order: WordOrder, device: torch.device) -> None:
    """Refuses weights that this GPU would read as others.

    Raises:
        ValueError: not the GPU's word order.
    """
    expected = word_order_of(device)
    if order is not expected:
        raise ValueError(
            f"weights: expected word order '{expected.value}' on {device}, got '{order.value}' of another device; "
            f"weights.to('{device}') converts them"
        )


def check_output(
    output: Tensor | None, dtype: torch.dtype, tokens: int, hidden_size: int, device: torch.device
) -> None:
    """Checks the tensor to write to, where one was given.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    if output is not None:
        _check("output", output, (dtype,), (tokens, hidden_size), (tokens, hidden_size), device)


def tile_of_call(
    tile_mn: tuple[int, int] | None,
    auto_tile_select: bool,
    tokens: int,
    top_k: int,
    weights: MoEWeights,
    device: torch.device,
) -> Tile:
    """The tile that was named, or the automatic choice.

    Raises:
        TypeError, ValueError: as `manifest_tile`.
    """
    if tile_mn is not None:
        return manifest_tile(tile_mn)
    if not auto_tile_select:
        return manifest_tile(DEFAULT_TILE_MN)
    sizes = weights.hidden_size, weights.intermediate_size
    return select(tokens, top_k, weights.num_global_experts, *sizes, device.index)  # a slice: its share of rows


def check_call(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    hidden_size: int,
    device: torch.device,
) -> torch.dtype:
    """Checks the tensors of a call; also on fake ones, while a graph is traced.

    Returns:
        The output dtype.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    dtype = check_hidden_states(hidden_states, hidden_states_scale, scale_layout, output_dtype, hidden_size, device)
    tokens = hidden_states.shape[0]
    top_k = topk_ids.shape[1] if isinstance(topk_ids, Tensor) and topk_ids.dim() == 2 else 0
    _check("topk_ids", topk_ids, _IDS, (tokens, top_k), (tokens, "k"), device)
    if top_k == 0:
        raise ValueError(f"topk_ids: expected [{tokens}, k] with k at least 1, got k = 0")
    _check("topk_weights", topk_weights, _FLOAT32, (tokens, top_k), (tokens, top_k), device)
    return dtype


def check_hidden_states(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    scale_layout: str,
    output_dtype: torch.dtype | None,
    hidden_size: int,
    device: torch.device,
) -> torch.dtype:
    """The part of `check_call` that is about the hidden states and the output dtype.

    Returns:
        The output dtype.

    Raises:
        TypeError, ValueError: as `fused_moe`.
    """
    tokens = hidden_states.shape[0] if hidden_states.dim() == 2 else 0
    dtypes = _HALVES if hidden_states_scale is None else _MXFP8
    _check("hidden_states", hidden_states, dtypes, (tokens, hidden_size), ("T", hidden_size), device)
    if hidden_states_scale is not None:
        if scale_layout not in reference.SCALE_LAYOUTS:
            raise ValueError(f"scale_layout: expected 'linear' or 'swizzled', got {scale_layout!r}")
        shape: tuple[int, ...] = (tokens, hidden_size // BLOCK)
        if scale_layout == "swizzled":
            shape = (-(-tokens // 128) * -(-hidden_size // 128) * 512,)
        _check("hidden_states_scale", hidden_states_scale, _UINT8, shape, shape, device)
    if output_dtype is None:
        return hidden_states.dtype if hidden_states_scale is None else torch.bfloat16
    if output_dtype not in _HALVES:
        raise TypeError(f"output_dtype: expected torch.bfloat16 or torch.float16, got {output_dtype}")
    return output_dtype


def check_limits(num_experts: int, tokens: int, top_k: int) -> None:
    """Refuses sizes that the kernels cannot count.

    Raises:
        ValueError: more than MAX_EXPERTS experts or MAX_SLOTS slots.
    """
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"weights: expected at most {MAX_EXPERTS} experts, got {num_experts}")
    if tokens * top_k > MAX_SLOTS:
        raise ValueError(f"topk_ids: expected at most {MAX_SLOTS} slots (tokens * top_k), got {tokens} * {top_k}")


def check_capability(capability: tuple[int, int], name: str) -> None:
    """Refuses a GPU that the wheel has no machine code for.

    Args:
        capability: the GPU's compute capability.
        name: the GPU in words, for the message.

    Raises:
        LoadError: one sentence with the GPU's arch, the wheel's archs, and CUDA and torch versions.
    """
    if _wheel.arch_for(capability) is None:
        having = ", ".join(f"sm_{arch}" for arch in _wheel.built_archs())
        raise _load.LoadError(
            f"hidden_states: expected a tensor on a GPU that this wheel has machine code for ({having}), got one on "
            f"{name}, which is sm_{capability[0]}{capability[1]}; the wheel was built for {_load.built_for()}, "
            f"you have {_load.environment()}; {DOCTOR}"
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
def select(tokens: int, top_k: int, experts: int, hidden: int, intermediate: int, device_index: int | None) -> Tile:
    """The tile of an automatic choice; without a GPU the simple rule's."""
    tiles = _load.manifest().tiles
    if device_index is None or tokens == 0:
        return select_tile(tokens, top_k, experts, tiles)
    layer = Layer(experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)
    return choose_tile(tokens, layer, device_facts(device_index), tiles)


@functools.cache
def device_facts(device_index: int) -> DeviceFacts:
    """What the choice of a tile knows of this GPU."""
    return from_properties(torch.cuda.get_device_properties(device_index))


@functools.cache
def _operator(device_index: int, tile: Tile) -> tuple[Any, Tile]:
    """The layer's operator and the tile to call it with: loaded, on a supported device, and not blocked there."""
    name, capability = torch.cuda.get_device_name(device_index), torch.cuda.get_device_capability(device_index)
    check_capability(capability, f"{name} (cuda:{device_index})")
    tile = _load.load_nearest(tile, name, capability)
    return _load.moe_ops().fused_moe.default, tile


@functools.cache
def _module(tile: Tile) -> FusedMoEModule:
    if torch.version.cuda is not None:
        _load.load_tile(tile)
    return FusedMoEModule(tile)
