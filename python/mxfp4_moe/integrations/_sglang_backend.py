"""The MoE runner backend `mxfp4_moe` in SGLang's own registries; nothing of SGLang is replaced but one look-up.

SGLang resolves `--moe-runner-backend auto` model by model before its processes start; a provider for GptOssForCausalLM
that is registered behind SGLang's own has the last word there. In the processes that run the model, a hook around
`Mxfp4Config.get_quant_method` gives layers our method where the backend is ours. With a backend that SGLang's TopK and
dispatcher do not know they do what they do for `triton`: standard top-k, and ids that count the experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from sglang.srt import server_args
from sglang.srt.arg_groups.overrides import register_model_override
from sglang.srt.layers.moe import utils
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from ._engines import Settings, say
from ._engines.table import SGLANG
from ._sglang_decide import BACKEND, Model, decide

_LOOK_UP = "sglang.srt.layers.quantization.mxfp4.Mxfp4Config.get_quant_method"
_settings: list[Settings] = []


def put_in(settings: Settings) -> str:
    """Registers everything, in an order in which nothing stays behind where a step fails."""
    if BACKEND in server_args.MOE_RUNNER_BACKEND_CHOICES:
        raise ValueError(f"SGLang has a MoE runner backend {BACKEND} already")
    make_known()
    _settings[:] = [settings]
    HookRegistry.register(_LOOK_UP, get_quant_method, HookType.AROUND)
    register_model_override("GptOssForCausalLM")(choose_backend)
    server_args.add_moe_runner_backend_choices([BACKEND])
    return f"--moe-runner-backend {BACKEND} is there, and auto means it where it serves"


def make_known() -> None:
    """SGLang finds a backend of our name as it finds its own: by its registry, before it had one as one more value."""
    register = getattr(utils, "register_moe_runner_backend_name", None)
    if register is not None:
        register(BACKEND)
        found = utils.resolve_moe_runner_backend(BACKEND)
    else:
        ours = object.__new__(utils.MoeRunnerBackend)
        ours._name_, ours._value_ = BACKEND.upper(), BACKEND
        found = utils.MoeRunnerBackend._value2member_map_.setdefault(BACKEND, ours)
        if utils.MoeRunnerBackend(BACKEND) is not found:
            raise TypeError("MoeRunnerBackend is not the enumeration that it was")
    if found.value != BACKEND or found.is_auto():
        raise TypeError(f"SGLang's MoE runner backend {BACKEND} is {found!r}")


def choose_backend(args: Any, hf_config: Any) -> dict[str, str]:
    """SGLang's call while it resolves the arguments: what `auto` means for this model, or nothing."""
    asked = args.moe_runner_backend
    if asked not in ("auto", BACKEND):
        return {}
    try:
        decision = decide(Model.of(args, hf_config), _settings[0])
    except Exception as error:  # an argument that this version does not have: SGLang's own choice stands
        say(SGLANG, f"mxfp4-moe is not used, SGLang's own kernels run this model's experts: {error}")
        return {}
    if not decision.format and asked == BACKEND:
        raise ValueError(f"--moe-runner-backend {BACKEND}: {decision.reason}{_then(decision.next_step)}")
    if not decision.format:
        say(
            SGLANG,
            f"mxfp4-moe is not used, SGLang's own kernels run this model's experts: {decision.reason}"
            f"{_then(decision.next_step)}",
        )
        return {}
    say(SGLANG, f"mxfp4-moe runs this model's experts: {decision.reason}")
    return {"moe_runner_backend": BACKEND}


def get_quant_method(
    original: Callable[..., Any], config: Any, layer: Any, prefix: str, *args: Any, **more: Any
) -> Any:
    """Around SGLang's look-up of a layer's method: ours for experts of an MXFP4 checkpoint, where the backend is."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    ours = utils.get_moe_runner_backend().value == BACKEND and isinstance(layer, FusedMoE)
    if not ours or not config.is_checkpoint_mxfp4_serialized:
        return original(config, layer, prefix, *args, **more)
    return import_module("._sglang_method", __package__).Method(prefix, _settings[0])  # SGLang has it by then


def _then(next_step: str) -> str:
    return f"; {next_step}" if next_step else ""
