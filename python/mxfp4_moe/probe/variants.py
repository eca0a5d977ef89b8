"""The table of instruction variants, variants.toml, as objects."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Isa = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One instruction with its modifiers, in one statement of PTX.

    `isa` is the first PTX ISA version that has it, `section` the heading of the PTX ISA manual that describes it.
    `nowhere` says why no target accepts it, and is empty for all but the few that are asked about for that reason.
    """

    category: str
    section: str
    isa: Isa
    ptx: str
    nowhere: str = ""

    @property
    def name(self) -> str:
        """The instruction with its modifiers, such as 'ldmatrix.sync.aligned.m8n8.x1.shared.b16'."""
        return self.ptx.split()[0].rstrip(";")


def parse_isa(text: str) -> Isa:
    """(8, 6) from '8.6'."""
    major, minor = text.split(".")
    return int(major), int(minor)


def isa_text(isa: Isa) -> str:
    return f"{isa[0]}.{isa[1]}"


def read_table(name: str) -> dict[str, Any]:
    """A TOML file of this package."""
    return tomllib.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def load() -> tuple[Variant, ...]:
    """Every variant, in the table's order."""
    return tuple(
        Variant(
            category=section["category"],
            section=section["title"],
            isa=parse_isa(row["isa"]),
            ptx=row["ptx"],
            nowhere=row.get("nowhere", ""),
        )
        for section in read_table("variants.toml")["section"]
        for row in section["variants"]
    )


def categories() -> tuple[str, ...]:
    return tuple(dict.fromkeys(variant.category for variant in load()))
