// Router: from logits to the k best experts of each token and their weights.
//
// in   logits [T, E] fp32, bf16 or fp16
// out  topk_ids [T, k] int32, best first; topk_weights [T, k] fp32: exp(x - max) / sum over the chosen k (renormalize)
//      or over all E
// Equal logits (-0 equals +0): the lower expert first. A NaN counts as the largest logit and makes the token's weights
// NaN, as does a +inf or a row of nothing but -inf: torch's softmax. Called by ops.cpp.
// Why it is fast: one warp per token, the logits stay in registers as integers in the order of the floats; a choice is
// one pass over them and two warp-wide integer reductions. No shared memory, every logit is read once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "moe.h"

namespace mxfp4_moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTokensPerBlock = kThreads / kWarpSize;
constexpr uint32_t kNanKey = 0xffffffffu;  // above every number's
constexpr uint32_t kNoKey = 0;             // below every number's: chosen before, or past the last expert

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Integers in the order of the floats. Adding 0 turns -0 into +0.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return x != x ? kNanKey : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key == kNanKey ? 0x7fc00000u : key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// Lane l holds experts l, l + 32, ...: kPerLane of them.
template <typename Logit, int kPerLane>
__global__ void __launch_bounds__(kThreads) topk_softmax_kernel(const TopkSoftmaxArgs args) {
  const int64_t token = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (token >= args.tokens) {
    return;
  }
  const Logit* logits = static_cast<const Logit*>(args.logits) + token * args.experts;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    keys[i] = expert < args.experts ? key_of(widen(logits[expert])) : kNoKey;
  }

  float largest = 0.0f, sum = 0.0f;
  float mine = 0.0f;  // lane j keeps what belongs to choice j
  int my_expert = 0;
  for (int j = 0; j < args.top_k; ++j) {
    uint32_t best = keys[0];
    int best_i = 0;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        best_i = i;
      }
    }
    const uint32_t key = __reduce_max_sync(kAllLanes, best);
    const unsigned candidate = best == key ? best_i * kWarpSize + lane : kMaxExperts;
    const int expert = static_cast<int>(__reduce_min_sync(kAllLanes, candidate));
    if (j == 0) {
      largest = value_of(key);
      if (!args.renormalize) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          sum += keys[i] == kNoKey ? 0.0f : expf(value_of(keys[i]) - largest);
        }
#pragma unroll
        for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, delta);
        }
      }
    }
    const float term = expf(value_of(key) - largest);
    sum += args.renormalize ? term : 0.0f;
    if (lane == j) {
      mine = term;
      my_expert = expert;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys[i] = i * kWarpSize + lane == expert ? kNoKey : keys[i];
    }
  }
  if (lane < args.top_k) {
    args.topk_weights[token * args.top_k + lane] = mine / sum;
    args.topk_ids[token * args.top_k + lane] = my_expert;
  }
}

template <typename Logit>
cudaError_t launch_for(const TopkSoftmaxArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((int64_t{args.tokens} + kTokensPerBlock - 1) / kTokensPerBlock));
  const auto run = [&](auto kernel) { return launch(kernel, grid, kThreads, 0, stream, args); };
  if (args.experts <= 1 * kWarpSize) return run(topk_softmax_kernel<Logit, 1>);
  if (args.experts <= 2 * kWarpSize) return run(topk_softmax_kernel<Logit, 2>);
  if (args.experts <= 4 * kWarpSize) return run(topk_softmax_kernel<Logit, 4>);
  if (args.experts <= 8 * kWarpSize) return run(topk_softmax_kernel<Logit, 8>);
  if (args.experts <= 16 * kWarpSize) return run(topk_softmax_kernel<Logit, 16>);
  return run(topk_softmax_kernel<Logit, 32>);
}

}  // namespace

cudaError_t launch_topk_softmax(const TopkSoftmaxArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) {
    return cudaSuccess;
  }
  switch (args.type) {
    case LogitsType::kFloat32:
      return launch_for<float>(args, stream);
    case LogitsType::kBFloat16:
      return launch_for<__nv_bfloat16>(args, stream);
    case LogitsType::kFloat16:
      return launch_for<__half>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxfp4_moe
