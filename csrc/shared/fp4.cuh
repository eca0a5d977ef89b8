// MXFP4 and NVFP4 of one block: the arithmetic, for whoever holds the values. Both by FlashInfer's rules
// (formats.quantize_mxfp4_activations and formats.quantize_nvfp4 are the same functions in torch, and say whence).
//
// MXFP4, 32 values: scale amax * fp32(1/6), rounded up to a power of two on the bits; codes E2M1(x * 2^-scale).
// NVFP4, 16 values under a global scale g: scale E4M3(g * (amax * fp32(1/6))), at most 448; codes
// E2M1(x * (1 / (scale * (1 / g)))), reciprocals to nearest. Codes are rounded to nearest even, at most 6. A block of
// zeros has the scale byte 0, and its codes keep the signs. An NVFP4 block whose scale rounds to 0 has codes of 6, of
// its zeros +6: 0 times infinity is a NaN. A block with a NaN or an infinity becomes codes 0 under a scale that is NaN.
#pragma once

#include "shared/mxfp8.cuh"

// cvt to E2M1 is an instruction of SM10x and SM12x, and there of their own targets alone (PTX ISA, cvt).
#if (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1000) || \
    (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ >= 1000)
#define MXFP4_MOE_HAS_E2M1_CVT 1
#else
#define MXFP4_MOE_HAS_E2M1_CVT 0
#endif

namespace mxfp4_moe {

constexpr uint32_t kE8m0Nan = 255;
constexpr uint32_t kE4m3Nan = 0x7f;
constexpr float kNvfp4Max = 6.0f * 448.0f;  // the largest code times the largest scale

// What cvt.rn.satfinite.e2m1x2.f32 makes of one value, in integers and one addition; a NaN is +6.
__device__ __forceinline__ uint32_t e2m1_by_hand(float x) {
  constexpr uint32_t kSix = 0x40c00000u, kTwo = 0x40000000u;
  const uint32_t size = min(magnitude(x), kSix);
  // Below 2 the codes count halves, which are the last bit of fp32 numbers from 2^22 on.
  const uint32_t halves = __float_as_uint(__fadd_rn(__uint_as_float(size), 4194304.0f)) & 7u;
  // From 2 on a code is exponent and first bit of the mantissa: of 2 they are 256, and the code is 4.
  const uint32_t rounded = (size + 0x001fffffu + (size >> 22 & 1u)) >> 22;
  const uint32_t sign = magnitude(x) > kFloatInfBits ? 0u : __float_as_uint(x) >> 28 & 8u;
  return (size < kTwo ? halves : rounded - 252u) | sign;
}

// Eight values to eight E2M1 codes, the first in the lowest nibble.
__device__ __forceinline__ uint32_t encode8_e2m1(const float (&x)[8]) {
  uint32_t codes;
#if MXFP4_MOE_HAS_E2M1_CVT
  asm("{ .reg .b8 b0, b1, b2, b3; cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3; "
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5; cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7; mov.b32 %0, {b0, b1, b2, b3}; }"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
#else
  codes = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) codes |= e2m1_by_hand(x[i]) << (4 * i);
#endif
  return codes;
}

// Codes of a block whose multiplier is known; of a poisoned one zeros.
__device__ __forceinline__ uint32_t fp4_codes(uint32_t amax, float multiplier, const float (&x)[8]) {
  float scaled[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) scaled[i] = __fmul_rn(x[i], multiplier);
  const uint32_t codes = encode8_e2m1(scaled);
  return amax >= kFloatInfBits ? 0 : codes;
}

__device__ __forceinline__ float sixth(uint32_t amax) { return __fmul_rn(__uint_as_float(amax), 1.0f / 6.0f); }

// ---- MXFP4 --------------------------------------------------------------------------------------------------------

// The scale byte of a block from the largest magnitude() in it.
__device__ __forceinline__ uint32_t mxfp4_scale(uint32_t amax) {
  return amax >= kFloatInfBits ? kE8m0Nan : e8m0_round_up(sixth(amax));
}

// What values are multiplied by; of a NaN scale anything.
__device__ __forceinline__ float mxfp4_multiplier(uint32_t scale) { return e8m0_reciprocal(scale); }

// ---- NVFP4 --------------------------------------------------------------------------------------------------------

// The value of an E4M3 byte without a sign: its bits are an fp32 number's, 2^120 too low.
__device__ __forceinline__ float e4m3_value(uint32_t byte) {
  return __fmul_rn(__uint_as_float(byte << 20), __uint_as_float((127u + 120u) << 23));
}

__device__ __forceinline__ uint32_t nvfp4_scale(uint32_t amax, float global_scale) {
  const float scale = __fmul_rn(global_scale, sixth(amax));
  const uint32_t byte = __nv_cvt_float_to_fp8(scale, __NV_SATFINITE, __NV_E4M3);
  return amax >= kFloatInfBits ? kE4m3Nan : byte;
}

// inverse: the reciprocal of the global scale.
__device__ __forceinline__ float nvfp4_multiplier(uint32_t amax, uint32_t scale, float inverse) {
  return amax == 0 ? 0.0f : __frcp_rn(__fmul_rn(e4m3_value(scale), inverse));
}

// The global scale that a row has for itself, from its largest magnitude(): 2688 / amax as torch divides a number by a
// tensor, which is 2688 * (1 / amax); at most fp32's largest number (formats.nvfp4_row_scales).
__device__ __forceinline__ float nvfp4_row_scale(uint32_t amax) {
  const float scale = __fmul_rn(kNvfp4Max, __frcp_rn(__uint_as_float(amax)));
  return amax == 0 || amax >= kFloatInfBits ? 1.0f : __uint_as_float(min(__float_as_uint(scale), kFloatInfBits - 1));
}

}  // namespace mxfp4_moe
