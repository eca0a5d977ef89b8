"""FlashInfer's names for what this library does: change the import, and keep the calls.

Names, order and meaning of arguments and the shapes of results are FlashInfer's (0.7.2). One of its modes is here,
MXFP8 activations x MXFP4 weights (``use_mxfp8_act_scaling=True``, weights as int64 views); an argument that asks for
another raises NotImplementedError with its name. Beyond FlashInfer, bfloat16 and float16 input is taken too and
quantized on the way, hidden and intermediate sizes need only be multiples of 32, and all of it runs on CPU tensors.

FlashInfer passes raw weights with every call; here they are prepared by the first call and kept as long as the tensors
that they came from live, see `cutlass_fused_moe`. Code that can hold a `MoEWeights` saves the second copy: make it with
`MoEWeights.from_flashinfer`, free the raw tensors, and call `mxfp4_moe.fused_moe`.
"""

from .call import ActivationType, cutlass_fused_moe, cutlass_fused_moe_workspace_size
from .quantizers import (
    SfLayout,
    block_scale_interleave,
    mxfp4_dequantize,
    mxfp4_quantize,
    mxfp8_dequantize_host,
    mxfp8_quantize,
)
from .weight_cache import forget_weights

__all__ = [
    "ActivationType",
    "SfLayout",
    "block_scale_interleave",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "forget_weights",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
]
