"""The functions between the two GEMMs, by the names that the field uses."""

from __future__ import annotations

from enum import Enum


class Activation(str, Enum):
    """What stands between the GEMMs, in float32; g is the gate, u the up projection, after their biases.

    Gated (w13 holds two rows per output):
        swiglu        silu(g) * u
        swiglu_oai    g = min(g, limit); u = clamp(u, -limit, limit); g * sigmoid(alpha * g) * (u + beta)   (gpt-oss;
                      with alpha 1 and beta 0 silu of a clamped gate, which is DeepSeek-V4's)
        swiglu_step   min(silu(g), limit) * clamp(u, -limit, limit)   (Ling V3)
        geglu         gelu(g) * u, with erf
        geglu_tanh    gelu(g) * u, with the tanh approximation
        situ          soft(g, beta) * sigmoid(g) * soft(u, limit)   (Kimi-K3: beta 4, limit 25)
    Not gated (w13 holds one row x per output):
        silu, gelu (erf), gelu_tanh, relu, relu2 (relu(x)^2), clamped_relu2 (soft(relu(x), limit)^2), identity

    soft(x, s) = s * tanh(x / s), which stays within +-s; without a limit it is x.

    Sources: swiglu_oai, gpt_oss/torch/model.py (swiglu) of openai/gpt-oss; DeepSeek-V4's, transformers 5.24,
    models/deepseek_v4 (_apply_gate); swiglu_step, vLLM 0.33, layers/activation.py (SwigluStepAndMul); situ, Moonshot's
    modeling_kimi_linear.py beside Kimi-K3's weights (SituAndMul; its linear_beta is limit here), and the same in vLLM
    0.33, layers/activation.py; clamped_relu2, Megatron-LM's core/fusions/fused_weighted_squared_relu.py
    (weighted_clamped_squared_relu; its clamp_scale is limit here), which FlashInfer calls ClampedRelu2.
    """

    SWIGLU = "swiglu"
    SWIGLU_OAI = "swiglu_oai"
    SWIGLU_STEP = "swiglu_step"
    GEGLU = "geglu"
    GEGLU_TANH = "geglu_tanh"
    SITU = "situ"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"
    CLAMPED_RELU2 = "clamped_relu2"
    IDENTITY = "identity"

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds a gate and an up row per output, or one row."""
        return self.code < _FIRST_NOT_GATED

    @property
    def code(self) -> int:
        """The number by which the kernels know it: enum Activation of csrc/shared/nonlinearities.cuh, in this order."""
        return _CODES[self]


_CODES = {activation: code for code, activation in enumerate(Activation)}
_FIRST_NOT_GATED = _CODES[Activation.SILU]
