// Bias, activation and MXFP8 quantization: what lies between the two GEMMs.
//
// in   gemm1 fp32; gated: [R, 2I], columns in groups of 16, 8 gates, then the 8 ups of the same outputs; not gated:
//      [R, I]; bias likewise [E, 2I] or [E, I]
// out  codes [R, I] E4M3, each block of 32 stored even k first; scales [ceil(I/128), R padded to 4, 4] E8M0
// g += bias, u += bias (not gated: x += bias), then the activation (tile/activation.cuh). Asked to, it rounds what it
// reads from gemm1, and what it quantizes, to bf16 or fp16 (RNE; beyond fp16's range to infinity): so do pipelines that
// keep these values in the output dtype. alpha, beta and limit are one number, or one per expert.
// Called by ops.cpp after GEMM1, for the activations and tiles that GEMM1's own epilogue does not take. Rows past the
// valid count are not touched.
// Why it is fast: a lane's 8 gates and 8 ups are 64 contiguous bytes, four 16-byte loads in flight at once, and the
// result never leaves registers before it is MXFP8.
#include "../tile/activation.cuh"
#include "quantize_mx.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;

// A lane's contiguous floats: 8 gates and 8 ups, or 8 values.
template <int kCount>
__device__ __forceinline__ void load(const float* p, float (&x)[kCount]) {
  float4 vectors[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    vectors[i] = __ldcg(reinterpret_cast<const float4*>(p) + i);
  }
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    x[4 * i] = vectors[i].x;
    x[4 * i + 1] = vectors[i].y;
    x[4 * i + 2] = vectors[i].z;
    x[4 * i + 3] = vectors[i].w;
  }
}

template <int kCount>
__device__ __forceinline__ void round_all(Rounding rounding, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = round_to(rounding, x[i]);
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
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int valid_rows = __ldcg(args.valid_rows);

  for (int64_t row = blockIdx.y; row < valid_rows; row += gridDim.y) {
    float x[kValuesPerLane] = {};
    if (column < args.intermediate) {
      float sum[kLoaded];
      load(args.gemm1 + row * width + loaded_column, sum);
      if constexpr (kRounds) {
        round_all(args.rounding, sum);
      }
      if (args.bias != nullptr) {
        float bias[kLoaded];
        load(args.bias + __ldcg(args.row_expert + row) * width + loaded_column, bias);
#pragma unroll
        for (int i = 0; i < kLoaded; ++i) {
          sum[i] += bias[i];
        }
      }
      if constexpr (kGated) {
        Numbers numbers = {};
        if constexpr (kActivation == Activation::kSwigluOai || kActivation == Activation::kSwigluStep) {
          const int expert = __ldcg(args.row_expert + row);
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
        round_all(args.rounding, x);
      }
    }
    const QuadCodes quad = quantize_quad(x);
    store_k_tile(quad, row, k_tile, {args.codes, args.scales, args.has_far, args.rows, args.intermediate});
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
