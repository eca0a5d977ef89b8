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

// Writes a half-warp's K tile of one row: codes and the scale word. `k` is the row's length; lanes whose block lies
// past it hold zeros, store no codes and contribute the zero scale byte that pads the word. All 32 lanes call it; a
// half-warp whose K tile lies past the row stores nothing.
__device__ __forceinline__ void store_k_tile(const QuadCodes& quad, int64_t row, int k_tile, int k, int64_t rows,
                                             uint8_t* __restrict__ codes, uint8_t* __restrict__ scales) {
  const int lane = threadIdx.x % kLanesPerWord;
  const int block_in_word = lane / kLanesPerBlock;
  const int k_block = k_tile * kBlocksPerWord + block_in_word;
  if (k_block < k / kScaleBlock) {
    uint8_t* out = codes + row * k + k_block * kScaleBlock + lane % kLanesPerBlock * 4;
    *reinterpret_cast<uint32_t*>(out) = quad.even;
    *reinterpret_cast<uint32_t*>(out + kScaleBlock / 2) = quad.odd;
  }
  uint32_t word = quad.scale << (8 * block_in_word);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  word |= __shfl_xor_sync(kAllLanes, word, 8);
  if (lane == 0 && k_tile < scale_k_tiles(k)) {
    *reinterpret_cast<uint32_t*>(scales + act_scale_offset(row, k_tile * kBlocksPerWord, rows)) = word;
  }
}

// The same of a folded row: four words of a lane, 16 bytes apart.
__device__ __forceinline__ void store_k_tile_folded(const QuadCodes& quad, int64_t row, int k_tile, int k,
                                                    uint8_t* __restrict__ folded) {
  const int lane = threadIdx.x % kLanesPerWord;
  const int k_block = k_tile * kBlocksPerWord + lane / kLanesPerBlock;
  if (k_block >= k / kScaleBlock) {
    return;
  }
  const float scale = folded_scale(quad.scale);
  const uint32_t pairs[4] = {quad.even, quad.even >> 16, quad.odd, quad.odd >> 16};  // k = 0 2, 4 6, 1 3, 5 7
  uint32_t* out = reinterpret_cast<uint32_t*>(folded) + (row * k + k_block * kScaleBlock) / 2 + lane % kLanesPerBlock;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i * 4] = fold_pair(pairs[i], scale, scale);
  }
}

}  // namespace mxfp4_moe
