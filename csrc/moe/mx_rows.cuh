// MXFP8 rows written by warps (the arithmetic: shared/mxfp8.cuh), and where their bytes go.
//
// A quad of lanes holds one block of 32 values, lane q the values k = 8q .. 8q+7. Lanes of a half-warp hold the four
// blocks of one K tile of 128 values, so that their scale bytes leave as one 32-bit word.
// Codes are stored even k first (16 even, then 16 odd of each block): the order the tile kernel's ldmatrix wants. Or,
// for kernels that want them so, rows are folded into bf16 (shared/folded.cuh). Used by quantize_permute.cu, permute.cu
// and activation.cu.
#pragma once

#include "moe/kernels.h"
#include "moe/warps.cuh"
#include "shared/folded.cuh"
#include "shared/launch.cuh"
#include "shared/mxfp8.cuh"
#include "shared/scale_layout.cuh"

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

// A half-warp's K tile of a row, as each lane stores its part: made once, stored in as many rows as want it.
struct KTile {
  uint4 words;      // 8 folded values; or in x and y 4 even-k and 4 odd-k codes
  uint32_t scales;  // of the four blocks
  bool is_far;      // folded, of this lane's block
};

// Word i of lane p becomes word p of lane i, in each quad. All 32 lanes call it.
__device__ __forceinline__ uint4 transpose_in_quad(const uint4& x) {
  const bool odd = threadIdx.x % 2 != 0, high = threadIdx.x % 4 >= 2;
  const uint32_t a = __shfl_xor_sync(kAllLanes, odd ? x.x : x.y, 1), b = __shfl_xor_sync(kAllLanes, odd ? x.z : x.w, 1);
  const uint4 pairs = odd ? make_uint4(a, x.y, b, x.w) : make_uint4(x.x, a, x.z, b);
  const uint32_t c = __shfl_xor_sync(kAllLanes, high ? pairs.x : pairs.z, 2);
  const uint32_t d = __shfl_xor_sync(kAllLanes, high ? pairs.y : pairs.w, 2);
  return high ? make_uint4(c, d, pairs.z, pairs.w) : make_uint4(pairs.x, pairs.y, c, d);
}

// Lanes whose block lies past the row hold zeros and contribute the zero scale byte that pads the word. All 32 lanes
// call it.
__device__ __forceinline__ KTile make_k_tile(const QuadCodes& quad, bool folds) {
  KTile tile;
  tile.words = make_uint4(quad.even, quad.odd, 0, 0);
  tile.is_far = false;
  if (folds) {
    const float scale = folded_scale(quad.scale);
    const auto fold = [scale](uint32_t pair) { return fold_pair(pair, scale, scale); };  // of k = 0 2, 4 6, 1 3, 5 7:
    tile.words = make_uint4(fold(quad.even), fold(quad.even >> 16), fold(quad.odd), fold(quad.odd >> 16));
    tile.words = transpose_in_quad(tile.words);
    tile.is_far = is_far(quad.scale) && ((quad.even | quad.odd) & 0x7f7f7f7f) != 0;
  }
  uint32_t word = quad.scale << (8 * (threadIdx.x % kLanesPerWord / kLanesPerBlock));
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  tile.scales = word | __shfl_xor_sync(kAllLanes, word, 8);
  return tile;
}

// Writes a K tile to a row, its scale word included; what lies past the row is not stored.
__device__ __forceinline__ void store_k_tile(const KTile& tile, int64_t row, int k_tile, const RowsOut& to) {
  const int lane = threadIdx.x % kLanesPerWord, part = lane % kLanesPerBlock;
  const int k_block = k_tile * kBlocksPerWord + lane / kLanesPerBlock;
  if (k_block < to.k / kScaleBlock) {
    const int64_t first = row * to.k + k_block * kScaleBlock;
    if (to.has_far == nullptr) {
      uint8_t* codes = to.codes + first;
      *reinterpret_cast<uint32_t*>(codes + part * 4) = tile.words.x;
      *reinterpret_cast<uint32_t*>(codes + kScaleBlock / 2 + part * 4) = tile.words.y;
    } else {
      reinterpret_cast<uint4*>(to.codes + first * 2)[part] = tile.words;
      if (tile.is_far) {
        *to.has_far = 1;
      }
    }
  }
  if (lane == 0 && k_tile < scale_k_tiles(to.k)) {
    *reinterpret_cast<uint32_t*>(to.scales + act_scale_offset(row, k_tile * kBlocksPerWord, to.rows)) = tile.scales;
  }
}

}  // namespace mxfp4_moe
