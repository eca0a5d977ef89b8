// One token's experts, chosen by one warp: the k largest logits and their softmax weights (topk_softmax.cu has the
// contract). The logits stay in registers as integers in the order of the floats; a choice is one pass over them and
// two warp-wide integer reductions. No shared memory, every logit is read once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "moe/kernels.h"
#include "moe/warps.cuh"
#include "shared/launch.cuh"

namespace mxfp4_moe {

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

// run(n), n a constant: the first of kWidths experts per lane that suffice, or the last.
template <int kWidth, int... kWider, typename Run>
__host__ __device__ __forceinline__ auto with_width(int experts, const Run& run) {
  if constexpr (sizeof...(kWider) > 0) {
    if (experts > kWidth * kWarpSize) {
      return with_width<kWider...>(experts, run);
    }
  }
  return run(std::integral_constant<int, kWidth>{});
}

template <typename Logit, int kTokens, int kPerLane>
__device__ __forceinline__ void load_logits_as(const TopkSoftmaxArgs& args, const int64_t (&tokens)[kTokens], int lane,
                                               float (&values)[kTokens][kPerLane]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const Logit* logits = static_cast<const Logit*>(args.logits) + tokens[t] * args.experts + lane;
    asm("" : "+l"(logits));  // is in registers, so that every load has its distance in the instruction
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      Logit logit = 0.0f;
      if (i * kWarpSize + lane < args.experts) {
        logit = __ldcg(logits + i * kWarpSize);
      }
      values[t][i] = widen(logit);
    }
  }
}

// Lane l's logits of each of the tokens: experts l, l + 32, ..., kPerLane of them, all loads in flight at once. One
// branch that all lanes take alike finds the dtype, so that there is one kernel for the three (docs/decisions.md).
template <int kTokens, int kPerLane>
__device__ __forceinline__ void load_logits(const TopkSoftmaxArgs& args, const int64_t (&tokens)[kTokens], int lane,
                                            float (&values)[kTokens][kPerLane]) {
  if (args.type == LogitsType::kFloat32) {
    load_logits_as<float>(args, tokens, lane, values);
  } else if (args.type == LogitsType::kBFloat16) {
    load_logits_as<__nv_bfloat16>(args, tokens, lane, values);
  } else {
    load_logits_as<__half>(args, tokens, lane, values);
  }
}

// Lane l holds experts l, l + 32, ...: kPerLane of them, of each of kTokens tokens from `first` on, `stride` apart,
// whose latencies overlap. All lanes of the warp call it.
template <int kPerLane, int kTokens>
__device__ __forceinline__ void choose_experts(const TopkSoftmaxArgs& args, int64_t first, int64_t stride, int lane) {
  int64_t tokens[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    tokens[t] = min(first + t * stride, int64_t{args.tokens} - 1);
  }
  float logits[kTokens][kPerLane];
  load_logits(args, tokens, lane, logits);
  int experts = args.experts;
  asm("" : "+r"(experts));  // compared anew: of the loads' comparisons a lane would have to keep up to 32 results
  uint32_t keys[kTokens][kPerLane];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      keys[t][i] = i * kWarpSize + lane < experts ? key_of(logits[t][i]) : kNoKey;
    }
  }

  uint32_t my_key[kTokens] = {};  // lane j keeps what belongs to choice j
  int my_expert[kTokens] = {};
  float sum[kTokens] = {};
  const auto highest = [&](int t) {
    uint32_t best = keys[t][0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      best = max(best, keys[t][i]);
    }
    return __reduce_max_sync(kAllLanes, best);
  };
  if (!args.renormalize) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float largest = value_of(highest(t));
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        sum[t] += keys[t][i] == kNoKey ? 0.0f : expf(value_of(keys[t][i]) - largest);
      }
#pragma unroll
      for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
        sum[t] += __shfl_xor_sync(kAllLanes, sum[t], delta);
      }
    }
  }
  for (int j = 0; j < args.top_k; ++j) {
    uint32_t key[kTokens];
    int expert[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      key[t] = highest(t);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      unsigned candidate = kMaxExperts;
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i) {
        candidate = keys[t][i] == key[t] ? i * kWarpSize + lane : candidate;
      }
      expert[t] = static_cast<int>(__reduce_min_sync(kAllLanes, candidate));
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      my_key[t] = lane == j ? key[t] : my_key[t];
      my_expert[t] = lane == j ? expert[t] : my_expert[t];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        keys[t][i] = expert[t] - lane == i * kWarpSize ? kNoKey : keys[t][i];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float mine = expf(value_of(my_key[t]) - value_of(__shfl_sync(kAllLanes, my_key[t], 0)));
    if (args.renormalize) {
#pragma unroll 4
      for (int j = 0; j < args.top_k; ++j) {  // in this order
        sum[t] += __shfl_sync(kAllLanes, mine, j);
      }
    }
    const int64_t token = first + t * stride;
    if (token < args.tokens && lane < args.top_k) {
      args.topk_weights[token * args.top_k + lane] = mine / sum[t];
      args.topk_ids[token * args.top_k + lane] = my_expert[t];
    }
  }
}

}  // namespace mxfp4_moe
