"""What every engine's integration needs before it may touch the engine; nothing here imports torch or an engine.

`table.py` has the engines as data, `settings.py` the user's environment variables, `hooks.py` looks up what an
integration holds on to, `standing.py` decides whether an engine gets our kernels and says why not, `register.py` is
what an engine's entry point calls. `verify.py`, which needs torch, compares a layer's bits at start-up on request.
"""

from .activations import Choice, choose_activations
from .hooks import missing_hooks
from .register import register, say
from .settings import Settings, SettingsError
from .standing import Standing, installed_version, selftest_gate, static_standing
from .table import ENGINES, Engine, engine

__all__ = [
    "ENGINES",
    "Choice",
    "Engine",
    "Settings",
    "SettingsError",
    "Standing",
    "choose_activations",
    "engine",
    "installed_version",
    "missing_hooks",
    "register",
    "say",
    "selftest_gate",
    "static_standing",
]
