// One token's experts under any router, chosen by one warp (topk_experts.cu has the contract). Lane l holds experts l,
// l + 32, ...: their scores, and what they are chosen by as integers in the order of the floats, all in registers. A
// choice is one pass over them and two warp-wide integer reductions, as in choose_experts.cuh; so is a group's best.
// No shared memory, every logit is read once.
#pragma once

#include "moe/choose_experts.cuh"
#include "moe/kernels.h"
#include "moe/scores.cuh"
#include "moe/topk_ids.cuh"
#include "moe/warps.cuh"

namespace mxfp4_moe {

constexpr float kLeastSum = 1e-20f;  // added to a sum before dividing by it: DeepSeek's, so that 0 / 0 is 0

// values[i] = change(values[i]), four at a time: a loop over registers is unrolled, and a score is long. All move on by
// four after each turn, so that after the last one each is back in its place.
template <int kPerLane, typename Change>
__device__ __forceinline__ void in_turns(float (&values)[kPerLane], const Change& change) {
  constexpr int kTurn = 4;
  static_assert(kPerLane % kTurn == 0);
#pragma unroll 1
  for (int turn = 0; turn < kPerLane / kTurn; ++turn) {
    float changed[kTurn];
#pragma unroll
    for (int i = 0; i < kTurn; ++i) {
      changed[i] = change(values[i]);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = i < kPerLane - kTurn ? values[min(i + kTurn, kPerLane - 1)] : changed[i % kTurn];
    }
  }
}

template <int kPerLane>
__device__ __forceinline__ uint32_t highest_key(const uint32_t (&keys)[kPerLane]) {
  uint32_t best = keys[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) {
    best = max(best, keys[i]);
  }
  return __reduce_max_sync(kAllLanes, best);
}

// The lowest expert that has this key.
template <int kPerLane>
__device__ __forceinline__ int expert_with(const uint32_t (&keys)[kPerLane], uint32_t key, int lane) {
  unsigned candidate = kMaxExperts;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {
    candidate = keys[i] == key ? i * kWarpSize + lane : candidate;
  }
  return static_cast<int>(__reduce_min_sync(kAllLanes, candidate));
}

template <int kPerLane>
__device__ __forceinline__ void remove_expert(uint32_t (&keys)[kPerLane], int expert, int lane) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = expert - lane == i * kWarpSize ? kNoKey : keys[i];
  }
}

__device__ __forceinline__ int lowest_lane(bool is_it, int lane) {
  return static_cast<int>(__reduce_min_sync(kAllLanes, is_it ? unsigned(lane) : unsigned(kWarpSize)));
}

// Leaves only the experts of the groups that are kept: topk_group times the group whose score is highest, of equals the
// lower. A group is experts in a row, its score its highest key's value or the sum of the two highest.
template <int kPerLane>
__device__ __forceinline__ void keep_groups(const TopkExpertsArgs& args, int lane, uint32_t (&keys)[kPerLane]) {
  const int each = args.choice.experts / args.num_expert_group;
  const auto is_of = [&](int i, int group) {
    return static_cast<unsigned>(i * kWarpSize + lane - group * each) < static_cast<unsigned>(each);
  };
  uint32_t group_key = kNoKey;  // of the group with this lane's number
#pragma unroll 1
  for (int group = 0; group < args.num_expert_group; ++group) {
    uint32_t first = kNoKey, second = kNoKey;  // of this lane
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t key = is_of(i, group) ? keys[i] : kNoKey;
      second = max(second, min(first, key));
      first = max(first, key);
    }
    uint32_t score = __reduce_max_sync(kAllLanes, first);
    if (args.group_score == GroupScore::kTop2Sum) {
      const bool has_it = lane == lowest_lane(first == score, lane);
      const uint32_t next = __reduce_max_sync(kAllLanes, has_it ? second : first);
      score = key_of(__fadd_rn(value_of(score), value_of(next)));
    }
    group_key = lane == group ? score : group_key;
  }
  unsigned kept = 0;
#pragma unroll 1
  for (int j = 0; j < args.topk_group; ++j) {
    const uint32_t key = __reduce_max_sync(kAllLanes, group_key);
    const int group = lowest_lane(group_key == key, lane);
    kept |= 1u << group;
    group_key = lane == group ? kNoKey : group_key;
  }
#pragma unroll 1
  for (int group = 0; group < args.num_expert_group; ++group) {
    if ((kept >> group & 1) == 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        keys[i] = is_of(i, group) ? kNoKey : keys[i];
      }
    }
  }
}

// Lane j's expert is choice j; of lanes from top_k on anything. Uses the keys up.
template <int kPerLane>
__device__ __forceinline__ int choose(int top_k, int lane, uint32_t (&keys)[kPerLane]) {
  int mine = 0;
#pragma unroll 1
  for (int j = 0; j < top_k; ++j) {
    const uint32_t key = highest_key(keys);
    const int expert = expert_with(keys, key, lane);
    mine = lane == j ? expert : mine;
    remove_expert(keys, expert, lane);
  }
  return mine;
}

// visit(i, bias) for each of a lane's experts, 0 where there is none, with eight loads in flight: behind a branch each
// they would wait for one another.
template <int kPerLane, typename Visit>
__device__ __forceinline__ void load_biases(const TopkExpertsArgs& args, int lane, const Visit& visit) {
  constexpr int kInFlight = kPerLane < 8 ? kPerLane : 8;
#pragma unroll
  for (int first = 0; first < kPerLane; first += kInFlight) {
    float biases[kInFlight] = {};
    if (args.bias != nullptr) {
      const float* of_lane = args.bias + lane;
      asm("" : "+l"(of_lane));  // as for the logits
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if ((first + i) * kWarpSize + lane < args.choice.experts) {
          biases[i] = __ldg(of_lane + (first + i) * kWarpSize);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      visit(first + i, biases[i]);
    }
  }
}

// All lanes of the warp call it for one token.
template <int kPerLane>
__device__ __forceinline__ void score_experts(const TopkExpertsArgs& args, int64_t token, int lane) {
  const TopkSoftmaxArgs& choice = args.choice;
  const bool is_softmax = args.scoring_func == ScoringFunc::kSoftmax;
  const bool is_sigmoid = args.scoring_func == ScoringFunc::kSigmoid;
  const bool is_given = args.given != GivenIds::kNone;
  const bool has_groups = args.num_expert_group > 1;
  const bool by_scores = !is_given && (has_groups || args.bias != nullptr);  // else by logits, with which scores rise
  const int64_t tokens[1] = {token};
  float logits[1][kPerLane];
  load_logits(choice, tokens, lane, logits);
  uint32_t keys[kPerLane];  // what experts are chosen by; kNoKey past the last expert
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = i * kWarpSize + lane < choice.experts ? key_of(logits[0][i]) : kNoKey;
  }

  float (&scores)[kPerLane] = logits[0];  // of a softmax the numerators; where few are needed they stay logits
  float sum = 0.0f;                       // of a softmax's numerators: a lane's own in order, then the lanes' by halves
  if (is_softmax) {
    const float largest = value_of(highest_key(keys));
    in_turns(scores, [&](float x) { return score_of<ScoringFunc::kSoftmax>(x, largest); });
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarpSize + lane < choice.experts) {
        sum = __fadd_rn(sum, scores[i]);
      }
    }
#pragma unroll
    for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, delta));
    }
  } else if (by_scores && is_sigmoid) {
    in_turns(scores, [](float x) { return score_of<ScoringFunc::kSigmoid>(x); });
  } else if (by_scores) {
    in_turns(scores, [](float x) { return score_of<ScoringFunc::kSqrtSoftplus>(x); });
  }

  int expert = 0;  // lane j's is choice j
  if (is_given) {
    const int64_t slot = token * choice.top_k + lane;
    if (lane < choice.top_k) {
      const int64_t id = load_id(args.given_ids, args.given == GivenIds::kInt64, slot);
      expert = id >= 0 && id < choice.experts ? static_cast<int>(id) : -1;
    }
  } else {
    if (by_scores) {
      float chosen_by[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        chosen_by[i] = scores[i];
      }
      if (is_softmax) {
        in_turns(chosen_by, [&](float x) { return __fdiv_rn(x, sum); });
      }
      load_biases<kPerLane>(args, lane, [&](int i, float bias) {
        keys[i] = i * kWarpSize + lane < choice.experts ? key_of(__fadd_rn(chosen_by[i], bias)) : kNoKey;
      });
    }
    if (has_groups) {
      keep_groups(args, lane, keys);
    }
    expert = choose(choice.top_k, lane, keys);
  }

  float weight = 0.0f;  // a given id of no expert keeps it
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float there = __shfl_sync(kAllLanes, scores[i], expert & (kWarpSize - 1));
    weight = expert >> 5 == i ? there : weight;
  }
  if (is_softmax) {
    weight = __fdiv_rn(weight, sum);
  } else if (!by_scores && expert >= 0) {
    weight = is_sigmoid ? score_of<ScoringFunc::kSigmoid>(weight) : score_of<ScoringFunc::kSqrtSoftplus>(weight);
  }
  if (choice.renormalize) {
    float of_all = 0.0f;
#pragma unroll 4
    for (int j = 0; j < choice.top_k; ++j) {  // in this order
      of_all = __fadd_rn(of_all, __shfl_sync(kAllLanes, weight, j));
    }
    weight = __fdiv_rn(weight, __fadd_rn(of_all, kLeastSum));
  }
  if (lane < choice.top_k) {
    const int64_t slot = token * choice.top_k + lane;
    choice.topk_weights[slot] = __fmul_rn(weight, args.routed_scaling_factor);
    choice.topk_ids[slot] = expert;
  }
}

}  // namespace mxfp4_moe
