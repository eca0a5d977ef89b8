"""The functions between the two GEMMs, by the names that the field uses."""

from __future__ import annotations

from enum import Enum


class Activation(str, Enum):
    """What stands between the GEMMs, in float32; g is the gate, u the up projection, after their biases.

    Gated (w13 holds two rows per output):
        swiglu        silu(g) * u
        swiglu_oai    g = min(g, limit); u = clamp(u, -limit, limit); g * sigmoid(alpha * g) * (u + beta)   (gpt-oss)
        swiglu_step   min(silu(g), limit) * clamp(u, -limit, limit)
        geglu         gelu(g) * u, with erf
        geglu_tanh    gelu(g) * u, with the tanh approximation
    Not gated (w13 holds one row x per output):
        silu, gelu (erf), gelu_tanh, relu, relu2 (relu(x)^2), identity
    """

    SWIGLU = "swiglu"
    SWIGLU_OAI = "swiglu_oai"
    SWIGLU_STEP = "swiglu_step"
    GEGLU = "geglu"
    GEGLU_TANH = "geglu_tanh"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"
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
