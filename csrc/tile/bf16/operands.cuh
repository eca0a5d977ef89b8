// What the kernels of bf16 and fp16 MMAs share (mma_sync_kernel.cuh, sm90/wgmma_kernel.cuh): loads of activations, and
// where a lane finds the weights that it makes operands of (bf16_weights.cuh, fp16_weights.cuh).
//
// Arithmetic (arithmetic.SM90_BF16, SM90_FP16): the operands are bf16 or fp16, weights with their scale multiplied in;
// the sum over all of K stays in the tensor core's fp32 accumulator, MMA by MMA of 16 consecutive k. So every tile
// gives the same bits, whichever instruction it has.
#pragma once

#include "tile/bf16/bf16_weights.cuh"
#include "tile/bf16/fp16_weights.cuh"
#include "tile/bf16/tile_shape.cuh"
#include "tile/epilogue.cuh"
#include "tile/fragments.cuh"
#include "tile/pipeline.cuh"

namespace mxfp4_moe {

// --- loads ------------------------------------------------------------------------------------------------------

// Activations as the producer loads them: boxes of rows, only those that have any of the tile's.
template <class Shape>
struct Bf16ActLoads {
  static __device__ __forceinline__ int boxes(const Mxfp4MoeMTile& m) {
    return Shape::M == Shape::kBoxRows ? 1 : ceil_div(m.row_end - m.row_begin, Shape::kBoxRows);
  }
  static __device__ __forceinline__ uint32_t bytes(const Mxfp4MoeMTile& m) { return boxes(m) * Shape::kBoxRows * 256; }
  static __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt,
                                              const Mxfp4MoeMTile& m) {
    const Barrier* full = smem.full(s);
    const auto load_box = [&](int b) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        tma_load_2d(smem.act(s) + half * Shape::kHalfBytes + b * Shape::kBoxRows * 128, maps.act, full,
                    kt * kTileK + half * 64, m.row_begin + b * Shape::kBoxRows, kEvictLast);
    };
    // Not unrolled: one lane issues all copies of a stage, and with few rows its instructions are what takes time.
    load_box(0);
    const int count = boxes(m);
#pragma unroll 1
    for (int b = 1; b < count; ++b) load_box(b);
  }
};

// The warp has read all that it wants of a stage.
template <class Shape>
__device__ __forceinline__ void release(const SharedStorage<Shape>& smem, int stage) {
  after_all_lanes([&] {
    if (elect_one_lane()) smem.empty(stage)->arrive();
  });
}

// --- weights ----------------------------------------------------------------------------------------------------

// The A registers of rows g and g + 8 for a K block's two MMAs.
template <class Scales, bool kLarge>
__device__ __forceinline__ void expand_rows(uint32_t (&a)[8], const uint32_t* words, const uint32_t* scales, int step,
                                            const typename Scales::Kept& kept) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pair[4];
    Scales::template expand_scaled<kLarge>(pair, words[r], scales[r], step, kept);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i * 2 + r] = pair[i];
  }
}

// The first of a lane's weight rows: in its block of 64, and where the block is in a stage.
struct FirstRow {
  int in_block;
  uint32_t block;
};
template <class Shape>
__device__ __forceinline__ FirstRow first_row(int row) {
  return {row % kWeightBlockRows, static_cast<uint32_t>(row / kWeightBlockRows * Shape::kWeightBlockBytes)};
}
// Where a lane finds what it expands, in a stage's weights: the words and the scales of its first row, in step 0.
struct Places {
  uint32_t words, scales;
};
template <class Shape>
__device__ __forceinline__ Places places(const FirstRow& row) {
  return {row.block + weight_word_in_block(row.in_block, 0, lane_id() % 4, Shape::kScaleWords),
          row.block + weight_scale_word_in_block(row.in_block)};
}

// The scale words of rows g, g + 8, g + 16 .. of a warp whose first row is the first of 8, 16 or 32 in its block.
template <int kGroups>
__device__ __forceinline__ void load_scales(uint32_t (&scales)[kGroups], const uint8_t* from) {
  if constexpr (kGroups < 4) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load_words<1>(scales + g, from + weight_scale_position(g) * 4);
  } else {
#pragma unroll
    for (int g = 0; g < kGroups; g += 4) {
      uint32_t in_place[4];
      load_words<4>(in_place, from + g / 4 * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) scales[g + i] = in_place[weight_scale_position(i)];
    }
  }
}
// Their words of a step.
template <int kGroups>
__device__ __forceinline__ void load_groups(uint32_t (&words)[kGroups], const uint8_t* from) {
  constexpr int kPerLoad = min_of(kGroups, 4);
#pragma unroll
  for (int g = 0; g < kGroups; g += kPerLoad) load_words<kPerLoad>(words + g, from + g / 4 * 512);
}

// Whether any of the warp's scales takes two factors.
template <int kGroups>
__device__ __forceinline__ bool has_large(const uint32_t (&scales)[kGroups]) {
  uint32_t all = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) all |= scales[g];
  return __any_sync(~0u, (all & kLargeScales) != 0);
}

}  // namespace mxfp4_moe
