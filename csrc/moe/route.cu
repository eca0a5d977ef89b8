// Route-sort: from topk_ids to rows in expert order, and the list of m-tiles that the two GEMMs walk.
//
// in   topk_ids [R = T * k] int32 or int64; ids outside first_expert .. first_expert + E - 1 are no expert here: their
//      slots get no row. Or the router's logits, of which topk_softmax.cu's or topk_experts.cu's kernel first makes the
//      ids and weights: all multiprocessors choose, while this kernel starts
// out  slot_row [R], slot -> row or -1; row_expert [R]; valid_rows
//      m_tiles: every expert's rows cut into equal pieces of at most tile_m (shared/schedule.cuh), experts and rows
//      ascending
//      if wanted expert_offsets [E + 1] and row_slot [R], row -> slot, -1 past the valid rows
// Called by layer.cpp, first of a layer's kernels. A counting sort, stable in slot order and without atomics, so that
// the result is the same on every run, for any number of warps and blocks. Few slots have a kernel of their own:
// route_few.cu.
// Why it is fast: one launch of one block or, where the GPU is known to have clusters and there are slots enough, of
// one cluster. Every warp owns a contiguous range of slots and its own histogram in shared memory; __match_any_sync
// counts 32 ids at once. A column scan over the warps, sums over the blocks, which read each other's counts, and one
// scan over the experts turn histograms into row numbers, and the same ranges are read again to hand them out.
#include <cooperative_groups.h>
#include <limits.h>

#include "moe/kernels.h"
#include "moe/topk_ids.cuh"
#include "moe/warps.cuh"
#include "shared/launch.cuh"
#include "shared/schedule.cuh"

namespace mxfp4_moe {
namespace {

constexpr int kMinWarps = 4, kMaxWarps = 32;
constexpr int kMaxExpertsToRouteAtOnce = 256;  // of launch_topk_route_few, for topk_softmax's rule
constexpr int kBatch = 4;                      // ids per lane in flight
constexpr size_t kHistogramBytes = 64 * 1024;  // with tables under SM12x's 99 KB
constexpr int kTables = 4;                     // of experts + 1, beside the histograms
// More blocks than one cost 1.5 us (H100).
constexpr int kMaxSlotsOfOneBlock = 256, kSlotsPerBlock = 128;

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
template <typename Ids, typename Visit>
__device__ __forceinline__ void for_each_slot(const RouteArgs& args, const Ids& ids, int64_t begin, int64_t end,
                                              int lane, const Visit& visit) {
  for (int64_t base = begin; base < end; base += kBatch * kWarpSize) {
    int experts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t slot = base + i * kWarpSize + lane;
      const int64_t expert = slot < end ? int64_t{ids(slot)} - args.first_expert : -1;
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

// This block's part of [0, count): all of it, or what falls to it in a cluster.
struct Part {
  int begin, end;
};
__device__ __forceinline__ Part part_of(int64_t count) {
  const int64_t each = (count + gridDim.x - 1) / gridDim.x;
  return {static_cast<int>(min(blockIdx.x * each, count)), static_cast<int>(min((blockIdx.x + 1) * each, count))};
}

// The block has the slots of `part`; ids(slot) is a slot's.
template <typename Ids>
__device__ __forceinline__ void route_block(const RouteArgs& args, const Part& part, const Ids& ids) {
  extern __shared__ int shared[];
  __shared__ RowsAndTiles warp_sums[kMaxWarps];
  const int experts = args.experts;
  const auto cluster = cooperative_groups::this_cluster();
  const bool is_cluster = gridDim.x > 1;
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int* histograms = shared;                      // [warps][experts]
  int* row_base = histograms + warps * experts;  // [experts + 1]
  int* tile_base = row_base + experts + 1;       // [experts + 1]
  int* counts = tile_base + experts + 1;         // [experts] of this block, for the others
  int* before = counts + experts + 1;            // [experts] in the blocks before this one
  int* mine = histograms + warp * experts;

  // A whole number of batches per warp keeps the ranges aligned; the last ones may be empty.
  const int64_t slots = part.end - part.begin;
  const int64_t per_warp = (slots + warps * kWarpSize - 1) / (warps * kWarpSize) * kWarpSize;
  const int64_t begin = min(part.begin + warp * per_warp, int64_t{part.end});
  const int64_t end = min(begin + per_warp, int64_t{part.end});

#pragma unroll 4
  for (int e = lane; e < experts; e += kWarpSize) {
    mine[e] = 0;
  }
  __syncwarp();
  for_each_slot(args, ids, begin, end, lane, [&](int64_t, int expert, unsigned peers) {
    if (expert >= 0 && lane == __ffs(peers) - 1) {
      mine[expert] += __popc(peers);
    }
    __syncwarp();
  });
  __syncthreads();

  // Per expert: rows of the warps before this one.
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    int total = 0;
#pragma unroll 1
    for (int w = 0; w < warps; w += kMinWarps) {  // whose loads overlap
      int each[kMinWarps];
#pragma unroll
      for (int i = 0; i < kMinWarps; ++i) {
        each[i] = histograms[(w + i) * experts + e];
      }
#pragma unroll
      for (int i = 0; i < kMinWarps; ++i) {
        histograms[(w + i) * experts + e] = total;
        total += each[i];
      }
    }
    (is_cluster ? counts : row_base)[e] = total;
  }
  // The total of all blocks goes to row_base until the scan replaces it.
  if (is_cluster) {
    cluster.sync();
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
      int total = 0, earlier = 0;
#pragma unroll 4
      for (unsigned b = 0; b < gridDim.x; ++b) {
        const int there = *cluster.map_shared_rank(counts + e, b);
        earlier += b < blockIdx.x ? there : 0;
        total += there;
      }
      before[e] = earlier;
      row_base[e] = total;
    }
    cluster.barrier_arrive();  // its counterpart is at the end: until then all may read this block's counts
  }
  __syncthreads();

  // Exclusive scan over the experts, each thread a few consecutive ones.
  const int per_thread = (experts + blockDim.x - 1) / blockDim.x;
  const int first = min(static_cast<int>(threadIdx.x) * per_thread, experts);
  const int last = min(first + per_thread, experts);
  RowsAndTiles sum = 0;
#pragma unroll 1
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
#pragma unroll 1
  for (int e = first; e < last; ++e) {
    const int rows = row_base[e];
    row_base[e] = rows_of(base);
    tile_base[e] = tiles_of(base);
    if (blockIdx.x == 0 && args.expert_offsets != nullptr) {
      args.expert_offsets[e] = rows_of(base);
    }
    base += pack(rows, m_tiles_of(rows, args.tile_m));
  }
  const int valid_rows = rows_of(warp_sums[warps - 1]);
  const int num_m_tiles = tiles_of(warp_sums[warps - 1]);
  if (threadIdx.x == 0) {
    row_base[experts] = valid_rows;
    tile_base[experts] = num_m_tiles;
    if (blockIdx.x == 0) {
      if (args.expert_offsets != nullptr) {
        args.expert_offsets[experts] = valid_rows;
      }
      *args.valid_rows = valid_rows;
      *args.num_m_tiles = num_m_tiles;
    }
  }
  __syncthreads();

  // The same ranges again: a slot's row is its expert's base, plus the blocks, the warps and the peers before.
  for_each_slot(args, ids, begin, end, lane, [&](int64_t slot, int expert, unsigned peers) {
    int row = -1;
    if (expert >= 0) {
      row = row_base[expert] + (is_cluster ? before[expert] : 0) + mine[expert] + __popc(peers & ((1u << lane) - 1));
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
  const int64_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 1
  for (int64_t row = thread; row < args.slots; row += threads) {
    const bool is_valid = row < valid_rows;
    args.row_expert[row] = is_valid ? expert_of(row_base, experts, static_cast<int>(row)) : -1;
    if (args.row_slot != nullptr && !is_valid) {
      args.row_slot[row] = -1;
    }
  }
#pragma unroll 1
  for (int64_t i = thread; i < num_m_tiles; i += threads) {
    const int t = static_cast<int>(i);
    const int expert = expert_of(tile_base, experts, t);
    const int first = row_base[expert], end = row_base[expert + 1];
    const int rows = rows_of_m_tile(end - first, args.tile_m);
    const int row_begin = first + (t - tile_base[expert]) * rows;
    const int4 entry = make_int4(expert, row_begin, min(row_begin + rows, end), 0);
    reinterpret_cast<int4*>(args.m_tiles)[t] = entry;
  }
  if (is_cluster) {
    cluster.barrier_wait();
  }
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1) route_kernel(const RouteArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  route_block(args, part_of(args.slots),
              [&](int64_t slot) { return load_id(args.topk_ids, args.ids_are_int64, slot); });
}

}  // namespace

cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream) {
  if (args.slots <= kFewSlots) {
    return launch_route_few(args, stream);
  }
  int blocks = 1;
  while (args.slots > kMaxSlotsOfOneBlock && blocks < args.most_blocks &&
         int64_t{blocks} * kSlotsPerBlock < args.slots) {
    blocks *= 2;
  }
  int warps = kMinWarps;  // a warp for each 32 slots
  while (warps < kMaxWarps && int64_t{warps} * blocks < args.slots / kWarpSize) {
    warps *= 2;
  }
  while (warps * args.experts * sizeof(int) > kHistogramBytes) {
    warps /= 2;
  }
  LaunchOptions options;
  options.smem_bytes = (static_cast<size_t>(warps) * args.experts + kTables * (args.experts + 1)) * sizeof(int);
  options.cluster_blocks = blocks;
  if (options.smem_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(route_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(options.smem_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_with(options, route_kernel, dim3(blocks), warps * kWarpSize, stream, args);
}

cudaError_t launch_topk_route(const TopkExpertsArgs& router, const RouteArgs& args, cudaStream_t stream) {
  if (args.slots <= kFewSlots && (!is_topk_softmax(router) || router.choice.experts <= kMaxExpertsToRouteAtOnce)) {
    return launch_topk_route_few(router, args, stream);
  }
  const cudaError_t error = launch_topk_experts(router, stream);
  return error != cudaSuccess ? error : launch_route(args, stream);
}

}  // namespace mxfp4_moe
