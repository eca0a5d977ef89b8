// What the two kernels for folded activations share (mma_sync_kernel.cuh, wgmma_kernel.cuh): loads, weights as bf16
// operands, and how a K block's sums are added.
#pragma once

#include "shared/folded.cuh"
#include "tile/epilogue.cuh"
#include "tile/fragments.cuh"
#include "tile/pipeline.cuh"

namespace mxfp4_moe {

// --- loads ------------------------------------------------------------------------------------------------------

// Activations as the producer loads them: boxes of rows, only those that have any of the tile's.
template <class Shape>
struct FoldedActLoads {
  static __device__ __forceinline__ int boxes(const Mxfp4MoeMTile& m) {
    return Shape::M == Shape::kBoxRows ? 1 : ceil_div(m.row_end - m.row_begin, Shape::kBoxRows);
  }
  static __device__ __forceinline__ uint32_t bytes(const Mxfp4MoeMTile& m) { return boxes(m) * Shape::kBoxRows * 256; }
  static __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt,
                                              const Mxfp4MoeMTile& m) {
    uint64_t* full = reinterpret_cast<uint64_t*>(smem.full(s));
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
    if (cute::elect_one_sync()) smem.empty(stage)->arrive();
  });
}

// --- weights ----------------------------------------------------------------------------------------------------

// The A registers of one row and K block: w has word order `halves` (mma_mx.cuh). Each code goes to where bf16 has
// sign, low exponent and high mantissa, which is the value times 2^-126: eleven operations for eight codes, and no
// other order needs fewer.
__device__ __forceinline__ void expand_to_bf16(uint32_t (&pair)[4], uint32_t w) {
  constexpr uint32_t kSign = 0x80008000u, kValue = 0x01C001C0u;
  pair[0] = ((w >> 3) & kValue) | ((w << 1) & kSign);
  pair[1] = w & (kSign | kValue);
  pair[2] = (w << 3) & (kSign | kValue);
  pair[3] = ((w << 6) & kValue) | ((w << 2) & kSign);
}

// The same of rows g and g + 8 for a K block's two MMAs.
__device__ __forceinline__ void expand_rows(uint32_t (&a)[8], const uint32_t* words) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pair[4];
    expand_to_bf16(pair, words[r]);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i * 2 + r] = pair[i];
  }
}

// Where a lane finds what it expands, in a stage's weights: the words and the scales of its first row, in step 0.
struct Places {
  uint32_t words, scales;
};
// The first of this lane's weight rows in the tile: in its block, and where the block is in a stage.
struct FirstRow {
  int in_block;
  uint32_t block;
};
template <class Shape>
__device__ __forceinline__ FirstRow first_row() {
  const int row = warp_id() * Shape::kWarpM + lane_id() / 4;
  return {row % kWeightBlockRows, static_cast<uint32_t>(row / kWeightBlockRows * kWeightBlockBytes)};
}
__device__ __forceinline__ Places places(const FirstRow& row) {
  return {row.block + weight_word_in_block(row.in_block, 0, lane_id() % 4),
          row.block + weight_scale_word_in_block(row.in_block)};
}

// The scales of a lane's weight rows in a stage: of each set of 16 rows, g and g + 8.
template <class Shape>
__device__ __forceinline__ void load_scales(uint32_t (&scales)[Shape::kRowSets][2], const uint8_t* from) {
  if constexpr (Shape::kRowSets == 1) {
    load_words<1>(&scales[0][0], from);
    load_words<1>(&scales[0][1], from + (weight_scale_position(1) - weight_scale_position(0)) * 4);
  } else {
#pragma unroll
    for (int set = 0; set < Shape::kRowSets; set += 2) {
      uint32_t in_place[4];
      load_words<4>(in_place, from + set / 2 * 128);
#pragma unroll
      for (int i = 0; i < 4; ++i) scales[set + i / 2][i % 2] = in_place[weight_scale_position(i)];
    }
  }
}

// --- additions --------------------------------------------------------------------------------------------------

constexpr float kFoldedUnit = static_cast<float>(int64_t{1} << kAccumulatorExponent);  // what an accumulator counts

// 2^exponent, for exponents of normal floats.
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }

// An MMA's sums of a K block have 2^-126 of the weights' codes and 2^kNearShift of the activations in them: with weight
// scale byte w an accumulator must grow by 2^(w - 127 + 126 - kNearShift - kAccumulatorExponent) times them.
__device__ __forceinline__ float scale_factor(uint32_t word, int step) {
  constexpr int kMore = 126 - kNearShift - kAccumulatorExponent;
  static_assert(kMore == 1, "bytes 0 to 253 are exponents 1 to 254");
  return __uint_as_float((__byte_perm(word, 0, 0x4440 | step) << 23) + (kMore << 23));
}

__device__ __forceinline__ int load_byte(const uint8_t* at) {
  int byte;
  asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(byte) : "l"(at));
  return byte;
}

// What a K block's sums must grow by, where the activations' shift is any.
__device__ __forceinline__ int far_exponent(uint32_t word, int step, int shift) {
  return static_cast<int>(word >> 8 * step & 0xff) - 127 + 126 - shift - kAccumulatorExponent;
}

// acc + block * 2^exponent, as exact as if the product were any number.
__device__ __forceinline__ float add_scaled(float acc, float block, int exponent) {
  return fmaf(block * power_of_two(exponent >> 1), power_of_two(exponent - (exponent >> 1)), acc);
}

}  // namespace mxfp4_moe
