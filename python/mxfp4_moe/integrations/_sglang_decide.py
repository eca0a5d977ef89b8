"""Whether SGLang's `auto` means our backend for a model, with which activations, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._install import wheel
from ._engines import Choice, Settings, choose_activations, selftest_gate
from ._engines.activations import formats_on
from ._engines.settings import CPU_VARIABLE
from ._engines.table import SGLANG

BACKEND = "mxfp4_moe"


@dataclass(frozen=True, kw_only=True)
class Model:
    """What SGLang's arguments and the model's config.json say.

    Attributes:
        quant_method: of config.json's quantization_config.
        limit: swiglu_limit.
        obstacles: arguments that are set, each of which our layer cannot be used with, as sentences.
    """

    quant_method: str
    limit: float | None
    obstacles: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Any, hf_config: Any) -> Model:
        """From SGLang's `ServerArgs` and the configuration.

        Raises:
            AttributeError: an argument that this version of SGLang does not have.
        """
        quantization = getattr(hf_config, "quantization_config", None) or {}
        found = []
        if args.enable_lora or args.lora_paths:
            found.append("LoRA may change experts, which our layer does not do")
        if args.moe_a2a_backend != "none":
            found.append(f"--moe-a2a-backend {args.moe_a2a_backend} brings tokens in another form")
        if args.speculative_algorithm and args.speculative_moe_runner_backend is None:
            found.append("the draft model of speculative decoding would get the same backend")
        if args.quantization not in (None, "mxfp4"):
            found.append(f"--quantization {args.quantization} is not MXFP4")
        return cls(
            quant_method=str(quantization.get("quant_method", "")),
            limit=getattr(hf_config, "swiglu_limit", None),
            obstacles=tuple(found),
        )


def decide(model: Model, settings: Settings) -> Choice:
    """The activations to compute with; an empty format where SGLang's own kernels must run."""
    if model.quant_method != "mxfp4":
        return Choice(format="", reason="the checkpoint is not MXFP4")
    if model.limit is None:
        return Choice(format="", reason="config.json has no swiglu_limit")
    if model.obstacles:
        return Choice(format="", reason=model.obstacles[0])
    if waits := _device_fault(settings):
        return Choice(format="", reason=waits[0], next_step=waits[1])
    return activations(settings)


def activations(settings: Settings) -> Choice:
    """For this process's device: SGLang computes W4A8 on SM120, W4A16 elsewhere."""
    if not torch.cuda.is_available():
        return choose_activations(SGLANG, settings, formats_on(torch.device("cpu")))
    default = "mxfp8" if torch.cuda.get_device_capability()[0] == 12 else "bf16"
    device = torch.device("cuda", torch.cuda.current_device())
    return choose_activations(SGLANG, settings, formats_on(device), engine_default=default)


def _device_fault(settings: Settings) -> tuple[str, str] | None:
    """Why our kernels do not run on this process's device, with the next step."""
    if not torch.cuda.is_available():
        if settings.cpu:
            return None
        return "there is no CUDA GPU", f"{CPU_VARIABLE}=1 takes the reference on a CPU, for tests"
    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if wheel.arch_for(capability) is None:
        return f"this wheel has no machine code for compute capability {capability[0]}.{capability[1]} of {name}", ""
    return selftest_gate(name, capability, settings)
