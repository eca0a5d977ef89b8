// Route-sort, with or without top-k, of so few slots that a thread can look at all of them: what route.cu does, in less
// time.
//
// in   topk_ids [R = T * k] int32 or int64, R at most kFewSlots, or the router's logits [T, E]; for topk_softmax's rule
//      E at most 256
// out  as in route.cu: slot_row, row_expert, valid_rows, m_tiles; if wanted expert_offsets and row_slot; from
//      logits topk_weights [T, k]. The same values, one block, no atomics
// Called by route.cu. Why it is fast: there are few steps that wait for one another. A slot's row is the number of
// slots with lower keys, expert first and slot second, and one pass over the keys in shared memory counts them, four to
// a load and the same for all lanes; another pass counts the m-tiles before. And it is little code, which counts in a
// kernel of one block (docs/decisions.md).
#include "moe/choose_experts.cuh"
#include "moe/kernels.h"
#include "moe/score_experts.cuh"
#include "moe/topk_ids.cuh"
#include "moe/warps.cuh"
#include "shared/launch.cuh"
#include "shared/schedule.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kMinThreads = kFewSlots, kMaxWarps = 32;
constexpr unsigned kNoSlot = 0xffffffffu;  // above every key

// Calls visit(i, values[i]) for all, and for zero to three more.
template <typename Value, typename Visit>
__device__ __forceinline__ void for_each_of(const Value* values, int count, const Visit& visit) {
#pragma unroll 1
  for (int i = 0; i < count; i += 4) {
    const uint4 packed = *reinterpret_cast<const uint4*>(values + i);
    Value four[4];
    memcpy(four, &packed, sizeof(four));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      visit(i + j, four[j]);
    }
  }
}

// One block of at least kFewSlots threads; ids(slot) is a slot's.
template <typename Ids>
__device__ __forceinline__ void route_few(const RouteArgs& args, const Ids& ids) {
  __shared__ __align__(16) unsigned keys[kFewSlots];  // expert * kFewSlots + slot
  __shared__ __align__(16) int tiles[kFewSlots];      // of the expert, at its first slot; else 0
  const int slot = threadIdx.x;
  int expert = -1;
  if (slot < kFewSlots) {
    if (slot < args.slots) {
      const int64_t id = int64_t{ids(slot)} - args.first_expert;
      expert = id >= 0 && id < args.experts ? static_cast<int>(id) : -1;
    }
    keys[slot] = expert >= 0 ? expert * kFewSlots + slot : kNoSlot;
  }
  const int valid_rows = __syncthreads_count(expert >= 0);

  const unsigned first_key = expert * kFewSlots, key = first_key + slot;
  int begin = 0, end = 0, row = 0;  // the expert's rows, and the slot's
  if (expert >= 0) {
    for_each_of(keys, args.slots, [&](int, unsigned other) {
      begin += other < first_key;
      row += other < key;
      end += other < first_key + kFewSlots;
    });
  }
  const int my_tiles = expert >= 0 && row == begin ? m_tiles_of(end - begin, args.tile_m) : 0;
  if (slot < kFewSlots) {
    tiles[slot] = my_tiles;
  }
  if (slot < args.slots) {
    args.slot_row[slot] = expert >= 0 ? row : -1;
    if (expert >= 0) {
      args.row_expert[row] = expert;
    }
    if (slot >= valid_rows) {
      args.row_expert[slot] = -1;
    }
  }
  __syncthreads();

  if (my_tiles > 0 || slot == 0) {
    int first_tile = 0, all = 0;
    for_each_of(tiles, args.slots, [&](int other, int of_other) {
      first_tile += keys[other] < first_key ? of_other : 0;
      all += of_other;
    });
#pragma unroll 1
    for (int t = 0; t < my_tiles; ++t) {
      const int rows = rows_of_m_tile(end - begin, args.tile_m);
      const int from = begin + t * rows;
      reinterpret_cast<int4*>(args.m_tiles)[first_tile + t] = make_int4(expert, from, min(from + rows, end), 0);
    }
    if (slot == 0) {
      *args.num_m_tiles = all;
      *args.valid_rows = valid_rows;
    }
  }

  // What a layer does not need.
  if (args.row_slot != nullptr && slot < args.slots) {
    if (expert >= 0) {
      args.row_slot[row] = slot;
    }
    if (slot >= valid_rows) {
      args.row_slot[slot] = -1;
    }
  }
  if (args.expert_offsets != nullptr) {
#pragma unroll 1
    for (int e = slot; e <= args.experts; e += blockDim.x) {
      int before = 0;
      for_each_of(keys, args.slots, [&](int, unsigned other) { before += other < unsigned(e) * kFewSlots; });
      args.expert_offsets[e] = before;
    }
  }
}

__global__ void __launch_bounds__(kMinThreads) route_few_kernel(const RouteArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  route_few(args, [&](int slot) { return load_id(args.topk_ids, args.ids_are_int64, slot); });
}

template <int kPerLane>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    topk_route_few_kernel(const TopkSoftmaxArgs choice, const RouteArgs args) {
  __shared__ int32_t ids[kFewSlots];
  wait_for_previous_kernel();
  let_next_kernel_start();
  TopkSoftmaxArgs mine = choice;
  mine.topk_ids = ids;
  const int warps = blockDim.x / kWarpSize;
#pragma unroll 1
  for (int token = threadIdx.x / kWarpSize; token < choice.tokens; token += warps) {
    choose_experts<kPerLane, 1>(mine, token, 0, threadIdx.x % kWarpSize);
  }
  __syncthreads();
  route_few(args, [&](int slot) { return ids[slot]; });
}

// The most warps of a block: a lane that holds many experts needs more registers than 1024 threads have.
template <int kPerLane>
constexpr int kMaxScoringWarps = kPerLane > 8 ? kMaxWarps / 2 : kMaxWarps;

template <int kPerLane>
__global__ void __launch_bounds__(kMaxScoringWarps<kPerLane>* kWarpSize)
    topk_experts_route_few_kernel(const TopkExpertsArgs router, const RouteArgs args) {
  __shared__ int32_t ids[kFewSlots];
  wait_for_previous_kernel();
  let_next_kernel_start();
  TopkExpertsArgs mine = router;
  mine.choice.topk_ids = ids;
  mine.given = GivenIds::kNone;
  const int warps = blockDim.x / kWarpSize;
#pragma unroll 1
  for (int token = threadIdx.x / kWarpSize; token < router.choice.tokens; token += warps) {
    score_experts<kPerLane>(mine, token, threadIdx.x % kWarpSize);
  }
  __syncthreads();
  route_few(args, [&](int slot) { return ids[slot]; });
}

int threads_of(int tokens, int most_warps) {
  const int wanted = (tokens < most_warps ? tokens : most_warps) * kWarpSize;
  return wanted > kMinThreads ? wanted : kMinThreads;
}

}  // namespace

cudaError_t launch_route_few(const RouteArgs& args, cudaStream_t stream) {
  return launch_before_gemm(route_few_kernel, dim3(1), kMinThreads, stream, args);
}

cudaError_t launch_topk_route_few(const TopkExpertsArgs& router, const RouteArgs& args, cudaStream_t stream) {
  const TopkSoftmaxArgs& choice = router.choice;
  if (is_topk_softmax(router)) {
    const int threads = threads_of(choice.tokens, kMaxWarps);
    return with_width<1, 2, 4, 8>(choice.experts, [&](auto width) {
      return launch_before_gemm(topk_route_few_kernel<width()>, dim3(1), threads, stream, choice, args);
    });
  }
  return with_width<4, 8, 16, 32>(choice.experts, [&](auto width) {
    const int threads = threads_of(choice.tokens, kMaxScoringWarps<width()>);
    return launch_before_gemm(topk_experts_route_few_kernel<width()>, dim3(1), threads, stream, router, args);
  });
}

}  // namespace mxfp4_moe
