"""vLLM's quantization configs for MXFP4 checkpoints, whose experts get our method where our kernels serve.

The classes are a module's own, because vLLM pickles them into its workers; a worker registers anew and finds them here.
vLLM runs these checkpoints in bfloat16 alone. With MXFP4_MOE_ACTIVATIONS=fp16 they take float16 too, for our kernels,
and where those do not serve the model does not start: vLLM's own were never meant to run it.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.quantization as quantization
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, Mxfp4Config

from ._engines import Settings
from ._vllm_decide import decide, say_once
from ._vllm_method import GptOssMethod, Mxfp4Method
from ._vllm_others import around


class _Float16:
    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """vLLM's own dtypes, and float16 where it was asked for by name."""
        dtypes: list[torch.dtype] = super().get_supported_act_dtypes()  # type: ignore[misc]
        more = [torch.float16] if Settings.read().activations == "fp16" else []
        return [*dtypes, *(dtype for dtype in more if dtype not in dtypes)]


class MoeMxfp4Config(_Float16, Mxfp4Config):  # type: ignore[misc]
    """``quant_method: mxfp4`` of models other than gpt-oss."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts that our kernels serve; vLLM's own answer for everything else."""
        ours = _method(layer, Mxfp4Method, Mxfp4Config) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)


class MoeGptOssMxfp4Config(_Float16, GptOssMxfp4Config):  # type: ignore[misc]
    """``quant_method: mxfp4`` of gpt-oss, which vLLM calls gpt_oss_mxfp4."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts that our kernels serve; vLLM's own answer for everything else."""
        ours = _method(layer, GptOssMethod, GptOssMxfp4Config) if isinstance(layer, RoutedExperts) else None
        return ours or super().get_quant_method(layer, prefix)


CONFIGS = {"mxfp4": MoeMxfp4Config, "gpt_oss_mxfp4": MoeGptOssMxfp4Config}


def _method(layer: Any, kind: Any, own: Any) -> Any:
    decision = decide(layer, kind.gpt_oss, Settings.read())
    say_once(layer, decision)
    if decision.experts is not None:
        return kind(layer.moe_config, decision)
    dtype, vllms = layer.moe_config.in_dtype, own.get_supported_act_dtypes()
    if dtype is torch.float16 and dtype not in vllms:
        raise ValueError(
            f"--dtype float16: expected experts that mxfp4-moe runs, for vLLM's own take {', '.join(map(str, vllms))} "
            f"alone, got: {decision.reason}; take --dtype bfloat16"
        )
    return None


def put_in(settings: Settings) -> str:
    """Registers the configs under vLLM's own names, and stands around its look-up for the others; all or nothing."""
    known = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    before, look_up = dict(known), RoutedExperts._get_quant_method
    try:
        for name, config in CONFIGS.items():
            quantization.register_quantization_config(name)(config)
        RoutedExperts._get_quant_method = around(look_up)
    except BaseException:
        known.clear()
        known.update(before)
        raise
    return "experts of MXFP4 models get our kernels where they serve (MXFP4_MOE_ENGINES=off switches this off)"
