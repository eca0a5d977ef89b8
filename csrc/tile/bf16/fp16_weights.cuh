// Packed weights as fp16, from the words and scale bytes that bf16's kernels read.
//
// A code where a half has sign, low exponent and high mantissa is its value times 2^-14, the subnormal one included.
// One multiplication by a scale's half makes it an operand.
//
// MXFP4: fp16 has far fewer exponents than E8M0, so scales count from B, the largest byte of the expert's matrix, which
// its factor, 2^(B - 128), names (tile_abi.h). A block of byte b has the half 2^(x - 15), x = 30 + b - B, and zero
// where that is not above zero: an operand is code * 2^(1 + b - B), exact while B - b is at most 24, rounded to a
// multiple of 2^-24 below, and zero from 29 on. Bytes above B are those of blocks of zeros; held to x = 30, they stay
// zeros.
//
// NVFP4: E4M3's byte, which has no sign, is 2^-8 times its value where a half has low exponent and high mantissa,
// subnormal numbers included; 2^15 times that times a code's 2^-14 is the weight times 2^-7, exactly: 21 at most, and
// 2^-17 its last bit. Factors are 2^7 times the weights' own.
#pragma once

#include "tile/bf16/weights.cuh"

namespace mxfp4_moe {

__device__ __forceinline__ uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Eight codes of a row's K block, in word order `pairs`, as fp16: four pairs as in bf16_weights.cuh. That order has a
// sign seven bits above its code's highest bit, which is bf16's distance; fp16's is four. So codes are taken from the
// word rotated by three, and signs from the word itself, as many pairs at a time as do not collide.
__device__ __forceinline__ void expand_fp16(uint32_t (&pair)[4], uint32_t w) {
  constexpr uint32_t kMask = 0x8E008E00u, kHigh = 0x8C008C00u, kLow = 0x02000200u;
  constexpr uint32_t kSigns03 = 0x80028002u, kSigns1 = 0x08000800u, kSigns2 = 0x00200020u;
  const uint32_t codes = __funnelshift_l(w, w, 3);
  // The compiler, if it knew, would have masks of its own for each pair instead of a word for two.
  const auto with_signs = [&](uint32_t signs) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(signs), "r"(w), "r"(codes));  // signs ? w : codes
    return d;
  };
  const uint32_t both03 = with_signs(kSigns03);
  pair[0] = both03 & kMask;
  pair[1] = (with_signs(kSigns1) << 4) & kMask;
  const uint32_t of2 = with_signs(kSigns2);
  pair[2] = __funnelshift_r(of2, of2, 6) & kMask;
  pair[3] = (__funnelshift_r(both03, both03, 2) & kHigh) | ((codes << 6) & kLow);
}

template <>
struct Scaling<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_FP16> {
  static constexpr float kUnit = 1.f;
  static constexpr int kSetSteps = 4, kScaleShift = 10;
  static constexpr bool kHasLarge = false;
  static constexpr int kMostX = 30;  // a half's largest exponent

  struct Origin {
    uint32_t above;  // kMostX - B, in both halves
    // Of both an expert's factors, which are the same. Their exponent field is B - 1.
    static __device__ __forceinline__ Origin of(const Mxfp4MoeFactors& factors, int expert) {
      const float factor = __ldg(factors.of_weights + 2 * expert);
      return {__byte_perm(kMostX - 1 - (__float_as_uint(factor) >> 23), 0, 0x1010)};
    }
  };
  struct Kept {
    uint32_t unit;
    Origin origin;
  };
  static __device__ __forceinline__ Kept keep(const Origin& origin) { return {scale_unit<kScaleShift>(), origin}; }

  // The halves of the scale word's bytes `step` and its neighbour: of the even one the low half. The same in both
  // steps, so that it is computed once.
  static __device__ __forceinline__ uint32_t factors_of(uint32_t word, int step, const Kept& kept) {
    const uint32_t bytes = __byte_perm(word, 0, step < 2 ? 0x4140 : 0x4342);
    return __viaddmin_s16x2_relu(bytes, kept.origin.above, kMostX << 16 | kMostX) * kept.unit;
  }

  template <bool kLarge>
  static __device__ __forceinline__ void expand_scaled(uint32_t (&pair)[4], uint32_t w, uint32_t scales, int step,
                                                       const Kept& kept) {
    static_assert(!kLarge);
    expand_fp16(pair, w);
    const uint32_t factors = factors_of(scales, step, kept);
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = multiply_fp16(pair[i], step % 2 == 0 ? twice<0>(factors) : twice<1>(factors));
  }
};

template <>
struct Scaling<MXFP4_MOE_WEIGHT_NVFP4, MXFP4_MOE_ACT_FP16> : CommonScaling<7> {
  static constexpr float kUnit = 1.f;  // the factors are 2^7 times the weights' own
  static constexpr int kSetSteps = 2;
  static constexpr bool kHasLarge = false;

  // Of both 16 k of a block: the first's is the low half, the second's the high.
  static __device__ __forceinline__ uint32_t factors_of(uint32_t word, int step, uint32_t unit) {
    constexpr uint32_t kTo2To15 = (15u + 15u) << 10;
    const uint32_t bytes = __byte_perm(word, 0, step % 2 == 0 ? 0x4140 : 0x4342) * unit;
    return multiply_fp16(bytes, kTo2To15 << 16 | kTo2To15);
  }

  template <bool kLarge>
  static __device__ __forceinline__ void expand_scaled(uint32_t (&pair)[4], uint32_t w, uint32_t scales, int step,
                                                       const Kept& kept) {
    static_assert(!kLarge);
    expand_fp16(pair, w);
    const uint32_t factors = factors_of(scales, step, kept.unit);
    pair[0] = multiply_fp16(pair[0], twice<0>(factors));
    pair[1] = multiply_fp16(pair[1], twice<0>(factors));
    pair[2] = multiply_fp16(pair[2], twice<1>(factors));
    pair[3] = multiply_fp16(pair[3], twice<1>(factors));
  }
};

}  // namespace mxfp4_moe
