"""One layer on its way in: tensors checked against each other, then prepared expert by expert.

Every form of a checkpoint becomes a `RawLayer`, whose sources give rows as MXFP4 or NVFP4; `prepared_fields` makes of
it what `MoEWeights` holds. `nvfp4_layers` has the forms of NVFP4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arguments import describe, require_contiguous, require_tensor
from ..activations import Activation
from ..formats import BLOCK, WeightFormat, word_order_of
from .options import GateUpOrder, Number, check_number, shard_of, source_rows
from .prepare import empty, prepare, with_progress
from .sources import Source, ceil_div, flashinfer_source, float_source, mxfp4_source
from .tensor_scales import TensorScales

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CODES = (torch.int8, torch.float4_e2m1fn_x2)  # what codes come in beside uint8: bytes, all of them
_SCALES = (torch.float8_e8m0fnu,)


@dataclass(frozen=True, kw_only=True)
class RawLayer:
    """A layer of E experts as it came, whole: sizes H and I are known to fit the tensors."""

    w13: Source
    w2: Source
    experts: int
    hidden: int
    inter: int
    device: torch.device
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    bias_names: tuple[str, str] = ("w13_bias", "w2_bias")
    format: WeightFormat = WeightFormat.MXFP4  # of the rows that the sources give
    tensor_scales: TensorScales | None = None  # of NVFP4


def mxfp4_layer(
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    gated: bool,
) -> RawLayer:
    """Of tensors as checkpoints store them; see `MoEWeights.from_mxfp4`."""
    w13, w2 = as_bytes(w13, CODES), as_bytes(w2, CODES)
    w13_scale, w2_scale = as_bytes(w13_scale, _SCALES), as_bytes(w2_scale, _SCALES)
    experts, hidden, inter = _mxfp4_sizes(w13, w13_scale, w2, w2_scale, gated)
    return RawLayer(
        w13=mxfp4_source("w13_scale", w13.__getitem__, w13_scale.__getitem__),
        w2=mxfp4_source("w2_scale", w2.__getitem__, w2_scale.__getitem__),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=w13.device,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
    )


def float_layer(
    w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, gated: bool, block: int = BLOCK
) -> RawLayer:
    """Of floats, quantized to MXFP4 on the way; see `MoEWeights.from_float`."""
    require_tensor("w13", w13, _FLOATS, ("E", rows_name(gated), "H"))
    experts, rows, hidden = w13.shape
    inter = rows // 2 if gated else rows
    check_sizes("w13", w13, experts, hidden, inter, gated, block)
    require_tensor("w2", w2, _FLOATS, (experts, hidden, inter), w13.device)
    return RawLayer(
        w13=float_source("w13", w13.__getitem__),
        w2=float_source("w2", w2.__getitem__),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=w13.device,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
    )


def flashinfer_layer(
    fc1_expert_weights: Tensor,
    fc1_scale: Tensor,
    fc2_expert_weights: Tensor,
    fc2_scale: Tensor,
    fc1_expert_biases: Tensor | None,
    fc2_expert_biases: Tensor | None,
    gated: bool,
) -> RawLayer:
    """Of FlashInfer's packed views and swizzled scales; see `MoEWeights.from_flashinfer`."""
    names = ("fc1_expert_weights", "fc1_scale", "fc2_expert_weights", "fc2_scale")
    require_tensor(names[0], fc1_expert_weights, torch.int64, ("E", rows_name(gated), "H/16"))
    experts, rows, words = fc1_expert_weights.shape
    hidden, inter, device = words * 16, rows // 2 if gated else rows, fc1_expert_weights.device
    check_sizes(names[0], fc1_expert_weights, experts, hidden, inter, gated)
    fc1_scale_shape = (experts, ceil_div(rows, 128) * 128, ceil_div(hidden, 128))
    fc2_scale_shape = (experts, ceil_div(hidden, 128) * 128, ceil_div(inter, 128))
    require_tensor(names[1], fc1_scale, torch.int32, fc1_scale_shape, device)
    require_tensor(names[2], fc2_expert_weights, torch.int64, (experts, hidden, inter // 16), device)
    require_tensor(names[3], fc2_scale, torch.int32, fc2_scale_shape, device)
    for name, tensor in zip(names, (fc1_expert_weights, fc1_scale, fc2_expert_weights, fc2_scale), strict=True):
        require_contiguous(name, tensor)
        if tensor.untyped_storage().nbytes() == 0:  # flashinfer_api frees raw weights that it has prepared
            raise ValueError(
                f"{name}: expected a tensor with memory, got {describe(tensor)}, whose memory was freed when "
                "cutlass_fused_moe prepared it; load it again, and see flashinfer_api.set_raw_weights"
            )
    return RawLayer(
        w13=flashinfer_source(names[1], fc1_expert_weights, fc1_scale, rows, hidden),
        w2=flashinfer_source(names[3], fc2_expert_weights, fc2_scale, hidden, inter),
        experts=experts,
        hidden=hidden,
        inter=inter,
        device=device,
        w13_bias=fc1_expert_biases,
        w2_bias=fc2_expert_biases,
        bias_names=("fc1_expert_biases", "fc2_expert_biases"),
    )


@torch.no_grad()
def prepared_fields(
    raw: RawLayer,
    gate_up_order: GateUpOrder,
    activation: Activation,
    numbers: tuple[Number, Number, Number | None],
    ranks: tuple[int, int, int, int],
    activation_format: str | None = None,
) -> dict[str, Any]:
    """The fields of `MoEWeights`: the part of the layer that ranks (ep_rank, ep_size, tp_rank, tp_size) name.

    Args:
        activation_format: of the calls that will read it (`formats.word_order_of`); None for MXFP8.
    """
    experts, hidden, inter, device, kind = raw.experts, raw.hidden, raw.inter, raw.device, raw.format
    w13_bias, w2_bias = raw.w13_bias, raw.w2_bias
    per_output = 2 if activation.is_gated else 1
    if w13_bias is not None:
        require_tensor(raw.bias_names[0], w13_bias, _FLOATS, (experts, per_output * inter), device)
    if w2_bias is not None:
        require_tensor(raw.bias_names[1], w2_bias, _FLOATS, (experts, hidden), device)
    for name, number in zip(("alpha", "beta", "limit"), numbers, strict=True):
        if number is not None or name != "limit":
            check_number(name, number, experts, device)
    first, last = shard_of("ep", ranks[0], ranks[1], experts, 1)
    begin, end = shard_of("tp", ranks[2], ranks[3], inter, kind.shard_block(inter))

    w13_rows = source_rows(gate_up_order, inter, activation.is_gated, device)
    w13_rows = w13_rows[per_output * begin : per_output * end]
    w2_rows = torch.arange(hidden, device=device)
    local, shard = last - first, end - begin
    w13_out = empty(local, per_output * shard, hidden, device, kind)
    w2_out = empty(local, hidden, shard, device, kind)
    order = word_order_of(w13_out.device, kind.activations_named(activation_format))
    for e in with_progress(local):
        prepare(raw.w13(first + e, 0, hidden), w13_rows, hidden, order, w13_out[e], kind)
        prepare(raw.w2(first + e, begin, end), w2_rows, shard, order, w2_out[e], kind)

    own = slice(first, last)
    alpha, beta, limit = (number[own].clone() if isinstance(number, Tensor) else number for number in numbers)
    assert alpha is not None
    assert beta is not None
    return {
        "w13": w13_out,
        "w2": w2_out,
        "hidden_size": hidden,
        "intermediate_size": shard,
        "word_order": order,
        "w13_bias": None if w13_bias is None else w13_bias[own][:, w13_rows].to(torch.float32).contiguous(),
        "w2_bias": None if w2_bias is None or ranks[2] else w2_bias[own].to(torch.float32, copy=True).contiguous(),
        "activation": activation,
        "alpha": alpha,
        "beta": beta,
        "limit": limit,
        "gate_up_order": gate_up_order,
        "first_expert": first,
        "num_global_experts": experts,
        "weight_format": kind,
        "tensor_scales": None if raw.tensor_scales is None else raw.tensor_scales.map(lambda scale: scale[own].clone()),
    }


def as_bytes(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A view as uint8 of a tensor whose dtype is another name for the same bytes; others as they are."""
    return tensor.view(torch.uint8) if isinstance(tensor, Tensor) and tensor.dtype in dtypes else tensor


def rows_name(gated: bool) -> str:
    """How messages call the rows of w13."""
    return "2I" if gated else "I"


def _mxfp4_sizes(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, gated: bool) -> tuple[int, int, int]:
    """(E, H, I) of checkpoint tensors, once all four are known to fit each other."""
    hidden = _check_blocks("w13", w13, rows_name(gated), "H")
    _check_blocks("w2", w2, "H", "I")
    experts, rows = w13.shape[:2]
    inter = rows // 2 if gated else rows
    check_sizes("w13", w13, experts, hidden, inter, gated)
    device = w13.device
    require_tensor("w13_scale", w13_scale, torch.uint8, (experts, rows, hidden // BLOCK), device)
    w2_shape = (experts, hidden, inter // 2) if w2.dim() == 3 else (experts, hidden, inter // BLOCK, 16)
    require_tensor("w2", w2, torch.uint8, w2_shape, device)
    require_tensor("w2_scale", w2_scale, torch.uint8, (experts, hidden, inter // BLOCK), device)
    return experts, hidden, inter


def _check_blocks(name: str, blocks: Tensor, rows: str, k: str) -> int:
    """[E, N, K/2] or [E, N, K/32, 16] -> K."""
    shape: tuple[int | str, ...] = ("E", rows, f"{k}/2")
    if isinstance(blocks, Tensor) and blocks.dim() == 4:
        shape = ("E", rows, f"{k}/32", 16)
    require_tensor(name, blocks, torch.uint8, shape)
    return 2 * math.prod(blocks.shape[2:])


def check_sizes(name: str, w13: Tensor, experts: int, hidden: int, inter: int, gated: bool, block: int = BLOCK) -> None:
    """Refuses sizes that are no whole blocks, or none at all."""
    rows = "half the rows" if gated else "the rows"
    for size, what in ((hidden, "H (the last dimension, in values)"), (inter, f"I ({rows})")):
        if size == 0 or size % block:
            raise ValueError(f"{name}: expected {what} a multiple of {block}, got {size} from {describe(w13)}")
    if experts == 0 or (gated and w13.shape[1] % 2):
        raise ValueError(f"{name}: expected at least one expert and an even number of rows, got {describe(w13)}")
