"""The shape of one MoE layer, the presets that the command line knows, and lists of token counts."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
DEFAULT_PRESET = "gpt-oss-120b"


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """E experts of which a token uses k; w13 is [E, 2I, H] and w2 [E, H, I].

    Raises:
        ValueError: a size that no layer has, or that the kernels do not take; the message names it.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= 1024:
            raise ValueError(f"experts: expected 1 to 1024, got {self.experts}")
        if not 1 <= self.top_k <= min(32, self.experts):
            raise ValueError(f"top_k: expected 1 to {min(32, self.experts)}, got {self.top_k}")
        for name, size in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            if size < 32 or size % 32:
                raise ValueError(f"{name}: expected a positive multiple of 32, got {size}")

    @property
    def words(self) -> str:
        """The shape in words, for headings."""
        sizes = f"{self.experts} experts, top-{self.top_k}, hidden {self.hidden}, intermediate {self.intermediate}"
        return f"{self.name}: {sizes}" if self.name else sizes

    def as_dict(self) -> dict[str, int | str]:
        return dict(vars(self))


PRESETS = {
    "gpt-oss-20b": MoEShape(name="gpt-oss-20b", experts=32, top_k=4, hidden=2880, intermediate=2880),
    "gpt-oss-120b": MoEShape(name="gpt-oss-120b", experts=128, top_k=4, hidden=2880, intermediate=2880),
}


def shape_from(
    preset: str | None,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
) -> MoEShape:
    """The preset's shape with the sizes that were given in place of its own; without a name when any was changed.

    Raises:
        ValueError: an unknown preset, or sizes that make no layer.
    """
    name = preset or DEFAULT_PRESET
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    base = PRESETS[name]
    given = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
    sizes = {key: getattr(base, key) if value is None else value for key, value in given.items()}
    same = all(getattr(base, key) == value for key, value in sizes.items())
    return MoEShape(name=base.name if same else "", **sizes)


def parse_tokens(text: str) -> tuple[int, ...]:
    """Token counts from "1,2,4", sorted, each once.

    Raises:
        ValueError: something that is not a positive integer.
    """
    counts = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise ValueError(f"tokens: expected positive integers with commas between, such as 1,16,64, got {text!r}")
        counts.add(int(part))
    return tuple(sorted(counts))
