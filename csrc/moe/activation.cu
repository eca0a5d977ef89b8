// Bias, gated activation and MXFP8 quantization: what lies between the two GEMMs.
//
// in   gemm1 [R, 2I] fp32, columns in groups of 16: 8 gates, then the 8 ups of the same outputs; bias likewise [E, 2I]
// out  codes [R, I] E4M3, each block of 32 stored even k first; scales [ceil(I/128), R padded to 4, 4] E8M0
// g += bias, u += bias, then (all fp32)
//   swiglu      g * sigmoid(g) * u
//   swiglu_oai  g = min(g, limit), u = clamp(u, -limit, limit), g * sigmoid(alpha * g) * (u + beta)
// Called by ops.cpp after GEMM1. Rows past the valid count are not touched. NaN passes through the clamps.
// Why it is fast: a lane's 8 gates and 8 ups are 64 contiguous bytes, four 16-byte loads in flight at once, and the
// result never leaves registers before it is MXFP8. expf, not __expf: the accuracy is worth more than the cycles
// that memory hides.
#include "quantize_mx.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Comparisons, not fminf/fmaxf: those would swallow a NaN.
__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_below(float x, float limit) { return x < limit ? limit : x; }

__device__ __forceinline__ float apply(float gate, float up, const ActivationArgs& args) {
  if (args.activation == Activation::kSwigluOai) {
    gate = clamp_above(gate, args.limit);
    up = clamp_below(clamp_above(up, args.limit), -args.limit);
    return gate * sigmoid(args.alpha * gate) * (up + args.beta);
  }
  return gate * sigmoid(gate) * up;
}

// 8 gates and 8 ups from 16 contiguous floats.
struct GateUp {
  float4 v[4];
  static __device__ __forceinline__ GateUp load(const float* p) {
    const auto* vectors = reinterpret_cast<const float4*>(p);
    return GateUp{{__ldg(vectors), __ldg(vectors + 1), __ldg(vectors + 2), __ldg(vectors + 3)}};
  }
};

__global__ void __launch_bounds__(kThreads) activation_kernel(const ActivationArgs args) {
  const int k_tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kLanesPerWord;
  const int column = k_tile * kBlocksPerWord * kScaleBlock + threadIdx.x % kLanesPerWord * kValuesPerLane;
  const int valid_rows = *args.valid_rows;

  for (int64_t row = blockIdx.y; row < valid_rows; row += gridDim.y) {
    float x[kValuesPerLane] = {};
    if (column < args.intermediate) {
      const int64_t width = 2 * static_cast<int64_t>(args.intermediate);
      GateUp sum = GateUp::load(args.gemm1 + row * width + 2 * column);
      if (args.bias != nullptr) {
        const GateUp bias = GateUp::load(args.bias + args.row_expert[row] * width + 2 * column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum.v[i].x += bias.v[i].x;
          sum.v[i].y += bias.v[i].y;
          sum.v[i].z += bias.v[i].z;
          sum.v[i].w += bias.v[i].w;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 gate = sum.v[i], up = sum.v[i + 2];
        x[4 * i] = apply(gate.x, up.x, args);
        x[4 * i + 1] = apply(gate.y, up.y, args);
        x[4 * i + 2] = apply(gate.z, up.z, args);
        x[4 * i + 3] = apply(gate.w, up.w, args);
      }
    }
    store_k_tile(quantize_quad(x), row, k_tile, args.intermediate, args.rows, args.codes, args.scales);
  }
}

}  // namespace

cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0) {
    return cudaSuccess;
  }
  const int k_tiles = static_cast<int>(scale_k_tiles(args.intermediate));
  const dim3 grid((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, args.rows < kMaxGridY ? args.rows : kMaxGridY);
  return launch(activation_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
