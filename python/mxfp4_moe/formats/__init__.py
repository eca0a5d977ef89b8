"""Number formats and memory layouts of MXFP4 weights and MXFP8 activations.

Everything here is plain vectorised torch and runs on any device. The quantizers and layouts are the oracle for the
CUDA code.

Bytes travel as uint8: the float8/float4 dtypes of torch differ from version to version, bytes do not.
"""

from .numbers import (
    BLOCK,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_NAN,
    E8M0_MAX,
    E8M0_ONE,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    dequantize_mxfp4,
    dequantize_mxfp8,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    mxfp8_to_bf16,
    quantize_mxfp4,
    quantize_mxfp8,
)
from .row_layouts import (
    deinterleave_k,
    interleave_k,
    pack_row_scales,
    swizzle_scales,
    unpack_row_scales,
    unswizzle_scales,
)
from .weight_layout import (
    WEIGHT_BLOCK_ROWS,
    WordOrder,
    arrange_weights,
    pack_words,
    read_rows,
    reorder_words,
    restore_weights,
    unpack_words,
    weight_bytes,
    word_order_of,
    write_rows,
)

__all__ = [
    "BLOCK",
    "E2M1_VALUES",
    "E4M3_MAX",
    "E4M3_NAN",
    "E8M0_MAX",
    "E8M0_ONE",
    "WEIGHT_BLOCK_ROWS",
    "WordOrder",
    "arrange_weights",
    "decode_e2m1",
    "decode_e4m3",
    "decode_e8m0",
    "deinterleave_k",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "encode_e2m1",
    "encode_e4m3",
    "encode_e8m0",
    "interleave_k",
    "mxfp8_to_bf16",
    "pack_row_scales",
    "pack_words",
    "quantize_mxfp4",
    "quantize_mxfp8",
    "read_rows",
    "reorder_words",
    "restore_weights",
    "swizzle_scales",
    "unpack_row_scales",
    "unpack_words",
    "unswizzle_scales",
    "weight_bytes",
    "word_order_of",
    "write_rows",
]
