// Route-sort: from topk_ids to rows in expert order, and the list of m-tiles that the two GEMMs walk.
//
// in   topk_ids [R = T * k] int32 or int64; ids outside first_expert .. first_expert + E - 1 are no expert here: their
//      slots get no row. Or the router's logits, of which the same kernel first makes the ids and weights
// out  expert_offsets [E + 1]; row_slot [R] (row -> slot, -1 past the valid rows); slot_row [R] (slot -> row or -1);
//      row_expert [R]; has_far [2], zeros; m_tiles: every expert's rows cut into pieces of at most tile_m, experts and
//      rows ascending
// Called by ops.cpp, first of a layer's kernels. A counting sort, stable in slot order and without atomics, so that
// the result is the same on every run, for any number of warps.
// Why it is fast: one block, one launch. Every warp owns a contiguous range of slots and its own histogram in shared
// memory; __match_any_sync counts 32 ids at once. A column scan over the warps and one scan over the experts turn
// histograms into row numbers, and the same ranges are read again (from L2) to hand them out.
#include <limits.h>

#include "../tile/schedule.cuh"
#include "choose_experts.cuh"
#include "launch.cuh"
#include "moe.h"

namespace mxfp4_moe {
namespace {

constexpr int kMinWarps = 4, kMaxWarps = 32;
constexpr int kMaxExpertsToRouteAtOnce = 256;  // more logits per lane would spill beside 1024 threads
constexpr int kBatch = 4;                      // ids per lane in flight
constexpr size_t kHistogramBytes = 64 * 1024;  // with the two offset tables well under SM12x's 99 KB

// Sum of both halves at once: rows in the upper 32 bits, m-tiles in the lower; neither reaches 2^31.
using RowsAndTiles = unsigned long long;

__device__ __forceinline__ RowsAndTiles pack(int rows, int tiles) {
  return static_cast<RowsAndTiles>(rows) << 32 | static_cast<unsigned>(tiles);
}
__device__ __forceinline__ int rows_of(RowsAndTiles x) { return static_cast<int>(x >> 32); }
__device__ __forceinline__ int tiles_of(RowsAndTiles x) { return static_cast<int>(x & UINT_MAX); }

__device__ __forceinline__ RowsAndTiles warp_inclusive_scan(RowsAndTiles x, int lane) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const RowsAndTiles left = __shfl_up_sync(kAllLanes, x, delta);
    x += lane >= delta ? left : 0;
  }
  return x;
}

// Calls visit(slot, expert, peers) for the warp's slots in order, 32 at a time, all lanes together. expert is -1 for
// lanes without a valid id; peers are the lanes that hold the same expert.
template <typename Id, typename Visit>
__device__ __forceinline__ void for_each_slot(const RouteArgs& args, int64_t begin, int64_t end, int lane,
                                              const Visit& visit) {
  const auto* ids = static_cast<const Id*>(args.topk_ids);
  for (int64_t base = begin; base < end; base += kBatch * kWarpSize) {
    int experts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t slot = base + i * kWarpSize + lane;
      const int64_t expert = slot < end ? int64_t{__ldcg(ids + slot)} - args.first_expert : -1;
      experts[i] = expert >= 0 && expert < args.experts ? static_cast<int>(expert) : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + i * kWarpSize < end) {
        visit(base + i * kWarpSize + lane, experts[i], __match_any_sync(kAllLanes, experts[i]));
      }
    }
  }
}

// The expert whose rows, or m-tiles, hold number `i`: the last one with base[e] <= i. Experts without rows have none.
__device__ __forceinline__ int expert_of(const int* base, int experts, int i) {
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (base[middle] <= i ? low : high) = middle;
  }
  return low;
}

template <typename Id>
__device__ __forceinline__ void route_block(const RouteArgs& args) {
  extern __shared__ int shared[];
  __shared__ RowsAndTiles warp_sums[kMaxWarps];
  const int experts = args.experts;
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int* histograms = shared;                      // [warps][experts]
  int* row_base = histograms + warps * experts;  // [experts + 1]
  int* tile_base = row_base + experts + 1;       // [experts + 1]
  int* mine = histograms + warp * experts;

  // A whole number of batches per warp keeps the ranges aligned; the last ones may be empty.
  const int64_t per_warp = (int64_t{args.slots} + warps * kWarpSize - 1) / (warps * kWarpSize) * kWarpSize;
  const int64_t begin = min(warp * per_warp, int64_t{args.slots});
  const int64_t end = min(begin + per_warp, int64_t{args.slots});

  for (int e = lane; e < experts; e += kWarpSize) {
    mine[e] = 0;
  }
  __syncwarp();
  for_each_slot<Id>(args, begin, end, lane, [&](int64_t, int expert, unsigned peers) {
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      mine[expert] += __popc(peers);
    }
    __syncwarp();
  });
  __syncthreads();

  // Per expert: rows of the warps before this one; the total goes to row_base until the scan replaces it.
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int total = 0;
    for (int w = 0; w < warps; w += kMinWarps) {  // whose loads overlap
      int counts[kMinWarps];
#pragma unroll
      for (int i = 0; i < kMinWarps; ++i) {
        counts[i] = histograms[(w + i) * experts + e];
      }
#pragma unroll
      for (int i = 0; i < kMinWarps; ++i) {
        histograms[(w + i) * experts + e] = total;
        total += counts[i];
      }
    }
    row_base[e] = total;
  }
  __syncthreads();

  // Exclusive scan over the experts, each thread a few consecutive ones.
  const int per_thread = (experts + blockDim.x - 1) / blockDim.x;
  const int first = min(static_cast<int>(threadIdx.x) * per_thread, experts);
  const int last = min(first + per_thread, experts);
  RowsAndTiles sum = 0;
  for (int e = first; e < last; ++e) {
    sum += pack(row_base[e], m_tiles_of(row_base[e], args.tile_m));
  }
  const RowsAndTiles in_warp = warp_inclusive_scan(sum, lane);
  if (lane == kWarpSize - 1) {
    warp_sums[warp] = in_warp;
  }
  __syncthreads();
  if (warp == 0) {
    const RowsAndTiles scanned = warp_inclusive_scan(lane < warps ? warp_sums[lane] : 0, lane);
    warp_sums[lane] = scanned;
  }
  __syncthreads();
  RowsAndTiles base = in_warp - sum + (warp > 0 ? warp_sums[warp - 1] : 0);
  for (int e = first; e < last; ++e) {
    const int rows = row_base[e];
    row_base[e] = rows_of(base);
    tile_base[e] = tiles_of(base);
    args.expert_offsets[e] = rows_of(base);
    base += pack(rows, m_tiles_of(rows, args.tile_m));
  }
  const int valid_rows = rows_of(warp_sums[warps - 1]);
  const int num_m_tiles = tiles_of(warp_sums[warps - 1]);
  if (threadIdx.x == 0) {
    row_base[experts] = valid_rows;
    tile_base[experts] = num_m_tiles;
    args.expert_offsets[experts] = valid_rows;
    *args.num_m_tiles = num_m_tiles;
    if (args.has_far != nullptr) {
      args.has_far[0] = args.has_far[1] = 0;
    }
  }
  __syncthreads();

  // The same ranges again: a slot's row is its expert's base, plus the warps before, plus the peers before.
  for_each_slot<Id>(args, begin, end, lane, [&](int64_t slot, int expert, unsigned peers) {
    int row = -1;
    if (expert >= 0) {
      row = row_base[expert] + mine[expert] + __popc(peers & ((1u << lane) - 1));
      if (args.row_slot != nullptr) {
        args.row_slot[row] = static_cast<int>(slot);
      }
    }
    if (slot < end) {
      args.slot_row[slot] = row;
    }
    __syncwarp();
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      mine[expert] += __popc(peers);
    }
    __syncwarp();
  });

  // Found again, so that the stores of a warp are next to each other.
  for (int64_t row = threadIdx.x; row < args.slots; row += blockDim.x) {
    const bool is_valid = row < valid_rows;
    args.row_expert[row] = is_valid ? expert_of(row_base, experts, static_cast<int>(row)) : -1;
    if (args.row_slot != nullptr && !is_valid) {
      args.row_slot[row] = -1;
    }
  }
  for (int t = threadIdx.x; t < num_m_tiles; t += blockDim.x) {
    const int expert = expert_of(tile_base, experts, t);
    const int row_begin = row_base[expert] + (t - tile_base[expert]) * args.tile_m;
    const int rows_left = row_base[expert + 1] - row_begin;
    const int4 entry = make_int4(expert, row_begin, row_begin + min(rows_left, args.tile_m), 0);
    reinterpret_cast<int4*>(args.m_tiles)[t] = entry;
  }
}

template <typename Id>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1) route_kernel(const RouteArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  route_block<Id>(args);
}

template <typename Logit, int kPerLane>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    topk_route_kernel(const TopkSoftmaxArgs choice, const RouteArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kTokens = 2;
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (choice.tokens <= warps) {
    if (warp < choice.tokens) {
      choose_experts<Logit, kPerLane, 1>(choice, warp, warps, lane);
    }
  } else {
    for (int token = warp; token < choice.tokens; token += warps * kTokens) {
      choose_experts<Logit, kPerLane, kTokens>(choice, token, warps, lane);
    }
  }
  __syncthreads();
  route_block<int32_t>(args);
}

// A warp per `work`, within limits: more only wait for each other.
template <typename Kernel, typename... Args>
cudaError_t launch_one_block(Kernel kernel, int work, int experts, cudaStream_t stream, const Args&... args) {
  int warps = kMinWarps;
  while (warps < kMaxWarps && warps < work) {
    warps *= 2;
  }
  while (warps * experts * sizeof(int) > kHistogramBytes) {
    warps /= 2;
  }
  const size_t smem_bytes = (static_cast<size_t>(warps) * experts + 2 * (experts + 1)) * sizeof(int);
  if (smem_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch(kernel, dim3(1), warps * kWarpSize, smem_bytes, stream, args...);
}

template <typename Logit>
cudaError_t launch_topk_route_for(const TopkSoftmaxArgs& choice, const RouteArgs& args, cudaStream_t stream) {
  const auto run = [&](auto kernel) {
    return launch_one_block(kernel, choice.tokens, args.experts, stream, choice, args);
  };
  if (choice.experts <= 1 * kWarpSize) return run(topk_route_kernel<Logit, 1>);
  if (choice.experts <= 2 * kWarpSize) return run(topk_route_kernel<Logit, 2>);
  if (choice.experts <= 4 * kWarpSize) return run(topk_route_kernel<Logit, 4>);
  return run(topk_route_kernel<Logit, 8>);
}

}  // namespace

cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream) {
  const int work = args.slots / kWarpSize;
  return args.ids_are_int64 ? launch_one_block(route_kernel<int64_t>, work, args.experts, stream, args)
                            : launch_one_block(route_kernel<int32_t>, work, args.experts, stream, args);
}

cudaError_t launch_topk_route(const TopkSoftmaxArgs& choice, const RouteArgs& args, cudaStream_t stream) {
  if (choice.tokens > kMaxTokensToRouteAtOnce || choice.experts > kMaxExpertsToRouteAtOnce) {
    const cudaError_t error = launch_topk_softmax(choice, stream);
    return error != cudaSuccess ? error : launch_route(args, stream);
  }
  switch (choice.type) {
    case LogitsType::kFloat32:
      return launch_topk_route_for<float>(choice, args, stream);
    case LogitsType::kBFloat16:
      return launch_topk_route_for<__nv_bfloat16>(choice, args, stream);
    case LogitsType::kFloat16:
      return launch_topk_route_for<__half>(choice, args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxfp4_moe
