// Folded activations: MXFP8 rows as bf16, each value multiplied by its block's scale, for MMAs that take no scales.
//
// E4M3 has four significant bits and a scale is a power of two, so bf16 holds their product exactly. It is stored times
// 2^90, which makes up for the 2^-126 of an FP4 code whose bits are read as bf16: then the product of the two, and sums
// of 32 of them, are normal fp32 numbers for scale bytes 47 to 156, largest magnitudes of 2^-72 to 2^37. Such blocks
// are near. Blocks of other scales are far: they are stored times another 2^100 or 2^-100, and a kernel that writes one
// with a value other than zero sets the flag has_far. Where it is set, the GEMM reads the scales, which are written
// beside the values as for MXFP8 rows, to undo the shift. No value is infinite; NaN occurs only in poisoned blocks.
//
// Accumulators count 2^35, so that a weight scale of any byte is one factor (tile/sm90/wgmma_kernel.cuh): sums below
// 2^-91 lose bits there.
//
// Layout: [rows, k] bf16, in each block of 32 the k in the order of the words that weights come in (weight_layout.cuh,
// halves): value k = 8 t + c stands at 16 (c % 2) + 8 (c / 4) + 2 t + c / 2 % 2.
#pragma once

#include <cuda_fp16.h>

#include "shared/mxfp8.cuh"
#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

constexpr int kNearScaleMin = 47, kNearScaleMax = 156, kNearShift = 90, kFarShift = 100;
constexpr int kAccumulatorExponent = 35;

// A block whose scale is this byte is stored times 2^shift.
MXFP4_MOE_HOST_DEVICE constexpr int folded_shift(int byte) {
  return kNearShift + (byte < kNearScaleMin ? kFarShift : byte > kNearScaleMax ? -kFarShift : 0);
}
MXFP4_MOE_HOST_DEVICE constexpr bool is_far(int byte) { return byte < kNearScaleMin || byte > kNearScaleMax; }

MXFP4_MOE_HOST_DEVICE constexpr int folded_position(int k) {
  return k / 32 * 32 + k % 2 * 16 + k % 8 / 4 * 8 + k % 32 / 8 * 2 + k % 4 / 2;
}

#ifdef __CUDACC__

// What a block's values are multiplied by: its scale and the shift.
__device__ __forceinline__ float folded_scale(int byte) {
  return __uint_as_float(static_cast<uint32_t>(byte + folded_shift(byte)) << 23);
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
