// SM12x's kernel of MMAs that take scales. Grouped GEMM, MXFP8, MXFP4 or NVFP4 activations x MXFP4 or NVFP4 weights:
// out[r, :] = act[r, :] . weight[expert(r), :, :]^T.
//
// Shapes: act [rows, k] E4M3 (in each 32-block the even k, then the odd k) or [rows, k / 2] packed E2M1, with scales as
// in tile_abi.h; weight [experts, weight_bytes(n, k)] packed E2M1 and scales as in shared/weight_layout.cuh; out [rows,
// n] in fp32, bf16 or fp16, or the activation of it (swiglu_epilogue.cuh). Rows come in m-tiles of one expert each
// (shared/schedule.cuh). Launched by launcher.cuh; one instance per tile, architecture and pair of formats.
//
// Fast because: weights stay packed until they are in registers, which halves the shared memory and its traffic; they
// come in whole blocks, laid out for the lanes, one 16-byte load for four fragments; their codes are ordered for the
// instructions that expand them, or for MMAs that need no expansion (fp4_operands.cuh); loads run ahead of the MMAs
// (pipeline.cuh); and the even/odd order of the activations spares all shuffles: a dot product may visit a block's k in
// any order as long as both operands agree.
//
// Every output element is one chain of MMAs over the K blocks in order, whatever the tile: no split along K, no
// reduction across threads. That is why all tiles give the same bits.
#pragma once

#include "tile/epilogue.cuh"
#include "tile/pipeline.cuh"
#include "tile/sm12x/fp4_operands.cuh"
#include "tile/sm12x/operands.cuh"

namespace mxfp4_moe {

// --- main loop --------------------------------------------------------------------------------------------------

template <class Shape>
struct PlainSum {
  static constexpr float kUnit = 1.f;
  const GemmParams& p;
  const SharedStorage<Shape>& smem;
  int lane;           // of this thread in its warp
  int m0, n0;         // the warp's place in the physical tile
  uint32_t act_lane;  // what this lane reads of the activations, in stage 0

  __device__ __forceinline__ PlainSum(const GemmParams& params, const SharedStorage<Shape>& storage, int warp, int lane)
      : p(params),
        smem(storage),
        lane(lane),
        m0(warp_m0<Shape>(warp)),
        n0(warp_n0<Shape>(warp)),
        act_lane(OperandLoads<Shape>::act_lane(Shape::kSwap ? n0 : m0, lane)) {}

  // Adds the output tile at `coord` to acc.
  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const TileCoord& coord) const {
    const int tile_n0 = coord.n * Shape::N;
    const int scale_row_shift = load_m_tile(p.m_tiles + coord.m).row_begin % 4;
    const int act_scale_row = Shape::kSwap ? n0 + scale_b_col(lane_id()) : m0 + scale_a_row(lane_id());
    const uint32_t act_scale_lane = (act_scale_row + scale_row_shift) * 4;
    // A tile narrower than a block of weights starts anywhere in it.
    const int weight_row0 = tile_n0 % kWeightBlockRows + (Shape::kSwap ? m0 : n0);
    const uint32_t weight_lane = OperandLoads<Shape>::weight_lane(weight_row0, lane_id());
    const auto weight_scale_lane = [&] { return WeightScales<Shape>::lane_offset(weight_row0, lane_id()); };
    const uint32_t kept_scale_lane = Shape::kKeepsNothing ? 0 : weight_scale_lane();

    const auto k_tile = [&](int s) {
      const StageOperands stage{
          smem.act(s),
          smem.weight(s),
          act_lane,
          weight_lane,
          smem.act_scale(s) + act_scale_lane,
          smem.weight(s) + (Shape::kKeepsNothing ? weight_scale_lane() : kept_scale_lane),
      };
      if constexpr (Shape::kActFormat == MXFP4_MOE_ACT_MXFP8)
        mma_k_tile<Shape>(acc, stage);
      else
        mma_fp4_k_tile<Shape>(acc, stage);
    };
    const auto release = [&](int s) {
      after_all_lanes([&] {
        if (lane == 0) smem.empty(s)->arrive();
      });
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
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, ScaledActLoads<Shape>>(maps, p, smem, OutputTiles<Shape, PlainSum<Shape>>{p, smem});
}

// The function of a shape's kernel, for the launcher; the other kernels say it of theirs. It is an instance of the
// shape that is asked about, a type of tile.cu that names the arch and the pair, by which builds find a kernel.
template <class Shape, std::enable_if_t<!Shape::kReadsHalves, int> = 0>
constexpr auto kernel_of(Shape*) {
  return grouped_gemm<Shape>;
}

}  // namespace mxfp4_moe
