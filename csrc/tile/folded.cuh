// Folded activations: MXFP8 rows as bf16, each value multiplied by its block's scale, for MMAs that take no scales.
//
// E4M3 has four significant bits and a scale is a power of two, so bf16 holds their product exactly, unless it is below
// 2^-131: then it is rounded to a multiple of that (blocks whose scale byte is under 5). A stored number is the value
// divided by 4 and a folded weight by 2, so that the largest scales that are accepted stay finite; sums are multiplied
// by 8 at the end. Infinities and NaN do not occur but as a poisoned block's NaN.
//
// Layout: [rows, k] bf16, in each block of 32 the k in the order of the words that weights come in (weight_layout.cuh,
// halves): value k = 8 t + c stands at 16 (c % 2) + 8 (c / 4) + 2 t + c / 2 % 2.
#pragma once

#include <cuda_fp16.h>

#include "mxfp8.cuh"
#include "scale_layout.cuh"

namespace mxfp4_moe {

constexpr int kFoldedActShift = 2, kFoldedWeightShift = 1;
constexpr float kFoldedUnit = 1 << (kFoldedActShift + kFoldedWeightShift);  // what an accumulator counts

MXFP4_MOE_HOST_DEVICE constexpr int folded_position(int k) {
  return k / 32 * 32 + k % 2 * 16 + k % 8 / 4 * 8 + k % 32 / 8 * 2 + k % 4 / 2;
}

#ifdef __CUDACC__

// 2^(byte - 127) / 4.
__device__ __forceinline__ float folded_scale(uint32_t byte) {
  return __uint_as_float(byte > kFoldedActShift ? (byte - kFoldedActShift) << 23 : 0x00100000u << byte);
}

// Two E4M3 codes, in the low 16 bits, as a pair of folded values.
__device__ __forceinline__ uint32_t fold_pair(uint32_t codes, float scale_low, float scale_high) {
  uint32_t halves, folded;
  asm("{ .reg .b16 low; cvt.u16.u32 low, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(halves) : "r"(codes));
  const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(folded) : "f"(x.y * scale_high), "f"(x.x * scale_low));
  return folded;
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe
