"""Whether one layer of experts in vLLM gets our kernels, with which activations, and if not, why: a `Decision`.

vLLM's own check of what a kernel class supports (`is_supported_config`) is asked with our classes, so batched formats,
LoRA on experts, routing methods and the rest are declined in vLLM's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static, kMxfp8Dynamic
from vllm.platforms import current_platform

from .._install import wheel
from ..weights import Activation, GateUpOrder
from ._engines import Choice, Settings, choose_activations, engine, say, selftest_gate
from ._engines.activations import formats_on
from ._vllm_experts import ModularExperts, MonolithicExperts

ENGINE = engine("vllm")
_SWIGLU_STEP_LIMIT = 7.0  # vLLM's experts apply swiglustep_and_mul with its default, whatever the config says


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of a layer.

    Attributes:
        experts: our class of experts, or None where vLLM's own kernels run.
        reason: why not, or which activations.
        next_step: what the user could do, or "".
        activation_format: as `fused_moe` takes it.
        activation, alpha, beta, limit: what stands between the GEMMs.
        order: of w13's rows as vLLM loads them.
        verify: compare the layer's bits at start-up.
    """

    experts: Any
    reason: str
    next_step: str = ""
    activation_format: str = "mxfp8"
    activation: Activation = Activation.SWIGLU
    alpha: float = 1.702
    beta: float = 1.0
    limit: float | None = None
    order: GateUpOrder = GateUpOrder.GATE_UP
    verify: bool = False


def decide(layer: Any, gpt_oss: bool, settings: Settings, computes: str = "") -> Decision:
    """The decision for one layer.

    Args:
        layer: vLLM's `RoutedExperts`, before its weights are made.
        gpt_oss: its checkpoint is gpt-oss's, whose numbers are vLLM's constants.
        computes: the activations of the kernels that vLLM has chosen, "bf16" or "mxfp8", where that is known.
    """
    moe = layer.moe_config

    def no(reason: str, next_step: str = "") -> Decision:
        return Decision(experts=None, reason=reason, next_step=next_step)

    if moe.moe_backend != "auto":
        return no(f"--moe-backend {moe.moe_backend} was asked for")
    if waits := _device_fault(settings):
        return no(*waits)
    config = get_current_vllm_config()
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        return no("elastic expert parallelism moves experts in a way that is not supported yet")
    online = getattr(layer.quant_config, "online_quantization_config", None)
    if online is not None and online.resolve_quant_method_cls(type(layer), layer.layer_name) is not None:
        return no("--quantization-config asks vLLM to quantize these experts anew")
    if layer.apply_router_weight_on_input:
        return no("this model applies router weights to the input")
    if moe.in_dtype not in (torch.bfloat16, torch.float16):
        return no(f"hidden states are {moe.in_dtype}, and our kernels take bfloat16 or float16", "--dtype bfloat16")
    numbers = _numbers(layer, gpt_oss)
    if numbers is None:
        return no(f"no kernel has the activation {moe.activation.value} as this checkpoint stores it")
    experts, why = _experts(layer, config)
    if experts is None:
        return no(why)
    choice = _activations(moe, config, settings, computes)
    if not choice.format:
        return no(choice.reason, choice.next_step)
    return Decision(
        experts=experts,
        reason=choice.reason,
        activation_format=choice.format,
        verify=settings.verify,
        **numbers,
    )


def say_once(layer: Any, decision: Decision) -> None:
    """One line for a model, from the first rank: which activations, or why not."""
    parallel = layer.moe_config.moe_parallel_config
    if parallel.tp_rank or parallel.ep_rank or parallel.dp_rank:
        return
    if decision.experts is not None:
        kind = "one call with the router" if decision.experts.is_monolithic() else "behind vLLM's router"
        say(ENGINE, f"mxfp4-moe runs this model's experts: {decision.reason}; {kind}")
    else:
        step = f"; {decision.next_step}" if decision.next_step else ""
        say(ENGINE, f"mxfp4-moe is not used, vLLM's own kernels run this model's experts: {decision.reason}{step}")


def _device_fault(settings: Settings) -> tuple[str, str] | None:
    """Why our kernels do not run on this process's device, with the next step."""
    if current_platform.is_cpu():
        if settings.cpu:
            return None
        return "this is a CPU, where we have a slow reference alone", "MXFP4_MOE_CPU=1 takes it, for tests"
    if not current_platform.is_cuda():
        return f"there are no kernels for {current_platform.device_name}", ""
    capability = torch.cuda.get_device_capability()
    if wheel.arch_for(capability) is None:
        return f"this wheel has no machine code for compute capability {capability[0]}.{capability[1]}", ""
    return selftest_gate(torch.cuda.get_device_name(), capability, settings)


def _activations(moe: Any, config: Any, settings: Settings, computes: str) -> Choice:
    """vLLM computes with 16-bit activations on our GPUs, unless --quantization-config asks for MXFP8 ones."""
    given = getattr(getattr(config.model_config, "quantization_config", None), "moe", None)
    default = "mxfp8" if getattr(given, "activation", None) == kMxfp8Dynamic else computes or ENGINE.activations
    device = torch.device("cpu") if current_platform.is_cpu() else torch.device("cuda", torch.cuda.current_device())
    dtype = "fp16" if moe.in_dtype == torch.float16 else "bf16"
    return choose_activations(ENGINE, settings, formats_on(device), dtype=dtype, engine_default=default)


def _experts(layer: Any, config: Any) -> tuple[Any, str]:
    """Our class for the layer: with the router where vLLM allows that, else behind it; or why neither."""
    moe = layer.moe_config
    batched = moe.moe_parallel_config.use_batched_activation_format
    form = mk.FusedMoEActivationFormat.BatchedExperts if batched else mk.FusedMoEActivationFormat.Standard
    kinds: list[Any] = [MonolithicExperts, ModularExperts]
    captures = getattr(getattr(config, "aux_output_config", None), "enable_return_routed_experts", False)
    if captures or layer.routed_scaling_factor != 1.0 or layer.custom_routing_function is not None:
        kinds = [ModularExperts]  # what the router chose or did is asked for outside of the kernel
    why = ""
    for kind in kinds:
        supported, reason = kind.is_supported_config(kind, moe, kMxfp4Static, None, form)
        if supported:
            return kind, ""
        why = str(reason)
    return None, why.replace("kernel does not", "our kernels do not")


def _numbers(layer: Any, gpt_oss: bool) -> dict[str, Any] | None:
    """The activation and its numbers as vLLM computes them; None where we have no kernel for them."""
    activation = layer.moe_config.activation
    if gpt_oss:  # GptOssMxfp4MoEMethod has these numbers
        if activation is not MoEActivation.SWIGLUOAI:
            return None
        oai = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
        return {"activation": Activation.SWIGLU_OAI, **oai, "order": GateUpOrder.INTERLEAVED}
    limit = layer.swiglu_limit
    alpha = 1.0 if layer.swiglu_alpha is None else float(layer.swiglu_alpha)
    beta = 0.0 if layer.swiglu_beta is None else float(layer.swiglu_beta)
    if activation is MoEActivation.SILU and limit is None:
        return {"activation": Activation.SWIGLU}
    if activation is MoEActivation.SILU:  # silu(min(g, limit)) * clamp(u)
        return {"activation": Activation.SWIGLU_OAI, "alpha": 1.0, "beta": 0.0, "limit": float(limit)}
    if activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is not None:
        return {"activation": Activation.SWIGLU_OAI, "alpha": alpha, "beta": beta, "limit": float(limit)}
    # The others by name: vLLM has had them since 0.32 or 0.33.
    named = activation.value
    if named == "gelu":
        return {"activation": Activation.GEGLU}
    if named == "gelu_tanh":
        return {"activation": Activation.GEGLU_TANH}
    if named == "swiglustep":
        return {"activation": Activation.SWIGLU_STEP, "limit": _SWIGLU_STEP_LIMIT}
    if named == "situ" and (situ_beta := layer.moe_config.activation_situ_beta) is not None:
        soft = layer.moe_config.activation_situ_linear_beta
        return {"activation": Activation.SITU, "beta": float(situ_beta), "limit": None if soft is None else float(soft)}
    return None
