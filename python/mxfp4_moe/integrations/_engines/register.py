"""What an engine's entry point calls: it never raises, says one line, and registers all or nothing."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
from collections.abc import Callable

from ..._install.troubles import words
from .hooks import missing_hooks
from .settings import Settings
from .standing import Standing, installed_version, refusal
from .table import Engine

_said: set[str] = set()
_standings: dict[str, Standing] = {}


def say(engine: Engine, line: str, *, once: bool = True) -> None:
    """One line where the engine's user sees it: the engine's log, or stderr where that shows no such lines."""
    if once and line in _said:
        return
    _said.add(line)
    logger = logging.getLogger(f"{engine.module}.mxfp4_moe")
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)


def register(engine: Engine, put_in: Callable[[Settings], str], *, version: str = "") -> Standing:
    """Puts the integration into a running engine, or says in one line why the engine keeps its own kernels.

    Whatever goes wrong, the engine starts: nothing is raised. A second call in a process does nothing.

    Args:
        put_in: registers with the engine and returns what is worth knowing for the line; called when the settings, the
            version and all hooks allow it. It must undo what it did before it raises.
        version: the engine's own word for its version, where it has one.
    """
    if engine.name in _standings:
        return _standings[engine.name]
    try:
        standing = _register(engine, put_in, version or installed_version(engine))
    except Exception as error:
        standing = Standing(
            engine=engine,
            version=version,
            is_in=False,
            reason=words(error),
            next_step="`mxfp4-moe doctor` says more",
        )
    _standings[engine.name] = standing
    if multiprocessing.parent_process() is None:  # an engine's workers come to the same
        with contextlib.suppress(Exception):  # a closed stderr is no reason to stop an engine
            say(engine, standing.line)
    return standing


def _register(engine: Engine, put_in: Callable[[Settings], str], version: str) -> Standing:
    settings = Settings.read()
    refused = refusal(engine, version, settings, [])  # before any of the engine's modules is imported
    refused = refused or refusal(engine, version, settings, missing_hooks(engine.hooks))
    if refused:
        return refused
    return Standing(engine=engine, version=version, is_in=True, reason=put_in(settings))


def forget() -> None:
    """For tests: as if nothing had been registered or said in this process."""
    _standings.clear()
    _said.clear()
