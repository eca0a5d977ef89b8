"""What the user sets, for every engine alike: five environment variables. Standard library alone.

MXFP4_MOE_ENGINES      auto (default): every engine whose version was tested
                       off: none
                       vllm,sglang: these alone
                       untested: every engine, also in versions that were not tested, as long as all hooks are there
MXFP4_MOE_ACTIVATIONS  engine (default): what the engine's own kernels compute with; where we have no kernels for
                       that, the engine's own run
                       bf16, fp16: W4A16;  mxfp8: W4A8
MXFP4_MOE_VERIFY       1: compare the first layer's bits at start-up, and stop where they differ
MXFP4_MOE_SELFTEST     required (default): on SM12x wait for a passed `mxfp4-moe doctor --selftest`
                       skip: do not
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .table import ENGINES

ENGINES_VARIABLE = "MXFP4_MOE_ENGINES"
ACTIVATIONS_VARIABLE = "MXFP4_MOE_ACTIVATIONS"
VERIFY_VARIABLE = "MXFP4_MOE_VERIFY"
SELFTEST_VARIABLE = "MXFP4_MOE_SELFTEST"
CPU_VARIABLE = "MXFP4_MOE_CPU"

_ACTIVATIONS = ("engine", "bf16", "fp16", "mxfp8")


class SettingsError(ValueError):
    """A variable has a value that it does not have; the message says which ones it does."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The variables' values.

    Attributes:
        engines: names of the engines that may have our kernels.
        untested: also versions that were not tested.
        activations: "engine", "bf16", "fp16" or "mxfp8".
        verify: compare a layer's bits at start-up.
        selftest: on SM12x wait for a passed self-test.
        cpu: take CPU tensors too.
    """

    engines: tuple[str, ...]
    untested: bool = False
    activations: str = "engine"
    verify: bool = False
    selftest: bool = True
    cpu: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings of this process.

        Raises:
            SettingsError: a value that is not one of the variable's.
        """
        given = os.environ if environment is None else environment
        names = tuple(row.name for row in ENGINES)
        engines = given.get(ENGINES_VARIABLE, "").strip().lower() or "auto"
        if engines in ("auto", "untested"):
            chosen = names
        elif engines in ("off", "0"):
            chosen = ()
        else:
            chosen = tuple(name.strip() for name in engines.split(","))
            if unknown := [name for name in chosen if name not in names]:
                raise SettingsError(
                    f"{ENGINES_VARIABLE}: expected auto, off, untested or names out of {', '.join(names)}, "
                    f"got {unknown[0]!r}"
                )
        return cls(
            engines=chosen,
            untested=engines == "untested",
            activations=_one_of(given, ACTIVATIONS_VARIABLE, _ACTIVATIONS),
            verify=_one_of(given, VERIFY_VARIABLE, ("0", "1")) == "1",
            selftest=_one_of(given, SELFTEST_VARIABLE, ("required", "skip")) == "required",
            cpu=_one_of(given, CPU_VARIABLE, ("0", "1")) == "1",
        )


def _one_of(given: Mapping[str, str], variable: str, values: tuple[str, ...]) -> str:
    """The variable's value, the first one where it is not set."""
    value = given.get(variable, "").strip().lower() or values[0]
    if value not in values:
        raise SettingsError(f"{variable}: expected {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value
