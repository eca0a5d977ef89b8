"""The float32 scales of NVFP4 weights, one for each expert and projection, and of the inputs of their GEMMs.

Two kinds are in use, and one is the reciprocal of the other. NVIDIA ModelOpt's weight_scale_2 and input_scale multiply
what is read; compressed-tensors' weight_global_scale and input_global_scale divide it. They are kept as they came, so
that they can be given back bit for bit; what is computed with is `factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arguments import describe, has_values, require_tensor
from .._torch_state import exact
from ..formats import NVFP4_MAX

NAMES = ("w13", "w2", "w13_input", "w2_input")
MULTIPLY = ("w13_scale_2", "w2_scale_2", "w13_input_scale", "w2_input_scale")  # how `MoEWeights.from_nvfp4` calls them
DIVIDE = ("w13_global_scale", "w2_global_scale", "w13_input_global_scale", "w2_input_global_scale")
# What `TensorScales.operator_arguments` is made of.
WEIGHT_ARGUMENTS = ("w13_factors", "w2_factors")
INPUT_ARGUMENTS = ("w13_input_factors", "w2_input_factors", "w13_input_global_scales", "w2_input_global_scales")


_SMALLEST = 2.0**-128  # the reciprocal of what is larger is finite in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorScales:
    """Scales of E experts; P is 2, gate and up, for a gated activation, else 1. All are on one device.

    `MoEWeights` reads them once, when it is made: they are not to be written, and others are another `MoEWeights`.

    Attributes:
        w13: float32 [E, P].
        w2: float32 [E].
        w13_input: float32 [E, P], of the first GEMM's input, or None, where each row has a dynamic one.
        w2_input: float32 [E], or None, of the second's; both or none.
        divide: whether they divide (global scales) or multiply.
    """

    w13: Tensor
    w2: Tensor
    w13_input: Tensor | None = None
    w2_input: Tensor | None = None
    divide: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> TensorScales:
        """The same scales with every tensor replaced."""
        given = {name: getattr(self, name) for name in NAMES}
        made: dict[str, Any] = {name: None if scale is None else function(scale) for name, scale in given.items()}
        return TensorScales(**made, divide=self.divide)

    def map_with(self, others: Sequence[TensorScales], function: Callable[[list[Tensor]], Tensor]) -> TensorScales:
        """Scales of the same kind, made from each of these and those of the others that belong to it."""
        given = {name: [getattr(one, name) for one in (self, *others)] for name in NAMES}
        made: dict[str, Any] = {name: None if some[0] is None else function(some) for name, some in given.items()}
        return TensorScales(**made, divide=self.divide)

    def named(self) -> dict[str, Any]:
        """Copies under the names of `MoEWeights.from_nvfp4`; those of the other kind are None."""
        values = [None if value is None else value.clone() for value in (getattr(self, name) for name in NAMES)]
        mine, others = (DIVIDE, MULTIPLY) if self.divide else (MULTIPLY, DIVIDE)
        return dict(zip(mine, values, strict=True)) | dict.fromkeys(others)

    def check(self, experts: int, gated: bool, device: torch.device) -> None:
        """Checks scales that are a field of `MoEWeights`.

        Raises:
            TypeError, ValueError: another dtype, shape or device; scales of one input alone; values that
                `refuse_values` refuses.
        """
        if not isinstance(self.divide, bool):
            raise TypeError(f"tensor_scales.divide: expected a bool, got {self.divide!r}")
        for name in NAMES:
            value = getattr(self, name)
            if value is None and name in ("w13_input", "w2_input"):
                continue
            shape = (experts, 2 if gated else 1) if name.startswith("w13") else (experts,)
            require_tensor(f"tensor_scales.{name}", value, torch.float32, shape, device)
            refuse_values(f"tensor_scales.{name}", value, self._multiplies(name))
        if (self.w13_input is None) != (self.w2_input is None):
            raise ValueError("tensor_scales: expected w13_input and w2_input, or neither, got one of them")

    def _multiplies(self, name: str) -> bool:
        """Whether nobody takes a scale's reciprocal."""
        return not self.divide and name in ("w13", "w2")

    def factors(self) -> tuple[Tensor, Tensor]:
        """What the two GEMMs' sums are multiplied by for their weights: float32 [E, P] and [E]."""
        return self._multiplying(self.w13), self._multiplying(self.w2)

    def input_factors(self) -> tuple[Tensor, Tensor] | None:
        """The same for their inputs, float32 [E] twice, the reciprocals of their global scales; None if dynamic.

        Gates and ups have the same input, so the larger of their two counts, under which nothing saturates.
        """
        if self.w13_input is None or self.w2_input is None:
            return None
        return self._multiplying(self.w13_input).amax(1), self._multiplying(self.w2_input)

    def input_global_scales(self) -> tuple[Tensor, Tensor] | None:
        """What the inputs are multiplied by where they are quantized: float32 [E] twice; None if dynamic."""
        if self.w13_input is None or self.w2_input is None:
            return None
        w13, w2 = (self.w13_input.amin(1), self.w2_input) if self.divide else self._reciprocals()
        return w13, w2

    @exact
    def operator_arguments(self) -> dict[str, Tensor]:
        """What the layer's operator (csrc/moe/operators.cpp) takes; nothing of inputs whose rows have their own."""
        w13, w2 = self.factors()
        made = {
            "w13_factors": w13.expand(-1, 2).contiguous(),
            "w2_factors": w2.unsqueeze(1).expand(-1, 2).contiguous(),
        }
        factors, global_scales = self.input_factors(), self.input_global_scales()
        if factors is not None and global_scales is not None:
            made |= dict(zip(INPUT_ARGUMENTS, (*factors, *global_scales), strict=True))
        return {name: scale.contiguous() for name, scale in made.items()}

    def _reciprocals(self) -> tuple[Tensor, Tensor]:
        assert self.w13_input is not None
        assert self.w2_input is not None
        return self.w13_input.amax(1).reciprocal(), self.w2_input.reciprocal()

    def _multiplying(self, scales: Tensor) -> Tensor:
        return scales.reciprocal() if self.divide else scales


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorScales(TensorScales):
    """Scales that were made of `TensorScales.operator_arguments` again: all that is computed with has the same bits.

    They multiply, but those of inputs may have divided, and then what divides is not the reciprocal of what multiplies.

    Attributes:
        w13_input_global, w2_input_global: float32 [E], what `input_global_scales` gives; None if dynamic.
    """

    w13_input_global: Tensor | None = None
    w2_input_global: Tensor | None = None

    def _multiplies(self, name: str) -> bool:
        return True

    def input_global_scales(self) -> tuple[Tensor, Tensor] | None:
        """As they were given."""
        if self.w13_input_global is None or self.w2_input_global is None:
            return None
        return self.w13_input_global, self.w2_input_global


@exact
def of_operator_arguments(
    given: dict[str, Tensor | None], *, experts: int, gated: bool, unit: float = 1.0
) -> OperatorScales:
    """The scales of which `TensorScales.operator_arguments` made these.

    Args:
        given: by its names, each of them; None for what is not there.
        unit: a power of two by which the weights' factors were multiplied.

    Raises:
        TypeError, ValueError: another dtype or shape; no factors of weights; of the inputs' four, some and not all.
    """
    dynamic = all(given[name] is None for name in INPUT_ARGUMENTS)
    named: dict[str, Any] = {name: given[name] for name in (*WEIGHT_ARGUMENTS, *(() if dynamic else INPUT_ARGUMENTS))}
    for name, value in named.items():
        require_tensor(name, value, torch.float32, (experts, 2) if name in WEIGHT_ARGUMENTS else (experts,))
    parts = 2 if gated else 1
    made = {"w13": (named["w13_factors"] / unit)[:, :parts], "w2": (named["w2_factors"] / unit)[:, 0]}
    if not dynamic:
        made |= {"w13_input": named["w13_input_factors"].unsqueeze(1).expand(-1, parts)}
        made |= {"w2_input": named["w2_input_factors"]}
        made |= {f"{name}_input_global": named[f"{name}_input_global_scales"] for name in ("w13", "w2")}
    return OperatorScales(**made)


def tensor_scales(
    given: dict[str, Tensor | None], *, divide: bool, experts: int, gated: bool, device: torch.device
) -> TensorScales:
    """Scales as a caller gives them, checked.

    Args:
        given: by `NAMES`: float32, [] for all experts, [E] for each, and for w13 of a gated activation [E, 2] for gate
            and up of each.

    Raises:
        TypeError, ValueError: another dtype, shape or device; scales of one weight alone, or of one input alone; a
            scale that is not finite and above 0, or whose reciprocal is not finite. A scale of weights that multiplies
            may be 0, and as small as it likes.
    """
    labels = dict(zip(NAMES, DIVIDE if divide else MULTIPLY, strict=True))
    for one, other in (("w13", "w2"), ("w2", "w13"), ("w13_input", "w2_input"), ("w2_input", "w13_input")):
        if given[one] is None and (given[other] is not None or one == "w13"):
            beside = f", since {labels[other]} is given" if given[other] is not None else ""
            raise ValueError(f"{labels[one]}: expected float32 [{experts}]{beside}, got None")
    parts = 2 if gated else 1
    made: dict[str, Tensor | None] = {}
    for name in NAMES:
        shape = (experts, parts) if name.startswith("w13") else (experts,)
        value = given[name]
        made[name] = None if value is None else _checked(labels[name], value, shape, device)
        if value is not None:
            refuse_values(labels[name], value, not divide and name in ("w13", "w2"))
    w13, w2 = made["w13"], made["w2"]
    assert w13 is not None
    assert w2 is not None
    return TensorScales(w13=w13, w2=w2, w13_input=made["w13_input"], w2_input=made["w2_input"], divide=divide)


@exact
def refuse_values(label: str, scales: Tensor, multiplies: bool) -> None:
    """Refuses scales, [] or [E, ...], under which values are not what they were; waits for a GPU's.

    Args:
        multiplies: they are of weights, and nobody takes their reciprocal.

    Raises:
        ValueError: a NaN, an infinity, a negative one; a 0, or one whose reciprocal is infinite, unless it multiplies.
    """
    if not has_values(scales):
        return
    wrong = ~(scales.isfinite() & ((scales >= 0) if multiplies else (scales > _SMALLEST)))
    if bool(wrong.any()):
        place = f" for expert {int(wrong.nonzero()[0, 0])}" if scales.dim() else ""
        least = "of 0 or more" if multiplies else "above 2^-128, of which float32 has the reciprocals"
        raise ValueError(f"{label}: expected finite numbers {least}, got {scales[wrong][0]:g}{place}")


def _checked(label: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A copy in the shape, from one scale for all, one for each expert, or one for each of its parts."""
    require_tensor(label, value, torch.float32, None, device)
    if tuple(value.shape) not in ((), (1,), shape[:1], shape):
        each = f"{list(shape[:1])} or {list(shape)}" if len(shape) > 1 else f"or {list(shape)}"
        raise ValueError(f"{label}: expected float32 []{',' if len(shape) > 1 else ''} {each}, got {describe(value)}")
    if value.dim() == 1 and len(shape) == 2:
        value = value.unsqueeze(1)
    return value.expand(shape).clone(memory_format=torch.contiguous_format)


def from_float_scales(amax13: Tensor, amax2: Tensor) -> TensorScales:
    """Of weights that are quantized here, as ModelOpt makes them: amax / 2688, at least 2^-126; 1 where all is 0.

    Args:
        amax13: float32 [E, P].
        amax2: float32 [E].
    """
    w13, w2 = ((amax / NVFP4_MAX).clamp(min=2.0**-126).masked_fill(amax == 0, 1.0) for amax in (amax13, amax2))
    return TensorScales(w13=w13, w2=w2)
