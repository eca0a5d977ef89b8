// Finalize: back to token order, bias and router weight, sum over the token's experts.
//
// in   gemm2 [R, H] in expert order, bf16, or fp32 for an fp16 output; bias [E, H] fp32 or none; topk_weights [T, k]
//      fp32; slot_row [T * k]
// out  out [T, H] bf16 or fp16:  acc = 0; for j in 0 .. k-1: acc = fma(weight_j, row_j + bias_j, acc)
// in fp32 and rounded once. Slots without a row (id < 0 or >= E) contribute nothing; a token with none is zero.
// Rows are fp32 for fp16, since a row that fp16 cannot hold may still have a weight with which the sum can be held.
// Called by layer.cpp after GEMM2.
// Why it is fast, and the same every time: each lane owns 16 bytes of each of a token's rows (of few tokens 2 columns)
// and gathers the k rows itself, four loads in flight, in the fixed order of j. One pass, no atomics, every byte read
// once. Of few tokens it starts before GEMM2 is done, by the rule of shared/launch.cuh; of many, where its blocks would
// only take the place of GEMM2's, it does not.
#include <type_traits>

#include "moe/halves.cuh"
#include "moe/warps.cuh"
#include "shared/launch.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kLoadsAhead = 4;  // rows of one token in flight
// Columns per lane: 16-byte loads of rows; or, for few tokens, where a thread's own time is the kernel's, less work and
// code.
template <HalfType kType>
constexpr int kManyColumns = kType == HalfType::kFloat16 ? 4 : 8;
constexpr int kFewColumns = 2, kFewTokens = 8;

// How many 16-bit values a lane stores at once.
template <int kColumns>
using Packed = std::conditional_t<kColumns == 2, uint32_t, std::conditional_t<kColumns == 4, uint2, uint4>>;

// A lane's columns of one row of GEMM2, as they are loaded.
template <HalfType kType, int kColumns>
struct RowPart {
  Packed<kColumns> packed;
  __device__ __forceinline__ void load(const void* gemm2, int64_t at) {
    packed = __ldcg(reinterpret_cast<const Packed<kColumns>*>(static_cast<const uint16_t*>(gemm2) + at));
  }
  __device__ __forceinline__ void widen(float (&x)[kColumns]) const { mxfp4_moe::widen<kType>(packed, x); }
};

template <int kColumns>
struct RowPart<HalfType::kFloat16, kColumns> {
  using Floats = std::conditional_t<kColumns == 2, float2, float4>;
  static_assert(sizeof(Floats) == kColumns * sizeof(float));
  Floats floats;
  __device__ __forceinline__ void load(const void* gemm2, int64_t at) {
    floats = __ldcg(reinterpret_cast<const Floats*>(static_cast<const float*>(gemm2) + at));
  }
  __device__ __forceinline__ void widen(float (&x)[kColumns]) const { memcpy(x, &floats, sizeof(x)); }
};

// What a lane needs of up to kLoadsAhead choices of a token besides their rows.
template <int kColumns>
struct Choices {
  using Floats = std::conditional_t<kColumns == 2, float2, float4>;
  static constexpr int kLoads = kColumns * sizeof(float) / sizeof(Floats);
  int rows[kLoadsAhead];  // -1 for none
  float weights[kLoadsAhead];
  float bias[kLoadsAhead][kColumns];

  __device__ __forceinline__ void load(const FinalizeArgs& args, int64_t first_slot, int j0, int column) {
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      const int64_t slot = first_slot + j0 + i;
      rows[i] = j0 + i < args.top_k ? __ldcg(args.slot_row + slot) : -1;
      weights[i] = rows[i] >= 0 ? __ldcg(args.topk_weights + slot) : 0.0f;
      Floats loaded[kLoads] = {};
      if (rows[i] >= 0 && args.bias != nullptr) {
        const int64_t expert = __ldcg(args.row_expert + rows[i]);
        const auto* at = reinterpret_cast<const Floats*>(args.bias + expert * args.hidden_size + column);
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          loaded[l] = __ldg(at + l);
        }
      }
      memcpy(bias[i], loaded, sizeof(loaded));
    }
  }
};

template <HalfType kType, int kColumns>
__global__ void __launch_bounds__(kThreads) finalize_kernel(const FinalizeArgs args) {
  if constexpr (kColumns == kFewColumns) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  if (column >= args.hidden_size) {
    return;
  }
  auto* out = static_cast<typename Half<kType>::Element*>(args.out);

  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    float acc[kColumns] = {};
    for (int j0 = 0; j0 < args.top_k; j0 += kLoadsAhead) {
      Choices<kColumns> choices;
      choices.load(args, token * args.top_k, j0, column);
      RowPart<kType, kColumns> values[kLoadsAhead];
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        if (choices.rows[i] >= 0) {
          values[i].load(args.gemm2, int64_t{choices.rows[i]} * args.hidden_size + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        if (choices.rows[i] < 0) {
          continue;
        }
        float x[kColumns];
        values[i].widen(x);
        if (args.bias != nullptr) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            x[c] += choices.bias[i][c];
          }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          acc[c] = fmaf(choices.weights[i], x[c], acc[c]);
        }
      }
    }
    *reinterpret_cast<Packed<kColumns>*>(out + token * args.hidden_size + column) =
        narrow<kType, Packed<kColumns>>(acc);
  }
}

template <HalfType kType, int kColumns>
cudaError_t launch_columns(const FinalizeArgs& args, cudaStream_t stream) {
  const int lanes = args.hidden_size / kColumns;
  const dim3 grid((lanes + kThreads - 1) / kThreads, args.tokens < kMaxGridY ? args.tokens : kMaxGridY);
  LaunchOptions options;
  options.early = kColumns == kFewColumns;
  return launch_with(options, finalize_kernel<kType, kColumns>, grid, kThreads, stream, args);
}

template <HalfType kType>
cudaError_t launch_for(const FinalizeArgs& args, cudaStream_t stream) {
  return args.tokens <= kFewTokens ? launch_columns<kType, kFewColumns>(args, stream)
                                   : launch_columns<kType, kManyColumns<kType>>(args, stream);
}

}  // namespace

cudaError_t launch_finalize(const FinalizeArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  return args.type == HalfType::kBFloat16 ? launch_for<HalfType::kBFloat16>(args, stream)
                                          : launch_for<HalfType::kFloat16>(args, stream);
}

}  // namespace mxfp4_moe
