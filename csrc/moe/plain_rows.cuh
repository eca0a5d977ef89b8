// What the quantizers for callers outside of the layer have in common (mxfp8_quantize.cu, fp4_quantize.cu): how a lane
// loads its values, and where scales go in the ecosystem's layouts.
//
// A quad of lanes has 32 values of a row, a half-warp 128: a K tile. Four scales of neighbouring blocks are a word.
#pragma once

#include "moe/halves.cuh"
#include "moe/warps.cuh"
#include "shared/launch.cuh"
#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

constexpr int kThreads = 128;
constexpr int kLanes = 4;                       // of 32 values
constexpr int kValues = kScaleBlock / kLanes;   // of a lane
constexpr int kWordLanes = 4 * kLanes;          // of a K tile
constexpr int kTiles = kThreads / kWordLanes;   // of a thread block
constexpr int kFewRows = 512, kRowsAtOnce = 4;  // beyond few rows a lane loads several before it uses one
constexpr int kTallRows = 128, kShortRows = 8;  // of a tile of scales

// A lane's values as they are loaded, and as fp32.
template <QuantizeInput kInput>
struct Values {
  uint4 packed[kInput == QuantizeInput::kFloat32 ? 2 : 1];

  __device__ __forceinline__ void load(const void* x, int64_t first) {
    constexpr int kVectors = sizeof(packed) / sizeof(uint4);
    const auto* vectors = static_cast<const uint4*>(x) + first * kVectors / kValues;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      packed[i] = __ldcg(vectors + i);
    }
  }

  __device__ __forceinline__ void clear() {
    for (uint4& vector : packed) {
      vector = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void widen_to(float (&values)[kValues]) const {
    if constexpr (kInput == QuantizeInput::kFloat32) {
      memcpy(values, packed, sizeof(values));
    } else {
      constexpr HalfType kType = kInput == QuantizeInput::kBFloat16 ? HalfType::kBFloat16 : HalfType::kFloat16;
      widen<kType>(packed[0], values);
    }
  }
};

// Byte offset of a row's word of scales, in tiles of either height. Args say how many words each row has.
template <typename Args>
__device__ __forceinline__ int64_t word_offset(const Args& args, int64_t row, int word) {
  if (args.layout == ScaleLayout::k128x4) {
    return (row / kTallRows * scale_words(args) + word) * (kTallRows * 4) +
           swizzled_scale_word_offset(static_cast<int>(row % kTallRows));
  }
  return (row / kShortRows * scale_words(args) + word) * (kShortRows * 4) + row % kShortRows * 4;
}

template <typename Args>
__device__ __forceinline__ void store_word(const Args& args, int64_t row, int number, uint32_t word) {
  *reinterpret_cast<uint32_t*>(args.scales + word_offset(args, row, number)) = word;
}

// The words of the rows that fill up the last tile, divided among all threads of the grid.
template <typename Args>
__device__ __forceinline__ void store_padding(const Args& args) {
  if (args.layout == ScaleLayout::kLinear) {
    return;
  }
  const int height = args.layout == ScaleLayout::k128x4 ? kTallRows : kShortRows;
  const int64_t padding = (height - args.rows % height) % height;
  const int64_t threads = int64_t{gridDim.x} * gridDim.y * kThreads;
  const int64_t thread = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = thread; i < padding * scale_words(args); i += threads) {
    store_word(args, args.rows + i % padding, static_cast<int>(i / padding), 0);
  }
}

// All K tiles of kRows rows at once.
inline dim3 grid_of_rows(int64_t rows, int64_t k, int rows_at_once) {
  const int k_tiles = static_cast<int>(scale_k_tiles(k));
  const int64_t groups = (rows + rows_at_once - 1) / rows_at_once;
  return dim3((k_tiles + kTiles - 1) / kTiles, static_cast<unsigned>(groups < kMaxGridY ? groups : kMaxGridY));
}

}  // namespace mxfp4_moe
