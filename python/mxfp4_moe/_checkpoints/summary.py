"""All that a checkpoint holds of experts, as `mxfp4-moe inspect` shows it. Headers and config.json alone are read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from .config import ExpertConfig, compare_sizes, read_config, stated_activation
from .contents import (
    FoundLayer,
    LayerSizes,
    find_layers,
    is_draft,
    layer_sizes,
    no_experts,
    numbers_in_words,
    other_format,
)
from .files import Checkpoint
from .quantization_config import compare_quantization
from .router import FoundRouter, find_router, weigh_call
from .schemes import BY_NAME, Between


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that are alike in everything but their numbers.

    Attributes:
        problem: why they cannot be loaded, or "".
        between: what stands between their GEMMs, or None with `unknown` saying why that cannot be told.
        call: what loads the first of them.
        router: how their experts are chosen, or None with `router_unknown` saying why that cannot be told.
        router_call: what loads the first one's router, or weighs the experts that its table names.
    """

    scheme: str
    prefix: str
    layers: tuple[int, ...]
    sizes: LayerSizes | None
    between: Between | None
    unknown: str
    problem: str
    call: str
    router: FoundRouter | None
    router_unknown: str
    router_call: str

    @property
    def numbers(self) -> str:
        """The layers in words."""
        return numbers_in_words(self.layers)

    @property
    def written_by(self) -> str:
        """Who writes such files."""
        return BY_NAME[self.scheme].written_by


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint's experts, and what its config.json says of them."""

    path: Path
    config: ExpertConfig | None
    groups: tuple[Group, ...]


def summarize(path: str | Path) -> Summary:
    """Everything that a checkpoint holds of experts.

    Raises:
        FileNotFoundError, ValueError: nothing that can be read; the message says what it is and what to do.
    """
    with Checkpoint(path) as checkpoint:
        config = read_config(checkpoint.folder)
        places: dict[tuple[str, int], list[FoundLayer]] = defaultdict(list)
        for found in find_layers(checkpoint.names()):
            places[found.prefix, found.layer].append(found)
        if not places:
            raise ValueError(no_experts(checkpoint))
        layers = [_layer(checkpoint, config, candidates) for candidates in places.values()]
        return Summary(path=checkpoint.path, config=config, groups=_grouped(checkpoint.path, layers))


@dataclass(frozen=True, kw_only=True)
class _Layer:
    found: FoundLayer
    sizes: LayerSizes | None
    between: Between | None
    unknown: str
    problem: str
    router: FoundRouter | None
    router_unknown: str

    @property
    def kind(self) -> object:
        """What layers of a group have in common; names with a layer's own number are no part of it."""
        if self.problem:
            return "problem"
        if self.router is None:
            return self.sizes, self.between, None
        bias = self.router.bias
        rule = tuple(vars(self.router.rule).items())
        return self.sizes, self.between, (rule, bias and bias.dtype, bool(self.router.table))


def _layer(checkpoint: Checkpoint, config: ExpertConfig | None, candidates: list[FoundLayer]) -> _Layer:
    reasons = [other_format(checkpoint, found) for found in candidates]
    found = next((f for f, reason in zip(candidates, reasons, strict=True) if reason is None), candidates[0])
    problem = reasons[0] if None not in reasons else None
    sizes = between = router = None
    unknown = router_unknown = ""
    if problem is None:
        try:
            compare_quantization(checkpoint, found.scheme)
            sizes = layer_sizes(checkpoint, found)
            if config is not None:
                compare_sizes(config, found, sizes)
        except (ValueError, FileNotFoundError) as error:
            problem = str(error)
        try:
            between, _ = stated_activation(checkpoint, config, found, named=False)
        except ValueError as error:
            unknown = str(error)
        try:
            router = find_router(checkpoint, config, found)
        except ValueError as error:
            router_unknown = str(error)
    return _Layer(
        found=found,
        sizes=sizes,
        between=between,
        unknown=unknown,
        problem=problem or "",
        router=router,
        router_unknown=router_unknown,
    )


def _grouped(path: Path, layers: list[_Layer]) -> tuple[Group, ...]:
    several = len({layer.found.prefix for layer in layers if not is_draft(layer.found.prefix)}) > 1
    alike: dict[object, list[_Layer]] = defaultdict(list)
    for layer in layers:
        alike[layer.found.scheme.name, layer.found.prefix, layer.kind].append(layer)
    return tuple(_group(path, some, several) for some in alike.values())


def _group(path: Path, layers: list[_Layer], several: bool) -> Group:
    first = layers[0]
    named = several or is_draft(first.found.prefix)
    place = [repr(str(path)), f"layer={first.found.layer}"]
    place += [f"prefix={first.found.prefix!r}"] if named else []
    arguments = place + (["activation=..."] if first.between is None else [])
    router, router_call = (None, "") if first.problem else (first.router, f"load_router({', '.join(place)})")
    if router is None:
        router_call = ""
    elif router.table:
        router_call = weigh_call(router.rule)
    return Group(
        scheme=first.found.scheme.name,
        prefix=first.found.prefix,
        layers=tuple(layer.found.layer for layer in layers),
        sizes=first.sizes,
        between=first.between,
        unknown=first.unknown,
        problem=first.problem,
        call="" if first.problem else f"MoEWeights.from_pretrained({', '.join(arguments)})",
        router=router,
        router_unknown=first.router_unknown,
        router_call=router_call,
    )
