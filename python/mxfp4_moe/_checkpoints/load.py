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

from .config import compare_sizes, read_config, stated_activation
from .contents import FoundLayer, LayerSizes, choose_layer, layer_sizes
from .files import Checkpoint
from .prepare import Source, float_source, mxfp4_source
from .schemes import SCHEMES, Between, Scheme

Number = float | Tensor
STATED = "stated"  # for a number: take what the checkpoint says

_DEFAULTS = Between(activation="", limit=7.0)  # of from_mxfp4
_CALLER = 4  # frames up to the call that the user wrote


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What `MoEWeights` is built from."""

    found: FoundLayer
    sizes: LayerSizes
    w13: Source
    w2: Source
    w13_bias: Tensor | None
    w2_bias: Tensor | None


def open_layer(
    checkpoint: Checkpoint,
    layer: int,
    *,
    device: torch.device | str,
    prefix: str | None = None,
    scheme: str | None = None,
    among: Iterable[Scheme] = SCHEMES,
    gated: bool = True,
) -> LayerParts:
    """Finds a layer, checks its headers, and reads its biases.

    Raises:
        FileNotFoundError, ValueError: as `choose_layer` and `layer_sizes`.
    """
    found = choose_layer(checkpoint, layer, prefix=prefix, scheme=scheme, among=among)
    sizes = layer_sizes(checkpoint, found, gated=gated)
    reader = _Reader(checkpoint, found, sizes, device)
    return LayerParts(
        found=found,
        sizes=sizes,
        w13=reader.source(found.scheme.w13),
        w2=reader.source((found.scheme.w2,)),
        w13_bias=reader.bias(found.scheme.w13),
        w2_bias=reader.bias((found.scheme.w2,)),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads what experts have, projections one behind the other."""

    checkpoint: Checkpoint
    found: FoundLayer
    sizes: LayerSizes
    device: torch.device | str

    def source(self, projections: tuple[str, ...]) -> Source:
        scheme = self.found.scheme
        codes = self._expert(projections, scheme.codes)
        if scheme.scales is None:
            name = self._shown(projections[0], scheme.codes)
            return float_source(name, (lambda e: codes(e).mT) if scheme.transposed else codes)
        scales = self._expert(projections, scheme.scales)
        return mxfp4_source(
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
    parts: LayerParts,
    *,
    activation: str | None,
    alpha: Number | None,
    beta: Number | None,
    limit: Number | str | None,
) -> tuple[str, tuple[Number, Number, Number | None]]:
    """Activation, alpha, beta and limit: the caller's, else config.json's, else those of the only model so named.

    What the caller says wins, with a warning where it contradicts.

    Raises:
        ValueError: config.json's sizes are not the layer's; or nobody says what the activation is.
    """
    config = read_config(checkpoint.folder)
    if config is not None:
        compare_sizes(config, parts.found, parts.sizes)
    stated, where = stated_activation(checkpoint, config, parts.found, named=activation is not None)
    name = activation or (stated.activation if stated else "")
    if stated is not None and activation is not None and activation != stated.activation:
        _contradiction("activation", where, stated.activation, activation)
        stated = None
    numbers = stated or _DEFAULTS
    given = {"alpha": alpha, "beta": beta}
    for what, value in given.items():
        if stated is not None and value is not None and not _same(value, getattr(stated, what)):
            _contradiction(what, where, getattr(stated, what), value)
    if stated is not None and not isinstance(limit, str) and not _same(limit, stated.limit):
        _contradiction("limit", where, stated.limit, limit)
    return name, (
        numbers.alpha if alpha is None else alpha,
        numbers.beta if beta is None else beta,
        numbers.limit if isinstance(limit, str) else limit,
    )


def contradict_order(parts: LayerParts, order: str | None) -> str:
    """The order of w13's rows: the caller's, with a warning where the scheme has another."""
    stated = parts.found.scheme.gate_up_order
    if order is not None and order != stated:
        _contradiction("gate_up_order", f"the naming ({parts.found.scheme.name})", stated, order)
    return stated if order is None else order


def _same(value: Number | None, stated: float | None) -> bool:
    if value is None or stated is None:
        return value is stated
    return bool((value == stated).all()) if isinstance(value, Tensor) else float(value) == stated


def _contradiction(what: str, where: str, stated: object, given: object) -> None:
    shown = "one for each expert" if isinstance(given, Tensor) else repr(given)
    warnings.warn(
        f"{what}: {where} says {stated!r}, and {shown} was given and is used", UserWarning, stacklevel=_CALLER
    )
