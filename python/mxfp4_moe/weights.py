"""Checkpoint layouts -> `MoEWeights`, the one layout that the kernels read, and back again, bit for bit.

Preparing moves bits and computes nothing: gate and up rows are put in groups of 8, the codes of each 32-bit word in
the order that the device expands fastest, and every 64 rows of a K tile together with their scales into one contiguous
block (`formats.arrange_weights`). Weights stream through it expert by expert, and an expert in pieces of rows, so the
extra memory stays below two experts wherever they come from; `from_float` quantizes on the way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._checkpoint import TensorFiles
from ._load import explained
from ._prepare import (
    Source,
    ceil_div,
    cut,
    empty,
    flashinfer_source,
    float_source,
    move,
    mxfp4_source,
    prepare,
    restore,
    with_progress,
)
from .activations import Activation
from .formats import BLOCK, WordOrder, describe, require_tensor, weight_bytes, word_order_of

__all__ = ["Activation", "GateUpOrder", "MoEWeights", "Mxfp4Tensors", "WordOrder"]

Number = float | Tensor  # one for all experts, or float32 [E]

_EnumT = TypeVar("_EnumT", bound=Enum)
_Otherwise = TypeVar("_Otherwise", float, None)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHTS = {  # argument of from_mxfp4 -> name in a gpt-oss checkpoint
    "w13": "gate_up_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w2": "down_proj_blocks",
    "w2_scale": "down_proj_scales",
}
_BIASES = {"w13_bias": "gate_up_proj_bias", "w2_bias": "down_proj_bias"}


class GateUpOrder(str, Enum):
    """Order of a checkpoint's w13 rows; means nothing for activations that are not gated."""

    INTERLEAVED = "interleaved"  # g0, u0, g1, u1, ... (gpt-oss)
    GATE_UP = "gate_up"  # all gates, then all ups
    UP_GATE = "up_gate"  # all ups, then all gates (FlashInfer)


class Mxfp4Tensors(NamedTuple):
    """Weights of one layer as checkpoints store them; `MoEWeights.from_mxfp4` takes these names. W = 2I or I."""

    w13: Tensor  # uint8 [E, W, H/2], low nibble = even k
    w13_scale: Tensor  # uint8 [E, W, H/32], E8M0
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scale: Tensor  # uint8 [E, H, I/32]
    w13_bias: Tensor | None  # float32 [E, W]
    w2_bias: Tensor | None  # float32 [E, H]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MoEWeights:
    """The weights of one MoE layer, prepared for the kernels. Make them with one of the ``from_`` methods.

    E experts, H hidden size, I intermediate size; H and I are multiples of 32. W, the rows of w13, is 2I for a gated
    activation and I for one that is not. All tensors are contiguous and on one device.

    Attributes:
        w13: uint8 [E, weight_bytes(W, H)], codes and scales as `formats.arrange_weights` puts them. Gated: rows in
            groups of 16, 8 gates and then the 8 ups that belong to them.
        w2: uint8 [E, weight_bytes(H, I)], the same.
        hidden_size: H, in values.
        intermediate_size: I, in values.
        word_order: order of the codes inside the words of w13 and w2; kernels read that of their device
            (`formats.word_order_of`), CPU either.
        w13_bias: float32 [E, W] in w13's row order, or None.
        w2_bias: float32 [E, H], or None.
        activation: what stands between the GEMMs.
        alpha, beta, limit: the numbers of swiglu_oai, and limit that of swiglu_step; others ignore them. One float for
            all experts, or float32 [E]; limit None clamps nothing.
        gate_up_order: order in which the checkpoint had w13's rows; `to_mxfp4` restores it.
        first_expert: global id of expert 0 here; other than 0 in the slices that `expert_parallel` makes. Ids of
            experts that are not here contribute nothing.
        num_global_experts: experts of the whole layer; 0, the default, stands for first_expert + E.

    Raises:
        TypeError: a tensor of another dtype, or a value of another type.
        ValueError: a tensor whose shape, device or stride does not fit; numbers that are not finite.
    """

    w13: Tensor
    w2: Tensor
    hidden_size: int
    intermediate_size: int
    word_order: WordOrder = WordOrder.CONTAINERS
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    activation: Activation = Activation.SWIGLU_OAI
    alpha: Number = 1.702
    beta: Number = 1.0
    limit: Number | None = 7.0
    gate_up_order: GateUpOrder = GateUpOrder.INTERLEAVED
    first_expert: int = 0
    num_global_experts: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.activation, Activation):
            raise TypeError(f"activation: expected an Activation, got {self.activation!r}")
        if not isinstance(self.gate_up_order, GateUpOrder):
            raise TypeError(f"gate_up_order: expected a GateUpOrder, got {self.gate_up_order!r}")
        if not isinstance(self.word_order, WordOrder):
            raise TypeError(f"word_order: expected a WordOrder, got {self.word_order!r}")
        hidden, inter, rows = self.hidden_size, self.intermediate_size, self.w13_rows
        for name, size in (("hidden_size", hidden), ("intermediate_size", inter)):
            _check_int(name, size)
            if size <= 0 or size % BLOCK:
                raise ValueError(f"{name}: expected a multiple of {BLOCK}, got {size}")
        require_tensor("w13", self.w13, torch.uint8, ("E", weight_bytes(rows, hidden)))
        experts, device = self.num_experts, self.device
        if experts == 0:
            raise ValueError(f"w13: expected at least one expert, got {describe(self.w13)}")
        shapes = {
            "w13": (experts, weight_bytes(rows, hidden)),
            "w2": (experts, weight_bytes(hidden, inter)),
            "w13_bias": (experts, rows),
            "w2_bias": (experts, hidden),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None and name.endswith("_bias"):
                continue
            require_tensor(name, tensor, torch.float32 if name.endswith("_bias") else torch.uint8, shape, device)
            _check_contiguous(name, tensor)
        _check_number("alpha", self.alpha, experts, device)
        _check_number("beta", self.beta, experts, device)
        if self.limit is not None:
            _check_number("limit", self.limit, experts, device)
            if not isinstance(self.limit, Tensor) and self.limit <= 0:
                raise ValueError(f"limit: expected a number above 0, or None, got {self.limit}")
        _check_int("first_expert", self.first_expert)
        _check_int("num_global_experts", self.num_global_experts)
        if self.num_global_experts == 0:
            object.__setattr__(self, "num_global_experts", self.first_expert + experts)
        if not 0 <= self.first_expert <= self.num_global_experts - experts:
            raise ValueError(
                f"first_expert: expected 0 to {self.num_global_experts - experts}, where the {experts} experts here "
                f"fit into {self.num_global_experts}, got {self.first_expert}"
            )

    def __repr__(self) -> str:
        bias = "none" if self.w13_bias is None and self.w2_bias is None else "yes"
        part = f"first_expert={self.first_expert}, num_global_experts={self.num_global_experts}, "
        return (
            f"MoEWeights(num_experts={self.num_experts}, {part if self.num_experts < self.num_global_experts else ''}"
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, bias={bias}, "
            f"activation={self.activation.value}, device={self.device})"
        )

    @property
    def num_experts(self) -> int:
        """E, the experts that are here."""
        return self.w13.shape[0]

    @property
    def w13_rows(self) -> int:
        """W, the first GEMM's width: 2I for a gated activation, else I."""
        return self.intermediate_size * (2 if self.activation.is_gated else 1)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.w13.device

    @functools.cached_property
    def operator_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the layer's operator (csrc/moe/operators.cpp) takes of the weights: w13 to limit, the rare ones by name.

        Made once: no call has to gather them again.
        """
        alpha, alphas = split_number(self.alpha, 0.0)
        beta, betas = split_number(self.beta, 0.0)
        limit, limits = split_number(self.limit, math.inf)
        tensors = (self.w13, self.w13_bias, self.w2, self.w2_bias)
        rare = {"first_expert": self.first_expert or None, "alphas": alphas, "betas": betas, "limits": limits}
        return (
            (*tensors, self.intermediate_size, self.activation.code, alpha, beta, limit),
            {name: value for name, value in rare.items() if value is not None},
        )

    def __getstate__(self) -> dict[str, Any]:
        """The attributes alone: what was made from them is not copied or stored, it is made again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str | int) -> MoEWeights:
        """The same weights on another device, in its word order; tensors that are as wanted are shared, not copied.

        Where the word order changes, the copy is made expert by expert.

        Raises:
            RuntimeError: a GPU is asked for, and torch, the driver or the GPU is not fit for it; says what to do.
        """
        with explained(f"weights cannot be put on {device}"):
            place = torch.empty(0, device=device).device  # with its index
            order = word_order_of(place)

            def moved(tensor: Tensor) -> Tensor:
                hidden, inter = self.hidden_size, self.intermediate_size
                if tensor is self.w13 and order is not self.word_order:
                    return move(tensor, place, self.w13_rows, hidden, self.word_order, order)
                if tensor is self.w2 and order is not self.word_order:
                    return move(tensor, place, hidden, inter, self.word_order, order)
                return tensor.to(place)

            return replace(self._map(moved), word_order=order)

    def expert_parallel(self, ep_rank: int, ep_size: int) -> MoEWeights:
        """The experts of one of ep_size ranks: [ep_rank * E/ep_size, (ep_rank + 1) * E/ep_size).

        The slice shares memory with these weights. It takes the same global ids: a slot whose expert is elsewhere
        contributes nothing, and the sum of all ranks' outputs is the layer's.

        Raises:
            ValueError: ep_size does not divide E, or ep_rank is not one of its ranks.
        """
        begin, end = _shard("ep", ep_rank, ep_size, self.num_experts, 1)
        part = self._map(lambda tensor: tensor[begin:end])
        return replace(part, first_expert=self.first_expert + begin, num_global_experts=self.num_global_experts)

    def tensor_parallel(self, tp_rank: int, tp_size: int) -> MoEWeights:
        """Shard of one of tp_size ranks: every expert, a part of the intermediate dimension.

        Rank 0 keeps w2_bias, so the sum of all ranks' outputs is the layer's. Each rank rounds its own sum to the
        output dtype; apart from that rounding the split changes nothing, since blocks of 32 stay whole. Copies.

        Raises:
            ValueError: I / tp_size is not a multiple of 32, or tp_rank is not one of its ranks.
        """
        begin, end = _shard("tp", tp_rank, tp_size, self.intermediate_size, BLOCK)
        if tp_size == 1:
            return self
        per_output = 2 if self.activation.is_gated else 1
        rows, hidden, inter = slice(per_output * begin, per_output * end), self.hidden_size, self.intermediate_size
        return replace(
            self,
            w13=cut(self.w13, self.w13_rows, hidden, self.word_order, rows, slice(0, hidden)),
            w13_bias=None if self.w13_bias is None else self.w13_bias[:, rows].contiguous(),
            w2=cut(self.w2, hidden, inter, self.word_order, slice(0, hidden), slice(begin, end)),
            w2_bias=self.w2_bias if tp_rank == 0 else None,
            intermediate_size=end - begin,
        )

    def to_mxfp4(self) -> Mxfp4Tensors:
        """The checkpoint's tensors again, bit for bit and in its gate/up order.

        Blocks come back 3-D ([E, N, K/2]) also where they came 4-D; biases as float32, which holds every bfloat16 and
        float16 exactly. A slice gives its own experts or its own shard. FlashInfer's tensors are those of
        `from_flashinfer` after ``w13.view(torch.int64)`` and `flashinfer_api.block_scale_interleave`.
        """
        gated = self.activation.is_gated
        rows = _source_rows(self.gate_up_order, self.intermediate_size, gated, self.device)
        w13, w13_scale = restore(self.w13, rows, self.hidden_size, self.word_order)
        w2_rows = torch.arange(self.hidden_size, device=self.device)
        w2, w2_scale = restore(self.w2, w2_rows, self.intermediate_size, self.word_order)
        return Mxfp4Tensors(
            w13=w13,
            w13_scale=w13_scale,
            w2=w2,
            w2_scale=w2_scale,
            w13_bias=None if self.w13_bias is None else self.w13_bias[:, rows.argsort()].contiguous(),
            w2_bias=None if self.w2_bias is None else self.w2_bias.clone(),
        )

    @classmethod
    def from_mxfp4(
        cls,
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
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> MoEWeights:
        """Prepares weights given exactly as checkpoints store them. The tensors passed in stay as they are.

        W is 2I for a gated activation (w13 holds gate and up projections), I for one that is not.

        Args:
            w13: uint8 [E, W, H/2] or [E, W, H/32, 16], low nibble = even k.
            w13_scale: uint8 [E, W, H/32], E8M0.
            w2: uint8 [E, H, I/2] or [E, H, I/32, 16]; down projection.
            w2_scale: uint8 [E, H, I/32].
            w13_bias: bfloat16, float16 or float32 [E, W] in the row order of w13, or None.
            w2_bias: the same, [E, H], or None.
            gate_up_order: row order of w13: "interleaved", "gate_up" or "up_gate".
            activation: an `Activation` or its name.
            alpha, beta, limit: numbers of the activation, floats or float32 [E]; see `MoEWeights`.
            ep_rank, ep_size, tp_rank, tp_size: prepare one rank's part only, as `expert_parallel` and
                `tensor_parallel` would cut it from the whole.

        Returns:
            Prepared weights on the device of the tensors.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a shape or device that does not fit, H or I not a multiple of 32, a scale byte above 253
                (2^126; 255 is NaN), an unknown gate_up_order or activation, ranks that do not fit.
        """
        between = _member("activation", Activation, activation)
        sizes = _mxfp4_sizes(w13, w13_scale, w2, w2_scale, between.is_gated)
        return cls._build(
            mxfp4_source("w13_scale", w13.__getitem__, w13_scale.__getitem__),
            mxfp4_source("w2_scale", w2.__getitem__, w2_scale.__getitem__),
            sizes,
            w13.device,
            w13_bias=w13_bias,
            w2_bias=w2_bias,
            gate_up_order=_member("gate_up_order", GateUpOrder, gate_up_order),
            activation=between,
            numbers=(alpha, beta, limit),
            ranks=(ep_rank, ep_size, tp_rank, tp_size),
        )

    @classmethod
    def from_float(
        cls,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up_order: GateUpOrder | str = GateUpOrder.INTERLEAVED,
        activation: Activation | str = Activation.SWIGLU_OAI,
        alpha: Number = 1.702,
        beta: Number = 1.0,
        limit: Number | None = 7.0,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> MoEWeights:
        """Quantizes weights to MXFP4 (`formats.quantize_mxfp4`, OCP MX) and prepares them.

        Values that MXFP4 holds exactly, such as dequantized MXFP4 weights, keep their values. Strides are free: a
        checkpoint with [E, K, N] passes ``weight.mT``.

        Args:
            w13: bfloat16, float16 or float32 [E, W, H]; W as in `from_mxfp4`.
            w2: the same, [E, H, I].
            others: as for `from_mxfp4`.

        Raises:
            TypeError, ValueError: as `from_mxfp4`; a weight that is not finite.
        """
        between = _member("activation", Activation, activation)
        gated = between.is_gated
        require_tensor("w13", w13, _FLOATS, ("E", _rows_name(gated), "H"))
        experts, rows, hidden = w13.shape
        inter = rows // 2 if gated else rows
        _check_sizes("w13", w13, experts, hidden, inter, gated)
        require_tensor("w2", w2, _FLOATS, (experts, hidden, inter), w13.device)
        return cls._build(
            float_source("w13", w13),
            float_source("w2", w2),
            (experts, hidden, inter),
            w13.device,
            w13_bias=w13_bias,
            w2_bias=w2_bias,
            gate_up_order=_member("gate_up_order", GateUpOrder, gate_up_order),
            activation=between,
            numbers=(alpha, beta, limit),
            ranks=(ep_rank, ep_size, tp_rank, tp_size),
        )

    @classmethod
    def from_flashinfer(
        cls,
        fc1_expert_weights: Tensor,
        fc1_scale: Tensor,
        fc2_expert_weights: Tensor,
        fc2_scale: Tensor,
        *,
        fc1_expert_biases: Tensor | None = None,
        fc2_expert_biases: Tensor | None = None,
        activation: Activation | str = Activation.SWIGLU,
        alpha: Number = 1.0,
        beta: Number = 0.0,
        limit: Number | None = None,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> MoEWeights:
        """Prepares weights as FlashInfer's ``cutlass_fused_moe`` takes them for MXFP8 x MXFP4.

        As there, the tensors are this rank's own: ep_rank and ep_size say only which global ids its experts have, and
        fc2_expert_biases is left out on every tp_rank but 0.

        Args:
            fc1_expert_weights: int64 [E, W, H/16], a view of packed bytes; rows [up; gate] for a gated activation.
            fc1_scale: int32 [E, W padded to 128, ceil(H/128)], a view of 128x4-swizzled E8M0 bytes.
            fc2_expert_weights: int64 [E, H, I/16].
            fc2_scale: int32 [E, H padded to 128, ceil(I/128)].
            fc1_expert_biases: bfloat16, float16 or float32 [E, W], rows as fc1_expert_weights, or None.
            fc2_expert_biases: the same, [E, H], or None.
            activation, alpha, beta, limit: as for `from_mxfp4`; the defaults are FlashInfer's.

        Raises:
            TypeError, ValueError: as `from_mxfp4`.
        """
        between = _member("activation", Activation, activation)
        gated = between.is_gated
        names = ("fc1_expert_weights", "fc1_scale", "fc2_expert_weights", "fc2_scale")
        require_tensor(names[0], fc1_expert_weights, torch.int64, ("E", _rows_name(gated), "H/16"))
        experts, rows, words = fc1_expert_weights.shape
        hidden, inter, device = words * 16, rows // 2 if gated else rows, fc1_expert_weights.device
        _check_sizes(names[0], fc1_expert_weights, experts, hidden, inter, gated)
        fc1_scale_shape = (experts, ceil_div(rows, 128) * 128, ceil_div(hidden, 128))
        fc2_scale_shape = (experts, ceil_div(hidden, 128) * 128, ceil_div(inter, 128))
        require_tensor(names[1], fc1_scale, torch.int32, fc1_scale_shape, device)
        require_tensor(names[2], fc2_expert_weights, torch.int64, (experts, hidden, inter // 16), device)
        require_tensor(names[3], fc2_scale, torch.int32, fc2_scale_shape, device)
        for name, tensor in zip(names, (fc1_expert_weights, fc1_scale, fc2_expert_weights, fc2_scale), strict=True):
            _check_contiguous(name, tensor)
        begin, _ = _shard("ep", ep_rank, ep_size, experts * ep_size if isinstance(ep_size, int) else 0, 1)
        _shard("tp", tp_rank, tp_size, tp_size, 1)
        weights = cls._build(
            flashinfer_source(names[1], fc1_expert_weights, fc1_scale, rows, hidden),
            flashinfer_source(names[3], fc2_expert_weights, fc2_scale, hidden, inter),
            (experts, hidden, inter),
            device,
            w13_bias=fc1_expert_biases,
            w2_bias=fc2_expert_biases if tp_rank == 0 else None,
            bias_names=("fc1_expert_biases", "fc2_expert_biases"),
            gate_up_order=GateUpOrder.UP_GATE,
            activation=between,
            numbers=(alpha, beta, limit),
            ranks=(0, 1, 0, 1),
        )
        return replace(weights, first_expert=begin, num_global_experts=experts * ep_size)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        *,
        layer: int,
        gate_up_order: GateUpOrder | str = GateUpOrder.INTERLEAVED,
        activation: Activation | str = Activation.SWIGLU_OAI,
        alpha: Number = 1.702,
        beta: Number = 1.0,
        limit: Number | None = 7.0,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> MoEWeights:
        """Reads and prepares one layer of a checkpoint with gpt-oss's names; nothing but that layer is read.

        The names are ``model.layers.{layer}.mlp.experts.`` + gate_up_proj_blocks, gate_up_proj_scales,
        gate_up_proj_bias, down_proj_blocks, down_proj_scales, down_proj_bias. Experts are read one at a time, and only
        those of ep_rank.

        Args:
            path: a .safetensors file, or a directory with model.safetensors or with model.safetensors.index.json and
                the shards that it names.
            layer: layer number, from 0.
            gate_up_order, activation, alpha, beta, limit: as for `from_mxfp4`; the defaults are gpt-oss's.
            ep_rank, ep_size, tp_rank, tp_size: as for `from_mxfp4`.
            device: where to put the weights.

        Raises:
            FileNotFoundError: path, or the checkpoint in it, does not exist.
            ValueError: a tensor or shard is missing, or a file is malformed (names the tensor and the file).
            RuntimeError: a GPU is asked for, and torch, the driver or the GPU is not fit for it; says what to do.
        """
        if layer < 0:
            raise ValueError(f"layer: expected 0 or more, got {layer}")
        between = _member("activation", Activation, activation)
        prefix = f"model.layers.{layer}.mlp.experts."
        with explained(f"layer {layer} cannot be read to {device}"), TensorFiles(Path(path), device) as files:
            stored = {argument: files.open(prefix + suffix) for argument, suffix in _WEIGHTS.items()}
            biases = {argument: files.open(prefix + suffix).whole() for argument, suffix in _BIASES.items()}
            sizes = _mxfp4_sizes(**{name: tensor.spec for name, tensor in stored.items()}, gated=between.is_gated)
            return cls._build(
                mxfp4_source("w13_scale", stored["w13"].expert, stored["w13_scale"].expert),
                mxfp4_source("w2_scale", stored["w2"].expert, stored["w2_scale"].expert),
                sizes,
                biases["w2_bias"].device,
                w13_bias=biases["w13_bias"],
                w2_bias=biases["w2_bias"],
                gate_up_order=_member("gate_up_order", GateUpOrder, gate_up_order),
                activation=between,
                numbers=(alpha, beta, limit),
                ranks=(ep_rank, ep_size, tp_rank, tp_size),
            )

    @classmethod
    @torch.no_grad()
    def _build(
        cls,
        w13: Source,
        w2: Source,
        sizes: tuple[int, int, int],
        device: torch.device,
        *,
        w13_bias: Tensor | None,
        w2_bias: Tensor | None,
        gate_up_order: GateUpOrder,
        activation: Activation,
        numbers: tuple[Number, Number, Number | None],
        ranks: tuple[int, int, int, int],
        bias_names: tuple[str, str] = ("w13_bias", "w2_bias"),
    ) -> MoEWeights:
        """All ways in meet here: sizes are the whole layer's (E, H, I), ranks says which part of it to prepare."""
        experts, hidden, inter = sizes
        per_output = 2 if activation.is_gated else 1
        if w13_bias is not None:
            require_tensor(bias_names[0], w13_bias, _FLOATS, (experts, per_output * inter), device)
        if w2_bias is not None:
            require_tensor(bias_names[1], w2_bias, _FLOATS, (experts, hidden), device)
        for name, number in zip(("alpha", "beta", "limit"), numbers, strict=True):
            if number is not None:
                _check_number(name, number, experts, device)
        first, last = _shard("ep", ranks[0], ranks[1], experts, 1)
        begin, end = _shard("tp", ranks[2], ranks[3], inter, BLOCK)

        w13_rows = _source_rows(gate_up_order, inter, activation.is_gated, device)
        w13_rows = w13_rows[per_output * begin : per_output * end]
        w2_rows = torch.arange(hidden, device=device)
        local, shard = last - first, end - begin
        w13_out = empty(local, per_output * shard, hidden, device)
        w2_out = empty(local, hidden, shard, device)
        order = word_order_of(w13_out.device)
        for e in with_progress(local):
            prepare(w13(first + e, 0, hidden), w13_rows, hidden, order, w13_out[e])
            prepare(w2(first + e, begin, end), w2_rows, shard, order, w2_out[e])

        own = slice(first, last)
        alpha, beta, limit = (number[own].clone() if isinstance(number, Tensor) else number for number in numbers)
        assert alpha is not None
        assert beta is not None
        return cls(
            w13=w13_out,
            w2=w2_out,
            hidden_size=hidden,
            intermediate_size=shard,
            word_order=order,
            w13_bias=None if w13_bias is None else w13_bias[own][:, w13_rows].to(torch.float32).contiguous(),
            w2_bias=None if w2_bias is None or ranks[2] else w2_bias[own].to(torch.float32, copy=True).contiguous(),
            activation=activation,
            alpha=alpha,
            beta=beta,
            limit=limit,
            gate_up_order=gate_up_order,
            first_expert=first,
            num_global_experts=experts,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> MoEWeights:
        """The same weights with every tensor replaced."""
        fields: dict[str, Any] = {n: function(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **fields)


def split_number(value: Number | None, otherwise: _Otherwise) -> tuple[float | _Otherwise, Tensor | None]:
    """A number of the activation as the operators take it: the one for all experts, the tensor with one for each."""
    if isinstance(value, Tensor):
        return otherwise, value
    return (otherwise if value is None else value), None


def _source_rows(order: GateUpOrder, intermediate_size: int, gated: bool, device: torch.device) -> Tensor:
    """int64 [W]: the checkpoint row that stands at each prepared row."""
    if not gated:
        return torch.arange(intermediate_size, device=device)
    row = torch.arange(2 * intermediate_size, device=device)
    j, up = row // 16 * 8 + row % 8, row % 16 // 8
    if order is GateUpOrder.INTERLEAVED:
        return 2 * j + up
    return j + intermediate_size * (up if order is GateUpOrder.GATE_UP else 1 - up)


def _rows_name(gated: bool) -> str:
    return "2I" if gated else "I"


def _mxfp4_sizes(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, gated: bool) -> tuple[int, int, int]:
    """(E, H, I) of checkpoint tensors, once all four are known to fit each other."""
    hidden = _check_blocks("w13", w13, _rows_name(gated), "H")
    _check_blocks("w2", w2, "H", "I")
    experts, rows = w13.shape[:2]
    inter = rows // 2 if gated else rows
    _check_sizes("w13", w13, experts, hidden, inter, gated)
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


def _check_sizes(name: str, w13: Tensor, experts: int, hidden: int, inter: int, gated: bool) -> None:
    rows = "half the rows" if gated else "the rows"
    for size, what in ((hidden, "H (the last dimension, in values)"), (inter, f"I ({rows})")):
        if size == 0 or size % BLOCK:
            raise ValueError(f"{name}: expected {what} a multiple of {BLOCK}, got {size} from {describe(w13)}")
    if experts == 0 or (gated and w13.shape[1] % 2):
        raise ValueError(f"{name}: expected at least one expert and an even number of rows, got {describe(w13)}")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def _check_number(name: str, value: object, experts: int, device: torch.device) -> None:
    if isinstance(value, Tensor):
        require_tensor(name, value, torch.float32, (experts,), device)
        return _check_contiguous(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, or float32 [{experts}], got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def _shard(kind: str, rank: int, size: int, total: int, multiple: int) -> tuple[int, int]:
    """[begin, end) of one rank's share of total, a multiple of `multiple`."""
    _check_int(f"{kind}_rank", rank)
    _check_int(f"{kind}_size", size)
    if size < 1 or total % size or total // size % multiple:
        what = f"the {total} experts" if kind == "ep" else f"an intermediate size of {total} in multiples of {multiple}"
        raise ValueError(f"{kind}_size: expected a number of ranks that divides {what}, got {size}")
    if not 0 <= rank < size:
        raise ValueError(f"{kind}_rank: expected 0 to {size - 1}, got {rank}")
    return rank * (total // size), (rank + 1) * (total // size)


def _member(name: str, kind: type[_EnumT], value: object) -> _EnumT:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(m.value) for m in kind)
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}") from None
