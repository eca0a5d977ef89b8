// Finalize: back to token order, bias and router weight, sum over the token's experts.
//
// in   gemm2 [R, H] bf16 or fp16 in expert order; bias [E, H] fp32 or none; topk_weights [T, k] fp32; slot_row [T * k]
// out  out [T, H] of gemm2's dtype:  acc = 0; for j in 0 .. k-1: acc = fma(weight_j, row_j + bias_j, acc)
// in fp32 and rounded once. Slots without a row (id < 0 or >= E) contribute nothing; a token with none is zero.
// Called by ops.cpp after GEMM2.
// Why it is fast, and the same every time: each lane owns 8 columns of one token and gathers the k rows itself, four
// 16-byte loads in flight, in the fixed order of j. One pass, no atomics, every byte read once.
#include "half8.cuh"
#include "launch.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;     // per lane
constexpr int kLoadsAhead = 4;  // rows of one token in flight

template <HalfType kType>
__global__ void __launch_bounds__(kThreads) finalize_kernel(const FinalizeArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  if (column >= args.hidden_size) {
    return;
  }
  using Element = typename Half8<kType>::Element;
  const auto* gemm2 = static_cast<const Element*>(args.gemm2);
  auto* out = static_cast<Element*>(args.out);

  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    const int64_t first_slot = token * args.top_k;
    float acc[kColumns] = {};
    for (int j0 = 0; j0 < args.top_k; j0 += kLoadsAhead) {
      int rows[kLoadsAhead];
      uint4 values[kLoadsAhead];
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        rows[i] = j0 + i < args.top_k ? args.slot_row[first_slot + j0 + i] : -1;
        if (rows[i] >= 0) {
          values[i] = __ldg(reinterpret_cast<const uint4*>(gemm2 + int64_t{rows[i]} * args.hidden_size + column));
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        if (rows[i] < 0) {
          continue;
        }
        float x[kColumns];
        widen8<kType>(values[i], x);
        if (args.bias != nullptr) {
          const int64_t expert = args.row_expert[rows[i]];
          const auto* bias = reinterpret_cast<const float4*>(args.bias + expert * args.hidden_size + column);
          const float4 low = __ldg(bias), high = __ldg(bias + 1);
          x[0] += low.x;
          x[1] += low.y;
          x[2] += low.z;
          x[3] += low.w;
          x[4] += high.x;
          x[5] += high.y;
          x[6] += high.z;
          x[7] += high.w;
        }
        const float weight = __ldg(args.topk_weights + first_slot + j0 + i);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          acc[c] = fmaf(weight, x[c], acc[c]);
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
             ? launch(finalize_kernel<HalfType::kBFloat16>, grid, kThreads, 0, stream, args)
             : launch(finalize_kernel<HalfType::kFloat16>, grid, kThreads, 0, stream, args);
}

}  // namespace mxfp4_moe
