// Grouped GEMM, MXFP8 activations x MXFP4 weights: out[r, :] = act[r, :] . weight[expert(r), :, :]^T.
//
// Shapes: act [rows, k] E4M3 (in each 32-block the even k, then the odd k) with scales as in shared/scale_layout.cuh;
// weight [experts, weight_bytes(n, k)] packed E2M1 and scales as in shared/weight_layout.cuh; out [rows, n] in fp32,
// bf16 or fp16, or the activation of it (swiglu_epilogue.cuh). Rows come in m-tiles of one expert each
// (shared/schedule.cuh). Called by launcher.cuh; one instance per tile extension.
//
// Fast because: weights stay packed until they are in registers (half the shared memory and its traffic), come in whole
// blocks as the lanes want them, one 16-byte load for four fragments, and their codes are ordered for the instructions
// that expand them; one producer warp keeps kStages TMA loads in flight while the other warps compute, and runs ahead
// into the next output tile while they store; blocks are persistent; and the even/odd order of the activations spares
// all shuffles: a dot product may visit a block's k in any order as long as both operands agree.
//
// Every output element is one fp32 chain over the K blocks in order, whatever the tile: no split along K, no reduction
// across threads. That is why all tiles give the same bits.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cutlass/arch/barrier.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>

#include "shared/launch.cuh"
#include "shared/schedule.cuh"
#include "tile/mma_mx.cuh"
#include "tile/swiglu_epilogue.cuh"
#include "tile/tile_shape.cuh"
#include "tile/tma.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// The operands as TMA sees them; made in launcher.cuh.
struct TensorMaps {
  CUtensorMap act;          // bytes [rows][k], 128-byte swizzle
  CUtensorMap act_scale;    // pairs of words [k tiles][rows / 2]
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
  uint64_t weight_hint;      // L2's priority for weights, where it is not always the same
  const uint8_t* act_scale;  // these two only of folded activations
  const int32_t* has_far;
  Mxfp4MoeActivate activate;
};

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

template <class Shape>
struct SharedStorage {
  uint8_t* base;
  __device__ uint8_t* act(int stage) const { return base + Shape::kActOffset + stage * Shape::kActBytes; }
  __device__ uint8_t* weight(int stage) const { return base + Shape::kWeightOffset + stage * Shape::kWeightBytes; }
  __device__ uint8_t* act_scale(int stage) const {
    return base + Shape::kActScaleOffset + stage * Shape::kActScaleBytes;
  }
  __device__ FullBarrier* full(int stage) const {
    return reinterpret_cast<FullBarrier*>(base + Shape::kBarrierOffset) + stage;
  }
  __device__ EmptyBarrier* empty(int stage) const {
    return reinterpret_cast<EmptyBarrier*>(base + Shape::kBarrierOffset + Shape::kStages * 8) + stage;
  }
  __device__ uint32_t* amax() const { return reinterpret_cast<uint32_t*>(base + Shape::kAmaxOffset); }
};

// volatile, here and below: what a tile needs before and after its main loop is had twice rather than held in
// registers through the loop.
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
  __device__ __forceinline__ void skip(int stages) {
    const unsigned to = stage + stages;
    stage = to % kStages;
    phase ^= to / kStages & 1;
  }
};

// --- producer ---------------------------------------------------------------------------------------------------

// A stage's activations: E4M3 codes and scale words. TMA counts whole boxes, zero-filled beyond the edges.
template <class Shape>
struct ScaledActLoads {
  static __device__ __forceinline__ uint32_t bytes(const Mxfp4MoeMTile&) {
    return Shape::kActBytes + Shape::kActScaleRows * 4;
  }
  static __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt,
                                              const Mxfp4MoeMTile& m) {
    uint64_t* full = reinterpret_cast<uint64_t*>(smem.full(s));
    tma_load_2d(smem.act(s), maps.act, full, kt * kTileK, m.row_begin, kEvictLast);
    tma_load_2d(smem.act_scale(s), maps.act_scale, full, m.row_begin / 4 * 2, kt, kEvictLast);
  }
};

// A stage's weights: one copy for a whole K tile, one per block for the last if it is not whole.
template <class Shape, class ActLoads>
struct WeightLoads {
  static constexpr int kBlockUnits = kWeightBlockBytes / kWeightUnit;
  static constexpr bool kHintVaries = Shape::Arch::kFewWeightBytes != INT64_MAX;
  uint64_t hint;
  int num_k_tiles, tail_steps, tail_units, row_blocks, expert_units;

  __device__ __forceinline__ explicit WeightLoads(const GemmParams& p)
      : hint(kHintVaries ? p.weight_hint : kEvictFirst),
        num_k_tiles(ceil_div(p.k, kTileK)),
        tail_steps(p.k % kTileK / kBlockK),
        tail_units((kWeightBlockScaleBytes + tail_steps * kWeightStepBytes) / kWeightUnit),
        row_blocks(ceil_div(p.n, kWeightBlockRows)),
        expert_units(row_blocks * (p.k / kTileK * kBlockUnits + (tail_steps ? tail_units : 0))) {}

  // Also tells the stage's barrier what to expect, activations included.
  __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt, int n0,
                                       const Mxfp4MoeMTile& m) const {
    uint64_t* full = reinterpret_cast<uint64_t*>(smem.full(s));
    const int k_tile_unit = m.expert * expert_units + kt * row_blocks * kBlockUnits;
    const int row_block = n0 / kWeightBlockRows;
    if (tail_steps == 0 || kt + 1 < num_k_tiles) {
      smem.full(s)->arrive_and_expect_tx(ActLoads::bytes(m) + Shape::kWeightBytes);
      tma_load_2d(smem.weight(s), maps.weight, full, 0, k_tile_unit + row_block * kBlockUnits, hint);
    } else {
      smem.full(s)->arrive_and_expect_tx(ActLoads::bytes(m) + Shape::kWeightBlocks * tail_units * kWeightUnit);
      for (int b = 0; b < Shape::kWeightBlocks; ++b)
        tma_load_2d(smem.weight(s) + b * kWeightBlockBytes, maps.weight_tail, full, 0,
                    k_tile_unit + (row_block + b) * tail_units, hint);
    }
  }
};

// One warp, one lane of which issues all copies.
template <class Shape, class ActLoads = ScaledActLoads<Shape>>
__device__ void produce(const TensorMaps& maps, const GemmParams& p, const SharedStorage<Shape>& smem) {
  const bool issues = cute::elect_one_sync();
  const WeightLoads<Shape, ActLoads> weights(p);
  const int num_n_tiles = ceil_div(p.n, Shape::N);
  const int num_tiles = load_num_m_tiles(p) * num_n_tiles;

  // The first stages' weights do not depend on the kernel before this one, nor do the stages have to be waited for.
  int fetched = 0;
  if (p.m_tiles_are_ready) {
    if (issues && static_cast<int>(blockIdx.x) < num_tiles) {
      const TileCoord coord = tile_coord(blockIdx.x, num_n_tiles);
      const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + coord.m);
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

// --- operands ---------------------------------------------------------------------------------------------------

// kCount 8x16-byte matrices; lane l names row l % 8 of matrix l / 8. Thread t of a quad gets bytes 4t..4t+3 of its row.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t* r, const uint8_t* row) {
  const auto& source = *reinterpret_cast<const cute::uint128_t*>(row);
  if constexpr (kCount == 4) {
    cute::SM75_U32x4_LDSM_N::copy(source, r[0], r[1], r[2], r[3]);
  } else if constexpr (kCount == 2) {
    cute::SM75_U32x2_LDSM_N::copy(source, r[0], r[1]);
  } else {
    static_assert(kCount == 1);
    cute::SM75_U32x1_LDSM_N::copy(source, r[0]);
  }
}

// TMA's 128-byte swizzle: 16-byte chunk c of row r sits where 8 consecutive rows hit all banks once. Rows of fragments
// start at multiples of 8, so moving to another chunk flips bits of the offset: offset ^ (delta << 4).
__device__ __forceinline__ uint32_t act_chunk(int row, int chunk) {
  return row * kActRowBytes + ((chunk ^ (row & 7)) << 4);
}

// kCount consecutive 32-bit words of shared memory in one load.
template <int kCount>
__device__ __forceinline__ void load_words(uint32_t* r, const uint8_t* from) {
  if constexpr (kCount == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  } else if constexpr (kCount == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    r[0] = v.x, r[1] = v.y;
  } else {
    static_assert(kCount == 1);
    r[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// A warp's operands of one step (K = 32): per group of 8 rows two words of activations (k slots 0-15 and 16-31), as
// ldmatrix delivers them, and one of packed weights, four groups in a load. Swapping is only here.
// One ldmatrix fetches the activations of two groups in the order of the MMA's registers, because ptxas copies words
// that are not where the MMA wants them: for A group 0, 1, 0, 1 of slots 0-15 and 16-31, for B group 0, 0, 1, 1.
template <class Shape>
struct Operands {
  static constexpr int kActGroups = (Shape::kSwap ? Shape::kWarpN : Shape::kWarpM) / 8;
  static constexpr int kWeightGroups = Shape::kWarpWeightRows / 8;
  static constexpr int kActGroupsPerLoad = min_of(kActGroups, 2);
  static constexpr int kWeightGroupsPerLoad = min_of(kWeightGroups, 4);
  uint32_t act[kActGroups * 2];
  uint32_t weight[kWeightGroups];

  // Offsets of what this lane reads at step 0, for a warp whose rows start at row0.
  static __device__ uint32_t act_lane(int row0, int lane) {
    const int group = Shape::kSwap ? lane / 16 % kActGroupsPerLoad : lane / 8 % 2;
    return act_chunk(row0 + group * 8 + lane % 8, Shape::kSwap ? lane / 8 % 2 : lane / 16);
  }
  static __device__ uint32_t weight_lane(int row0, int lane) {
    return row0 / kWeightBlockRows * kWeightBlockBytes +
           weight_word_in_block(row0 % kWeightBlockRows + lane / 4, 0, lane % 4);
  }

  // act_stage and weight_stage are the same for the whole warp, and kept apart from what is the lane's own, so that the
  // one can stay in uniform registers and the other, with the step's bits, in four that never change.
  __device__ __forceinline__ void load(const uint8_t* act_stage, uint32_t act_at, const uint8_t* weight_stage,
                                       uint32_t weight_at, int step) {
    act_at ^= step << 5;  // 32 bytes of activations per row and step
#pragma unroll
    for (int g = 0; g < kActGroups; g += kActGroupsPerLoad)
      ldmatrix<kActGroupsPerLoad * 2>(act + g * 2, act_stage + act_at + g * 8 * kActRowBytes);
#pragma unroll
    for (int g = 0; g < kWeightGroups; g += kWeightGroupsPerLoad)
      load_words<kWeightGroupsPerLoad>(weight + g, weight_stage + weight_at + step * kWeightStepBytes + g / 4 * 512);
  }

  // The MMA's A of fragment i, rows g and g + 8, and its B of fragment j.
  __device__ __forceinline__ void a(Fragment& lo, Fragment& hi, int i) const {
    if constexpr (Shape::kSwap) {
      lo = expand_weight(weight[2 * i]);
      hi = expand_weight(weight[2 * i + 1]);
    } else {
      lo = expand_act(act[4 * i], act[4 * i + 2]);
      hi = expand_act(act[4 * i + 1], act[4 * i + 3]);
    }
  }
  __device__ __forceinline__ Fragment b(int j) const {
    if constexpr (Shape::kSwap) {
      return expand_act(act[2 * j], act[2 * j + 1]);
    } else {
      return expand_weight(weight[j]);
    }
  }
};

// This lane's scale words of a warp's weight rows: as A of rows scale_a_row in each of the fragments of 16, as B of
// columns scale_b_col in each of those of 8. row0 is the warp's first row in its block.
template <class Shape>
struct WeightScales {
  static constexpr int kFragments = Shape::kSwap ? Shape::kFragM : Shape::kFragN;

  static __device__ uint32_t lane_offset(int row0, int lane) {
    return row0 / kWeightBlockRows * kWeightBlockBytes +
           weight_scale_word_in_block(row0 % kWeightBlockRows + (Shape::kSwap ? scale_a_row(lane) : scale_b_col(lane)));
  }
  static __device__ __forceinline__ void load(uint32_t (&word)[kFragments], const uint8_t* from) {
    if constexpr (Shape::kSwap) {
      constexpr int kPerLoad = min_of(kFragments, 2);  // fragments of 16 rows that stand side by side
#pragma unroll
      for (int i = 0; i < kFragments; i += kPerLoad) load_words<kPerLoad>(word + i, from + i / 2 * 128);
    } else if constexpr (kFragments == 4) {
      uint32_t in_place[4];
      load_words<4>(in_place, from);
#pragma unroll
      for (int j = 0; j < 4; ++j) word[j] = in_place[weight_scale_position(j)];
    } else {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) load_words<1>(word + j, from + weight_scale_position(j) * 4);
    }
  }
};

// One K tile: four steps. Where the MMA takes scale selectors they are constants, so the steps are unrolled; elsewhere
// the largest warp tiles loop, which keeps the scheduler from hoisting more operands than there are registers. word_a
// and word_b hold this lane's scale words (scale_a_row, scale_b_col). Sharing them among lanes is free on SM12x;
// elsewhere it doubles their registers, so the largest warp tiles share A's in every step anew.
template <class Shape>
__device__ __forceinline__ void mma_k_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], const uint8_t* act_stage,
                                           uint32_t act_at, const uint8_t* weight_stage, uint32_t weight_at,
                                           const uint32_t (&word_a)[Shape::kFragM],
                                           const uint32_t (&word_b)[Shape::kFragN]) {
  constexpr Fp4Operand kFp4 = Shape::kSwap ? Fp4Operand::kA : Fp4Operand::kB;
  constexpr bool kShareLate = Shape::kAccumulators > 64;
  ScaleA scale_a[Shape::kFragM];
  ScaleB scale_b[Shape::kFragN];
#pragma unroll
  for (int i = 0; i < Shape::kFragM; ++i)
    if constexpr (!kShareLate) scale_a[i] = share_scale_a(word_a[i]);
#pragma unroll
  for (int j = 0; j < Shape::kFragN; ++j) scale_b[j] = share_scale_b(word_b[j]);

  const auto step = [&](auto s) {
    Operands<Shape> operands;
    operands.load(act_stage, act_at, weight_stage, weight_at, s);
    Fragment b[Shape::kFragN];
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) b[j] = operands.b(j);
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
      Fragment lo, hi;
      operands.a(lo, hi, i);
      if constexpr (kShareLate) scale_a[i] = share_scale_a(word_a[i]);
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) mx_mma<kFp4>(acc[i][j], lo, hi, b[j], scale_a[i], scale_b[j], s);
    }
  };
  if constexpr (kSelectorIsImmediate) {
    step(cute::C<0>{});
    step(cute::C<1>{});
    step(cute::C<2>{});
    step(cute::C<3>{});
  } else {
    constexpr int kUnroll = Shape::kAccumulators <= 32 ? 4 : Shape::kAccumulators <= 64 ? 2 : 1;
#pragma unroll kUnroll
    for (int s = 0; s < 4; ++s) step(s);
  }
}

// --- epilogue ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_pair(float lo, float hi, int32_t out_type) {
  if (out_type == MXFP4_MOE_OUT_BFLOAT16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// acc -> out for one warp; (m0, n0) is the warp's place in the physical tile.
template <class Shape>
__device__ __forceinline__ void store(const float (&acc)[Shape::kFragM][Shape::kFragN][4], const GemmParams& p,
                                      const Mxfp4MoeMTile& m_tile, int tile_n0, int m0, int n0, int lane) {
  const int rows = m_tile.row_end - m_tile.row_begin;
  const auto element = [&](int row, int col) { return static_cast<int64_t>(m_tile.row_begin + row) * p.n + col; };
#pragma unroll
  for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // rows g and g + 8 of the fragment
        const float lo = acc[i][j][h * 2], hi = acc[i][j][h * 2 + 1];
        const int phys_m = m0 + i * 16 + c_row(lane, h * 2), phys_n = n0 + j * 8 + c_col(lane, 0);
        if constexpr (!Shape::kSwap) {
          const int row = phys_m, col = tile_n0 + phys_n;
          if (row >= rows || col >= p.n) continue;
          if (p.out_type == MXFP4_MOE_OUT_FLOAT32) {
            *reinterpret_cast<float2*>(static_cast<float*>(p.out) + element(row, col)) = make_float2(lo, hi);
          } else {
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + element(row, col)) =
                pack_pair(lo, hi, p.out_type);
          }
        } else if (p.out_type == MXFP4_MOE_OUT_FLOAT32) {
          const int row = phys_n, col = tile_n0 + phys_m;
          if (col >= p.n) continue;
          if (row < rows) static_cast<float*>(p.out)[element(row, col)] = lo;
          if (row + 1 < rows) static_cast<float*>(p.out)[element(row + 1, col)] = hi;
        } else {
          const uint32_t pair = transpose_8x8(pack_pair(lo, hi, p.out_type));
          const int row = n0 + j * 8 + lane / 4, col = tile_n0 + m0 + i * 16 + h * 8 + c_col(lane, 0);
          if (row >= rows || col >= p.n) continue;
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + element(row, col)) = pair;
        }
      }
    }
  }
}

// --- consumer ---------------------------------------------------------------------------------------------------

template <class Shape>
__device__ void consume(const GemmParams& p, const SharedStorage<Shape>& smem, int warp, int lane) {
  const int num_n_tiles = ceil_div(p.n, Shape::N);
  // Where accumulators leave no registers for what is seldom needed, that is had again.
  constexpr bool kReadsAgain = Shape::kAccumulators > 64;
  const int num_tiles = kReadsAgain ? 0 : uniform(load_num_m_tiles(p)) * num_n_tiles;
  const auto is_tile = [&](int tile) {
    return tile < (kReadsAgain ? uniform(load_num_m_tiles(p)) * ceil_div(p.n, Shape::N) : num_tiles);
  };
  const auto warp_m0 = [](int w) { return w / Shape::kWarpsN * Shape::kWarpM; };
  const auto warp_n0 = [](int w) { return w % Shape::kWarpsN * Shape::kWarpN; };
  const int m0 = warp_m0(warp), n0 = warp_n0(warp);

  // This lane's offsets into stage 0; a tile narrower than a block of weights starts anywhere in it.
  const uint32_t act_lane = Operands<Shape>::act_lane(Shape::kSwap ? n0 : m0, lane);

  Ring<Shape::kStages> ring;
  for (int tile = blockIdx.x; is_tile(tile); tile += gridDim.x) {
    const TileCoord coord = tile_coord(tile, num_n_tiles);
    const int tile_n0 = coord.n * Shape::N;
    const int scale_row_shift = load_m_tile(p.m_tiles + coord.m).row_begin % 4;
    const int act_scale_row = Shape::kSwap ? n0 + scale_b_col(lane_id()) : m0 + scale_a_row(lane_id());
    const uint32_t act_scale_lane = (act_scale_row + scale_row_shift) * 4;
    const int weight_row0 = tile_n0 % kWeightBlockRows + (Shape::kSwap ? m0 : n0);
    const uint32_t weight_lane = Operands<Shape>::weight_lane(weight_row0, lane_id());
    const auto weight_scale_lane = [&] { return WeightScales<Shape>::lane_offset(weight_row0, lane_id()); };
    const uint32_t kept_scale_lane = kReadsAgain ? 0 : weight_scale_lane();

    float acc[Shape::kFragM][Shape::kFragN][4] = {};
    const auto k_tile = [&](int s) {
      const uint8_t* act_scales = smem.act_scale(s) + act_scale_lane;
      uint32_t act_word[Shape::kSwap ? Shape::kFragN : Shape::kFragM], weight_word[WeightScales<Shape>::kFragments];
#pragma unroll
      for (int f = 0; f < (Shape::kSwap ? Shape::kFragN : Shape::kFragM); ++f)
        load_words<1>(act_word + f, act_scales + f * (Shape::kSwap ? 8 : 16) * 4);
      WeightScales<Shape>::load(weight_word, smem.weight(s) + (kReadsAgain ? weight_scale_lane() : kept_scale_lane));
      if constexpr (Shape::kSwap)
        mma_k_tile<Shape>(acc, smem.act(s), act_lane, smem.weight(s), weight_lane, weight_word, act_word);
      else
        mma_k_tile<Shape>(acc, smem.act(s), act_lane, smem.weight(s), weight_lane, act_word, weight_word);
    };
    const auto release = [&](int s) {
      asm volatile("" ::: "memory");  // no load may move behind the arrival
      __syncwarp();
      if (lane == 0) smem.empty(s)->arrive();
    };
    if constexpr (Shape::kUnrollsStages) {
      // Once around the stages at a time, so that all their addresses are constants. Every output tile begins at stage
      // 0; in its last round, stages without a K tile only pass the barriers.
#pragma unroll 1
      for (int k = 0; k < p.k; k += Shape::kStages * kTileK) {
#pragma unroll
        for (int s = 0; s < Shape::kStages; ++s) {
          wait_for(smem.full(s), ring.phase);
          if (k + s * kTileK < p.k) k_tile(s);
          release(s);
        }
        ring.phase ^= 1;
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < p.k; k += kTileK) {
        wait_for(smem.full(ring.stage), ring.phase);
        k_tile(ring.stage);
        release(ring.stage);
        ring.advance();
      }
    }
    // The coordinates are computed again, from a tile index that the compiler cannot know to be the same, so that they
    // hold no registers through the main loop.
    if constexpr (kAccumulatorUnit != 1.f) {
#pragma unroll
      for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
          for (int x = 0; x < 4; ++x) acc[i][j][x] *= kAccumulatorUnit;
        }
      }
    }
    int same_tile = tile;
    asm volatile("" : "+r"(same_tile));
    const TileCoord done = tile_coord(same_tile, num_n_tiles);
    const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + done.m);
    const int same_warp = uniform(warp_id()), done_m0 = warp_m0(same_warp), done_n0 = warp_n0(same_warp);
    if constexpr (Shape::kActivates) {
      if (p.activate.codes != nullptr) {
        store_activated<Shape>(acc, p.activate, m_tile, p.rows, p.n, done.n * Shape::N, done_m0, done_n0, lane_id(),
                               smem.amax());
        continue;
      }
    }
    store<Shape>(acc, p, m_tile, done.n * Shape::N, done_m0, done_n0, lane_id());
  }
}

// Barriers; and where the m-tiles may not be read yet, the wait for them.
template <class Shape>
__device__ __forceinline__ void start_block(const GemmParams& p, const SharedStorage<Shape>& smem) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      smem.full(s)->init(1);
      smem.empty(s)->init(Shape::kMmaWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (!p.m_tiles_are_ready) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __syncthreads();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  const int warp = uniform(threadIdx.x / 32);
  const int lane = threadIdx.x % 32;

  start_block(p, smem);

  if (warp >= Shape::kMmaWarps) {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    if (warp == Shape::kMmaWarps) produce<Shape>(maps, p, smem);
  } else {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kMmaRegisters));
    wait_for_previous_kernel();
    consume<Shape>(p, smem, warp, lane);
  }
}

}  // namespace mxfp4_moe
