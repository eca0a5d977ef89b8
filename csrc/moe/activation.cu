// Bias, activation and MXFP8 quantization: what lies between the two GEMMs.
//
// in   gemm1 fp32; gated: [R, 2I], columns in groups of 16, 8 gates, then the 8 ups of the same outputs; not gated:
//      [R, I]; bias likewise [E, 2I] or [E, I]
// out  codes [R, I] E4M3, each block of 32 stored even k first; scales [ceil(I/128), R padded to 4, 4] E8M0
// g += bias, u += bias (not gated: x += bias), then (all fp32)
//   swiglu       silu(g) * u                                     silu(x) = x * sigmoid(x)
//   swiglu_oai   g = min(g, limit), u = clamp(u, -limit, limit), g * sigmoid(alpha * g) * (u + beta)
//   swiglu_step  min(silu(g), limit) * clamp(u, -limit, limit)
//   geglu        gelu(g) * u           gelu(x) = x/2 * erfc(-x / sqrt(2))
//   geglu_tanh   gelu_tanh(g) * u      gelu_tanh(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
//   silu, gelu, gelu_tanh, relu, relu2 = relu(x)^2, identity
// Asked to, it rounds what it reads from gemm1, and what it quantizes, to bf16 or fp16 (RNE; beyond fp16's range to
// infinity): so do pipelines that keep these values in the output dtype.
// alpha, beta and limit are one number, or one per expert. Both gelus are written so that nothing cancels where x is
// far below zero. Called by ops.cpp after GEMM1. Rows past the valid count are not touched. NaN passes through.
// Why it is fast: a lane's 8 gates and 8 ups are 64 contiguous bytes, four 16-byte loads in flight at once, and the
// result never leaves registers before it is MXFP8. expf, not __expf: the accuracy is worth more than the cycles
// that memory hides.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "quantize_mx.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;

struct Numbers {
  float alpha, beta, limit;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

// Comparisons, not fminf/fmaxf: those would swallow a NaN.
__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_below(float x, float limit) { return x < limit ? limit : x; }
__device__ __forceinline__ float clamp_both(float x, float limit) { return clamp_below(clamp_above(x, limit), -limit); }

template <Activation kActivation>
__device__ __forceinline__ float apply(float gate, float up, const Numbers& numbers) {
  if constexpr (kActivation == Activation::kSwiglu) {
    return silu(gate) * up;
  } else if constexpr (kActivation == Activation::kSwigluOai) {
    gate = clamp_above(gate, numbers.limit);
    return gate * sigmoid(numbers.alpha * gate) * (clamp_both(up, numbers.limit) + numbers.beta);
  } else if constexpr (kActivation == Activation::kSwigluStep) {
    return clamp_above(silu(gate), numbers.limit) * clamp_both(up, numbers.limit);
  } else if constexpr (kActivation == Activation::kGeglu) {
    return gelu(gate) * up;
  } else {
    static_assert(kActivation == Activation::kGegluTanh);
    return gelu_tanh(gate) * up;
  }
}

template <Activation kActivation>
__device__ __forceinline__ float apply(float x) {
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
  } else {
    static_assert(kActivation == Activation::kIdentity);
    return x;
  }
}

// A lane's contiguous floats: 8 gates and 8 ups, or 8 values.
template <int kCount>
__device__ __forceinline__ void load(const float* p, float (&x)[kCount]) {
  float4 vectors[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    vectors[i] = __ldg(reinterpret_cast<const float4*>(p) + i);
  }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    x[4 * i] = vectors[i].x;
    x[4 * i + 1] = vectors[i].y;
    x[4 * i + 2] = vectors[i].z;
    x[4 * i + 3] = vectors[i].w;
  }
}

__device__ __forceinline__ float of_expert(const PerExpert& number, int expert) {
  return number.values == nullptr ? number.value : __ldg(number.values + expert);
}

template <int kCount>
__device__ __forceinline__ void round_to(Rounding rounding, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = rounding == Rounding::kBFloat16 ? __bfloat162float(__float2bfloat16_rn(x[i]))
                                           : __half2float(__float2half_rn(x[i]));
  }
}

// kRounds is a constant so that those who do not round do not pay: which dtype, those who do find out as they run.
template <Activation kActivation, bool kRounds>
__global__ void __launch_bounds__(kThreads) activation_kernel(const ActivationArgs args) {
  constexpr bool kGated = is_gated(kActivation);
  constexpr int kLoaded = kGated ? 2 * kValuesPerLane : kValuesPerLane;
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const int64_t width = int64_t{args.intermediate} * (kGated ? 2 : 1);
  const int loaded_column = kGated ? 2 * column : column;
  const int valid_rows = *args.valid_rows;

  for (int64_t row = blockIdx.y; row < valid_rows; row += gridDim.y) {
    float x[kValuesPerLane] = {};
    if (column < args.intermediate) {
      float sum[kLoaded];
      load(args.gemm1 + row * width + loaded_column, sum);
      if constexpr (kRounds) {
        round_to(args.rounding, sum);
      }
      if (args.bias != nullptr) {
        float bias[kLoaded];
        load(args.bias + args.row_expert[row] * width + loaded_column, bias);
#pragma unroll
        for (int i = 0; i < kLoaded; ++i) {
          sum[i] += bias[i];
        }
      }
      if constexpr (kGated) {
        Numbers numbers = {};
        if constexpr (kActivation == Activation::kSwigluOai || kActivation == Activation::kSwigluStep) {
          const int expert = args.row_expert[row];
          numbers = {of_expert(args.alpha, expert), of_expert(args.beta, expert), of_expert(args.limit, expert)};
        }
#pragma unroll
        for (int i = 0; i < kValuesPerLane; ++i) {
          x[i] = apply<kActivation>(sum[i], sum[i + kValuesPerLane], numbers);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kValuesPerLane; ++i) {
          x[i] = apply<kActivation>(sum[i]);
        }
      }
      if constexpr (kRounds) {
        round_to(args.rounding, x);
      }
    }
    store_k_tile(quantize_quad(x), row, k_tile, args.intermediate, args.rows, args.codes, args.scales);
  }
}

using Kernel = void (*)(ActivationArgs);

template <bool kRounds>
Kernel kernel_of(Activation activation) {
  switch (activation) {
    case Activation::kSwiglu:
      return activation_kernel<Activation::kSwiglu, kRounds>;
    case Activation::kSwigluOai:
      return activation_kernel<Activation::kSwigluOai, kRounds>;
    case Activation::kSwigluStep:
      return activation_kernel<Activation::kSwigluStep, kRounds>;
    case Activation::kGeglu:
      return activation_kernel<Activation::kGeglu, kRounds>;
    case Activation::kGegluTanh:
      return activation_kernel<Activation::kGegluTanh, kRounds>;
    case Activation::kSilu:
      return activation_kernel<Activation::kSilu, kRounds>;
    case Activation::kGelu:
      return activation_kernel<Activation::kGelu, kRounds>;
    case Activation::kGeluTanh:
      return activation_kernel<Activation::kGeluTanh, kRounds>;
    case Activation::kRelu:
      return activation_kernel<Activation::kRelu, kRounds>;
    case Activation::kRelu2:
      return activation_kernel<Activation::kRelu2, kRounds>;
    case Activation::kIdentity:
      return activation_kernel<Activation::kIdentity, kRounds>;
  }
  return nullptr;
}

}  // namespace

cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  const Kernel kernel =
      args.rounding == Rounding::kNone ? kernel_of<false>(args.activation) : kernel_of<true>(args.activation);
  if (kernel == nullptr) {
    return cudaErrorInvalidValue;
  }
  const int k_tiles = static_cast<int>(scale_k_tiles(args.intermediate));
  const dim3 grid((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, args.rows < kMaxGridY ? args.rows : kMaxGridY);
  return launch(kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
