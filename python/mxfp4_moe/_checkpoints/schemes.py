"""How checkpoints name and lay out a layer's experts: one row for each scheme, data alone.

A tensor's name is a prefix, the layer's number, the scheme's `path` to the experts, a projection, and a suffix that
says what of it: codes, scales or bias. Whatever prefix a checkpoint has fits, so that language models inside of others
need no row of their own. Rows are added where a public loader or writer shows the names; `sources` says which, and of
packages the release that was read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

EXPERT = "{expert}"  # in `Scheme.path`, where an expert's number stands

_GATE_UP_DOWN = ("gate_proj", "up_proj"), "down_proj"
_W1_W3_W2 = ("w1", "w3"), "w2"  # w1 is the gate, w3 the up projection


@dataclass(frozen=True, kw_only=True)
class Between:
    """What stands between the GEMMs: the name of an `Activation` and its numbers."""

    activation: str
    alpha: float = 1.702
    beta: float = 1.0
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One naming.

    Attributes:
        name: what `MoEWeights.from_pretrained` and the command line call it.
        written_by: who writes such files.
        containers: the list that a layer's number indexes, as the last part of the prefix.
        path: from the layer's number to the projections.
        w13: the projection that holds gates and ups, or the two that hold one each, gate first.
        w2: the down projection.
        codes, scales, bias: suffixes. Without scales the weights are floating point, to be quantized on the way.
        scale_2: NVFP4's float32 scale of a projection; where it is there, scales are E4M3 of 16 values each.
        input_scale: NVFP4's float32 scale of a projection's input, which a checkpoint may lack.
        divide: whether those two divide what is read, as global scales do, or multiply it.
        gated: whether w13 has gates.
        gate_up_order: of the rows of w13; "gate_up" where two projections are put one behind the other.
        transposed: floating point stored as [.., in, out].
        needs_bias: the bias is what tells these names from others of another layout.
        activation: where the names alone say which model it is.
        sources: where the names and the layout were read.
    """

    name: str
    written_by: str
    containers: tuple[str, ...] = ("layers",)
    path: str
    w13: tuple[str, ...]
    w2: str
    codes: str
    scales: str | None
    bias: str | None = None
    scale_2: str | None = None
    input_scale: str | None = None
    divide: bool = False
    gated: bool = True
    gate_up_order: str = "gate_up"
    transposed: bool = False
    needs_bias: bool = False
    activation: Between | None = None
    sources: tuple[str, ...]

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return EXPERT in self.path

    @property
    def is_packed(self) -> bool:
        """Whether the weights are FP4 as they are."""
        return self.scales is not None

    @property
    def is_nvfp4(self) -> bool:
        """Whether they are NVFP4."""
        return self.scale_2 is not None

    @property
    def block(self) -> int:
        """Values that share a scale; sizes are multiples of it."""
        return 16 if self.is_nvfp4 else 32

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections of a layer."""
        return (*self.w13, self.w2)

    @property
    def tensor_suffixes(self) -> tuple[str, ...]:
        """What every projection must have."""
        return tuple(suffix for suffix in (self.codes, self.scales, self.scale_2) if suffix is not None)

    def tensor(
        self, prefix: str, layer: int | str, projection: str, suffix: str, expert: int | str | None = None
    ) -> str:
        """A tensor's full name; expert where each has its own."""
        return f"{prefix}{layer}.{self.path.replace(EXPERT, str(expert))}.{projection}{suffix}"

    @property
    def ending(self) -> str:
        """How the names end that `pattern` looks at: the codes of the first projection."""
        return self.w13[0] + self.codes

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the codes of the first projection; groups prefix, layer and, per expert, expert."""
        path = re.escape(self.path).replace(re.escape(EXPERT), r"(?P<expert>\d+)")
        lists = "|".join(map(re.escape, self.containers))
        return re.compile(rf"(?P<prefix>(?:.*\.)?(?:{lists})\.)(?P<layer>\d+)\.{path}\.{re.escape(self.ending)}")


# What may stand beside a projection's tensors and changes nothing: activations are quantized here as they come.
INPUT_SCALES = (".input_scale", ".input_global_scale")  # of NVFP4 they count
HARMLESS = (*INPUT_SCALES, ".weight_shape")
_OAI_SWIGLU = Between(activation="swiglu_oai", limit=7.0)

_MODELOPT = (
    "vLLM 0.33, model_executor/layers/quantization/modelopt.py (ModelOptNvFp4FusedMoE)",
    "nvidia-modelopt 0.47, torch/export/quant_utils.py and torch/quantization/qtensor/nvfp4_tensor.py",
)

SCHEMES = (
    Scheme(
        name="gpt-oss",
        written_by="gpt-oss on the Hub (openai/gpt-oss-20b, -120b)",
        path="mlp.experts",
        w13=("gate_up_proj",),
        w2="down_proj",
        codes="_blocks",
        scales="_scales",
        bias="_bias",
        gate_up_order="interleaved",
        activation=_OAI_SWIGLU,
        sources=(
            "transformers 5.24, quantizers/quantizer_mxfp4.py (serialized_names) and models/gpt_oss",
            "vLLM 0.33, model_executor/models/gpt_oss.py (hf_to_vllm_mapper)",
        ),
    ),
    Scheme(
        name="gpt-oss-original",
        written_by="OpenAI's original/ folder of gpt-oss",
        containers=("block",),
        path="mlp",
        w13=("mlp1",),
        w2="mlp2",
        codes="_weight.blocks",
        scales="_weight.scales",
        bias="_bias",
        gate_up_order="interleaved",
        activation=_OAI_SWIGLU,
        sources=("openai/gpt-oss, gpt_oss/torch/weights.py (PARAM_NAME_MAP) and gpt_oss/torch/model.py (swiglu)",),
    ),
    Scheme(
        name="gpt-oss-bf16",
        written_by="gpt-oss fine-tuned or merged in bf16 (transformers' GptOssExperts)",
        path="mlp.experts",
        w13=("gate_up_proj",),
        w2="down_proj",
        codes="",
        scales=None,
        bias="_bias",
        gate_up_order="interleaved",
        transposed=True,
        needs_bias=True,  # Qwen3-VL-MoE and Llama 4 have these names without, and their gates before their ups
        activation=_OAI_SWIGLU,
        sources=("transformers 5.24, models/gpt_oss/modeling_gpt_oss.py (GptOssExperts: [E, in, out], gates at ::2)",),
    ),
    Scheme(
        name="gpt-oss-quark",
        written_by="AMD Quark for gpt-oss (amd/gpt-oss-20b-MoE-Quant-W-MXFP4-A-FP8-KV-FP8)",
        path="mlp.experts.{expert}",
        w13=("gate_up_proj",),
        w2="down_proj",
        codes=".weight",
        scales=".weight_scale",
        bias=".bias",
        gate_up_order="interleaved",
        activation=_OAI_SWIGLU,
        sources=("vLLM 0.33, model_executor/models/gpt_oss.py (_load_weights_quark: rows as in OpenAI's files)",),
    ),
    Scheme(
        name="compressed-tensors",
        written_by="compressed-tensors and LLM Compressor (mxfp4-pack-quantized), AutoRound",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight_packed",
        scales=".weight_scale",
        bias=".bias",
        sources=(
            "compressed-tensors 0.20, compressors/mxfp4/base.py (compression_param_names; E8M0 as uint8)",
            "vLLM 0.33, compressed_tensors_moe_w4a4_mxfp4.py and inc/schemes/inc_mxfp4_moe.py",
        ),
    ),
    Scheme(
        name="compressed-tensors-w1",
        written_by="compressed-tensors for models that call projections w1, w2, w3 (Kimi-K3, MiniMax)",
        path="block_sparse_moe.experts.{expert}",
        w13=_W1_W3_W2[0],
        w2=_W1_W3_W2[1],
        codes=".weight_packed",
        scales=".weight_scale",
        bias=".bias",
        sources=(
            "vLLM 0.33, models/kimi_k3/amd/linear.py (load_weights: w1, w3, weight_packed; block_sparse_moe)",
            "SGLang 0.5.23, srt/models/kimi_k3.py (load_weights)",
        ),
    ),
    Scheme(
        name="weight-scale",
        written_by="AMD Quark, NVIDIA ModelOpt (mxfp4, w4a8_mxfp4_fp8), MiMo-V2's own",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight",
        scales=".weight_scale",
        bias=".bias",
        sources=(
            "amd-quark 0.13, torch/export/nn/modules/realquantizer.py (E8M0 as uint8), torch/utils/pack.py (Pack_fp4)",
            "nvidia-modelopt 0.47, torch/export/quant_utils.py and torch/quantization/qtensor/mxfp4_tensor.py",
            "SGLang 0.5.23, srt/models/mimo_v2.py (load_weights: uint8 weight and weight_scale of mlp.experts)",
        ),
    ),
    Scheme(
        name="weight-scale-w1",
        written_by="AMD Quark for models that call projections w1, w2, w3 (MiniMax-M3)",
        path="block_sparse_moe.experts.{expert}",
        w13=_W1_W3_W2[0],
        w2=_W1_W3_W2[1],
        codes=".weight",
        scales=".weight_scale",
        bias=".bias",
        sources=(
            "vLLM 0.33, models/minimax_m3/amd/model.py (load_weights: block_sparse_moe, w1, w3, w2); its pull 45794",
            "SGLang 0.5.23, srt/models/minimax_m3.py (load_weights)",
        ),
    ),
    Scheme(
        name="weight-scale-inv",
        written_by="Ling and Bailing V3 (FP8 checkpoints with routed_experts_quant_method mxfp4)",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight",
        scales=".weight_scale_inv",  # E8M0 here too: the name alone is that of FP8's scales
        bias=".bias",
        sources=("vLLM 0.33, model_executor/models/bailing_moe_v3.py (_LING_MXFP4_WEIGHTS_MAPPER)",),
    ),
    Scheme(
        name="deepseek-v4",
        written_by="DeepSeek-V4's own (expert_dtype fp4)",
        containers=("layers", "mtp"),
        path="ffn.experts.{expert}",
        w13=_W1_W3_W2[0],
        w2=_W1_W3_W2[1],
        codes=".weight",
        scales=".scale",
        bias=".bias",
        sources=(
            "SGLang 0.5.23, srt/models/deepseek_v4.py (remap: .ffn., .w1., .scale; mtp.N), srt/configs/deepseek_v4.py",
            "vLLM 0.33, models/deepseek_v4/nvidia/model.py (float8_e8m0fnu scales, viewed as bytes)",
        ),
    ),
    Scheme(
        name="nvfp4-modelopt",
        written_by="NVIDIA ModelOpt, NVFP4 (Qwen3-MoE, DeepSeek, GLM in NVIDIA's format)",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight",
        scales=".weight_scale",
        scale_2=".weight_scale_2",
        input_scale=".input_scale",
        sources=_MODELOPT,
    ),
    Scheme(
        name="nvfp4-modelopt-w1",
        written_by="NVIDIA ModelOpt, NVFP4, for models that call projections w1, w2, w3 (MiniMax-M2)",
        path="block_sparse_moe.experts.{expert}",
        w13=_W1_W3_W2[0],
        w2=_W1_W3_W2[1],
        codes=".weight",
        scales=".weight_scale",
        scale_2=".weight_scale_2",
        input_scale=".input_scale",
        sources=(*_MODELOPT, "vLLM 0.33, model_executor/models/minimax_m2.py (block_sparse_moe, w1, w2, w3)"),
    ),
    Scheme(
        name="nvfp4-modelopt-mixer",
        written_by="NVIDIA ModelOpt, NVFP4, for Nemotron-H and Nemotron 3",
        path="mixer.experts.{expert}",
        w13=("up_proj",),
        w2="down_proj",
        codes=".weight",
        scales=".weight_scale",
        scale_2=".weight_scale_2",
        input_scale=".input_scale",
        gated=False,
        activation=Between(activation="relu2"),
        sources=(
            *_MODELOPT,
            "vLLM 0.33, model_executor/models/nemotron_h.py (mixer; up_proj and down_proj; mlp_hidden_act relu2)",
        ),
    ),
    Scheme(
        name="nvfp4-compressed-tensors",
        written_by="compressed-tensors and LLM Compressor, NVFP4 (nvfp4-pack-quantized)",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight_packed",
        scales=".weight_scale",
        scale_2=".weight_global_scale",
        input_scale=".input_global_scale",
        divide=True,
        sources=(
            "compressed-tensors 0.20, compressors/nvfp4 (weight_packed, E4M3 weight_scale, float32 global scales)",
            "vLLM 0.33, compressed_tensors_moe_w4a4_nvfp4.py (1 / weight_global_scale, 1 / input_global_scale)",
        ),
    ),
    Scheme(
        name="float",
        written_by="unquantized models: Qwen3-MoE, MiMo, Ling and others, in bf16, fp16 or fp32",
        path="mlp.experts.{expert}",
        w13=_GATE_UP_DOWN[0],
        w2=_GATE_UP_DOWN[1],
        codes=".weight",
        scales=None,
        bias=".bias",
        sources=("transformers 5.24, conversion_mapping.py (qwen2_moe, used for qwen3_moe and mimo_v2_flash)",),
    ),
    Scheme(
        name="float-w1",
        written_by="unquantized models that call projections w1, w2, w3: MiniMax, Mixtral",
        path="block_sparse_moe.experts.{expert}",
        w13=_W1_W3_W2[0],
        w2=_W1_W3_W2[1],
        codes=".weight",
        scales=None,
        bias=".bias",
        sources=("transformers 5.24, conversion_mapping.py (mixtral, minimax_m2)",),
    ),
)

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
GPT_OSS = tuple(scheme for scheme in SCHEMES if scheme.name.startswith("gpt-oss"))
