// MXFP8 rows written by warps (the arithmetic: tile/mxfp8.cuh), and where their bytes go.
//
// A quad of lanes holds one block of 32 values, lane q the values k = 8q .. 8q+7. Lanes of a half-warp hold the four
// blocks of one K tile of 128 values, so that their scale bytes leave as one 32-bit word.
// Codes are stored even k first (16 even, then 16 odd of each block): the order the tile kernel's ldmatrix wants. Or,
// for kernels that want them so, rows are folded into bf16 (tile/folded.cuh). Used by quantize.cu and activation.cu.
#pragma once

#include "../tile/folded.cuh"
#include "../tile/mxfp8.cuh"
#include "../tile/scale_layout.cuh"
#include "launch.cuh"
#include "moe.h"

namespace mxfp4_moe {

constexpr int kLanesPerBlock = 4;  // a quad
constexpr int kValuesPerLane = kScaleBlock / kLanesPerBlock;
constexpr int kBlocksPerWord = 4;
constexpr int kLanesPerWord = kLanesPerBlock * kBlocksPerWord;  // a half-warp: one K tile of one row

struct QuadCodes {
  uint32_t even, odd;  // this lane's 4 even-k and 4 odd-k codes
  uint32_t scale;      // the block's E8M0 byte, the same in all four lanes
};

// Quantizes the block that this lane's quad holds. All 32 lanes of the warp must call it.
__device__ __forceinline__ QuadCodes quantize_quad(const float (&x)[kValuesPerLane]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    amax = max(amax, magnitude(x[i]));
  }
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 1));
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 2));
  const uint32_t scale = mx_scale(amax);
  return QuadCodes{mx_codes(amax, scale, x[0], x[2], x[4], x[6]), mx_codes(amax, scale, x[1], x[3], x[5], x[7]), scale};
}

// Where rows go: codes or folded values [rows, k], and scales. `has_far` is of folded rows, else null.
struct RowsOut {
  uint8_t* codes;
  uint8_t* scales;
  int32_t* has_far;
  int64_t rows;
  int k;
};

// One block of a row, of which this lane has an eighth of its quad's: even k first, in two words.
__device__ __forceinline__ void store_codes(const QuadCodes& quad, uint8_t* codes, int part) {
  *reinterpret_cast<uint32_t*>(codes + part * 4) = quad.even;
  *reinterpret_cast<uint32_t*>(codes + kScaleBlock / 2 + part * 4) = quad.odd;
}

// The same folded: four words, 16 bytes apart.
__device__ __forceinline__ void store_folded(const QuadCodes& quad, uint8_t* folded, int part, int32_t* has_far) {
  const float scale = folded_scale(quad.scale);
  const uint32_t pairs[4] = {quad.even, quad.even >> 16, quad.odd, quad.odd >> 16};  // k = 0 2, 4 6, 1 3, 5 7
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<uint32_t*>(folded)[i * 4 + part] = fold_pair(pairs[i], scale, scale);
  }
  if (is_far(quad.scale) && ((quad.even | quad.odd) & 0x7f7f7f7f) != 0) {
    *has_far = 1;
  }
}

// Writes a half-warp's K tile of one row, its scale word included. Lanes whose block lies past the row hold zeros,
// store no values and contribute the zero scale byte that pads the word. All 32 lanes call it; a half-warp whose K tile
// lies past the row stores nothing.
__device__ __forceinline__ void store_k_tile(const QuadCodes& quad, int64_t row, int k_tile, const RowsOut& to) {
  const int lane = threadIdx.x % kLanesPerWord;
  const int block_in_word = lane / kLanesPerBlock;
  const int k_block = k_tile * kBlocksPerWord + block_in_word;
  if (k_block < to.k / kScaleBlock) {
    const int64_t first = row * to.k + k_block * kScaleBlock;
    if (to.has_far == nullptr) {
      store_codes(quad, to.codes + first, lane % kLanesPerBlock);
    } else {
      store_folded(quad, to.codes + first * 2, lane % kLanesPerBlock, to.has_far);
    }
  }
  uint32_t word = quad.scale << (8 * block_in_word);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  word |= __shfl_xor_sync(kAllLanes, word, 8);
  if (lane == 0 && k_tile < scale_k_tiles(to.k)) {
    *reinterpret_cast<uint32_t*>(to.scales + act_scale_offset(row, k_tile * kBlocksPerWord, to.rows)) = word;
  }
}

}  // namespace mxfp4_moe
