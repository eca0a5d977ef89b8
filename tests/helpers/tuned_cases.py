"""Tuned tables with round numbers."""

from __future__ import annotations

from mxfp4_moe._choice.facts import PUBLISHED, Layer
from mxfp4_moe.tiles import Tile, load_manifest

TILES = load_manifest().tiles
LAYER = Layer(experts=128, top_k=4, hidden=2880, intermediate=2880)
BY_NAME = {device.name: device for device in PUBLISHED}
H200, RTX_5090, GB10 = BY_NAME["NVIDIA H200"], BY_NAME["NVIDIA GeForce RTX 5090"], BY_NAME["NVIDIA GB10"]
SMALL, MIDDLE, LARGE = (Tile.from_mn(mn) for mn in ((8, 64), (64, 128), (128, 128)))
