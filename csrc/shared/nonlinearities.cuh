// What lies between the two GEMMs, value by value: gate and up, or one x, to the activation. All in fp32.
//
//   swiglu       silu(g) * u                                     silu(x) = x * sigmoid(x)
//   swiglu_oai   g = min(g, limit), u = clamp(u, -limit, limit), g * sigmoid(alpha * g) * (u + beta)
//   swiglu_step  min(silu(g), limit) * clamp(u, -limit, limit)
//   situ         soft(g, beta) * sigmoid(g) * soft(u, limit)    soft(x, s) = s * tanh(x / s)
//   geglu        gelu(g) * u           gelu(x) = x/2 * erfc(-x / sqrt(2))
//   geglu_tanh   gelu_tanh(g) * u      gelu_tanh(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
//   silu, gelu, gelu_tanh, relu, relu2 = relu(x)^2, clamped_relu2 = soft(relu(x), limit)^2, identity
// Both gelus are written so that nothing cancels where x is far below zero. NaN passes through. expf, not __expf: the
// accuracy is worth more than the cycles that memory hides. Used by the tiles (GEMM1's epilogue) and csrc/moe.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "tile_abi.h"

namespace mxfp4_moe {

// The order of activations.py, whose codes these are: gated ones first.
enum class Activation : int {
  kSwiglu = MXFP4_MOE_SWIGLU,
  kSwigluOai = MXFP4_MOE_SWIGLU_OAI,
  kSwigluStep = MXFP4_MOE_SWIGLU_STEP,
  kGeglu,
  kGegluTanh,
  kSitu = MXFP4_MOE_SITU,
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kRelu2,
  kClampedRelu2,
  kIdentity,
};
constexpr int kNumActivations = static_cast<int>(Activation::kIdentity) + 1;
constexpr bool is_gated(Activation activation) { return activation <= Activation::kSitu; }
// Whether GEMM1's epilogue takes it, in tiles that activate: what models have between their GEMMs.
constexpr bool is_fused(Activation activation) {
  return activation <= Activation::kSwigluStep || activation == Activation::kSitu;
}

// Whether it takes any of alpha, beta and limit.
constexpr bool has_numbers(Activation activation) {
  return activation == Activation::kSwigluOai || activation == Activation::kSwigluStep ||
         activation == Activation::kSitu || activation == Activation::kClampedRelu2;
}

// To which dtype GEMM1's values and the activation's are rounded; fp32 means not at all.
enum class Rounding : int {
  kNone = MXFP4_MOE_OUT_FLOAT32,
  kBFloat16 = MXFP4_MOE_OUT_BFLOAT16,
  kFloat16 = MXFP4_MOE_OUT_FLOAT16
};

// A number that the layer has once, or once per expert.
using PerExpert = Mxfp4MoePerExpert;

#ifdef __CUDACC__

struct Numbers {
  float alpha, beta, limit;
};

// 1 / x to one ulp, without the subroutine for denormals that division brings; for 1 + exp(.), which has none.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

// Comparisons, not fminf/fmaxf: those would swallow a NaN.
__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_below(float x, float limit) { return x < limit ? limit : x; }
__device__ __forceinline__ float clamp_both(float x, float limit) { return clamp_below(clamp_above(x, limit), -limit); }

// limit * tanh(x / limit); x itself where there is no limit, +inf, of which rcp makes zero. A factor in place of the
// division is the same to one ulp.
__device__ __forceinline__ float soft_clamp(float x, float limit) {
  const float inverse = reciprocal(limit);
  return inverse == 0.0f ? x : limit * tanhf(x * inverse);
}
__device__ __forceinline__ float situ(float gate, float up, const Numbers& numbers) {
  return soft_clamp(gate, numbers.beta) * sigmoid(gate) * soft_clamp(up, numbers.limit);
}
__device__ __forceinline__ float swiglu_step(float gate, float up, const Numbers& numbers) {
  return clamp_above(silu(gate), numbers.limit) * clamp_both(up, numbers.limit);
}

__device__ __forceinline__ float swiglu_oai(float gate, float up, const Numbers& numbers) {
  gate = clamp_above(gate, numbers.limit);
  return gate * sigmoid(numbers.alpha * gate) * (clamp_both(up, numbers.limit) + numbers.beta);
}
// swiglu is swiglu_oai with these numbers, up to the sign of a zero, which no product of the second GEMM can show.
constexpr Numbers kSwigluNumbers = {1.0f, 0.0f, __builtin_huge_valf()};

template <Activation kActivation>
__device__ __forceinline__ float apply(float gate, float up, const Numbers& numbers) {
  if constexpr (kActivation == Activation::kSwiglu) {
    return silu(gate) * up;
  } else if constexpr (kActivation == Activation::kSwigluOai) {
    return swiglu_oai(gate, up, numbers);
  } else if constexpr (kActivation == Activation::kSwigluStep) {
    return swiglu_step(gate, up, numbers);
  } else if constexpr (kActivation == Activation::kGeglu) {
    return gelu(gate) * up;
  } else if constexpr (kActivation == Activation::kGegluTanh) {
    return gelu_tanh(gate) * up;
  } else {
    static_assert(kActivation == Activation::kSitu);
    return situ(gate, up, numbers);
  }
}

template <Activation kActivation>
__device__ __forceinline__ float apply(float x, const Numbers& numbers) {
  if constexpr (kActivation == Activation::kSilu) {
    return silu(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu_tanh(x);
  } else if constexpr (kActivation == Activation::kRelu) {
    return clamp_below(x, 0.0f);
  } else if constexpr (kActivation == Activation::kRelu2) {
    const float positive = clamp_below(x, 0.0f);
    return positive * positive;
  } else if constexpr (kActivation == Activation::kClampedRelu2) {
    const float positive = soft_clamp(clamp_below(x, 0.0f), numbers.limit);
    return positive * positive;
  } else {
    static_assert(kActivation == Activation::kIdentity);
    return x;
  }
}

__device__ __forceinline__ float of_expert(const PerExpert& number, int expert) {
  return number.values == nullptr ? number.value : __ldg(number.values + expert);
}

// Which dtype is found out as it runs; RNE, beyond fp16's range to infinity.
__device__ __forceinline__ float round_to(Rounding rounding, float x) {
  return rounding == Rounding::kNone       ? x
         : rounding == Rounding::kBFloat16 ? __bfloat162float(__float2bfloat16_rn(x))
                                           : __half2float(__float2half_rn(x));
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe
