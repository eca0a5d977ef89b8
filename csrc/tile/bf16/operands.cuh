// What the kernels of bf16 MMAs share (mma_sync_kernel.cuh, sm90/wgmma_kernel.cuh): loads of activations, and weights
// as bf16 operands.
//
// Arithmetic (arithmetic.SM90_BF16): the operands are bf16, weights with their scale multiplied in, both exact; the sum
// over all of K stays in the tensor core's fp32 accumulator, MMA by MMA of 16 consecutive k. So every tile gives the
// same bits, whichever instruction it has.
#pragma once

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

__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// What the weights' formats differ in.
//   kUnit        what accumulators count in: a weight's bf16 operand is its value divided by it
//   kSetSteps    K blocks whose scales a scale word holds
//   kHasLarge    whether scales may take more than the usual expansion (has_large)
//   kScaleShift  from a scale's byte to where it stands in a bf16
template <int kWeightFormat>
struct Scaling;
template <>
struct Scaling<MXFP4_MOE_WEIGHT_MXFP4> {
  static constexpr float kUnit = 2.f;  // so that 6 * 2^126 is a number
  static constexpr int kSetSteps = 4, kScaleShift = 7;
  static constexpr bool kHasLarge = true;
};
template <>
struct Scaling<MXFP4_MOE_WEIGHT_NVFP4> {
  static constexpr float kUnit = 128.f;  // so that factors of 448 are numbers: the codes they multiply are so small
  static constexpr int kSetSteps = 2, kScaleShift = 4;
  static constexpr bool kHasLarge = false;
};

// Eight codes of a row's K block, in word order `pairs` (formats/weight_layout.py), as bf16: pair 0 and 1 for the first
// 16 k, 2 and 3 for the others. Nine operations, five of which must run on the ALU's logic and two on its shifter.
__device__ __forceinline__ void expand(uint32_t (&pair)[4], uint32_t w) {
  constexpr uint32_t kMask = 0x81C081C0u, kHigh = 0x81808180u, kLow = 0x00400040u;
  pair[0] = w & kMask;
  pair[1] = (w << 4) & kMask;
  pair[2] = __funnelshift_r(w, w, 6) & kMask;
  pair[3] = (__funnelshift_r(w, w, 2) & kHigh) | ((w << 6) & kLow);
}

// 2^kScaleShift, unknown to the compiler, because ptxas turns a multiplication by a number that it knows into a shift,
// which runs on the ALU that expanding keeps busy; multiply-adds have a pipe of their own.
template <int kWeightFormat>
__device__ __forceinline__ uint32_t scale_unit() {
  uint32_t one;
  asm volatile("mov.u32 %0, %%ntid.y;" : "=r"(one));  // blocks have one dimension
  return one << Scaling<kWeightFormat>::kScaleShift;
}

// --- MXFP4's scales
//
// A code where bf16 has sign, low exponent and high mantissa is its value times 2^-126. One factor makes that a weight
// of a scale up to 2^0, bytes 0 to 127. Beyond, where blocks hold weights of 6 and more, it takes two, and more time.
constexpr uint32_t kLargeScales = 0x80808080u;  // these bits of a scale word

// The factor of the scale word's byte `step`, below 128, for both halves: 2^(byte - 2).
__device__ __forceinline__ uint32_t factor_of(uint32_t word, int step, uint32_t exponent_one) {
  constexpr uint32_t kBias = (127 - 2) << 7;
  return __byte_perm(word, 0, 0x4040 | step | step << 8) * exponent_one + (kBias << 16 | kBias);
}

// --- NVFP4's scales
//
// E4M3's byte, which has no sign, is 2^-120 times its value where bf16 has low exponent and high mantissa; subnormal
// numbers are bf16's subnormal ones, which multiplications honour. (0x7F, its NaN, would be 480: weights are not
// prepared with it.) Two exact multiplications make it 2^119 times the value, which one integer addition would but for
// zero and the subnormal ones. They are for both 16 k of a block at once: the first's factor is the low half, the
// second's the high.
__device__ __forceinline__ uint32_t nvfp4_factors(uint32_t word, int step, uint32_t unit) {
  constexpr uint32_t kTo2To7 = (127u + 127u) << 7, kTo2To119 = (127u + 112u) << 7;
  const uint32_t bytes = __byte_perm(word, 0, step % 2 == 0 ? 0x4140 : 0x4342) * unit;
  return multiply_pairs(multiply_pairs(bytes, kTo2To7 << 16 | kTo2To7), kTo2To119 << 16 | kTo2To119);
}

// One half in both: an operand's modifier in machine code, not an instruction.
template <int kHalf>
__device__ __forceinline__ uint32_t twice(uint32_t pair) {
  uint32_t both;
  if constexpr (kHalf == 0)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(both) : "r"(pair));
  else
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(both) : "r"(pair));
  return both;
}

// --- both
//
// Eight codes of a row's K block `step` as bf16, of which `scales` is the word with its scales.
template <int kWeightFormat, bool kLarge>
__device__ __forceinline__ void expand_scaled(uint32_t (&pair)[4], uint32_t w, uint32_t scales, int step,
                                              uint32_t unit) {
  expand(pair, w);
  if constexpr (kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4) {
    static_assert(!kLarge);
    const uint32_t factors = nvfp4_factors(scales, step, unit);
    pair[0] = multiply_pairs(pair[0], twice<0>(factors));
    pair[1] = multiply_pairs(pair[1], twice<0>(factors));
    pair[2] = multiply_pairs(pair[2], twice<1>(factors));
    pair[3] = multiply_pairs(pair[3], twice<1>(factors));
  } else if constexpr (!kLarge) {
    const uint32_t factor = factor_of(scales, step, unit);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = multiply_pairs(pair[i], factor);
  } else {  // 2^(byte - 2) as 2^126 or 2^0, and the rest
    const uint32_t byte = scales >> 8 * step & 0xff;
    const uint32_t first = byte > 127 ? (127u + 126u) << 7 : 127u << 7;
    const uint32_t second = (byte > 127 ? byte - 1 : byte + 125) << 7;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pair[i] = multiply_pairs(multiply_pairs(pair[i], first << 16 | first), second << 16 | second);
  }
}

// The A registers of rows g and g + 8 for a K block's two MMAs.
template <int kWeightFormat, bool kLarge>
__device__ __forceinline__ void expand_rows(uint32_t (&a)[8], const uint32_t* words, const uint32_t* scales, int step,
                                            uint32_t unit) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pair[4];
    expand_scaled<kWeightFormat, kLarge>(pair, words[r], scales[r], step, unit);
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
  uint32_t block;  // of 64 rows
};
template <class Shape>
__device__ __forceinline__ Places places(const FirstRow& row) {
  return {row.block + weight_word_in_block(row.in_block, 0, lane_id() % 4, Shape::kScaleWords),
          row.block + weight_scale_word_in_block(row.in_block), row.block};
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
