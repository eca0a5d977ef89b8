"""Layers read from a checkpoint's files: the part of `MoEWeights` that opens them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .._install.errors import explained
from ..activations import Activation
from .files import Checkpoint
from .layers import prepared_fields
from .load import STATED, open_layer, settle, settle_order
from .options import GateUpOrder, Number, check_layer, member
from .schemes import GPT_OSS

_WeightsT = TypeVar("_WeightsT", bound="FromFiles")


class FromFiles:
    """What `MoEWeights` inherits: made from the fields that `prepared_fields` gives."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    @classmethod
    def from_safetensors(
        cls: type[_WeightsT],
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
    ) -> _WeightsT:
        """Reads and prepares one layer of a gpt-oss checkpoint; nothing but that layer is read.

        As `from_pretrained` for gpt-oss in any of its namings (the Hub's, OpenAI's ``original/``, merged to bf16, AMD
        Quark's), with all numbers from the arguments: config.json is not looked at. Experts are read one at a time, and
        only those of ep_rank.

        Args:
            path, layer, device, ep_rank, ep_size, tp_rank, tp_size: as for `from_pretrained`.
            gate_up_order, activation, alpha, beta, limit: as for `from_mxfp4`; the defaults are gpt-oss's.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: as `from_pretrained`.
        """
        check_layer(layer)
        between = member("activation", Activation, activation)
        numbers, ranks = (alpha, beta, limit), (ep_rank, ep_size, tp_rank, tp_size)
        with explained(f"layer {layer} cannot be read to {device}"), Checkpoint(path) as checkpoint:
            opened = open_layer(checkpoint, layer, device=device, among=GPT_OSS, gated=between.is_gated)
            order = member("gate_up_order", GateUpOrder, gate_up_order)
            return cls(**prepared_fields(opened.raw, order, between, numbers, ranks))

    @classmethod
    def from_pretrained(
        cls: type[_WeightsT],
        path: str | Path,
        *,
        layer: int,
        prefix: str | None = None,
        scheme: str | None = None,
        gate_up_order: GateUpOrder | str | None = None,
        activation: Activation | str | None = None,
        alpha: Number | None = None,
        beta: Number | None = None,
        limit: Number | str | None = STATED,
        ep_rank: int = 0,
        ep_size: int = 1,
        tp_rank: int = 0,
        tp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> _WeightsT:
        """Reads and prepares one layer of a model's checkpoint, whatever names it has for its experts (docs/models.md).

        Names, dtypes and shapes are found from the files' headers; the activation and its numbers from config.json
        beside them, whose sizes must be those of the tensors. Floating point weights are quantized to MXFP4 on the way.
        No file is opened that does not hold a part of the layer; experts are read one at a time, and only those of
        ep_rank, so that the memory needed is that of the result and less than two experts more.
        ``mxfp4-moe inspect PATH`` says what there is and how it is loaded.

        Args:
            path: a .safetensors file, or a directory with one, with several, or with an index and its shards.
            layer: the layer's number in the checkpoint, from 0.
            prefix: what stands before the number, such as "model.layers."; needed where several have the layer. Layers
                of a draft model ("mtp.") are taken only where it is named.
            scheme: the naming, where the files alone do not tell; a name of docs/models.md.
            gate_up_order, activation, alpha, beta, limit: in place of what the checkpoint says; a warning says so where
                that is something else. limit=None clamps nothing.
            ep_rank, ep_size, tp_rank, tp_size: as for `from_mxfp4`.
            device: where to put the weights.

        Raises:
            FileNotFoundError: nothing is there; of a link that leads nowhere it says that.
            ValueError: something else than a checkpoint (a Git LFS pointer, a web page, GGUF, a pickle, a file that is
                not whole), no such layer, another format than MXFP4 or floating point, tensors that do not fit each
                other or config.json, an activation that is not known; the message says what is there and what to do.
            RuntimeError: a GPU is asked for, and torch, the driver or the GPU is not fit for it; says what to do.
        """
        check_layer(layer)
        if isinstance(limit, str) and limit != STATED:
            raise ValueError(f"limit: expected a number, None or {STATED!r}, got {limit!r}")
        given = None if activation is None else member("activation", Activation, activation)
        given_order = None if gate_up_order is None else member("gate_up_order", GateUpOrder, gate_up_order)
        with explained(f"layer {layer} cannot be read to {device}"), Checkpoint(path) as checkpoint:
            opened = open_layer(checkpoint, layer, device=device, prefix=prefix, scheme=scheme)
            order = settle_order(opened, given_order)
            between, numbers = settle(checkpoint, opened, activation=given, alpha=alpha, beta=beta, limit=limit)
            return cls(**prepared_fields(opened.raw, order, between, numbers, (ep_rank, ep_size, tp_rank, tp_size)))
