"""The two numbers that bound a layer's time from below: weight bytes that must be read, and multiplications to do.

Bytes are those of the experts that are hit, as MXFP4 stores them: half a byte for each weight and one scale byte for
each 32. An implementation that pads weights reads more; it is measured against the same number. Activations are left
out: at 4096 tokens they are a tenth of the weights, below that nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tiles import MXFP4_MXFP8
from ..tiles import expert_bytes as _matrix_bytes
from .shapes import MoEShape


def expected_active_experts(shape: MoEShape, tokens: int) -> float:
    """Mean number of experts that get a row, when each token picks top_k different experts uniformly."""
    if tokens < 0:
        raise ValueError(f"tokens: expected at least 0, got {tokens}")
    idle: float = (1.0 - shape.top_k / shape.experts) ** tokens
    return shape.experts * (1.0 - idle)


def expert_bytes(shape: MoEShape) -> int:
    """Bytes of one expert's weights and scales, both GEMMs, without biases."""
    hidden, intermediate = shape.hidden, shape.intermediate
    return _matrix_bytes(MXFP4_MXFP8, 2 * intermediate, hidden) + _matrix_bytes(MXFP4_MXFP8, hidden, intermediate)


def weight_bytes(shape: MoEShape, active_experts: float) -> float:
    """Bytes of the weights that `active_experts` experts make a layer read."""
    return active_experts * expert_bytes(shape)


def flops(shape: MoEShape, tokens: int) -> int:
    """Floating-point operations of both GEMMs: two for each weight and row."""
    return 2 * 3 * shape.hidden * shape.intermediate * tokens * shape.top_k


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Microseconds below which a layer cannot be: the larger of both."""

    memory_us: float
    math_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.math_us)

    @property
    def bound_by(self) -> str:
        return "memory" if self.memory_us >= self.math_us else "math"


def floor(bytes_read: float, operations: float, *, gb_per_s: float, tflops: float) -> Floor:
    """The floor of `bytes_read` bytes and `operations` flops on a GPU of these rates (10^9 bytes, 10^12 flops)."""
    if gb_per_s <= 0 or tflops <= 0:
        raise ValueError(f"expected rates above 0, got gb_per_s={gb_per_s}, tflops={tflops}")
    return Floor(memory_us=bytes_read / gb_per_s / 1e3, math_us=operations / tflops / 1e6)
