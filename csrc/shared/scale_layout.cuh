// Where a block scale of activations lives: the one definition used by kernel, launcher, quantizers and tests.
//
// Rows start anywhere, so the scales are words, row after row per K tile: [ceil(K/128), rows padded to 4, 4]. The
// ecosystem's 128x4 layout (one 512-byte block per 128 rows and 4 K blocks; a row's four scales of a K tile are one
// 32-bit word) is how MXFP8 hidden states may come. Offsets, allocations and layouts all use the padded sizes. Weights'
// scales: weight_layout.cuh. formats/row_layouts.py mirrors this file; tests compare it with CuTe's
// tile_atom_to_shape_SFA/SFB.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define MXFP4_MOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MXFP4_MOE_HOST_DEVICE inline
#endif

namespace mxfp4_moe {

// K tiles of 128 values that hold k values.
MXFP4_MOE_HOST_DEVICE constexpr int64_t scale_k_tiles(int64_t k) { return (k + 127) / 128; }

// Bytes of n rows' swizzled scales, padded to whole 128x4 blocks.
MXFP4_MOE_HOST_DEVICE constexpr int64_t swizzled_scale_bytes(int64_t n, int64_t k) {
  return (n + 127) / 128 * scale_k_tiles(k) * 512;
}

// First byte of the 512-byte block that holds rows [128*row_block, +128) and K tile k_tile.
MXFP4_MOE_HOST_DEVICE constexpr int64_t swizzled_scale_block_offset(int64_t row_block, int64_t k_tile, int64_t k) {
  return (row_block * scale_k_tiles(k) + k_tile) * 512;
}

// Byte offset, inside its 512-byte block, of the word of one of the block's 128 rows.
MXFP4_MOE_HOST_DEVICE constexpr int swizzled_scale_word_offset(int row_in_block) {
  return (row_in_block % 32) * 16 + (row_in_block / 32) * 4;
}

// Byte offset of the scale of (row, k_block); k_block counts 32 values.
MXFP4_MOE_HOST_DEVICE constexpr int64_t swizzled_scale_offset(int64_t row, int64_t k_block, int64_t k) {
  return swizzled_scale_block_offset(row / 128, k_block / 4, k) +
         swizzled_scale_word_offset(static_cast<int>(row % 128)) + k_block % 4;
}

// TMA strides are multiples of 16 bytes: four rows of one-word scales.
MXFP4_MOE_HOST_DEVICE constexpr int64_t act_scale_rows(int64_t rows) { return (rows + 3) / 4 * 4; }

MXFP4_MOE_HOST_DEVICE constexpr int64_t act_scale_bytes(int64_t rows, int64_t k) {
  return scale_k_tiles(k) * act_scale_rows(rows) * 4;
}

// Byte offset of the scale of (row, k_block) of the activations.
MXFP4_MOE_HOST_DEVICE constexpr int64_t act_scale_offset(int64_t row, int64_t k_block, int64_t rows) {
  return (k_block / 4 * act_scale_rows(rows) + row) * 4 + k_block % 4;
}

}  // namespace mxfp4_moe
