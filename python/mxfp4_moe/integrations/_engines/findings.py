"""The doctor's rows about engines: version, whether we are in, and why not."""

from __future__ import annotations

from ..._health.checks import ok
from ..._health.findings import Finding
from ..._install.driver import Gpu
from .settings import Settings, SettingsError
from .standing import Standing, selftest_gate, static_standing
from .table import ENGINES

SUBJECT = "engines"


def engine_findings(gpus: tuple[Gpu, ...] = ()) -> list[Finding]:
    """One finding for each engine that is installed, or one that says that none is; all are notes.

    An engine that keeps its own kernels works; it is worth no warning.
    """
    standings = [static_standing(engine) for engine in ENGINES]
    found = [finding_of(standing, gpus) for standing in standings if standing.version]
    return found or [ok(SUBJECT, f"none of {', '.join(row.title for row in ENGINES)} is installed")]


def finding_of(standing: Standing, gpus: tuple[Gpu, ...]) -> Finding:
    """The row of one engine; on SM12x, whether automatic use waits for the self-test."""
    name = f"{standing.engine.title} {standing.version}"
    if not standing.is_in:
        return ok(SUBJECT, f"{name}: mxfp4-moe is not in, {standing.reason}", standing.next_step)
    try:
        settings = Settings.read()
    except SettingsError as error:
        return ok(SUBJECT, f"{name}: mxfp4-moe is not in, {error}", "correct it")
    for gpu in gpus:
        if waits := selftest_gate(gpu.name, gpu.capability, settings):
            return ok(SUBJECT, f"{name}: mxfp4-moe waits, {waits[0]}", waits[1])
    return ok(SUBJECT, f"{name}: mxfp4-moe is in, by {standing.reason}")
