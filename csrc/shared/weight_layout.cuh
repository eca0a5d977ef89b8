// Where a weight and its scale live: blocks of 64 rows by one K tile of 128, each contiguous, scales included, so that
// a stage's weights arrive in one copy of whole DRAM bursts and lie in shared memory as the MMA's lanes read them.
//
// One expert [n, k]: for every K tile, the blocks of all rows (n padded to 64). One block:
//   256 bytes      scales of MXFP4: E8M0 word of row r (four blocks of 32 k, the padding ones 0) at
//                  r / 32 * 128 + r % 8 * 16 + scale_position(r / 8 % 4) * 4
//   or 512         of NVFP4: the same twice, E4M3 words of four blocks of 16 k each, of k = 0 .. 63 and 64 .. 127
//   1024 per step  of K = 32 (a last K tile may have fewer than four): the 32-bit word of row r and k = 8t .. 8t + 7 at
//                  r / 32 * 512 + (r % 8 * 4 + t) * 16 + r / 8 % 4 * 4
// so that lane 4g + t of a warp gets row g of four groups of 8 rows in one 16-byte load. Inside a word the eight codes
// are ordered for the instructions that expand them: containers for SM12x's block-scaled MMA (tile/sm12x/mma.cuh),
// pairs for bf16 MMAs (tile/bf16/operands.cuh); or, for MMAs of FP4 alone, plainly. formats/weight_layout.py mirrors
// this file.
#pragma once

#include <stdint.h>

#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

constexpr int kWeightBlockRows = 64;
constexpr int kWeightStepBytes = kWeightBlockRows * 16;     // packed E2M1 of K = 32
constexpr int kWeightScaleSetBytes = kWeightBlockRows * 4;  // one word per row
constexpr int kWeightUnit = 256;                            // bytes; everything here is a multiple

// Scale words of a row in a K tile.
constexpr int kMxfp4ScaleWords = 1, kNvfp4ScaleWords = 2;

MXFP4_MOE_HOST_DEVICE constexpr int weight_block_scale_bytes(int scale_words) {
  return scale_words * kWeightScaleSetBytes;
}
MXFP4_MOE_HOST_DEVICE constexpr int weight_block_bytes(int scale_words) {
  return weight_block_scale_bytes(scale_words) + 4 * kWeightStepBytes;
}

// K steps of 32 in K tile k_tile.
MXFP4_MOE_HOST_DEVICE constexpr int weight_steps(int k_tile, int k) {
  return k - k_tile * 128 >= 128 ? 4 : (k - k_tile * 128) / 32;
}

MXFP4_MOE_HOST_DEVICE constexpr int64_t weight_row_blocks(int64_t n) {
  return (n + kWeightBlockRows - 1) / kWeightBlockRows;
}

// Bytes of one expert.
MXFP4_MOE_HOST_DEVICE constexpr int64_t weight_bytes(int64_t n, int64_t k, int scale_words) {
  return weight_row_blocks(n) * (scale_k_tiles(k) * weight_block_scale_bytes(scale_words) + k / 32 * kWeightStepBytes);
}

// First byte of the block of rows [64 * row_block, +64) and K tile k_tile.
MXFP4_MOE_HOST_DEVICE constexpr int64_t weight_block_offset(int64_t row_block, int k_tile, int64_t n, int k,
                                                            int scale_words) {
  const int64_t block_bytes = weight_block_scale_bytes(scale_words) + weight_steps(k_tile, k) * kWeightStepBytes;
  return k_tile * weight_row_blocks(n) * weight_block_bytes(scale_words) + row_block * block_bytes;
}

// Inside a block: the first scale word of a row. Groups of 8 rows stand 0, 2, 1, 3: the even ones, whose words SM12x
// reads from even lanes, side by side, and the odd ones.
MXFP4_MOE_HOST_DEVICE constexpr int weight_scale_position(int group) { return group % 2 * 2 + group / 2; }
MXFP4_MOE_HOST_DEVICE constexpr int weight_scale_word_in_block(int row) {
  return row / 32 * 128 + row % 8 * 16 + weight_scale_position(row / 8 % 4) * 4;
}

// Inside a block: the word of a row and k = 32 * step + 8 * t .. + 7.
MXFP4_MOE_HOST_DEVICE constexpr int weight_word_in_block(int row, int step, int t, int scale_words) {
  return weight_block_scale_bytes(scale_words) + step * kWeightStepBytes + row / 32 * 512 + (row % 8 * 4 + t) * 16 +
         row / 8 % 4 * 4;
}

}  // namespace mxfp4_moe
