"""SGLang: what its entry point `sglang.srt.plugins` calls in every process of a server."""

from __future__ import annotations

from importlib import import_module

from ._engines import Settings, engine
from ._engines import register as register_engine


def register() -> None:
    """Adds the MoE runner backend `mxfp4_moe`, which SGLang's `auto` then means for gpt-oss on our GPUs.

    Never raises: one line says why SGLang keeps its own kernels.
    """

    def put_in(settings: Settings) -> str:
        words: str = import_module("._sglang_backend", __package__).put_in(settings)  # imports SGLang's layers
        return words

    register_engine(engine("sglang"), put_in)
