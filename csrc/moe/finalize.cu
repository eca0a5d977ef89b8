// Finalize: back to token order, bias and router weight, sum over the token's experts.
//
// in   gemm2 [R, H] bf16 or fp16 in expert order; bias [E, H] fp32 or none; topk_weights [T, k] fp32; slot_row [T * k]
// out  out [T, H] of gemm2's dtype:  acc = 0; for j in 0 .. k-1: acc = fma(weight_j, row_j + bias_j, acc)
// in fp32 and rounded once. Slots without a row (id < 0 or >= E) contribute nothing; a token with none is zero.
// Called by ops.cpp after GEMM2.
// Why it is fast, and the same every time: each lane owns 8 columns of one token and gathers the k rows itself, four
// 16-byte loads in flight, in the fixed order of j. One pass, no atomics, every byte read once. It is the one
// kernel of a layer that does not start before the one before it is done (docs/decisions.md).
#include "half8.cuh"
#include "launch.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;     // per lane
constexpr int kLoadsAhead = 4;  // rows of one token in flight

// What a lane needs of up to kLoadsAhead choices of a token besides their rows.
struct Choices {
  int rows[kLoadsAhead];  // -1 for none
  float weights[kLoadsAhead];
  float4 bias[kLoadsAhead][2];

  __device__ __forceinline__ void load(const FinalizeArgs& args, int64_t first_slot, int j0, int column) {
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      const int64_t slot = first_slot + j0 + i;
      rows[i] = j0 + i < args.top_k ? __ldcg(args.slot_row + slot) : -1;
      weights[i] = rows[i] >= 0 ? __ldcg(args.topk_weights + slot) : 0.0f;
      bias[i][0] = bias[i][1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (rows[i] >= 0 && args.bias != nullptr) {
        const int64_t expert = __ldcg(args.row_expert + rows[i]);
        const auto* at = reinterpret_cast<const float4*>(args.bias + expert * args.hidden_size + column);
        bias[i][0] = __ldg(at);
        bias[i][1] = __ldg(at + 1);
      }
    }
  }
};

template <HalfType kType>
__global__ void __launch_bounds__(kThreads) finalize_kernel(const FinalizeArgs args) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  if (column >= args.hidden_size) {
    return;
  }
  using Element = typename Half8<kType>::Element;
  const auto* gemm2 = static_cast<const Element*>(args.gemm2);
  auto* out = static_cast<Element*>(args.out);

  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    float acc[kColumns] = {};
    for (int j0 = 0; j0 < args.top_k; j0 += kLoadsAhead) {
      Choices choices;
      choices.load(args, token * args.top_k, j0, column);
      uint4 values[kLoadsAhead];
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        if (choices.rows[i] >= 0) {
          values[i] =
              __ldcg(reinterpret_cast<const uint4*>(gemm2 + int64_t{choices.rows[i]} * args.hidden_size + column));
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        if (choices.rows[i] < 0) {
          continue;
        }
        float x[kColumns];
        widen8<kType>(values[i], x);
        if (args.bias != nullptr) {
          const float4 low = choices.bias[i][0], high = choices.bias[i][1];
          x[0] += low.x;
          x[1] += low.y;
          x[2] += low.z;
          x[3] += low.w;
          x[4] += high.x;
          x[5] += high.y;
          x[6] += high.z;
          x[7] += high.w;
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          acc[c] = fmaf(choices.weights[i], x[c], acc[c]);
        }
      }
    }
    *reinterpret_cast<uint4*>(out + token * args.hidden_size + column) = narrow8<kType>(acc);
  }
}

}  // namespace

cudaError_t launch_finalize(const FinalizeArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  const int lanes = args.hidden_size / kColumns;
  const dim3 grid((lanes + kThreads - 1) / kThreads, args.tokens < kMaxGridY ? args.tokens : kMaxGridY);
  return args.type == HalfType::kBFloat16
             ? launch_in_order(finalize_kernel<HalfType::kBFloat16>, grid, kThreads, stream, args)
             : launch_in_order(finalize_kernel<HalfType::kFloat16>, grid, kThreads, stream, args);
}

}  // namespace mxfp4_moe
