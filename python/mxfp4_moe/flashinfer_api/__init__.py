"""FlashInfer's names for what this library does: change the import, and keep the calls.

Names, order and meaning of arguments and the shapes of results are those of FlashInfer 0.7.2.post1; a test compares the
signatures with the published package's. These of its modes are here: MXFP8 activations x MXFP4 weights
(``use_mxfp8_act_scaling=True``, weights as int64 views), FP8 activations x MXFP4 weights, bfloat16 activations x MXFP4
weights (``use_w4_group_scaling=True``, weights from `interleave_moe_weights_for_sm90_mixed_gemm` and scales from
`interleave_moe_scales_for_sm90_mixed_gemm`), and NVFP4 x NVFP4 for CPU tensors; an argument that asks for another
raises NotImplementedError with its name. Beyond FlashInfer, bfloat16 and float16 input is taken with weights as int64
views too and quantized on the way, hidden and intermediate sizes need only be multiples of 32 (of bfloat16 x MXFP4 and
of NVFP4 128), bfloat16 x MXFP4 is not for SM90 alone, and all of it runs on CPU tensors. Where results differ on
purpose: `quantizers`, `nvfp4`, and `cutlass_fused_moe`.

FlashInfer passes raw weights with every call; here they are prepared by the first call and kept as long as the tensors
that they came from live, see `cutlass_fused_moe`, and `set_raw_weights` for the memory of the raw ones.

Names of the SM120 fork that these tiles come from are here too: `SM120_SUPPORTED_TILE_MN`, `select_tile_mn_for_sm120`,
`get_cutlass_fused_moe_module` with a tile, `prewarm_moe_tiles`.
"""

from typing import Any

from .._call import modules as _modules
from .._call.modules import prewarm_moe_tiles
from ..tiles import select_tile_mn_for_sm120
from .activation_type import ActivationType
from .call import cutlass_fused_moe
from .mixed_gemm import interleave_moe_scales_for_sm90_mixed_gemm, interleave_moe_weights_for_sm90_mixed_gemm
from .modules import CutlassFusedMoEModule, get_cutlass_fused_moe_module
from .nvfp4 import nvfp4_quantize
from .quantizers import (
    fp4_quantize,
    mxfp4_dequantize,
    mxfp4_dequantize_host,
    mxfp4_quantize,
    mxfp8_dequantize_host,
    mxfp8_quantize,
)
from .scale_layouts import SfLayout, block_scale_interleave, nvfp4_block_scale_interleave
from .weight_cache import forget_weights, set_raw_weights
from .workspace import cutlass_fused_moe_workspace_size

SM120_SUPPORTED_TILE_MN: tuple[tuple[int, int], ...]

__all__ = [
    "SM120_SUPPORTED_TILE_MN",
    "ActivationType",
    "CutlassFusedMoEModule",
    "SfLayout",
    "block_scale_interleave",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "forget_weights",
    "fp4_quantize",
    "get_cutlass_fused_moe_module",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "mxfp4_dequantize",
    "mxfp4_dequantize_host",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
    "nvfp4_block_scale_interleave",
    "nvfp4_quantize",
    "prewarm_moe_tiles",
    "select_tile_mn_for_sm120",
    "set_raw_weights",
]


def __getattr__(name: str) -> Any:
    if name == "SM120_SUPPORTED_TILE_MN":  # read from the wheel's manifest when it is asked for
        return _modules.SM120_SUPPORTED_TILE_MN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
