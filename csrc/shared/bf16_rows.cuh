// Activations as SM90's kernels read them: bf16 rows [rows, k], plain k order, for MMAs that take no scales. Rows of
// fp16 are alike, values as they came, rounded to fp16: what is beyond its range becomes infinity.
//
// bf16 rows are either MXFP8 codes times their scales, or values as they came, rounded to bf16. E4M3 has four
// significant bits and a scale is a power of two, so bf16 holds their product exactly from 2^-133 to its largest
// number, 2^128 - 2^120; what lies below is rounded to a multiple of 2^-133, zero among them, and what lies above
// becomes infinity.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "shared/mxfp8.cuh"

namespace mxfp4_moe {

// Two values, rounded to nearest even: the first in the low half.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t fp16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^(byte - 127) for byte 0 .. 254; the first one is a denormal.
__device__ __forceinline__ float e8m0_value(uint32_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23);
}

// Two E4M3 codes, in the low 16 bits, times their blocks' scales.
__device__ __forceinline__ uint32_t bf16_pair_of_codes(uint32_t codes, float scale_low, float scale_high) {
  uint32_t halves;
  asm("{ .reg .b16 low; cvt.u16.u32 low, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(halves) : "r"(codes));
  const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  return bf16_pair(x.x * scale_low, x.y * scale_high);
}

}  // namespace mxfp4_moe
