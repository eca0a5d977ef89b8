"""Whether an engine gets our kernels, and if not, why and what to do: one sentence each."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from ..._health import remembered
from ..._install import wheel
from ..._install.troubles import release
from .hooks import missing_in_files
from .settings import ENGINES_VARIABLE, SELFTEST_VARIABLE, Settings, SettingsError
from .table import Engine


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one engine stands.

    Attributes:
        version: of the engine, "" where it is not installed.
        is_in: whether its layers get our kernels (where the layer and the GPU allow it).
        reason: why not; with is_in, what is worth knowing.
        next_step: what to do about it, or "".
    """

    engine: Engine
    version: str
    is_in: bool
    reason: str = ""
    next_step: str = ""

    @property
    def line(self) -> str:
        """The one line that is said at start-up."""
        if self.is_in:
            text = f"mxfp4-moe {wheel.version()} is in {self.engine.title} {self.version}"
            return f"{text}: {self.reason}" if self.reason else text
        text = f"mxfp4-moe {wheel.version()} is not used, {self.engine.title}'s own kernels run: {self.reason}"
        return f"{text}; {self.next_step}" if self.next_step else text


def installed_version(engine: Engine) -> str:
    """The engine's version, "" where it is not installed; the engine is not imported."""
    for name in engine.distributions:
        try:
            return importlib.metadata.version(name) or ""  # None where the metadata is broken
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def ranges(engine: Engine) -> str:
    """The tested versions in words: '>=0.32, <0.34'."""
    return " or ".join(f">={first}, <{below}" for first, below in engine.tested) or "none yet"


def is_tested(engine: Engine, version: str) -> bool:
    """Whether the version is in one of the engine's tested ranges."""
    numbers = release(version)
    return any(release(first) <= numbers < release(below) for first, below in engine.tested)


def refusal(engine: Engine, version: str, settings: Settings, missing: list[str]) -> Standing | None:
    """Why the engine keeps its own kernels: by the settings, its version, its hooks; None where it need not.

    Args:
        missing: hooks that were looked for and not found.
    """

    def no(reason: str, next_step: str = "") -> Standing:
        return Standing(engine=engine, version=version, is_in=False, reason=reason, next_step=next_step)

    if engine.name not in settings.engines:
        return no(f"{ENGINES_VARIABLE} leaves {engine.name} out", f"unset {ENGINES_VARIABLE} to change that")
    if not is_tested(engine, version) and not settings.untested:
        return no(
            f"{engine.title} {version or 'of unknown version'} was not tested (tested: {ranges(engine)})",
            f"pip install -U mxfp4-moe, or {ENGINES_VARIABLE}=untested to try it",
        )
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return no(
            f"{engine.title} {version} has no {missing[0].replace(':', '.')}{more}, which the integration needs",
            "pip install -U mxfp4-moe, or open an issue with this line",
        )
    return None


def selftest_gate(device: str, capability: tuple[int, int], settings: Settings) -> tuple[str, str] | None:
    """On SM12x, why automatic use waits, with the next step; None on other GPUs and where the self-test passed here.

    No machine of ours has an SM12x GPU, so its owner runs every tile once before a model is served with them.

    Args:
        device, capability: the GPU's name and compute capability.
    """
    if capability[0] != 12 or not settings.selftest:
        return None
    result = remembered.read(device, capability)
    step = f"run `mxfp4-moe doctor --selftest` (seconds), or set {SELFTEST_VARIABLE}=skip"
    if result is None:
        return f"the self-test has not been run on {device}", step
    if result.fingerprint != wheel.fingerprint():
        return f"the self-test on {device} was of another wheel", step
    if result.passed < result.tiles:
        return f"{result.tiles - result.passed} of {result.tiles} tiles failed the self-test on {device}", step
    return None


def static_standing(engine: Engine) -> Standing:
    """Where an engine stands by what is installed; the engine is not imported. Never raises."""
    version = installed_version(engine)
    if not version:
        return Standing(engine=engine, version="", is_in=False, reason="is not installed")
    try:
        settings = Settings.read()
    except SettingsError as error:
        return Standing(engine=engine, version=version, is_in=False, reason=str(error), next_step="correct it")
    refused = refusal(engine, version, settings, missing_in_files(engine.hooks))
    return refused or Standing(engine=engine, version=version, is_in=True, reason=engine.how)
