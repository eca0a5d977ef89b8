// NVFP4 rows for the GEMMs, written by warps (the arithmetic: shared/fp4.cuh), and where their bytes go.
//
// Lanes as in mx_rows.cuh: a half-warp has a K tile of a row, lane l the values k = 8l .. 8l+7. Here a block of 16
// values is a pair of lanes, and the four blocks of 64 k are eight lanes, whose scale bytes leave as one 32-bit word:
// two words to a K tile. What a row is multiplied by first is its expert's global scale or its own (kernels.h,
// GlobalScales).
// Used by nvfp4_permute.cu and fp4_activation.cu.
#pragma once

#include "moe/mx_rows.cuh"

namespace mxfp4_moe {

constexpr int kNvfp4WordsPerTile = 2;
constexpr int kLanesPerNvfp4Word = kLanesPerWord / kNvfp4WordsPerTile;
constexpr int kLanesPerNvfp4Block = 2;

struct GlobalScale {
  float scale, inverse;
};
__device__ __forceinline__ GlobalScale with_inverse(float scale) { return {scale, __frcp_rn(scale)}; }

// A half-warp's K tile of a row, as each lane stores its part.
struct Nvfp4Tile {
  uint4 words;      // this lane's values: in x their codes, or 8 bf16
  uint32_t scales;  // of the four blocks of these 64 k
};

// The largest magnitude() of the block that this lane's pair holds. All 32 lanes call it, and what follows.
__device__ __forceinline__ uint32_t pair_amax(const float (&x)[kValuesPerLane]) {
  const uint32_t amax = lane_amax(x);
  return max(amax, __shfl_xor_sync(kAllLanes, amax, 1));
}

// amax: of pair_amax(x). Lanes whose block lies past the row hold zeros, and their scale byte is the zero that pads the
// words.
__device__ __forceinline__ Nvfp4Tile make_nvfp4_tile(const float (&x)[kValuesPerLane], uint32_t amax,
                                                     const GlobalScale& global, RowFormat format) {
  if (format == RowFormat::kNvfp4InBf16) {
    return {folded8(x, folded_nvfp4(amax, global.scale, global.inverse)), 0};
  }
  const uint32_t scale = nvfp4_scale(amax, global.scale);
  uint32_t word = scale << (8 * (threadIdx.x % kLanesPerNvfp4Word / kLanesPerNvfp4Block));
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return {make_uint4(fp4_codes(amax, nvfp4_multiplier(amax, scale, global.inverse), x), 0, 0, 0), word};
}

// Writes a K tile to a row, its scale words included; what lies past the row is not stored.
__device__ __forceinline__ void store_nvfp4_tile(const Nvfp4Tile& tile, int64_t row, int k_tile, const RowsOut& to) {
  if (to.format == RowFormat::kNvfp4InBf16) {
    store_bf16_words(tile.words, row, k_tile, to);
    return;
  }
  const int lane = threadIdx.x % kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + lane * kValuesPerLane;
  if (column < to.k) {
    *reinterpret_cast<uint32_t*>(to.out + (row * to.k + column) / 2) = tile.words.x;
  }
  if (lane % kLanesPerNvfp4Word == 0 && k_tile < scale_k_tiles(to.k)) {
    const int word = k_tile * kNvfp4WordsPerTile + lane / kLanesPerNvfp4Word;
    *reinterpret_cast<uint32_t*>(to.scales + act_scale_offset(row, int64_t{word} * 4, to.rows)) = tile.scales;
  }
}

// The largest of all threads' numbers, in all of them; `of_warps` is shared memory. All threads of the block call it.
template <int kThreads>
__device__ __forceinline__ uint32_t block_max(uint32_t x, uint32_t (&of_warps)[kThreads / kWarpSize]) {
#pragma unroll
  for (int stride = 1; stride < kWarpSize; stride *= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, stride));
  }
  __syncthreads();  // all have read what was there before
  if (threadIdx.x % kWarpSize == 0) {
    of_warps[threadIdx.x / kWarpSize] = x;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
    x = max(x, of_warps[warp]);
  }
  return x;
}

}  // namespace mxfp4_moe
