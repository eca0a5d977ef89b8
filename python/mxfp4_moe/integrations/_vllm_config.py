"""vLLM's quantization configs for MXFP4 checkpoints, whose experts get our method where our kernels serve.

The classes are a module's own, because vLLM pickles them into its workers; a worker registers anew and finds them here.
"""

from __future__ import annotations

from typing import Any

import vllm.model_executor.layers.quantization as quantization
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, Mxfp4Config

from ._engines import Settings
from ._vllm_decide import decide, say_once
from ._vllm_method import GptOssMethod, Mxfp4Method


class MoeMxfp4Config(Mxfp4Config):  # type: ignore[misc]
    """``quant_method: mxfp4`` of models other than gpt-oss."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts that our kernels serve; vLLM's own answer for everything else."""
        ours = _method(layer, Mxfp4Method) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)


class MoeGptOssMxfp4Config(GptOssMxfp4Config):  # type: ignore[misc]
    """``quant_method: mxfp4`` of gpt-oss, which vLLM calls gpt_oss_mxfp4."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts that our kernels serve; vLLM's own answer for everything else."""
        ours = _method(layer, GptOssMethod) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)


CONFIGS = {"mxfp4": MoeMxfp4Config, "gpt_oss_mxfp4": MoeGptOssMxfp4Config}


def _method(layer: Any, kind: Any) -> Any:
    decision = decide(layer, kind.gpt_oss, Settings.read())
    say_once(layer, decision)
    return kind(layer.moe_config, decision) if decision.experts is not None else None


def put_in(settings: Settings) -> str:
    """Registers the configs under vLLM's own names; both or, after an error, neither."""
    known = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    before = dict(known)
    try:
        for name, config in CONFIGS.items():
            quantization.register_quantization_config(name)(config)
    except BaseException:
        known.clear()
        known.update(before)
        raise
    return "experts of MXFP4 models get our kernels where they serve (MXFP4_MOE_ENGINES=off switches this off)"
