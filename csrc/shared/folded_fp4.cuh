// MXFP4 and NVFP4 for MMAs that take no scales (SM90's): the values of a block, codes times their scale, as bf16 rows
// have them (shared/bf16_rows.cuh). Codes and scales are those of shared/fp4.cuh.
//
// E2M1 has two significant bits and E4M3 four, so bf16 holds NVFP4's products exactly; NVFP4's global scale is in the
// GEMM's factors. MXFP4's are exact from its smallest, 2^-128, to bf16's largest number; 4 under a scale of 2^126,
// which values from 7/8 of 2^128 on get, becomes infinity. A poisoned block is NaN. In torch: fp4_to_bf16 of
// python/mxfp4_moe/_mma/operands.py.
#pragma once

#include "shared/bf16_rows.cuh"
#include "shared/fp4.cuh"

namespace mxfp4_moe {

// The value of the code that encode8_e2m1 gives for x, in fp32.
__device__ __forceinline__ float e2m1_value(float x) {
  constexpr uint32_t kSix = 0x40c00000u, kTwo = 0x40000000u, kTwoBits = 0xffc00000u;
  const uint32_t size = min(magnitude(x), kSix);
  // Below 2 the values are multiples of a half, which is the last bit of fp32 numbers from 2^22 on.
  constexpr float kLastIsHalf = 4194304.0f;
  const float small = __fadd_rn(__fadd_rn(__uint_as_float(size), kLastIsHalf), -kLastIsHalf);
  // From 2 on they are exponent and first bit of the mantissa.
  const uint32_t large = (size + 0x001fffffu + (size >> 22 & 1u)) & kTwoBits;
  const uint32_t sign = magnitude(x) > kFloatInfBits ? 0u : __float_as_uint(x) & 0x80000000u;
  return __uint_as_float((size < kTwo ? __float_as_uint(small) : large) | sign);
}

// What a block's values are multiplied by before they are rounded to codes, and codes for the row's values.
struct FoldedBlock {
  float multiplier, scale;
};

// Of the largest magnitude() in it.
__device__ __forceinline__ FoldedBlock folded_mxfp4(uint32_t amax) {
  const uint32_t byte = mxfp4_scale(amax);
  return {mxfp4_multiplier(byte), amax >= kFloatInfBits ? __int_as_float(0x7fffffff) : e8m0_value(byte)};
}
// inverse: the reciprocal of the global scale.
__device__ __forceinline__ FoldedBlock folded_nvfp4(uint32_t amax, float global_scale, float inverse) {
  const uint32_t byte = nvfp4_scale(amax, global_scale);
  return {nvfp4_multiplier(amax, byte, inverse), amax >= kFloatInfBits ? __int_as_float(0x7fffffff) : e4m3_value(byte)};
}

__device__ __forceinline__ float folded(float x, const FoldedBlock& block) {
  return __fmul_rn(e2m1_value(__fmul_rn(x, block.multiplier)), block.scale);
}

// A lane's eight values.
__device__ __forceinline__ uint4 folded8(const float (&x)[8], const FoldedBlock& block) {
  const auto pair = [&](int i) { return bf16_pair(folded(x[i], block), folded(x[i + 1], block)); };
  return make_uint4(pair(0), pair(2), pair(4), pair(6));
}

}  // namespace mxfp4_moe
