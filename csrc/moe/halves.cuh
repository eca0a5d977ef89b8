// 16-bit floats as they are loaded and stored, several in one word or vector, and as fp32 in registers. bf16 and fp16
// to fp32 is exact; back is RNE.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "moe/kernels.h"

namespace mxfp4_moe {

template <HalfType kType>
struct Half;

template <>
struct Half<HalfType::kBFloat16> {
  using Element = __nv_bfloat16;
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(Pair pair) { return __bfloat1622float2(pair); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

template <>
struct Half<HalfType::kFloat16> {
  using Element = __half;
  using Pair = __half2;
  static __device__ __forceinline__ float2 widen(Pair pair) { return __half22float2(pair); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

template <HalfType kType, typename Packed>
__device__ __forceinline__ void widen(const Packed& packed, float (&x)[sizeof(Packed) / 2]) {
  constexpr int kPairs = sizeof(Packed) / 4;
  typename Half<kType>::Pair pairs[kPairs];
  memcpy(pairs, &packed, sizeof(pairs));
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 wide = Half<kType>::widen(pairs[i]);
    x[2 * i] = wide.x;
    x[2 * i + 1] = wide.y;
  }
}

template <HalfType kType, typename Packed>
__device__ __forceinline__ Packed narrow(const float (&x)[sizeof(Packed) / 2]) {
  constexpr int kPairs = sizeof(Packed) / 4;
  typename Half<kType>::Pair pairs[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    pairs[i] = Half<kType>::narrow(x[2 * i], x[2 * i + 1]);
  }
  Packed packed;
  memcpy(&packed, pairs, sizeof(packed));
  return packed;
}

}  // namespace mxfp4_moe
