"""The library's mathematics in plain torch: the CPU implementation, and the oracle that the kernels are compared with.

One call flows through `route` -> `quantize_mxfp8` -> `grouped_gemm` -> `activate` -> `quantize_mxfp8` ->
`grouped_gemm` -> `finalize`; `fused_moe` is that chain. All of it runs on CPU and CUDA tensors. `topk_softmax` is the
router in front of it.

Routing, quantization and the two GEMMs are what the kernels do bit for bit, the GEMMs under the arithmetic of their
architecture: `arithmetic.of_arch`. Who names none gets the fp32 chain, as CPU tensors do. `activate` and the softmax
evaluate the same float32 formulas with torch's exp instead of the kernel's, so they agree closely, not bitwise.

Words: T tokens, k experts per token, E experts, H hidden size, I intermediate size. A slot is one (token, choice)
pair, number t*k+j; a row is one slot's place in the activations sorted by expert; R = T*k.
"""

from .activation import activate
from .chain import (
    MXFP8_INPUT_SCALE_MAX,
    ROW_DTYPES,
    SCALE_LAYOUTS,
    default_output_dtype,
    finalize,
    fused_moe,
    layer,
    m_tiles,
    mxfp8_rows,
    route,
    topk_softmax,
)
from .gemm import grouped_gemm

__all__ = [
    "MXFP8_INPUT_SCALE_MAX",
    "ROW_DTYPES",
    "SCALE_LAYOUTS",
    "activate",
    "default_output_dtype",
    "finalize",
    "fused_moe",
    "grouped_gemm",
    "layer",
    "m_tiles",
    "mxfp8_rows",
    "route",
    "topk_softmax",
]
