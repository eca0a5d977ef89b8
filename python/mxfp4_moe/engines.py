"""For authors of engines: a layer's parts one by one, where `MoEWeights.from_mxfp4` and `fused_moe` hide too much.

An engine owns its parameters, loads them in its own way and knows which rank has which expert. So here one matrix is
prepared at a time, into a tensor that the engine has; raw tensors go as soon as they are read; prepared tensors are
wrapped without a copy; and a map of experts becomes what the kernels take. docs/engines.md has an example.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._arguments import require_contiguous, require_tensor
from ._checkpoints.fp16_factors import ready_for
from ._checkpoints.options import Number, member, source_rows
from ._checkpoints.prepare import empty, prepare
from ._checkpoints.sources import mxfp4_source
from .activations import Activation
from .formats import BLOCK, WeightFormat, weight_bytes, word_order_of
from .weights import GateUpOrder, MoEWeights

__all__ = [
    "linear_first_expert",
    "local_ids",
    "prepare_layer",
    "prepare_matrix",
    "update_fp16_factors",
    "wrap_layer",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int32, torch.int64)
_BYTES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu)


@torch.no_grad()
def prepare_matrix(
    packed: Tensor,
    scales: Tensor,
    *,
    gate_up_order: GateUpOrder | str | None = None,
    out: Tensor | None = None,
    activation_format: str = "mxfp8",
) -> Tensor:
    """One matrix of all experts in the layout that the kernels of its device read; expert by expert, on that device.

    Args:
        packed: uint8, int8 or float4_e2m1fn_x2 [E, N, K/2] or [E, N, K/32, 16], low nibble = even k.
        scales: uint8 or float8_e8m0fnu [E, N, K/32], E8M0, bytes 0 to 253.
        gate_up_order: order of the rows of a gated w13 (N = 2I): "interleaved", "gate_up" or "up_gate". None, the
            default, leaves rows as they are: w2, and a w13 that is not gated.
        out: uint8 [E, formats.weight_bytes(N, K)], contiguous, to write to; it must not share memory with the others.
        activation_format: of the calls that will read it (`formats.word_order_of`).

    Returns:
        uint8 [E, formats.weight_bytes(N, K)]: out where it was given.

    Raises:
        TypeError, ValueError: a dtype, shape, device or order that does not fit; a scale byte above 253.
    """
    packed, scales = _as_bytes(packed), _as_bytes(scales)
    blocks = isinstance(packed, Tensor) and packed.dim() == 4
    require_tensor("packed", packed, torch.uint8, ("E", "N", "K/32", 16) if blocks else ("E", "N", "K/2"))
    experts, n, k = packed.shape[0], packed.shape[1], 2 * math.prod(packed.shape[2:])
    if k == 0 or k % BLOCK:
        raise ValueError(f"packed: expected K (the last dimension, in values) a multiple of {BLOCK}, got {k}")
    require_tensor("scales", scales, torch.uint8, (experts, n, k // BLOCK), packed.device)
    if out is None:
        out = empty(experts, n, k, packed.device)
    require_tensor("out", out, torch.uint8, (experts, weight_bytes(n, k)), packed.device)
    require_contiguous("out", out)
    if gate_up_order is None:
        rows = torch.arange(n, device=packed.device)
    elif n % 2:
        raise ValueError(f"packed: expected an even number of rows, gates and ups, got {n}")
    else:
        rows = source_rows(member("gate_up_order", GateUpOrder, gate_up_order), n // 2, True, packed.device)
    source = mxfp4_source("scales", packed.__getitem__, scales.__getitem__)
    order = word_order_of(packed.device, WeightFormat.MXFP4.activations_named(activation_format))
    for expert in range(experts):
        prepare(source(expert, 0, k), rows, k, order, out[expert])
    return out


def prepare_layer(
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    *,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    gate_up_order: GateUpOrder | str = GateUpOrder.INTERLEAVED,
    activation: Activation | str = Activation.SWIGLU_OAI,
    alpha: Number = 1.702,
    beta: Number = 1.0,
    limit: Number | None = 7.0,
    first_expert: int = 0,
    num_global_experts: int = 0,
    activation_format: str = "mxfp8",
    release: bool = False,
) -> MoEWeights:
    """`MoEWeights.from_mxfp4` for one rank's tensors as an engine has loaded them.

    Args:
        w13 .. limit: as `MoEWeights.from_mxfp4`, of the experts (and the part of I) that are here.
        first_expert, num_global_experts: where these experts stand in the layer, as in `MoEWeights`.
        activation_format: of the calls that will be made with them, as for `fused_moe`.
        release: free the storage of w13, w13_scale, w2 and w2_scale as soon as each matrix is prepared, so that beside
            the prepared weights only what is not read yet is there; the tensors are empty shells then. Tensors that
            are a part of a larger one, and storage that is not torch's own, stay.

    Raises:
        TypeError, ValueError: as `MoEWeights.from_mxfp4`. Nothing was released where the shapes do not fit.
    """
    between = member("activation", Activation, activation)
    order = member("gate_up_order", GateUpOrder, gate_up_order)
    activation_format = WeightFormat.MXFP4.activations_named(activation_format)
    for name, tensor in (("w13", w13), ("w13_scale", w13_scale), ("w2", w2), ("w2_scale", w2_scale)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    experts, rows = w13.shape[:2]
    hidden, inter = 2 * math.prod(w13.shape[2:]), 2 * math.prod(w2.shape[2:])
    if rows != (2 * inter if between.is_gated else inter) or w2.shape[:2] != (experts, hidden):
        raise ValueError(f"w2: expected [{experts}, {hidden}, I/2] with I of w13's {rows} rows, got {list(w2.shape)}")
    device = w13.device
    for name, scale, size in (("w13_scale", w13_scale, (rows, hidden)), ("w2_scale", w2_scale, (hidden, inter))):
        require_tensor(name, _as_bytes(scale), torch.uint8, (experts, size[0], size[1] // BLOCK), device)
    for name, bias, width in (("w13_bias", w13_bias, rows), ("w2_bias", w2_bias, hidden)):
        if bias is not None:
            require_tensor(name, bias, _FLOATS, (experts, width), device)
    row_order = source_rows(order, inter, between.is_gated, device)
    prepared = {}
    for name, packed, scales in (("w13", w13, w13_scale), ("w2", w2, w2_scale)):
        gated = order if name == "w13" and between.is_gated else None
        prepared[name] = prepare_matrix(packed, scales, gate_up_order=gated, activation_format=activation_format)
        if release:
            _release(packed)
            _release(scales)
    weights = MoEWeights(
        w13=prepared["w13"],
        w2=prepared["w2"],
        hidden_size=hidden,
        intermediate_size=inter,
        word_order=word_order_of(prepared["w13"].device, activation_format),
        w13_bias=None if w13_bias is None else w13_bias[:, row_order].to(torch.float32).contiguous(),
        w2_bias=None if w2_bias is None else w2_bias.to(torch.float32, copy=True).contiguous(),
        activation=between,
        alpha=alpha,
        beta=beta,
        limit=limit,
        gate_up_order=order,
        first_expert=first_expert,
        num_global_experts=num_global_experts,
    )
    return ready_for(weights, activation_format)


def wrap_layer(
    weights: MoEWeights,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    *,
    fp16_factors: tuple[Tensor, Tensor] | None = None,
) -> MoEWeights:
    """The same layer over an engine's own tensors, which hold prepared weights: nothing is copied.

    What an engine later writes into them (another expert's bytes, for instance: row e is expert e, whole) counts. Calls
    with activation_format "fp16" read one factor more for each expert's matrix. Where the engine has them as tensors of
    the layer beside its weights, they go where the weights go, and nothing is ever made from values again; without
    them, a write may need `update_fp16_factors`.

    Args:
        weights: the layer, for everything but its tensors.
        w13, w2: as `MoEWeights.w13` and `.w2`, in the word order of `weights`.
        w13_bias, w2_bias: float32, as there. NVFP4's float32 scales stay those of `weights`, and are not to be written.
        fp16_factors: of w13 and of w2, float32 [E, 2] with row e expert e's, as `MoEWeights.fp16_factors` makes them.

    Raises:
        TypeError, ValueError: tensors that do not fit each other.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    fields = {name: getattr(weights, name) for name in _OTHER_FIELDS}
    wrapped = MoEWeights(w13=w13, w2=w2, w13_bias=w13_bias, w2_bias=w2_bias, **fields)
    if fp16_factors is not None:
        if not isinstance(fp16_factors, (tuple, list)) or len(fp16_factors) != 2:
            raise TypeError(f"fp16_factors: expected those of w13 and of w2, got {type(fp16_factors).__name__}")
        for factors in fp16_factors:
            require_tensor("fp16_factors", factors, torch.float32, (wrapped.num_experts, 2), w13.device)
            require_contiguous("fp16_factors", factors)
        wrapped._read_fp16_factors_of((fp16_factors[0], fp16_factors[1]))
    return wrapped


def update_fp16_factors(weights: MoEWeights) -> None:
    """Makes `MoEWeights.fp16_factors` anew after something was written into w13 or w2; waits for the GPU.

    A call finds by itself what torch counted as a write. This is for others, such as those of a communication library,
    and for CUDA graphs: they read the same tensors, with what is in them then.

    Raises:
        TypeError: no weights.
        RuntimeError: while a CUDA graph is captured.
    """
    if not isinstance(weights, MoEWeights):
        raise TypeError(f"weights: expected MoEWeights, got {type(weights).__name__}")
    weights.update_fp16_factors()


_OTHER_FIELDS = (
    "weight_format",
    "tensor_scales",
    "word_order",
    "hidden_size",
    "intermediate_size",
    "activation",
    "alpha",
    "beta",
    "limit",
    "gate_up_order",
    "first_expert",
    "num_global_experts",
)


def linear_first_expert(expert_map: Tensor | None) -> int | None:
    """The global id of expert 0 here where the map is a shift, so that `MoEWeights.first_expert` does its work.

    Reads the map on the host: once, when weights are prepared.

    Args:
        expert_map: int32 or int64 [E of the whole layer], a global id's place here, negative where it is elsewhere;
            None where every expert is here.

    Returns:
        That id (0 for None), or None where the experts here are not consecutive: then `local_ids` maps each call's.
    """
    if expert_map is None:
        return 0
    require_tensor("expert_map", expert_map, _IDS, ("E",))
    places = expert_map.tolist()
    here = [expert for expert, place in enumerate(places) if place >= 0]
    if not here or [places[expert] for expert in here] != list(range(len(here))):
        return None
    return here[0] if here == list(range(here[0], here[0] + len(here))) else None


def local_ids(topk_ids: Tensor, expert_map: Tensor) -> Tensor:
    """Ids of the whole layer's experts as places here: int32 [T, k], -1 for what is elsewhere or is no expert.

    Args:
        topk_ids: int32 or int64 [T, k].
        expert_map: as in `linear_first_expert`, on the same device.
    """
    require_tensor("topk_ids", topk_ids, _IDS, ("T", "k"))
    require_tensor("expert_map", expert_map, _IDS, ("E",), topk_ids.device)
    experts = expert_map.shape[0]
    if experts == 0:
        raise ValueError("expert_map: expected a place for each of the layer's experts, got an empty one")
    known = (topk_ids >= 0) & (topk_ids < experts)
    return torch.where(known, expert_map[topk_ids.clamp(0, experts - 1).long()], -1).to(torch.int32)


def _release(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if storage.resizable() and storage.nbytes() == tensor.nbytes:
        storage.resize_(0)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if isinstance(tensor, Tensor) and tensor.dtype in _BYTES else tensor
