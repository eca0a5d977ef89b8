"""Two small Triton kernels for rivals whose libraries leave a step of the layer to someone else.

Imported only where Triton is; the rivals that need them need Triton anyway, or come with vLLM, which brings it.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _weighted_sum_kernel(rows, weights, out, columns, stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + choice
        row = tl.load(rows + slot * stride + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + slot) * row
    tl.store(out + token.to(tl.int64) * columns + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _swiglu_oai_kernel(pairs, out, columns, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = pairs + row * 2 * columns + 2 * column
    gate = tl.minimum(tl.load(at, mask=inside, other=0.0).to(tl.float32), LIMIT)
    up = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    up = tl.maximum(tl.minimum(up, LIMIT), -LIMIT)
    result = gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=inside)


def weighted_sum(rows: Tensor, topk_weights: Tensor, out: Tensor) -> None:
    """out [T, H] = sum over k of topk_weights [T, k] * rows [T * k, at least H], in float32."""
    tokens, columns = out.shape
    grid = (tokens, triton.cdiv(columns, _BLOCK))
    _weighted_sum_kernel[grid](rows, topk_weights, out, columns, rows.stride(0), topk_weights.shape[1], _BLOCK)


def swiglu_oai(pairs: Tensor, out: Tensor) -> None:
    """out [R, I] from pairs [R, 2I] with gate and up side by side; alpha 1.702, limit 7 (gpt-oss)."""
    rows, columns = out.shape
    _swiglu_oai_kernel[(rows, triton.cdiv(columns, _BLOCK))](pairs, out, columns, 1.702, 7.0, _BLOCK)
