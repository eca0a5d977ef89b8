"""Checkpoint layouts -> `MoEWeights`, the one layout that the kernels read, and back again, bit for bit.

Preparing moves bits and computes nothing: gate and up rows are put in groups of 8, the codes of each 32-bit word in
the order that the device expands fastest, and every 64 rows of a K tile together with their scales into one contiguous
block (`formats.arrange_weights`). Weights stream through it expert by expert, and an expert in pieces of rows, so the
extra memory stays below two experts wherever they come from; `from_float` quantizes on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ._arguments import named_device, require_device
from ._checkpoints.fields import Mxfp4Tensors, Nvfp4Tensors, alone, check_fields, operator_arguments
from ._checkpoints.fp16_factors import InFloat16, ready_for
from ._checkpoints.from_files import FromFiles
from ._checkpoints.layers import flashinfer_layer, float_layer, mxfp4_layer, prepared_fields
from ._checkpoints.nvfp4_layers import nvfp4_float_layer, nvfp4_layer, refuse_gpu
from ._checkpoints.options import GateUpOrder, Number, member, shard_of, source_rows
from ._checkpoints.prepare import cut, move, restore
from ._checkpoints.tensor_scales import TensorScales
from ._install.errors import explained
from .activations import Activation
from .formats import WeightFormat, WordOrder, word_order_of

__all__ = [
    "Activation",
    "GateUpOrder",
    "MoEWeights",
    "Mxfp4Tensors",
    "Nvfp4Tensors",
    "TensorScales",
    "WeightFormat",
    "WordOrder",
]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MoEWeights(FromFiles, InFloat16):
    """The weights of one MoE layer, prepared for the kernels. Make them with one of the ``from_`` methods.

    E experts, H hidden size, I intermediate size; H and I are multiples of 32, of NVFP4 of 16. W, the rows of w13, is
    2I for a gated activation and I for one that is not. All tensors are contiguous and on one device.

    Attributes:
        w13: uint8 [E, weight_bytes(W, H)], codes and block scales as `formats.WeightFormat` keeps them. Gated: rows in
            groups of 16, 8 gates and then the 8 ups that belong to them.
        w2: uint8 [E, weight_bytes(H, I)], the same.
        hidden_size: H, in values.
        intermediate_size: I, in values.
        word_order: order of the codes inside the words of w13 and w2; kernels read that of their device
            (`formats.word_order_of`), CPU either.
        w13_bias: float32 [E, W] in w13's row order, or None.
        w2_bias: float32 [E, H], or None.
        activation: what stands between the GEMMs.
        alpha, beta, limit: numbers of the activation, where its formula (`Activation`) has them. One float for all
            experts, or float32 [E]; finite, limit above 0 or None, which clamps nothing. A tensor's values are read
            here, once, which waits for a GPU's; no call reads them.
        gate_up_order: order in which the checkpoint had w13's rows; `to_mxfp4` restores it.
        first_expert: global id of expert 0 here; other than 0 in the slices that `expert_parallel` makes. Ids of
            experts that are not here contribute nothing.
        num_global_experts: experts of the whole layer; 0, the default, stands for first_expert + E.
        weight_format: "mxfp4", or "nvfp4", which GPUs have kernels for in wheels of profile `full`, where H and I are
            multiples of 32.
        tensor_scales: of NVFP4, its float32 scales; else None.

    Raises:
        TypeError: a tensor of another dtype, or a value of another type.
        ValueError: a tensor whose shape, device or stride does not fit; a number that float32 does not hold as finite.
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
    weight_format: WeightFormat = WeightFormat.MXFP4
    tensor_scales: TensorScales | None = None

    def __post_init__(self) -> None:
        self.__setstate__({"num_global_experts": check_fields(self)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.tensor_scales is not None:  # these are computed: now, and not in the stream or graph of a first call
            _ = self.operator_arguments
            self._made_with_nvfp4()

    def __repr__(self) -> str:
        bias = "none" if self.w13_bias is None and self.w2_bias is None else "yes"
        part = f"first_expert={self.first_expert}, num_global_experts={self.num_global_experts}, "
        part = part if self.num_experts < self.num_global_experts else ""
        kind = "" if self.weight_format is WeightFormat.MXFP4 else f"weight_format={self.weight_format.value}, "
        return (
            f"MoEWeights({kind}num_experts={self.num_experts}, {part}"
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
        """`operator_arguments`, made once: no call has to gather them again."""
        return operator_arguments(self)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes alone, a part of a larger tensor without the rest: what was made from them is made again."""
        return {field.name: alone(getattr(self, field.name)) for field in fields(self)}

    def to(self, device: torch.device | str | int, activation_format: str | None = None) -> MoEWeights:
        """The same weights on another device, in the word order of its kernels for these activations.

        Tensors that are as wanted are shared; others are copied, and both are there until the first ones go.

        Args:
            activation_format: of the calls, as for `fused_moe`; None: of one that names none. "fp16": with its factors.

        Raises:
            TypeError, ValueError: no device, such as a dtype; no format of activations for these weights; for NVFP4
                ones, a GPU for which this wheel has no kernels, or whose kernels do not take the layer's sizes.
            RuntimeError: a GPU is asked for, and torch, the driver or the GPU is not fit for it; says what to do.
        """
        kind, hidden, inter = self.weight_format, self.hidden_size, self.intermediate_size
        with explained(f"weights cannot be put on {device}"):
            if kind is WeightFormat.NVFP4:
                refuse_gpu("device", named_device("device", device), (hidden, inter))
            place = require_device("device", device)
            order = word_order_of(place, kind.activations_named(activation_format))

            def moved(tensor: Tensor) -> Tensor:
                if order is self.word_order or tensor.dtype is not torch.uint8:  # no codes
                    return tensor.to(place)
                size = (self.w13_rows, hidden) if tensor is self.w13 else (hidden, inter)
                return move(tensor, place, *size, self.word_order, order, kind)

            return ready_for(replace(self._map(moved), word_order=order), activation_format)

    def expert_parallel(self, ep_rank: int, ep_size: int) -> MoEWeights:
        """The experts of one of ep_size ranks, in order: E // ep_size each, and one more for the first E % ep_size.

        Copies, so that whole weights which are no longer needed can go. The part takes the same global ids: a slot
        whose expert is elsewhere contributes nothing, and the sum of all ranks' outputs is the layer's.

        Raises:
            ValueError: more ranks than experts, or ep_rank is not one of them.
        """
        begin, end = shard_of("ep", ep_rank, ep_size, self.num_experts, 1)
        if ep_size == 1:
            return self
        part = self._map(lambda tensor: tensor[begin:end].clone())
        return replace(part, first_expert=self.first_expert + begin, num_global_experts=self.num_global_experts)

    def tensor_parallel(self, tp_rank: int, tp_size: int) -> MoEWeights:
        """Shard of one of tp_size ranks: every expert, a part of the intermediate dimension.

        The dimension is cut between blocks of 32 (NVFP4's of 16 where I is no multiple of 32): I / 32 // tp_size blocks
        each, and one more for the first ranks where blocks are left over (2880 over 4 is 23, 23, 22 and 22 blocks).
        Rank 0 keeps w2_bias, so the sum of all ranks' outputs is the layer's. Each rank rounds its own sum to the
        output dtype; apart from that rounding the split changes nothing, but with NVFP4 activations whose scale is that
        of the rank's part of a row, since the checkpoint has none for inputs. Copies.

        Raises:
            ValueError: more ranks than blocks, or tp_rank is not one of them.
        """
        kind = self.weight_format
        begin, end = shard_of("tp", tp_rank, tp_size, self.intermediate_size, kind.shard_block(self.intermediate_size))
        if tp_size == 1:
            return self
        per_output = 2 if self.activation.is_gated else 1
        rows, hidden, inter = slice(per_output * begin, per_output * end), self.hidden_size, self.intermediate_size
        return replace(
            self,
            w13=cut(self.w13, self.w13_rows, hidden, self.word_order, rows, slice(0, hidden), kind),
            w13_bias=None if self.w13_bias is None else alone(self.w13_bias[:, rows].contiguous()),
            w2=cut(self.w2, hidden, inter, self.word_order, slice(0, hidden), slice(begin, end), kind),
            w2_bias=self.w2_bias if tp_rank == 0 else None,
            intermediate_size=end - begin,
        )

    def to_mxfp4(self) -> Mxfp4Tensors:
        """The checkpoint's tensors again, bit for bit and in its gate/up order.

        Blocks come back 3-D ([E, N, K/2]) also where they came 4-D; biases as float32, which holds every bfloat16 and
        float16 exactly. A slice gives its own experts or its own shard. FlashInfer's tensors are those of
        `from_flashinfer` after ``w13.view(torch.int64)`` and `flashinfer_api.block_scale_interleave`.

        Raises:
            ValueError: NVFP4 weights.
        """
        if self.weight_format is not WeightFormat.MXFP4:
            raise ValueError(f"weights: expected MXFP4, got {self!r}; to_nvfp4() gives its tensors")
        return Mxfp4Tensors(**self._plain())

    def to_nvfp4(self) -> Nvfp4Tensors:
        """`to_mxfp4` of NVFP4 weights, with linear block scales, and float32 scales of the kind that was given.

        Raises:
            ValueError: MXFP4 weights.
        """
        if self.tensor_scales is None:
            raise ValueError(f"weights: expected NVFP4, got {self!r}; to_mxfp4() gives its tensors")
        return Nvfp4Tensors(**self._plain(), **self.tensor_scales.named())

    def _plain(self) -> dict[str, Any]:
        """Codes, block scales and biases in the checkpoint's order of rows."""
        rows = source_rows(self.gate_up_order, self.intermediate_size, self.activation.is_gated, self.device)
        w2_rows = torch.arange(self.hidden_size, device=self.device)
        w13, w13_scale = restore(self.w13, rows, self.hidden_size, self.word_order, self.weight_format)
        w2, w2_scale = restore(self.w2, w2_rows, self.intermediate_size, self.word_order, self.weight_format)
        return {
            "w13": w13,
            "w13_scale": w13_scale,
            "w2": w2,
            "w2_scale": w2_scale,
            "w13_bias": None if self.w13_bias is None else self.w13_bias[:, rows.argsort()].contiguous(),
            "w2_bias": None if self.w2_bias is None else self.w2_bias.clone(),
        }

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
            w13: uint8, int8 or float4_e2m1fn_x2 [E, W, H/2] or [E, W, H/32, 16], low nibble = even k.
            w13_scale: uint8 or float8_e8m0fnu [E, W, H/32], E8M0.
            w2: as w13, [E, H, I/2] or [E, H, I/32, 16]; down projection.
            w2_scale: as w13_scale, [E, H, I/32].
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
        between = member("activation", Activation, activation)
        raw = mxfp4_layer(w13, w13_scale, w2, w2_scale, w13_bias, w2_bias, between.is_gated)
        numbers, ranks = (alpha, beta, limit), (ep_rank, ep_size, tp_rank, tp_size)
        return cls(**prepared_fields(raw, member("gate_up_order", GateUpOrder, gate_up_order), between, numbers, ranks))

    @classmethod
    def from_float(
        cls,
        w13: Tensor,
        w2: Tensor,
        *,
        format: WeightFormat | str = WeightFormat.MXFP4,
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
        """Quantizes weights to MXFP4 (`formats.quantize_mxfp4`, OCP MX) or NVFP4, and prepares them.

        Values that MXFP4 holds exactly, such as dequantized MXFP4 weights, keep their values. Strides are free: a
        checkpoint with [E, K, N] passes ``weight.mT``.

        Args:
            w13: bfloat16, float16 or float32 [E, W, H]; W as in `from_mxfp4`.
            w2: the same, [E, H, I].
            format: "mxfp4", or "nvfp4" (`formats.quantize_nvfp4`): as ModelOpt, with one scale amax / 2688 for each
                expert's gates, ups and down projection, and dynamic scales of activations.
            others: as for `from_mxfp4`.

        Raises:
            TypeError, ValueError: as `from_mxfp4`; a weight that is not finite.
        """
        between = member("activation", Activation, activation)
        order, kind = member("gate_up_order", GateUpOrder, gate_up_order), member("format", WeightFormat, format)
        raw = float_layer(w13, w2, w13_bias, w2_bias, between.is_gated, kind.block)
        if kind is WeightFormat.NVFP4:
            raw = nvfp4_float_layer(raw, w13, w2, order, between.is_gated)
        numbers, ranks = (alpha, beta, limit), (ep_rank, ep_size, tp_rank, tp_size)
        return cls(**prepared_fields(raw, order, between, numbers, ranks))

    @classmethod
    def from_nvfp4(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        *,
        w13_scale_2: Tensor | None = None,
        w2_scale_2: Tensor | None = None,
        w13_global_scale: Tensor | None = None,
        w2_global_scale: Tensor | None = None,
        w13_input_scale: Tensor | None = None,
        w2_input_scale: Tensor | None = None,
        w13_input_global_scale: Tensor | None = None,
        w2_input_global_scale: Tensor | None = None,
        scale_layout: str = "linear",
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up_order: GateUpOrder | str = GateUpOrder.GATE_UP,
        activation: Activation | str = Activation.SWIGLU,
        alpha: Number = 1.0,
        beta: Number = 0.0,
        limit: Number | None = None,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> MoEWeights:
        """Prepares NVFP4 weights given as checkpoints store them; on GPUs, for wheels of profile `full`.

        The float32 scales are of one of two kinds: ModelOpt's weight_scale_2 and input_scale, which multiply, or
        compressed-tensors' weight_global_scale and input_global_scale, which divide, so that one is the reciprocal of
        the other. Each is [] for all experts, [E] for each, or of w13 [E, 2] for gate and up of each.

        Args:
            w13: uint8, int8 or float4_e2m1fn_x2 [E, W, H/2], low nibble = even k; W as in `from_mxfp4`.
            w13_scale: uint8 or float8_e4m3fn [E, W, H/16], E4M3, or 128x4-swizzled.
            w2: as w13, [E, H, I/2].
            w2_scale: as w13_scale, [E, H, I/16].
            w13_scale_2, w2_scale_2, w13_input_scale, w2_input_scale: float32 scales that multiply.
            w13_global_scale, w2_global_scale, w13_input_global_scale, w2_input_global_scale: or that divide.
                Those of inputs may be None, both: then each row of activations gets its own.
            scale_layout: of the block scales: "linear", or "swizzled", rows padded to 128 and columns to 4, [E, ...].
            others: as for `from_mxfp4`, with a plain SwiGLU as the default.

        Raises:
            TypeError, ValueError: as `from_mxfp4`; H or I not a multiple of 16, a block scale that is negative or NaN,
                float32 scales of both kinds or of neither, or that are not above 0 and finite, or whose reciprocals are
                not; a GPU's tensors where `to` refuses the GPU.
        """
        multiply = (w13_scale_2, w2_scale_2, w13_input_scale, w2_input_scale)
        divide = (w13_global_scale, w2_global_scale, w13_input_global_scale, w2_input_global_scale)
        between, biases = member("activation", Activation, activation), (w13_bias, w2_bias)
        raw = nvfp4_layer(w13, w13_scale, w2, w2_scale, multiply, divide, biases, between.is_gated, scale_layout)
        numbers, ranks = (alpha, beta, limit), (ep_rank, ep_size, tp_rank, tp_size)
        return cls(**prepared_fields(raw, member("gate_up_order", GateUpOrder, gate_up_order), between, numbers, ranks))

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
        between = member("activation", Activation, activation)
        biases = fc1_expert_biases, fc2_expert_biases if tp_rank == 0 else None
        raw = flashinfer_layer(fc1_expert_weights, fc1_scale, fc2_expert_weights, fc2_scale, *biases, between.is_gated)
        all_experts = raw.experts * ep_size if isinstance(ep_size, int) else 0
        begin, _ = shard_of("ep", ep_rank, ep_size, all_experts, 1)
        shard_of("tp", tp_rank, tp_size, tp_size, 1)
        numbers, whole = (alpha, beta, limit), (0, 1, 0, 1)
        fields = prepared_fields(raw, GateUpOrder.UP_GATE, between, numbers, whole)
        return cls(**fields | {"first_expert": begin, "num_global_experts": all_experts})

    def _map(self, function: Callable[[Tensor], Tensor]) -> MoEWeights:
        """The same weights with every tensor replaced."""
        fields: dict[str, Any] = {n: function(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        if self.tensor_scales is not None:
            fields["tensor_scales"] = self.tensor_scales.map(function)
        return replace(self, **fields)
