"""vLLM with this library's kernels for the experts of MXFP4 models: the entry point that vLLM calls in every process.

Nothing of vLLM is imported before `_engines.register` has found that its version is one that was tested and that all
the hooks are there.
"""

from __future__ import annotations

import sys

from ._engines import Settings, engine
from ._engines import register as _register

ENGINE = engine("vllm")


def register() -> None:
    """Registers our quantization configs in place of vLLM's; never raises, and says one line. See docs/engines.md."""
    module = sys.modules.get(ENGINE.module)
    _register(ENGINE, _put_in, version=str(getattr(module, "__version__", "")))


def _put_in(settings: Settings) -> str:
    from . import _vllm_config

    return _vllm_config.put_in(settings)
