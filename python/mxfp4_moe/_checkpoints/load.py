"""One layer of a checkpoint, ready to be prepared: where its rows come from, its sizes, and what it computes.

Headers, config.json and the caller's arguments must agree before a byte of a weight is read. Weights are read one
expert at a time, and only those that a rank keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import named_device, require_device
from ..activations import Activation
from ..formats import WeightFormat
from .config import compare_sizes, read_config, stated_activation
from .contents import FoundLayer, LayerSizes, choose_layer, layer_sizes
from .files import Checkpoint
from .layers import RawLayer
from .nvfp4_layers import refuse_gpu
from .options import GateUpOrder, Number, check_number, member
from .quantization_config import compare_quantization
from .schemes import SCHEMES, Between, Scheme
from .sources import Source, float_source, mxfp4_source, nvfp4_source
from .tensor_scales import TensorScales, refuse_values, tensor_scales

STATED = "stated"  # for limit: take what the checkpoint says

_DEFAULTS = Between(activation="", limit=7.0)  # of from_mxfp4
_CALLER = 4  # frames up to the call that the user wrote


@dataclass(frozen=True, kw_only=True)
class OpenedLayer:
    """A layer of a checkpoint with its sizes known and its weights yet to be read."""

    found: FoundLayer
    sizes: LayerSizes
    raw: RawLayer


def open_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    device: torch.device | str,
    prefix: str | None = None,
    scheme: str | None = None,
    among: Iterable[Scheme] = SCHEMES,
    gated: bool = True,
) -> OpenedLayer:
    """Finds a layer, checks its headers, and reads its biases.

    Raises:
        FileNotFoundError, ValueError: as `choose_layer` and `layer_sizes`.
    """
    for name, value in (("prefix", prefix), ("scheme", scheme)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: expected a str or None, got {value!r}")
    found = choose_layer(checkpoint, layer, prefix=prefix, scheme=scheme, among=among)
    if found.scheme.is_nvfp4:
        refuse_gpu("device", named_device("device", device))  # before anything else is read
    sizes = layer_sizes(checkpoint, found, gated=gated)
    place = require_device("device", device)
    if found.scheme.is_nvfp4:
        refuse_gpu("device", place, (sizes.hidden_size, sizes.intermediate_size))
    reader = _Reader(checkpoint, found, sizes, place)
    raw = RawLayer(
        w13=reader.source(found.scheme.w13),
        w2=reader.source((found.scheme.w2,)),
        experts=sizes.num_experts,
        hidden=sizes.hidden_size,
        inter=sizes.intermediate_size,
        device=place,
        w13_bias=reader.bias(found.scheme.w13),
        w2_bias=reader.bias((found.scheme.w2,)),
        format=WeightFormat.NVFP4 if found.scheme.is_nvfp4 else WeightFormat.MXFP4,
        tensor_scales=reader.tensor_scales(),
    )
    return OpenedLayer(found=found, sizes=sizes, raw=raw)


@dataclass(frozen=True)
class _Reader:
    """Reads what experts have, projections one behind the other."""

    checkpoint: Checkpoint
    found: FoundLayer
    sizes: LayerSizes
    device: torch.device

    def source(self, projections: tuple[str, ...]) -> Source:
        scheme = self.found.scheme
        codes = self._expert(projections, scheme.codes)
        if scheme.scales is None:
            name = self._shown(projections[0], scheme.codes)
            return float_source(name, (lambda e: codes(e).mT) if scheme.transposed else codes)
        scales = self._expert(projections, scheme.scales)
        make = nvfp4_source if scheme.is_nvfp4 else mxfp4_source
        return make(
            self._shown(projections[0], scheme.scales),
            lambda e: codes(e).view(torch.uint8),
            lambda e: scales(e).view(torch.uint8),
        )

    def bias(self, projections: tuple[str, ...]) -> Tensor | None:
        scheme = self.found.scheme
        if not self.sizes.has_bias or scheme.bias is None:
            return None
        if not scheme.per_expert:
            return self.checkpoint.read(
                [self.checkpoint.entry(self.found.name(projections[0], scheme.bias))], self.device
            )
        read = self._expert(projections, scheme.bias)
        return torch.stack([read(e) for e in range(self.sizes.num_experts)])

    def tensor_scales(self) -> TensorScales | None:
        """NVFP4's float32 scales of all experts: one tensor for each projection and expert."""
        scheme = self.found.scheme
        if scheme.scale_2 is None:
            return None

        def scales(projections: tuple[str, ...], suffix: str | None) -> Tensor | None:
            if suffix is None:
                return None
            experts, places = range(self.sizes.num_experts), range(len(projections))
            entries = [[self.checkpoint.entry(self.found.name(p, suffix, e)) for p in projections] for e in experts]
            read = [[self.checkpoint.read([entries[e][i]], self.device).flatten() for i in places] for e in experts]
            made = torch.stack([torch.cat(some) for some in read])
            kind = not scheme.divide and suffix == scheme.scale_2
            for projection, values in zip(projections, made.unbind(1), strict=True):
                refuse_values(self._shown(projection, suffix), values, kind)
            return made

        inputs = scheme.input_scale if self.sizes.has_input_scales else None
        down = scales((scheme.w2,), scheme.scale_2), scales((scheme.w2,), inputs)
        w2, w2_input = (None if one is None else one.squeeze(1) for one in down)
        given = {"w13": scales(scheme.w13, scheme.scale_2), "w2": w2, "w13_input": scales(scheme.w13, inputs)}
        return tensor_scales(
            given | {"w2_input": w2_input},
            divide=scheme.divide,
            experts=self.sizes.num_experts,
            gated=scheme.gated,
            device=self.device,
        )

    def _expert(self, projections: tuple[str, ...], suffix: str) -> Callable[[int], Tensor]:
        def read(e: int) -> Tensor:
            own = e if self.found.scheme.per_expert else None
            entries = [self.checkpoint.entry(self.found.name(projection, suffix, own)) for projection in projections]
            return self.checkpoint.read(entries, self.device, e if own is None else None)

        return read

    def _shown(self, projection: str, suffix: str) -> str:
        """A name for messages, which say the expert themselves."""
        return self.found.scheme.tensor(self.found.prefix, self.found.layer, projection, suffix, "*")


# ---- what the layer computes -----------------------------------------------------------------------------------------


def settle(
    checkpoint: Checkpoint,
    opened: OpenedLayer,
    *,
    activation: Activation | None,
    alpha: Number | None,
    beta: Number | None,
    limit: Number | str | None,
) -> tuple[Activation, tuple[Number, Number, Number | None]]:
    """Activation, and alpha, beta and limit: the caller's, else config.json's, else those of the only model so named.

    What the caller says wins, with a warning where it contradicts.

    Raises:
        ValueError: config.json's sizes, or what it says of the quantization, are not the layer's; or nobody says what
            the activation is.
    """
    compare_quantization(checkpoint, opened.found.scheme)
    config = read_config(checkpoint.folder)
    if config is not None:
        compare_sizes(config, opened.found, opened.sizes)
    if activation is not None:
        _check_gates(activation, opened)  # before a warning says that it is used
    stated, where = stated_activation(checkpoint, config, opened.found, named=activation is not None)
    if stated is not None and activation is not None and activation.value != stated.activation:
        _contradiction("activation", where, stated.activation, activation.value)
        stated = None
    given = {"alpha": alpha, "beta": beta} | ({} if isinstance(limit, str) else {"limit": limit})
    for what, value in given.items():
        if value is not None:
            check_number(what, value, opened.sizes.num_experts, opened.raw.device)
        says = None if stated is None else getattr(stated, what)
        if stated is not None and not _same(value, says) and (value is not None or what == "limit"):
            _contradiction(what, where, says, value)
    numbers = stated or _DEFAULTS
    between = activation or member("activation", Activation, numbers.activation)
    _check_gates(between, opened)
    return between, (
        numbers.alpha if alpha is None else alpha,
        numbers.beta if beta is None else beta,
        numbers.limit if isinstance(limit, str) else limit,
    )


def _check_gates(between: Activation, opened: OpenedLayer) -> None:
    scheme = opened.found.scheme
    if between.is_gated != scheme.gated:
        rows = "gates and ups" if scheme.gated else "one projection and no gates"
        raise ValueError(
            f"activation: expected one for {rows}, which layer {opened.found.layer} has in the naming of "
            f"{scheme.name}, got {between.value!r}"
        )


def settle_order(opened: OpenedLayer, order: GateUpOrder | None) -> GateUpOrder:
    """The order of w13's rows: the caller's, with a warning where the naming has another."""
    stated = GateUpOrder(opened.found.scheme.gate_up_order)
    if order is not None and order is not stated:
        _contradiction("gate_up_order", f"the naming ({opened.found.scheme.name})", stated.value, order.value)
    return order or stated


def _same(value: Number | None, stated: float | None) -> bool:
    if value is None or stated is None:
        return value is stated
    return bool((value == stated).all()) if isinstance(value, Tensor) else float(value) == stated


def _contradiction(what: str, where: str, stated: object, given: object) -> None:
    shown = "one for each expert" if isinstance(given, Tensor) else repr(given)
    warnings.warn(
        f"{what}: {where} says {stated!r}, and {shown} was given and is used", UserWarning, stacklevel=_CALLER
    )
