"""What the choice of a tile goes by: the layer, and what is known of the GPU. Standard library alone.

A GPU says something of itself at run time; for the rest there is what its maker publishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Layer:
    """E experts of which a token uses k, hidden size H, intermediate size I."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One GPU as the choice of a tile sees it.

    Rates are the maker's, not measured: 10^9 bytes per second of memory, 10^9 clocks per second.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    gb_per_s: float
    ghz: float
    l2_bytes: int

    @property
    def arch_words(self) -> str:
        """Such as 'NVIDIA H200 (sm_90, 132 SMs)'."""
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]}, {self.sms} SMs)"


def _published(
    name: str, capability: tuple[int, int], sms: int, gb_per_s: float, ghz: float, l2_mb: int
) -> DeviceFacts:
    return DeviceFacts(name=name, capability=capability, sms=sms, gb_per_s=gb_per_s, ghz=ghz, l2_bytes=l2_mb << 20)


# NVIDIA's product pages and the RTX Blackwell architecture whitepaper; boost clocks. GB10's clock is not published:
# it follows from its published 31 TFLOP/s in float32 (48 SMs of 128 lanes, two flops a clock).
PUBLISHED = (
    _published("NVIDIA GeForce RTX 5090", (12, 0), 170, 1792, 2.41, 96),
    _published("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 1792, 2.62, 128),
    _published("NVIDIA GeForce RTX 5080", (12, 0), 84, 960, 2.62, 64),
    _published("NVIDIA GeForce RTX 5070 Ti", (12, 0), 70, 896, 2.45, 48),
    _published("NVIDIA GeForce RTX 5070", (12, 0), 48, 672, 2.51, 48),
    _published("NVIDIA GB10", (12, 1), 48, 273, 2.5, 24),
    _published("NVIDIA H200", (9, 0), 132, 4800, 1.98, 50),
    _published("NVIDIA H100 80GB HBM3", (9, 0), 132, 3352, 1.98, 50),
)

# Bounds of what a GPU may say of itself before its maker's figures are believed instead.
_GB_PER_S = (50.0, 20_000.0)
_GHZ = (0.5, 5.0)


def from_properties(properties: Any) -> DeviceFacts:
    """From `torch.cuda.get_device_properties`.

    Memory bandwidth is two transfers a clock on every lane of the bus. Where the GPU gives no such clocks (shared
    memory has none), or absurd ones, those of the published GPU with the same name stand in, else of the one of that
    compute capability with the nearest number of SMs.
    """
    name, sms = str(properties.name), int(properties.multi_processor_count)
    capability = (int(properties.major), int(properties.minor))
    known = _nearest_published(name, capability, sms)
    bandwidth = 2 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8 / 1e6
    clock = getattr(properties, "clock_rate", 0) / 1e6
    return DeviceFacts(
        name=name,
        capability=capability,
        sms=sms,
        gb_per_s=bandwidth if _GB_PER_S[0] <= bandwidth <= _GB_PER_S[1] else known.gb_per_s,
        ghz=clock if _GHZ[0] <= clock <= _GHZ[1] else known.ghz,
        l2_bytes=int(getattr(properties, "L2_cache_size", 0)) or known.l2_bytes,
    )


def _nearest_published(name: str, capability: tuple[int, int], sms: int) -> DeviceFacts:
    named = [facts for facts in PUBLISHED if facts.name in name]
    if named:
        return max(named, key=lambda facts: len(facts.name))  # "RTX 5070 Ti" before "RTX 5070"
    return min(
        PUBLISHED,
        key=lambda facts: (facts.capability != capability, facts.capability[0] != capability[0], abs(facts.sms - sms)),
    )
