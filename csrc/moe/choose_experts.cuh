// One token's experts, chosen by one warp: the k largest logits and their softmax weights (topk_softmax.cu has the
// contract). The logits stay in registers as integers in the order of the floats; a choice is one pass over them and
// two warp-wide integer reductions. No shared memory, every logit is read once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "moe.h"

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

// Lane l holds experts l, l + 32, ...: kPerLane of them. All lanes of the warp call it.
template <typename Logit, int kPerLane>
__device__ __forceinline__ void choose_experts(const TopkSoftmaxArgs& args, int64_t token, int lane) {
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

}  // namespace mxfp4_moe
