"""Asks our decision of layers that vLLM might make, with vLLM's own types around it; prints what it says.

vllm_declines.py MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

ANEW = SimpleNamespace(
    resolve_quant_method_cls=lambda layer, name: object
)  # --quantization-config's, for these experts


def layer(
    *,
    batched: bool = False,
    eplb: bool = False,
    on_input: bool = False,
    anew: Any = None,
    scaled: float = 1.0,
    routing: Any = None,
    **changes: Any,
) -> Any:
    """What `decide` looks at of a layer of gpt-oss's experts."""
    parallel = {"tp_rank": 0, "ep_rank": 0, "dp_rank": 0, "dp_size": 1, "use_batched_activation_format": batched}
    parallel |= {"use_ep": False, "use_all2all_kernels": False, "enable_eplb": eplb}
    moe = {
        "moe_backend": "auto",
        "in_dtype": torch.bfloat16,
        "activation": MoEActivation.SWIGLUOAI,
        "is_act_and_mul": True,
        "has_hash_routing": False,
        "is_lora_enabled": False,
        "routing_method": RoutingMethodType.Renormalize,
        "router_logits_dtype": None,
        "hidden_dim": 288,
        "experts_per_token": 4,
        "num_experts": 8,
        "moe_parallel_config": SimpleNamespace(**parallel),
    }
    return SimpleNamespace(
        moe_config=SimpleNamespace(**{**moe, **changes}),
        apply_router_weight_on_input=on_input,
        routed_scaling_factor=scaled,
        custom_routing_function=routing,
        quant_config=SimpleNamespace(online_quantization_config=anew),
        layer_name="model.layers.0.mlp.experts",
    )


CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "backend": {"moe_backend": "marlin"},
    "lora": {"is_lora_enabled": True},
    "batched": {"batched": True},
    "on input": {"on_input": True},
    "float16": {"in_dtype": torch.float16},
    "float32": {"in_dtype": torch.float32},
    "activation": {"activation": MoEActivation.SITU},
    "router": {"routing_method": RoutingMethodType.DeepseekV4},
    "many": {"experts_per_token": 33, "num_experts": 64},
    "anew": {"anew": ANEW},
    "EPLB": {"eplb": True},
    "scaled": {"scaled": 2.5},
    "own routing": {"routing": max},
}
GPUS = {"SM120": (12, 0), "SM121": (12, 1), "A100": (8, 0)}


@contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[None]:
    """As if this process's device were a GPU; nothing is run on it."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    with (
        mock.patch("mxfp4_moe.integrations._vllm_decide.current_platform", platform),
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.get_device_name", return_value="a card"),
    ):
        yield


def main() -> None:
    load_general_plugins()
    config = EngineArgs(sys.argv[1], skip_tokenizer_init=True).create_engine_config()
    print("config:", get_quantization_config("gpt_oss_mxfp4").__name__, get_quantization_config("mxfp4").__name__)
    from mxfp4_moe.integrations import _vllm_others
    from mxfp4_moe.integrations._engines import Settings
    from mxfp4_moe.integrations._vllm_config import GptOssMxfp4Config, MoeGptOssMxfp4Config, _method
    from mxfp4_moe.integrations._vllm_decide import decide
    from mxfp4_moe.integrations._vllm_method import GptOssMethod

    def tell(name: str, **changes: Any) -> None:
        found = decide(layer(**changes), True, Settings.read())
        kind = "vLLM" if found.experts is None else found.experts.__name__
        print(f"{name}: {kind}: {found.reason}; {found.next_step}")

    print("dtypes:", *MoeGptOssMxfp4Config.get_supported_act_dtypes())
    with set_current_vllm_config(config):
        try:
            _method(layer(in_dtype=torch.float16, moe_backend="marlin"), GptOssMethod, GptOssMxfp4Config)
        except ValueError as error:
            print(f"float16 for nobody: {error}")
        for name, changes in CASES.items():
            tell(name, **changes)
        for name, capability in GPUS.items():
            with gpu(capability):
                tell(name)
        with mock.patch("mxfp4_moe.integrations._vllm_decide.formats_on", return_value=("mxfp8",)):
            tell("no bf16")
        with mock.patch.object(config.aux_output_config, "enable_return_routed_experts", True):
            tell("captured")
        for name, title in _vllm_others._NOT_TAKEN.items():
            answer = type(name, (), {})()
            with mock.patch.object(_vllm_others, "say_once") as said:
                assert _vllm_others.quant_method(layer(), answer, None, None) is answer
            print(f"{title}: {said.call_args.args[1].reason}")
        with mock.patch.object(config.parallel_config, "enable_elastic_ep", True):
            tell("elastic")


if __name__ == "__main__":
    main()
