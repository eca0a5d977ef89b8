// The pipeline that every kernel of a tile runs on: a ring of stages in shared memory, one warp that loads them, others
// that multiply, and the life of a block. A kernel brings a shape (stages, shared memory, warps), the loads of its
// activations and what it does with a stage.
//
// One producer warp keeps kStages TMA loads in flight while the other warps compute, and runs ahead into the next
// output tile while they store. Blocks are persistent (shared/schedule.cuh).
#pragma once

#include <cuda.h>

#include "shared/launch.cuh"
#include "shared/schedule.cuh"
#include "shared/weight_layout.cuh"
#include "tile/tile_shape.cuh"
#include "tile/tma.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// The operands as TMA sees them; made in launcher.cuh.
struct TensorMaps {
  CUtensorMap act;          // bytes [rows][k], 128-byte swizzle; of packed E2M1 [rows][k / 2], 64-byte swizzle
  CUtensorMap act_scale;    // pairs of words [k tiles][rows / 2]; of NVFP4 [2 k tiles][rows / 2]
  CUtensorMap weight;       // units of 256 bytes; the box is a tile's blocks of one whole K tile
  CUtensorMap weight_tail;  // the same memory; the box is one block of a last K tile that is not whole
};

struct GemmParams {
  void* out;
  const Mxfp4MoeMTile* m_tiles;
  const int32_t* num_m_tiles;
  int32_t out_type;
  int32_t rows;
  int32_t n;
  int32_t k;
  int32_t m_tiles_are_ready;
  uint64_t weight_hint;  // L2's priority for weights, where it is not always the same
  Mxfp4MoeActivate activate;
  Mxfp4MoeFactors factors;
};

// A block's dynamic shared memory: Shape::Smem says where each part begins.
template <class Shape>
struct SharedStorage {
  static constexpr int kStages = Shape::kStages;
  uint8_t* base;
  __device__ uint8_t* act(int stage) const { return base + Shape::Smem::kAct + stage * Shape::kActBytes; }
  __device__ uint8_t* weight(int stage) const { return base + Shape::Smem::kWeight + stage * Shape::kWeightBytes; }
  __device__ uint8_t* act_scale(int stage) const {
    return base + Shape::Smem::kActScale + stage * Shape::kActScaleBytes;
  }
  __device__ Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(base + Shape::Smem::kBarrier) + stage; }
  __device__ Barrier* empty(int stage) const {
    return reinterpret_cast<Barrier*>(base + Shape::Smem::kBarrier + Shape::kStages * 8) + stage;
  }
  __device__ uint32_t* amax() const { return reinterpret_cast<uint32_t*>(base + Shape::Smem::kAmax); }
  // Where kPassesTiles: the output tile whose first K tile is in a stage, and the one that a warp is at.
  __device__ uint8_t* passed_tile(int stage) const {
    return base + Shape::Smem::kBarrier + Shape::kStages * kBarrierBytesPerStage + stage * kPassedTileBytes;
  }
  __device__ uint8_t* kept_tile(int warp) const {
    return base + Shape::Smem::kAmax + Shape::kAmaxBytes + warp * kPassedTileBytes;
  }

  __device__ __forceinline__ void init_barriers(int stage) const {
    full(stage)->init(1);
    empty(stage)->init(Shape::kMmaWarps);
  }
};

// volatile, here and below, so that what is needed before and after a main loop is read twice, instead of being held in
// a register through the loop.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ __forceinline__ int warp_id() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread / 32;
}
// relaxed.gpu: past L1 (shared/launch.cuh).
__device__ __forceinline__ Mxfp4MoeMTile load_m_tile(const Mxfp4MoeMTile* at) {
  Mxfp4MoeMTile m;
  asm volatile("ld.relaxed.gpu.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.expert), "=r"(m.row_begin), "=r"(m.row_end), "=r"(m.reserved)
               : "l"(at));
  return m;
}
__device__ __forceinline__ int32_t load_num_m_tiles(const GemmParams& p) {
  int32_t n;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(p.num_m_tiles));
  return n;
}

// The same in all lanes of a warp, so that the compiler keeps it, and what follows from it, in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// The same number, but unknown to the compiler: what is computed from it after the main loop is computed anew, instead
// of held in registers through it.
__device__ __forceinline__ int computed_anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A ring of stages: the parity flips every time around.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A warp's arrival at a barrier, arrive() by one of its lanes, comes after all that its lanes have read or written.
template <class Arrive>
__device__ __forceinline__ void after_all_lanes(const Arrive& arrive) {
  asm volatile("" ::: "memory");  // no access may move behind the arrival
  __syncwarp();
  arrive();
}

// --- producer ---------------------------------------------------------------------------------------------------

// A stage's activations: codes and scale words. TMA counts whole boxes, zero-filled beyond the edges.
template <class Shape>
struct ScaledActLoads {
  static __device__ __forceinline__ uint32_t bytes(const Mxfp4MoeMTile&) {
    return Shape::kActBytes + Shape::kScaleWords * Shape::kActScaleSetBytes;
  }
  static __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt,
                                              const Mxfp4MoeMTile& m) {
    const Barrier* full = smem.full(s);
    tma_load_2d(smem.act(s), maps.act, full, kt * Shape::kRowBytes, m.row_begin, kEvictLast);
    tma_load_2d(smem.act_scale(s), maps.act_scale, full, m.row_begin / 4 * 2, kt * Shape::kScaleWords, kEvictLast);
  }
};

// A stage's weights: one copy for a whole K tile, one per block for the last if it is not whole.
template <class Shape, class ActLoads>
struct WeightLoads {
  static constexpr int kBlockUnits = Shape::kWeightBlockBytes / kWeightUnit;
  static constexpr bool kHintVaries = Shape::Arch::kFewWeightBytes != INT64_MAX;
  uint64_t hint;
  int num_k_tiles, tail_steps, tail_units, row_blocks, expert_units;

  __device__ __forceinline__ explicit WeightLoads(const GemmParams& p)
      : hint(kHintVaries ? p.weight_hint : kEvictFirst),
        num_k_tiles(ceil_div(p.k, kTileK)),
        tail_steps(p.k % kTileK / kBlockK),
        tail_units((weight_block_scale_bytes(Shape::kScaleWords) + tail_steps * kWeightStepBytes) / kWeightUnit),
        row_blocks(ceil_div(p.n, kWeightBlockRows)),
        expert_units(row_blocks * (p.k / kTileK * kBlockUnits + (tail_steps ? tail_units : 0))) {}

  // Also tells the stage's barrier what to expect, activations included.
  __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt, int n0,
                                       const Mxfp4MoeMTile& m) const {
    const Barrier* full = smem.full(s);
    const int k_tile_unit = m.expert * expert_units + kt * row_blocks * kBlockUnits;
    const int row_block = n0 / kWeightBlockRows;
    if (tail_steps == 0 || kt + 1 < num_k_tiles) {
      full->arrive_and_expect_tx(ActLoads::bytes(m) + Shape::kWeightBytes);
      tma_load_2d(smem.weight(s), maps.weight, full, 0, k_tile_unit + row_block * kBlockUnits, hint);
    } else {
      full->arrive_and_expect_tx(ActLoads::bytes(m) + Shape::kWeightBlocks * tail_units * kWeightUnit);
      for (int b = 0; b < Shape::kWeightBlocks; ++b)
        tma_load_2d(smem.weight(s) + b * Shape::kWeightBlockBytes, maps.weight_tail, full, 0,
                    k_tile_unit + (row_block + b) * tail_units, hint);
    }
  }
};

// Which output tile begins in a stage, for the warps that multiply: they have it with the stage's data, and read no
// list (bf16/passed_tiles.cuh). An m-tile whose `reserved` is the tile along n.
template <class Shape>
__device__ __forceinline__ void pass_tile(const SharedStorage<Shape>& smem, int stage, const Mxfp4MoeMTile& m,
                                          int n_tile) {
  if constexpr (Shape::kPassesTiles)
    *reinterpret_cast<int4*>(smem.passed_tile(stage)) = make_int4(m.expert, m.row_begin, m.row_end, n_tile);
}

// One warp, one lane of which issues all copies.
template <class Shape, class ActLoads>
__device__ void produce(const TensorMaps& maps, const GemmParams& p, const SharedStorage<Shape>& smem) {
  const bool issues = elect_one_lane();
  const WeightLoads<Shape, ActLoads> weights(p);
  const int num_n_tiles = ceil_div(p.n, Shape::N);
  const int num_tiles = load_num_m_tiles(p) * num_n_tiles;

  // The first stages' weights do not depend on the kernel before this one, nor do the stages have to be waited for.
  int fetched = 0;
  if (p.m_tiles_are_ready) {
    if (issues && static_cast<int>(blockIdx.x) < num_tiles) {
      const TileCoord coord = tile_coord(blockIdx.x, num_n_tiles);
      const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + coord.m);
      pass_tile(smem, 0, m_tile, coord.n);
      for (; fetched < min(Shape::kStages, weights.num_k_tiles); ++fetched)
        weights.load(maps, smem, fetched, fetched, coord.n * Shape::N, m_tile);
    }
    __syncwarp();
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  if (!issues) return;

  Ring<Shape::kStages> ring;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const TileCoord coord = tile_coord(tile, num_n_tiles);
    const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + coord.m);
#pragma unroll 1
    for (int kt = 0; kt < weights.num_k_tiles; ++kt) {
      if (kt >= fetched) {
        wait_for(smem.empty(ring.stage), ring.phase ^ 1);
        if (kt == 0) pass_tile(smem, ring.stage, m_tile, coord.n);
        weights.load(maps, smem, ring.stage, kt, coord.n * Shape::N, m_tile);
      }
      ActLoads::load(maps, smem, ring.stage, kt, m_tile);
      ring.advance();
    }
    fetched = 0;
    if constexpr (Shape::kUnrollsStages) {  // the next tile begins at stage 0
      while (ring.stage != 0) {
        wait_for(smem.empty(ring.stage), ring.phase ^ 1);
        smem.full(ring.stage)->arrive();
        ring.advance();
      }
    }
  }
  // Leave only when every load has been consumed: a block must not exit with copies in flight.
  for (int i = 0; i < Shape::kStages; ++i) {
    wait_for(smem.empty(ring.stage), ring.phase ^ 1);
    ring.advance();
  }
}

// --- a block ----------------------------------------------------------------------------------------------------

// Barriers; and where the m-tiles may not be read yet, the wait for them.
template <class Storage>
__device__ __forceinline__ void start_block(const GemmParams& p, const Storage& smem) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Storage::kStages; ++s) smem.init_barriers(s);
    fence_barrier_init();
  }
  if (!p.m_tiles_are_ready) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __syncthreads();
}

// The roles of a block's warps: those before kProducer call compute(warp, lane), kProducer loads. Where accumulators
// want more registers than each thread starts with, the producer is one warp of a whole warpgroup that gives its own
// away, because registers move between warpgroups only (setmaxnreg).
template <class Shape, class ActLoads, class Storage, class Compute>
__device__ __forceinline__ void run_block(const TensorMaps& maps, const GemmParams& p, const Storage& smem,
                                          const Compute& compute) {
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  start_block(p, smem);
  if (warp >= Shape::kProducer) {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    if (warp == Shape::kProducer) produce<Shape, ActLoads>(maps, p, smem);
  } else {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kMmaRegisters));
    wait_for_previous_kernel();
    compute(warp, lane);
  }
}

}  // namespace mxfp4_moe
