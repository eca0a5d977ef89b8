// Eight 16-bit floats in one 16-byte access, as fp32 in registers. bf16 and fp16 to fp32 is exact; back is RNE.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "moe.h"

namespace mxfp4_moe {

template <HalfType kType>
struct Half8;

template <>
struct Half8<HalfType::kBFloat16> {
  using Element = __nv_bfloat16;
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float2 widen(Pair pair) { return __bfloat1622float2(pair); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

template <>
struct Half8<HalfType::kFloat16> {
  using Element = __half;
  using Pair = __half2;
  static __device__ __forceinline__ float2 widen(Pair pair) { return __half22float2(pair); }
  static __device__ __forceinline__ Pair narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

template <HalfType kType>
__device__ __forceinline__ void widen8(const uint4& packed, float (&x)[8]) {
  using Pair = typename Half8<kType>::Pair;
  Pair pairs[4];
  memcpy(pairs, &packed, sizeof(pairs));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 wide = Half8<kType>::widen(pairs[i]);
    x[2 * i] = wide.x;
    x[2 * i + 1] = wide.y;
  }
}

template <HalfType kType>
__device__ __forceinline__ uint4 narrow8(const float (&x)[8]) {
  using Pair = typename Half8<kType>::Pair;
  Pair pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = Half8<kType>::narrow(x[2 * i], x[2 * i + 1]);
  }
  uint4 packed;
  memcpy(&packed, pairs, sizeof(packed));
  return packed;
}

}  // namespace mxfp4_moe
