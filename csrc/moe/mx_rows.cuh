// Rows for the GEMMs, written by warps, and where their bytes go: MXFP8 (the arithmetic: shared/mxfp8.cuh), bf16, fp16
// or MXFP4 (shared/fp4.cuh). NVFP4: nvfp4_rows.cuh.
//
// A quad of lanes holds one block of 32 values, lane q the values k = 8q .. 8q+7. Lanes of a half-warp hold the four
// blocks of one K tile of 128 values, so that their scale bytes leave as one 32-bit word.
// E4M3 codes are stored even k first (16 even, then 16 odd of each block): the order the tile kernel's ldmatrix wants.
// bf16 and fp16 rows (shared/bf16_rows.cuh) and E2M1 codes have k in order. Used by quantize_permute.cu, permute.cu,
// activation.cu and fp4_activation.cu.
#pragma once

#include "moe/kernels.h"
#include "moe/warps.cuh"
#include "shared/bf16_rows.cuh"
#include "shared/folded_fp4.cuh"
#include "shared/launch.cuh"
#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

constexpr int kLanesPerBlock = 4;  // a quad
constexpr int kValuesPerLane = kScaleBlock / kLanesPerBlock;
constexpr int kBlocksPerWord = 4;
constexpr int kLanesPerWord = kLanesPerBlock * kBlocksPerWord;  // a half-warp: one K tile of one row

// The largest magnitude() of this lane's values.
__device__ __forceinline__ uint32_t lane_amax(const float (&x)[kValuesPerLane]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    amax = max(amax, magnitude(x[i]));
  }
  return amax;
}

// Of the block that this lane's quad holds. All 32 lanes of the warp must call it, and what follows.
__device__ __forceinline__ uint32_t quad_amax(const float (&x)[kValuesPerLane]) {
  uint32_t amax = lane_amax(x);
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 1));
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 2));
  return amax;
}

struct QuadCodes {
  uint32_t even, odd;  // this lane's 4 even-k and 4 odd-k codes
  uint32_t scale;      // the block's E8M0 byte, the same in all four lanes
};

// Quantizes the block that this lane's quad holds.
__device__ __forceinline__ QuadCodes quantize_quad(const float (&x)[kValuesPerLane]) {
  const uint32_t amax = quad_amax(x);
  const uint32_t scale = mx_scale(amax);
  return QuadCodes{mx_codes(amax, scale, x[0], x[2], x[4], x[6]), mx_codes(amax, scale, x[1], x[3], x[5], x[7]), scale};
}

// Where rows go: codes, bf16 or fp16 [rows, k], or packed codes [rows, k / 2]; and the codes' scales.
struct RowsOut {
  RowFormat format;
  uint8_t* out;
  uint8_t* scales;
  int64_t rows;
  int k;
};

// A half-warp's K tile of a row, as each lane stores its part: made once, stored in as many rows as want it.
struct KTile {
  uint4 words;      // 8 bf16 or fp16 values; or in x and y 4 even-k and 4 odd-k codes; or in x 8 E2M1 codes
  uint32_t scales;  // of the four blocks, of kMxfp8 and kMxfp4
};

// The four scale bytes of a half-warp's K tile as one word, in all its lanes. All 32 lanes call it.
__device__ __forceinline__ uint32_t scale_word(uint32_t scale) {
  uint32_t word = scale << (8 * (threadIdx.x % kLanesPerWord / kLanesPerBlock));
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return word | __shfl_xor_sync(kAllLanes, word, 8);
}

// Lanes whose block lies past the row hold zeros and contribute the zero scale byte that pads the word. All 32 lanes
// call it.
__device__ __forceinline__ KTile make_k_tile(const QuadCodes& quad, bool in_bf16) {
  KTile tile = {};
  if (in_bf16) {
    const float scale = e8m0_value(quad.scale);
    const auto pair = [&](uint32_t from_even, uint32_t from_odd) {  // a code of each, the even k first
      return bf16_pair_of_codes(__byte_perm(quad.even, quad.odd, from_even | (4 + from_odd) << 4), scale, scale);
    };
    tile.words = make_uint4(pair(0, 0), pair(1, 1), pair(2, 2), pair(3, 3));
    return tile;
  }
  tile.words = make_uint4(quad.even, quad.odd, 0, 0);
  tile.scales = scale_word(quad.scale);
  return tile;
}

// The same from values. All 32 lanes call it.
__device__ __forceinline__ KTile make_k_tile(const float (&x)[kValuesPerLane], RowFormat format) {
  if (format != RowFormat::kBf16) {
    return make_k_tile(quantize_quad(x), format == RowFormat::kMxfp8InBf16);
  }
  KTile tile = {};
  tile.words = make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
  return tile;
}

// A row's part of a K tile in bf16.
__device__ __forceinline__ void store_bf16_words(const uint4& words, int64_t row, int k_tile, const RowsOut& to) {
  const int column = (k_tile * kLanesPerWord + threadIdx.x % kLanesPerWord) * kValuesPerLane;
  if (column < to.k) {
    *reinterpret_cast<uint4*>(to.out + (row * to.k + column) * 2) = words;
  }
}

// The same of fp16.
__device__ __forceinline__ KTile make_fp16_tile(const float (&x)[kValuesPerLane]) {
  KTile tile = {};
  tile.words = make_uint4(fp16_pair(x[0], x[1]), fp16_pair(x[2], x[3]), fp16_pair(x[4], x[5]), fp16_pair(x[6], x[7]));
  return tile;
}

__device__ __forceinline__ void store_scale_word(const KTile& tile, int64_t row, int k_tile, const RowsOut& to) {
  if (threadIdx.x % kLanesPerWord == 0 && k_tile < scale_k_tiles(to.k)) {
    *reinterpret_cast<uint32_t*>(to.scales + act_scale_offset(row, k_tile * kBlocksPerWord, to.rows)) = tile.scales;
  }
}

// Writes a K tile to a row, its scale word included; what lies past the row is not stored.
__device__ __forceinline__ void store_k_tile(const KTile& tile, int64_t row, int k_tile, const RowsOut& to) {
  const int lane = threadIdx.x % kLanesPerWord, part = lane % kLanesPerBlock;
  const int k_block = k_tile * kBlocksPerWord + lane / kLanesPerBlock;
  const int64_t first = row * to.k + k_block * kScaleBlock;
  const bool is_in_row = k_block < to.k / kScaleBlock;
  if (to.format != RowFormat::kMxfp8) {
    if (is_in_row) {
      reinterpret_cast<uint4*>(to.out + first * 2)[part] = tile.words;
    }
    return;
  }
  if (is_in_row) {
    *reinterpret_cast<uint32_t*>(to.out + first + part * 4) = tile.words.x;
    *reinterpret_cast<uint32_t*>(to.out + first + kScaleBlock / 2 + part * 4) = tile.words.y;
  }
  store_scale_word(tile, row, k_tile, to);
}

// The same two of MXFP4.
__device__ __forceinline__ KTile make_mxfp4_tile(const float (&x)[kValuesPerLane], RowFormat format) {
  KTile tile = {};
  const uint32_t amax = quad_amax(x), scale = mxfp4_scale(amax);
  if (format == RowFormat::kMxfp4InBf16) {
    tile.words = folded8(x, folded_mxfp4(amax));
    return tile;
  }
  tile.words.x = fp4_codes(amax, mxfp4_multiplier(scale), x);
  tile.scales = scale_word(scale);
  return tile;
}
__device__ __forceinline__ void store_mxfp4_tile(const KTile& tile, int64_t row, int k_tile, const RowsOut& to) {
  if (to.format == RowFormat::kMxfp4InBf16) {
    store_bf16_words(tile.words, row, k_tile, to);
    return;
  }
  const int lane = threadIdx.x % kLanesPerWord;
  const int column = (k_tile * kLanesPerWord + lane) * kValuesPerLane;
  if (column < to.k) {
    *reinterpret_cast<uint32_t*>(to.out + (row * to.k + column) / 2) = tile.words.x;
  }
  store_scale_word(tile, row, k_tile, to);
}

}  // namespace mxfp4_moe
