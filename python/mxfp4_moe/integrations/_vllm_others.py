"""Experts in MXFP4 that stand in checkpoints of other quantization methods, such as DeepSeek-V4's "fp8".

Which layers are MXFP4 there is for vLLM's configs to know: layer by layer, by names, exceptions and data types that the
model's configuration has. So vLLM answers first, and ours stands in where its answer is its own method for MXFP4
experts, whose kernels would compute with the activations that we then take. What is FP4 and is not taken is said by
name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, _backend_activation_key
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config, Mxfp4MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic

from ._engines import Settings
from ._vllm_decide import Decision, decide, say_once
from ._vllm_method import Mxfp4Method

# vLLM's methods for experts in FP4 by the names of their classes, and what their checkpoints are called.
_NOT_TAKEN = {
    "CompressedTensorsW4A4Mxfp4MoEMethod": "MXFP4 experts of compressed-tensors",
    "CompressedTensorsW4A8Mxfp4MoEMethod": "MXFP4 experts of compressed-tensors",
    "CompressedTensorsW4A4Nvfp4MoEMethod": "NVFP4 experts of compressed-tensors",
    "INCMxfp4MoEMethod": "MXFP4 experts of Intel's auto-round",
    "ModelOptNvFp4FusedMoE": "NVFP4 experts of ModelOpt",
    "Mxfp4OnlineMoEMethod": "experts that vLLM itself quantizes to MXFP4",
    "QuarkNvfp4MoEMethod": "NVFP4 experts of Quark",
    "QuarkOCP_MX_MoEMethod": "MX experts of Quark",
}


def quant_method(layer: Any, answer: Any, quant_config: Any, moe_config: Any) -> Any:
    """vLLM's answer for a layer of experts, or ours in its place.

    Args:
        layer: vLLM's `RoutedExperts`, before its weights are made.
    """
    if title := _NOT_TAKEN.get(type(answer).__name__):
        say_once(layer, Decision(experts=None, reason=f"{title} are not taken yet"))
    # A subclass computes otherwise; and the configs of _vllm_config.py have been asked.
    if type(answer) is not Mxfp4MoEMethod or isinstance(quant_config, Mxfp4Config):
        return answer
    settings = Settings.read()
    decision = _decide(layer, answer, settings)
    say_once(layer, decision)
    return Mxfp4Method(moe_config, decision) if decision.experts is not None else answer


def _decide(layer: Any, answer: Any, settings: Settings) -> Decision:
    if layer.expert_map_manager.num_fused_shared_experts:
        return Decision(experts=None, reason="shared experts stand among the routed ones")
    backend = answer.mxfp4_backend
    computes = _computes(backend)
    if settings.activations == "engine" and not computes:
        return Decision(
            experts=None,
            reason=f"vLLM computes with the activations of {backend.value} here, which we do not have",
            next_step="MXFP4_MOE_ACTIVATIONS=bf16 or mxfp8 takes our kernels (docs/accuracy.md)",
        )
    return decide(layer, False, settings, computes)


def _computes(backend: Any) -> str:
    """The activations of one of vLLM's kernels, as `choose_activations` names them; "" for others."""
    if backend is Mxfp4MoeBackend.HUMMING:  # takes what the checkpoint declares
        return ""
    key = _backend_activation_key(backend)
    return "bf16" if key is None else "mxfp8" if key == kMxfp8Dynamic else ""


def around(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in place of `RoutedExperts._get_quant_method`."""

    @functools.wraps(original)
    def get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        answer = original(self, prefix, quant_config, moe_config)
        return quant_method(self, answer, quant_config, moe_config)

    return get_quant_method
