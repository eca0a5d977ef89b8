// Packed weights as bf16, exactly.
#pragma once

#include "tile/bf16/weights.cuh"

namespace mxfp4_moe {

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Eight codes of a row's K block, in word order `pairs` (formats/weight_layout.py), as bf16: pair 0 and 1 for the first
// 16 k, 2 and 3 for the others. Nine operations, five of which must run on the ALU's logic and two on its shifter.
__device__ __forceinline__ void expand_bf16(uint32_t (&pair)[4], uint32_t w) {
  constexpr uint32_t kMask = 0x81C081C0u, kHigh = 0x81808180u, kLow = 0x00400040u;
  pair[0] = w & kMask;
  pair[1] = (w << 4) & kMask;
  pair[2] = __funnelshift_r(w, w, 6) & kMask;
  pair[3] = (__funnelshift_r(w, w, 2) & kHigh) | ((w << 6) & kLow);
}

// --- MXFP4's scales
//
// A code where bf16 has sign, low exponent and high mantissa is its value times 2^-126. One factor makes that a weight
// of a scale up to 2^0, bytes 0 to 127. Beyond, where blocks hold weights of 6 and more, it takes two, and more time.
constexpr uint32_t kLargeScales = 0x80808080u;  // these bits of a scale word

template <>
struct Scaling<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_BF16> : CommonScaling<7> {
  static constexpr float kUnit = 2.f;  // so that 6 * 2^126 is a number
  static constexpr int kSetSteps = 4;
  static constexpr bool kHasLarge = true;

  // The factors of the scale word's bytes `step` and its neighbour, below 128, 2^(byte - 2): the even one's is the low
  // half. The same in both steps, so that they are computed once.
  static __device__ __forceinline__ uint32_t factors_of(uint32_t word, int step, uint32_t exponent_one) {
    constexpr uint32_t kBias = (127 - 2) << 7;
    return __byte_perm(word, 0, step < 2 ? 0x4140 : 0x4342) * exponent_one + (kBias << 16 | kBias);
  }

  template <bool kLarge>
  static __device__ __forceinline__ void expand_scaled(uint32_t (&pair)[4], uint32_t w, uint32_t scales, int step,
                                                       const Kept& kept) {
    expand_bf16(pair, w);
    if constexpr (!kLarge) {
      const uint32_t factors = factors_of(scales, step, kept.unit);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] = multiply_bf16(pair[i], step % 2 == 0 ? twice<0>(factors) : twice<1>(factors));
    } else {  // 2^(byte - 2) as 2^126 or 2^0, and the rest
      const uint32_t byte = scales >> 8 * step & 0xff;
      const uint32_t first = byte > 127 ? (127u + 126u) << 7 : 127u << 7;
      const uint32_t second = (byte > 127 ? byte - 1 : byte + 125) << 7;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] = multiply_bf16(multiply_bf16(pair[i], first << 16 | first), second << 16 | second);
    }
  }
};

// --- NVFP4's scales
//
// E4M3's byte, which has no sign, is 2^-120 times its value where bf16 has low exponent and high mantissa; subnormal
// numbers are bf16's subnormal ones, which multiplications honour. (0x7F, its NaN, would be 480: weights are not
// prepared with it.) Two exact multiplications make it 2^119 times the value, which one integer addition would but for
// zero and the subnormal ones. They are for both 16 k of a block at once: the first's factor is the low half, the
// second's the high.
template <>
struct Scaling<MXFP4_MOE_WEIGHT_NVFP4, MXFP4_MOE_ACT_BF16> : CommonScaling<4> {
  static constexpr float kUnit = 128.f;  // so that factors of 448 are numbers: the codes they multiply are so small
  static constexpr int kSetSteps = 2;
  static constexpr bool kHasLarge = false;

  static __device__ __forceinline__ uint32_t factors_of(uint32_t word, int step, uint32_t unit) {
    constexpr uint32_t kTo2To7 = (127u + 127u) << 7, kTo2To119 = (127u + 112u) << 7;
    const uint32_t bytes = __byte_perm(word, 0, step % 2 == 0 ? 0x4140 : 0x4342) * unit;
    return multiply_bf16(multiply_bf16(bytes, kTo2To7 << 16 | kTo2To7), kTo2To119 << 16 | kTo2To119);
  }

  template <bool kLarge>
  static __device__ __forceinline__ void expand_scaled(uint32_t (&pair)[4], uint32_t w, uint32_t scales, int step,
                                                       const Kept& kept) {
    static_assert(!kLarge);
    expand_bf16(pair, w);
    const uint32_t factors = factors_of(scales, step, kept.unit);
    pair[0] = multiply_bf16(pair[0], twice<0>(factors));
    pair[1] = multiply_bf16(pair[1], twice<0>(factors));
    pair[2] = multiply_bf16(pair[2], twice<1>(factors));
    pair[3] = multiply_bf16(pair[3], twice<1>(factors));
  }
};

}  // namespace mxfp4_moe
