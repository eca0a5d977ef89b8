"""One run of `mxfp4-moe tune`: every usable tile at every number of tokens, and the table that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .._choice.choice import modelled, served_device
from .._choice.facts import DeviceFacts, Layer
from .._choice.tuned import Choice, Entry, TunedLayer
from .._install import blocklist, loading
from ..tiles import Tile, select_tile
from .inputs import CallInputs, call_inputs, layer_tensors
from .report import aligned
from .run import our_call
from .shapes import MoEShape
from .timing import Timer

Progress = Callable[[str], None]

_FIRST_REPLAYS = 8  # of every tile; those that may be the fastest are measured again, longer
_SECOND_ROUND = 4
_INPUTS = 4
_AS_GOOD = 1.005  # a tile this near the fastest is no worse: such differences do not repeat


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Microseconds of each tile at one number of tokens, and what was and would have been chosen."""

    tokens: int
    us: Mapping[Tile, float]
    chosen: Tile
    rule: Tile
    model: Tile | None  # None on an arch without a model

    def loss(self, tile: Tile) -> float:
        """How much longer a tile takes than the chosen one, as a part."""
        return self.us[tile] / self.us[self.chosen] - 1


def pick(us: Mapping[Tile, float], rule: Tile) -> Tile:
    """The fastest tile; the simple rule's where that is as good."""
    fastest = min(us, key=lambda tile: us[tile])
    return rule if rule in us and us[rule] <= _AS_GOOD * us[fastest] else fastest


def layer_of(shape: MoEShape) -> Layer:
    """The shape as the runtime's choice names it."""
    return Layer(experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, intermediate=shape.intermediate)


def usable_tiles(device: DeviceFacts, progress: Progress) -> list[Tile]:
    """The manifest's tiles without those that are blocked on the device or do not load.

    Raises:
        RuntimeError: none is left.
    """
    blocked = blocklist.blocked(device.name, device.capability)
    tiles = []
    for tile in loading.manifest().tiles:
        if tile.name in blocked:
            progress(f"{tile.name}: left out, it failed the self-test on this GPU")
            continue
        try:
            loading.load_tile(tile)
        except loading.LoadError as error:
            progress(f"{tile.name}: left out, {error}")
            continue
        tiles.append(tile)
    if not tiles:
        raise RuntimeError("no tile of this wheel can be used here; `mxfp4-moe doctor --selftest` says why")
    return tiles


def run(
    shape: MoEShape, tokens: Sequence[int], facts: DeviceFacts, device: torch.device, replays: int, progress: Progress
) -> list[Measured]:
    """Measures the layer, from logits to output, with each tile."""
    tiles = usable_tiles(facts, progress)
    layer = layer_of(shape)
    with torch.cuda.device(device), torch.no_grad():
        timer = Timer(device)
        progress(f"weights: {shape.words}")
        weights = layer_tensors(shape, device).prepared()
        measured = []
        for count in tokens:
            inputs = [call_inputs(shape, count, device, seed) for seed in range(_INPUTS)]

            def time(tile: Tile, times: int, inputs: Sequence[CallInputs] = inputs) -> float:
                make_call = our_call(weights, shape.top_k, tile.mn, include_routing=True)
                return timer.measure([make_call(call) for call in inputs], times).median

            us = {tile: time(tile, _FIRST_REPLAYS) for tile in tiles}
            rule = select_tile(count, layer.top_k, layer.experts, tiles)
            model = modelled(count, layer, served_device(facts), tuple(tiles))
            again = {*sorted(us, key=lambda tile: us[tile])[:_SECOND_ROUND], rule, *([model] if model else [])}
            us |= {tile: time(tile, replays) for tile in again}
            chosen = pick({tile: us[tile] for tile in again}, rule)
            measured.append(Measured(tokens=count, us=us, chosen=chosen, rule=rule, model=model))
            progress(f"{count} tokens: {chosen.name} {us[chosen]:.1f} us, of {len(tiles)} tiles")
        return measured


def tuned_layer(layer: Layer, measured: Sequence[Measured]) -> TunedLayer:
    """What the table holds of a run."""
    return TunedLayer(
        layer,
        [
            Entry(tokens=m.tokens, choice=Choice(gemm1=m.chosen, gemm2=m.chosen), us=round(m.us[m.chosen], 2))
            for m in measured
        ],
    )


def merged(old: Sequence[TunedLayer], new: TunedLayer) -> list[TunedLayer]:
    """The table's layers with the new one in place of the same layer's before."""
    return [*(tuned for tuned in old if tuned.layer != new.layer), new]


def table(measured: Sequence[Measured]) -> str:
    """What was chosen, and what the rule and the model would have cost."""
    rows = [["tokens", "tile", "us", "rule", "costs", "model", "costs"]]
    for m in measured:
        model = ("-", "-") if m.model is None else (m.model.name, f"{100 * m.loss(m.model):+.1f}%")
        rule = (m.rule.name, f"{100 * m.loss(m.rule):+.1f}%")
        rows.append([str(m.tokens), m.chosen.name, f"{m.us[m.chosen]:.1f}", *rule, *model])
    return "\n".join(aligned(rows, left=(1, 3, 5)))
