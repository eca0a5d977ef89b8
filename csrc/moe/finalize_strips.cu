// Finalize of many rows with biases: what finalize.cu does, by strips of columns.
//
// in, out  as in finalize.cu; biases [E, H] fp32, of which E * kStripColumns fit a block's shared memory
// Called by finalize.cu. Why it is fast: a row's bias has twice the bytes of the row, or as many for an fp16 output. A
// block has the biases of all experts for a strip of columns in shared memory, and so reads them once and not once per
// row. One block per SM has an equal part of all pairs of strip and token, strips outermost. It does not start early,
// as finalize.cu of many tokens (docs/performance.md).
#include "moe/finalize_token.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 896;  // each with 72 registers; with 1024 the 64 left are not enough
constexpr int kStripColumns = 64;
constexpr int kQuads = kStripColumns / 4;  // of fp32, of a strip and an expert
constexpr int kSlotsWorthIt = 4096;

size_t strip_bytes(const FinalizeArgs& args) { return size_t(args.experts) * kStripColumns * sizeof(float); }

// A strip's biases. The lanes of a row read 16 bytes each, next to one another, so that no two want the same bank:
// before all second quads of lanes come all first ones.
template <int kColumns>
struct BiasesInStrip {
  static constexpr int kOfLane = kColumns / 4, kLanes = kStripColumns / kColumns;
  const float4* strip;  // [E][kOfLane][kLanes]
  int lane;

  // Where the strip's columns 4 quad to 4 quad + 3 are.
  static __device__ __forceinline__ int place(int quad) { return quad % kOfLane * kLanes + quad / kOfLane; }

  struct Part {
    int expert;
    __device__ __forceinline__ void load(const BiasesInStrip&, const int32_t* row_expert) {
      expert = __ldcg(row_expert);
    }
    __device__ __forceinline__ void add(const BiasesInStrip& biases, float (&x)[kColumns]) const {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const float4 bias = biases.strip[expert * kQuads + i * kLanes + biases.lane];
        x[4 * i] += bias.x;
        x[4 * i + 1] += bias.y;
        x[4 * i + 2] += bias.z;
        x[4 * i + 3] += bias.w;
      }
    }
  };
};

template <HalfType kType>
__global__ void __launch_bounds__(kThreads, 1) finalize_strips_kernel(const FinalizeArgs args) {
  constexpr int kColumns = kManyColumns<kType>;
  using Biases = BiasesInStrip<kColumns>;
  extern __shared__ float4 strip[];
  const int lane = threadIdx.x % Biases::kLanes;
  const Biases biases{strip, lane};
  const int strips = (args.hidden_size + kStripColumns - 1) / kStripColumns;
  const int64_t pairs = int64_t{strips} * args.tokens;
  const int64_t end = pairs * (blockIdx.x + 1) / gridDim.x;
  for (int64_t at = pairs * blockIdx.x / gridDim.x; at < end;) {
    const int first_column = static_cast<int>(at / args.tokens) * kStripColumns;
    const int first_token = static_cast<int>(at % args.tokens);
    const int end_token = static_cast<int>(min(int64_t{args.tokens}, first_token + end - at));
    for (int i = threadIdx.x; i < args.experts * kQuads; i += kThreads) {
      const int quad = i % kQuads, column = first_column + 4 * quad;
      if (column < args.hidden_size) {
        strip[i - quad + Biases::place(quad)] =
            __ldg(reinterpret_cast<const float4*>(args.bias + int64_t{i / kQuads} * args.hidden_size + column));
      }
    }
    __syncthreads();
    const int column = first_column + lane * kColumns;
    if (column < args.hidden_size) {
      for (int token = first_token + threadIdx.x / Biases::kLanes; token < end_token;
           token += kThreads / Biases::kLanes) {
        finalize_token<kType, kColumns>(args, token, column, biases);
      }
    }
    __syncthreads();
    at += end_token - first_token;
  }
}

// Of the current device; 0 where the driver does not say.
int attribute_of(PerDevice& known, cudaDeviceAttr attribute) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return known.get(device, [&] {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess) return value;
    cudaGetLastError();
    return 0;
  });
}

int most_smem_bytes() {
  static PerDevice known;
  return attribute_of(known, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int multiprocessors() {
  static PerDevice known;
  return attribute_of(known, cudaDevAttrMultiProcessorCount);
}

template <HalfType kType>
cudaError_t launch_for(const FinalizeArgs& args, cudaStream_t stream) {
  LaunchOptions options;
  options.early = false;
  options.smem_bytes = strip_bytes(args);
  const auto kernel = finalize_strips_kernel<kType>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(options.smem_bytes));
  return error != cudaSuccess ? error : launch_with(options, kernel, dim3(multiprocessors()), kThreads, stream, args);
}

}  // namespace

bool finalizes_by_strips(const FinalizeArgs& args) {
  return args.bias != nullptr && int64_t{args.tokens} * args.top_k >= kSlotsWorthIt && multiprocessors() > 0 &&
         strip_bytes(args) <= static_cast<size_t>(most_smem_bytes());
}

cudaError_t launch_finalize_strips(const FinalizeArgs& args, cudaStream_t stream) {
  return args.type == HalfType::kBFloat16 ? launch_for<HalfType::kBFloat16>(args, stream)
                                          : launch_for<HalfType::kFloat16>(args, stream);
}

}  // namespace mxfp4_moe
