"""FlashInfer's activations, by its names and numbers, and which `Activation` each is."""

from __future__ import annotations

from enum import IntEnum

from ..activations import Activation


class ActivationType(IntEnum):
    """What stands between the GEMMs, by FlashInfer's numbers; `Activation` has the formulas."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3  # with swiglu_alpha, swiglu_beta or swiglu_limit: SwigluBias
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7  # swiglu_limit is 7.0 where it is not given
    GegluTanh = 8
    Identity = 9
    Situ = 10  # situ_beta is 4.0 and situ_linear_beta 25.0 where they are not given
    InvalidType = 11  # refused
    ClampedRelu2 = 12  # with clamped_relu2_limit

    @property
    def is_gated(self) -> bool:
        """Whether fc1 holds an up and a gate row per output."""
        return self in _ACTIVATIONS and _ACTIVATIONS[self].is_gated


_ACTIVATIONS = {
    ActivationType.Gelu: Activation.GELU,
    ActivationType.Relu: Activation.RELU,
    ActivationType.Silu: Activation.SILU,
    ActivationType.Swiglu: Activation.SWIGLU,
    ActivationType.Geglu: Activation.GEGLU,
    ActivationType.SwigluBias: Activation.SWIGLU_OAI,
    ActivationType.Relu2: Activation.RELU2,
    ActivationType.SwigluStep: Activation.SWIGLU_STEP,
    ActivationType.GegluTanh: Activation.GEGLU_TANH,
    ActivationType.Identity: Activation.IDENTITY,
    ActivationType.Situ: Activation.SITU,
    ActivationType.ClampedRelu2: Activation.CLAMPED_RELU2,
}


def activation_of(value: ActivationType | int, has_swiglu_numbers: bool = False) -> Activation:
    """The activation that an argument means.

    Raises:
        ValueError: no ActivationType.
        NotImplementedError: one that is not here.
    """
    try:
        kind = ActivationType(-1 if isinstance(value, bool) else value)
    except ValueError:
        raise ValueError(f"activation_type: expected an ActivationType, got {value!r}") from None
    if kind not in _ACTIVATIONS:
        having = ", ".join(k.name for k in _ACTIVATIONS)
        raise NotImplementedError(f"activation_type: {kind.name} is not in this library, which has {having}")
    if kind is ActivationType.Swiglu and has_swiglu_numbers:
        return Activation.SWIGLU_OAI
    return _ACTIVATIONS[kind]
