"""The library's mathematics in plain torch: the CPU implementation, and the oracle that the kernels are compared with.

One call flows through `route` -> `as_rows` -> `grouped_gemm` -> `activate` -> `as_rows` -> `grouped_gemm` ->
`finalize`; `fused_moe` is that chain, or, of NVFP4 weights and of FP4 activations, `fp4.fused_moe`. All of it runs on
CPU and CUDA tensors. `topk_softmax` is the router in front of it.

Routing, quantization and the two GEMMs are what the kernels do bit for bit, the GEMMs under the arithmetic of their
architecture: `arithmetic.of_arch`. Who names none gets SM12x's of MXFP8 and FP4 activations, and SM90's of bfloat16, as
CPU tensors do. `activate` and the softmax evaluate the same float32 formulas with torch's exp instead of the kernel's,
so they agree closely, not bitwise.

Words: T tokens, k experts per token, E experts, H hidden size, I intermediate size. A slot is one (token, choice)
pair, number t*k+j; a row is one slot's place in the activations sorted by expert; R = T*k.
"""

from .activation import activate
from .call import fused_moe
from .chain import (
    ACTIVATION_FORMATS,
    MXFP8_INPUT_SCALE_MAX,
    ROW_DTYPES,
    SCALE_LAYOUTS,
    as_rows,
    default_output_dtype,
    finalize,
    layer,
    m_tiles,
    mxfp8_rows,
    route,
    topk_softmax,
)
from .gemm import grouped_gemm

__all__ = [
    "ACTIVATION_FORMATS",
    "MXFP8_INPUT_SCALE_MAX",
    "ROW_DTYPES",
    "SCALE_LAYOUTS",
    "activate",
    "as_rows",
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
