// Finalize: back to token order, bias and router weight, sum over the token's experts.
//
// in   gemm2 [R, H] in expert order, bf16, or fp32 for an fp16 output; bias [E, H] fp32 or none; topk_weights [T, k]
//      fp32; slot_row [T * k]
// out  out [T, H] bf16 or fp16, by finalize_token.cuh's rule
// Rows are fp32 for fp16, since a row that fp16 cannot hold may still have a weight with which the sum can be held.
// Called by layer.cpp after GEMM2. Of many rows with biases it leaves all to finalize_strips.cu.
// Why it is fast, and the same every time: each lane owns 16 bytes of each of a token's rows (of few tokens 2 columns)
// and gathers the k rows itself, four loads in flight, in the fixed order of j. One pass, no atomics, every byte read
// once. Of few tokens it starts before GEMM2 is done, by the rule of shared/launch.cuh, and has biases brought to L2
// meanwhile; of many, where its blocks would only take the place of GEMM2's, it does not.
#include "moe/finalize_token.cuh"
#include "moe/warps.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
// Fewer columns per lane for few tokens, where a thread's own time is the kernel's: less work and code.
constexpr int kFewColumns = 2, kFewTokens = 8;
constexpr int kLineColumns = 32;  // of fp32, in a line of L2

// Biases in memory, if there are any.
template <int kColumns>
struct BiasesInMemory {
  using Floats = std::conditional_t<kColumns == 2, float2, float4>;
  const float* at;  // expert 0's, at the lane's columns; or null
  int hidden_size;

  struct Part {
    static constexpr int kLoads = kColumns * sizeof(float) / sizeof(Floats);
    Floats loaded[kLoads];
    __device__ __forceinline__ void load(const BiasesInMemory& biases, const int32_t* row_expert) {
      if (biases.at == nullptr) return;
      const int64_t expert = __ldcg(row_expert);
      const auto* from = reinterpret_cast<const Floats*>(biases.at + expert * biases.hidden_size);
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        loaded[l] = __ldg(from + l);
      }
    }
    __device__ __forceinline__ void add(const BiasesInMemory& biases, float (&x)[kColumns]) const {
      if (biases.at == nullptr) return;
      float bias[kColumns];
      memcpy(bias, loaded, sizeof(bias));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        x[c] += bias[c];
      }
    }
  };
};

// Asks L2 for the biases of a token's experts, for which finalize would wait in DRAM, and changes no result. In a layer
// what it reads was complete when the kernel before this one began, so that it may come before the wait. Elsewhere, as
// in tests, it may be anything.
__device__ __forceinline__ void ask_for_biases(const FinalizeArgs& args, int64_t token, int column) {
#pragma unroll 1
  for (int j = 0; j < args.top_k; ++j) {
    const int row = __ldcg(args.slot_row + token * args.top_k + j);
    if (row < 0 || row >= args.tokens * args.top_k) {
      continue;
    }
    const int64_t expert = __ldcg(args.row_expert + row);
    if (expert >= 0 && expert < args.experts) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(args.bias + expert * args.hidden_size + column));
    }
  }
}

template <HalfType kType, int kColumns>
__global__ void __launch_bounds__(kThreads) finalize_kernel(const FinalizeArgs args) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kColumns;
  if constexpr (kColumns == kFewColumns) {
    // One token is a block's: with few, there are as many blocks along y. One lane asks for a line of 128 bytes.
    if (args.bias != nullptr && column < args.hidden_size && column % kLineColumns == 0) {
      ask_for_biases(args, blockIdx.y, column);
    }
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  if (column >= args.hidden_size) {
    return;
  }
  const BiasesInMemory<kColumns> biases{args.bias == nullptr ? nullptr : args.bias + column, args.hidden_size};
  for (int64_t token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    finalize_token<kType, kColumns>(args, token, column, biases);
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
  if (finalizes_by_strips(args)) {
    return launch_finalize_strips(args, stream);
  }
  return args.type == HalfType::kBFloat16 ? launch_for<HalfType::kBFloat16>(args, stream)
                                          : launch_for<HalfType::kFloat16>(args, stream);
}

}  // namespace mxfp4_moe
