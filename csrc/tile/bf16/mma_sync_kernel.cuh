// Grouped GEMM of bf16 or fp16 activations and MXFP4 or NVFP4 weights by the warp's MMA: on SM90 tiles of few
// activation rows and of few weight rows, on SM12x all. out[r, :] = act[r, :] . weight[expert(r), :, :]^T.
//
// Shapes: act [rows, k] bf16 or fp16 (shared/bf16_rows.cuh); weight [experts, weight_bytes(n, k)] packed E2M1 and
// scales as in shared/weight_layout.cuh, words in order `pairs`; out [rows, n] in fp32, bf16 or fp16, or the activation
// of it (swiglu_epilogue.cuh). Rows come in m-tiles of one expert each (shared/schedule.cuh). Arithmetic: operands.cuh.
//
// Fast because: a lane's weights of 32 rows and a K block come in one 16-byte load and are operands after few
// instructions, scales included; one ldmatrix has the activations of 8 rows and a K block; the operands of a K block
// are loaded before the one before it is multiplied; sums stay in the tensor core; a tile is as narrow as its rows; and
// several blocks hide each other's waits.
#pragma once

#include "tile/bf16/passed_tiles.cuh"

namespace mxfp4_moe {

// acc += a . b of m16n8k16, bf16 or fp16 (Mxfp4MoeActFormat).
template <int kActFormat>
__device__ __forceinline__ void mma_halves(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                           uint32_t b0, uint32_t b1) {
#define MXFP4_MOE_MMA_HALVES(TYPE)                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])     \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (kActFormat == MXFP4_MOE_ACT_FP16)
    MXFP4_MOE_MMA_HALVES("f16");
  else
    MXFP4_MOE_MMA_HALVES("bf16");
#undef MXFP4_MOE_MMA_HALVES
}

// What a warp multiplies in a K block: of each 8 activation rows four words, k = 0-7, 8-15, 16-23 and 24-31 (the lane's
// two of each), and of each 8 weight rows one. Where there are no registers for the activations of all rows, they are
// read when they are multiplied.
template <class Shape, int kActGroups>
struct BlockOperands {
  static constexpr int kWeightGroups = Shape::kWarpWeightRows / 8, kActFormat = Shape::kActFormat;
  using Scales = ScalingOf<Shape>;
  uint32_t act[Shape::kLoadsAhead ? kActGroups : 1][4];
  const uint8_t* act_rows;
  uint32_t words[kWeightGroups];

  __device__ __forceinline__ void load(const SharedStorage<Shape>& smem, int stage, int step, const Places& at,
                                       uint32_t act_at) {
    const uint8_t* rows = smem.act(stage) + step / 2 * Shape::kHalfBytes + (act_at ^ step % 2 * 64);
    if constexpr (Shape::kLoadsAhead) {
#pragma unroll
      for (int g = 0; g < kActGroups; ++g) ldmatrix<4>(act[g], rows + g * 8 * kActRowBytes);
    } else {
      act_rows = rows;
    }
    load_groups(words, smem.weight(stage) + at.words + step * kWeightStepBytes);
  }

  template <bool kLarge>
  __device__ __forceinline__ void multiply(float (&acc)[Shape::kFragM][Shape::kFragN][4],
                                           const uint32_t (&scales)[kWeightGroups], int step,
                                           const typename Scales::Kept& kept) const {
    if constexpr (!Shape::kLoadsAhead) {
      static_assert(Shape::kSwap);
      uint32_t a[Shape::kFragM][8];
#pragma unroll
      for (int i = 0; i < Shape::kFragM; ++i)
        expand_rows<Scales, kLarge>(a[i], words + i * 2, scales + i * 2, step, kept);
      constexpr int kTogether = min_of(kActGroups, 2);
#pragma unroll
      for (int first = 0; first < kActGroups; first += kTogether) {
        uint32_t b[kTogether][4];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) ldmatrix<4>(b[j], act_rows + (first + j) * 8 * kActRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
            for (int j = 0; j < kTogether; ++j)
              mma_halves<kActFormat>(acc[i][first + j], a[i][half * 4], a[i][half * 4 + 1], a[i][half * 4 + 2],
                                     a[i][half * 4 + 3], b[j][half * 2], b[j][half * 2 + 1]);
          }
        }
      }
    } else if constexpr (Shape::kSwap) {
#pragma unroll
      for (int i = 0; i < Shape::kFragM; ++i) {
        uint32_t a[8];
        expand_rows<Scales, kLarge>(a, words + i * 2, scales + i * 2, step, kept);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < kActGroups; ++j)
            mma_halves<kActFormat>(acc[i][j], a[half * 4], a[half * 4 + 1], a[half * 4 + 2], a[half * 4 + 3],
                                   act[j][half * 2], act[j][half * 2 + 1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) {
        uint32_t b[4];
        Scales::template expand_scaled<kLarge>(b, words[j], scales[j], step, kept);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < Shape::kFragM; ++i)
            mma_halves<kActFormat>(acc[i][j], act[i * 2][half * 2], act[i * 2 + 1][half * 2], act[i * 2][half * 2 + 1],
                                   act[i * 2 + 1][half * 2 + 1], b[half * 2], b[half * 2 + 1]);
        }
      }
    }
  }
};

// One output tile's sums of a warp, of its first 8 kActGroups activation rows. Afterwards every stage is released.
template <class Shape, int kActGroups>
__device__ __forceinline__ void sum_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring, const Places& at,
                                         uint32_t act_at, const typename ScalingOf<Shape>::Origin& origin) {
  using Operands = BlockOperands<Shape, kActGroups>;
  using Scales = ScalingOf<Shape>;
  Operands operands[2];
  uint32_t scales[Operands::kWeightGroups];
  const typename Scales::Kept kept = Scales::keep(origin);
  const auto open = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    operands[0].load(smem, ring.stage, 0, at, act_at);
  };
  // Of the last K tile only the first half has anything. Native tiles are not for speed, nor is it asked of them.
  const bool half_tail = Shape::kSwap && (k - 1) % kTileK < 64;
  open();
  load_scales(scales, smem.weight(ring.stage) + at.scales);
#pragma unroll 1
  for (int kt = ceil_div(k, kTileK); kt > 0; --kt) {
    const int stage = ring.stage;
    ring.advance();
    const auto multiply = [&](auto large) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (step == 2 && kt == 1 && half_tail) break;
        if (step < 3) {
          operands[(step + 1) % 2].load(smem, stage, step + 1, at, act_at);
        } else if (kt > 1) {
          open();
        }
        operands[step % 2].template multiply<decltype(large)::value>(acc, scales, step, kept);
        if (step < 3 && (step + 1) % Scales::kSetSteps == 0)
          load_scales(scales, smem.weight(stage) + at.scales + (step + 1) / Scales::kSetSteps * kWeightScaleSetBytes);
      }
    };
    if constexpr (!Scales::kHasLarge)
      multiply(std::false_type());
    else if (!has_large(scales))
      multiply(std::false_type());
    else
      multiply(std::true_type());
    if (kt > 1) load_scales(scales, smem.weight(ring.stage) + at.scales);
    release(smem, stage);
  }
}

// No more than twice the fragments that the rows need, where activation rows are the MMA's columns.
template <class Shape, int kActGroups>
__device__ __forceinline__ void sum_rows(int rows, float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring, const Places& at,
                                         uint32_t act_at, const typename ScalingOf<Shape>::Origin& origin) {
  if constexpr (Shape::kSwap && kActGroups > 1) {
    constexpr int kFewer = kActGroups / 2;
    if (rows <= kFewer * 8) return sum_rows<Shape, kFewer>(rows, acc, k, smem, ring, at, act_at, origin);
  }
  sum_tile<Shape, kActGroups>(acc, k, smem, ring, at, act_at, origin);
}

template <class Shape>
struct MmaSyncSum {
  static constexpr float kUnit = ScalingOf<Shape>::kUnit;
  static constexpr int kActGroups = (Shape::kSwap ? Shape::kWarpN : Shape::kWarpM) / 8;
  const GemmParams& p;
  const SharedStorage<Shape>& smem;

  __device__ __forceinline__ MmaSyncSum(const GemmParams& params, const SharedStorage<Shape>& storage, int, int)
      : p(params), smem(storage) {}

  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const TileCoord& coord) const {
    Mxfp4MoeMTile tile = load_m_tile(p.m_tiles + coord.m);
    tile.reserved = coord.n;
    (*this)(acc, ring, tile);
  }

  // rows.reserved: the tile along n.
  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const Mxfp4MoeMTile& rows) const {
    // A tile narrower than a block of weights starts anywhere in it.
    const int weight_row = Shape::kSwap ? warp_id() * Shape::kWarpM : rows.reserved * Shape::N % kWeightBlockRows;
    const int act_row = Shape::kSwap ? 0 : warp_id() * Shape::kWarpM;
    const Places at = places<Shape>(first_row<Shape>(weight_row + lane_id() / 4));
    const uint32_t act_at = act_chunk(act_row + lane_id() % 8, lane_id() / 8);  // what this lane names for ldmatrix
    const auto origin = ScalingOf<Shape>::Origin::of(p.factors, rows.expert);
    sum_rows<Shape, kActGroups>(uniform(rows.row_end - rows.row_begin), acc, p.k, smem, ring, at, act_at, origin);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_mma_sync(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, Bf16ActLoads<Shape>>(maps, p, smem, TilesOf<Shape, MmaSyncSum<Shape>>{p, smem});
}

template <class Shape, class Arch, class Pair, int M, int N, bool kSwap, int kMmaWarps, bool kMovesRegisters,
          int kMostBlocks, bool kLoadsAhead>
constexpr auto kernel_of(MmaSyncShape<Arch, Pair, M, N, kSwap, kMmaWarps, kMovesRegisters, kMostBlocks, kLoadsAhead>*) {
  return grouped_gemm_mma_sync<Shape>;
}

}  // namespace mxfp4_moe
