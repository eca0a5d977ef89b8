// A router's scoring functions, made of single operations that each round to nearest: no fused multiply-add, no
// approximation that a GPU generation may change. So every GPU, the fused kernels and the CPU (reference/routers.py,
// the same operations in torch) get the same bits, and from them the same experts. An exp that differs in its last bit
// would choose another expert wherever two are that close.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "moe/kernels.h"

namespace mxfp4_moe {

// e^y for y <= 0, within 1.2 ulp; 0 below -87, where it is less than 2^-125. NaN stays NaN.
__device__ __forceinline__ float exp_of_negative(float y) {
  constexpr float kLog2E = 1.44269504f, kRounder = 12582912.0f;       // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // the first has 15 bits: n * kLn2High is exact
  const float shifted = __fadd_rn(__fmul_rn(y, kLog2E), kRounder);
  const float n = __fsub_rn(shifted, kRounder);
  const float r = __fsub_rn(__fsub_rn(y, __fmul_rn(n, kLn2High)), __fmul_rn(n, kLn2Low));
  float p = 1.98756915e-4f;  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2
  p = __fadd_rn(__fmul_rn(p, r), 1.39819995e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.33345205e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.16657962e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.66666657e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 5.00000119e-1f);
  const float of_r = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  const uint32_t power = (__float_as_uint(shifted) << 23) + __float_as_uint(1.0f);  // the bits of 2^n
  return y < -87.0f ? 0.0f : __fmul_rn(of_r, __uint_as_float(power));
}

// log(1 + t) for 0 <= t <= 1, within 2 ulp: 2 atanh(t / (2 + t)).
__device__ __forceinline__ float log1p_of_fraction(float t) {
  const float s = __fdiv_rn(t, __fadd_rn(t, 2.0f));
  const float z = __fmul_rn(s, s), twice = __fadd_rn(s, s);
  float p = 1.16155140e-1f;  // (atanh(s) / s - 1) / s^2 for s^2 <= 1/9
  p = __fadd_rn(__fmul_rn(p, z), 1.08480930e-1f);
  p = __fadd_rn(__fmul_rn(p, z), 1.42969698e-1f);
  p = __fadd_rn(__fmul_rn(p, z), 1.99998185e-1f);
  p = __fadd_rn(__fmul_rn(p, z), 3.33333343e-1f);
  return __fadd_rn(twice, __fmul_rn(twice, __fmul_rn(z, p)));
}

// What one logit says alone; of a softmax, the numerator. `largest` is a softmax's alone: the row's largest logit.
template <ScoringFunc kScoring>
__device__ __forceinline__ float score_of(float x, float largest = 0.0f) {
  if constexpr (kScoring == ScoringFunc::kSoftmax) {
    return exp_of_negative(__fsub_rn(x, largest));
  }
  const float t = exp_of_negative(-fabsf(x));
  if constexpr (kScoring == ScoringFunc::kSigmoid) {
    return __fdiv_rn(x < 0.0f ? t : 1.0f, __fadd_rn(t, 1.0f));
  }
  return __fsqrt_rn(__fadd_rn(x > 0.0f ? x : 0.0f, log1p_of_fraction(t)));  // softplus
}

}  // namespace mxfp4_moe
