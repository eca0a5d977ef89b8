"""What stands between the GEMMs, in float32: the formulas of `Activation`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._arguments import require_tensor
from .._checkpoints.options import check_number
from .._torch_state import exact
from ..activations import Activation

_IDS = (torch.int32, torch.int64)
_HALVES = (torch.bfloat16, torch.float16)


@exact
def activate(
    gemm1: Tensor,
    row_expert: Tensor,
    w13_bias: Tensor | None,
    activation: Activation | str,
    alpha: float | Tensor = 1.702,
    beta: float | Tensor = 1.0,
    limit: float | Tensor | None = 7.0,
    *,
    rounding: torch.dtype | None = None,
) -> Tensor:
    """What stands between the GEMMs, in float32; the formulas are those of `Activation`. NaN stays NaN.

    Args:
        gemm1: float32 [R, 2I] in prepared row order: groups of 16 columns = 8 gates, then their 8 ups. [R, I] when the
            activation is not gated.
        row_expert: int32 or int64 [R], the expert of each row, 0 <= expert < E.
        w13_bias: float32 [E, 2I] or [E, I] in the same order, or None.
        activation: its name.
        alpha, beta: numbers of swiglu_oai, beta of situ too; or float32 [E] with one for each expert. Others ignore
            them.
        limit: the same for swiglu_oai, swiglu_step, situ and clamped_relu2; None clamps nothing.
        rounding: bfloat16 or float16: gemm1, before the bias, and the result are rounded to it (to nearest, ties to
            even; beyond float16's range to infinity). None rounds neither.

    Returns:
        float32 [R, I].
    """
    try:
        kind = Activation(activation)
    except ValueError:
        names = ", ".join(repr(a.value) for a in Activation)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}") from None
    width = "2I" if kind.is_gated else "I"
    require_tensor("gemm1", gemm1, torch.float32, ("R", width))
    rows, columns = gemm1.shape
    if kind.is_gated and columns % 16:
        raise ValueError(f"gemm1: expected 2I a multiple of 16, got float32 {[rows, columns]}")
    require_tensor("row_expert", row_expert, _IDS, (rows,), gemm1.device)
    if rounding is not None and rounding not in _HALVES:
        raise TypeError(f"rounding: expected torch.bfloat16, torch.float16 or None, got {rounding}")

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(torch.float32)

    for name, number in (("alpha", alpha), ("beta", beta), ("limit", limit)):
        if number is not None:
            check_number(name, number, "E", gemm1.device)
    gemm1 = rounded(gemm1)
    if w13_bias is not None:
        require_tensor("w13_bias", w13_bias, torch.float32, ("E", columns), gemm1.device)
        gemm1 = gemm1 + w13_bias[row_expert]

    def per_row(number: float | Tensor) -> float | Tensor:
        return number[row_expert].unsqueeze(1) if isinstance(number, Tensor) else number

    bound = per_row(math.inf if limit is None else limit)
    if kind is Activation.CLAMPED_RELU2:
        positive = _soft(_relu(gemm1), bound)
        return rounded(positive * positive)
    if not kind.is_gated:
        return rounded(_NOT_GATED[kind](gemm1))

    gate, up = (half.flatten(-2) for half in torch.unflatten(gemm1, -1, (columns // 16, 2, 8)).unbind(-2))

    def clamp_above(x: Tensor) -> Tensor:
        return torch.where(x > bound, bound, x)

    def clamp_both(x: Tensor) -> Tensor:
        return torch.where(x < -bound, -bound, clamp_above(x))

    if kind is Activation.SWIGLU_OAI:
        gate = clamp_above(gate)
        return rounded(gate * torch.sigmoid(per_row(alpha) * gate) * (clamp_both(up) + per_row(beta)))
    if kind is Activation.SWIGLU_STEP:
        return rounded(clamp_above(_silu(gate)) * clamp_both(up))
    if kind is Activation.SITU:
        return rounded(_soft(gate, per_row(beta)) * torch.sigmoid(gate) * _soft(up, bound))
    return rounded(_GATE[kind](gate) * up)


def _soft(x: Tensor, bound: float | Tensor) -> Tensor:
    """bound * tanh(x / bound), x where the bound is infinite; bound [R, 1] or one for all rows."""
    limits = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    return torch.where(limits.isinf(), x, limits * torch.tanh(x / limits))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: Tensor) -> Tensor:
    """x * Phi(x); 1 + erf would cancel where x is far below zero."""
    tail: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return 0.5 * x * tail


def _gelu_tanh(x: Tensor) -> Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), by 1 + tanh(y) = 2 sigmoid(2y), which does not cancel."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def _relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0.0, x)


def _relu2(x: Tensor) -> Tensor:
    return _relu(x) * _relu(x)


def _identity(x: Tensor) -> Tensor:
    return x


_GATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SWIGLU: _silu,
    Activation.GEGLU: _gelu,
    Activation.GEGLU_TANH: _gelu_tanh,
}
_NOT_GATED: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: _silu,
    Activation.GELU: _gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.RELU: _relu,
    Activation.RELU2: _relu2,
    Activation.IDENTITY: _identity,
}
