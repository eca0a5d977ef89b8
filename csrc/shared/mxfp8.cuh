// MXFP8 of one block (OCP MX v1.0, E4M3 elements under an E8M0 scale): the arithmetic, for whoever holds the values.
//
// Scale: amax * fp32(1/448), rounded up to a power of two on the bits. Codes: x * 2^-scale, RNE, clamped to +-448.
// An all-zero block is scale byte 0 and codes 0. A block with a NaN or an infinity becomes 32 NaN codes with scale
// byte 127 (2^0): poison stays in the block it came from. formats.quantize_mxfp8 is the same function in torch.
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

namespace mxfp4_moe {

constexpr uint32_t kFloatInfBits = 0x7f800000u;
constexpr uint32_t kPoisonScale = 127;
constexpr uint32_t kPoisonCodes = 0x7f7f7f7fu;

// |x| as an integer: in the order of the magnitudes, with |finite| < |inf| < |NaN|, so that one maximum over a block
// finds amax and the poison.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The E8M0 byte of the smallest power of two >= x, for finite x >= 0, as cvt.rp.satfinite.ue8m0x2.f32 gives it.
__device__ __forceinline__ uint32_t e8m0_round_up(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t exponent = bits >> 23;
  const uint32_t mantissa = bits & 0x007fffffu;
  // E8M0's smallest value 2^-127 is an fp32 denormal with mantissa 0x400000.
  const uint32_t exact = exponent == 0 ? 0x00400000u : 0u;
  return min(exponent + (mantissa > exact ? 1u : 0u), 254u);
}

// 2^(127 - byte) for byte 0 .. 254; the last one is a denormal.
__device__ __forceinline__ float e8m0_reciprocal(uint32_t byte) {
  return __uint_as_float(byte == 254u ? 0x00400000u : (254u - byte) << 23);
}

// The scale byte of a block from the largest magnitude() in it.
__device__ __forceinline__ uint32_t mx_scale(uint32_t amax) {
  return amax >= kFloatInfBits ? kPoisonScale
         : amax == 0           ? 0
                               : e8m0_round_up(__fmul_rn(__uint_as_float(amax), 1.0f / 448.0f));
}

// Four values to four E4M3 codes, the first in the lowest byte.
__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// The codes of four of a block's values, given its largest magnitude() and the scale made of it.
__device__ __forceinline__ uint32_t mx_codes(uint32_t amax, uint32_t scale, float a, float b, float c, float d) {
  const float r = e8m0_reciprocal(scale);
  const uint32_t codes = encode4(a * r, b * r, c * r, d * r);
  return amax >= kFloatInfBits ? kPoisonCodes : amax == 0 ? 0 : codes;
}

}  // namespace mxfp4_moe
