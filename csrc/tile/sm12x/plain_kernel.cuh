// SM12x's kernel. Grouped GEMM, MXFP8 activations x MXFP4 weights:
// out[r, :] = act[r, :] . weight[expert(r), :, :]^T.
//
// Shapes: act [rows, k] E4M3 (in each 32-block the even k, then the odd k) with scales as in shared/scale_layout.cuh;
// weight [experts, weight_bytes(n, k)] packed E2M1 and scales as in shared/weight_layout.cuh; out [rows, n] in fp32,
// bf16 or fp16, or the activation of it (swiglu_epilogue.cuh). Rows come in m-tiles of one expert each
// (shared/schedule.cuh). Launched by launcher.cuh; one instance per tile and architecture.
//
// Fast because: weights stay packed until they are in registers, which halves the shared memory and its traffic; they
// come in whole blocks, laid out for the lanes, one 16-byte load for four fragments; their codes are ordered for the
// instructions that expand them; loads run ahead of the MMAs (pipeline.cuh); and the even/odd order of the activations
// spares all shuffles: a dot product may visit a block's k in any order as long as both operands agree.
//
// Every output element is one chain of MMAs over the K blocks in order, whatever the tile: no split along K, no
// reduction across threads. That is why all tiles give the same bits.
#pragma once

#include "tile/epilogue.cuh"
#include "tile/fragments.cuh"
#include "tile/pipeline.cuh"
#include "tile/sm12x/mma.cuh"

namespace mxfp4_moe {

// --- operands ---------------------------------------------------------------------------------------------------

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
    return row0 / kWeightBlockRows * Shape::kWeightBlockBytes +
           weight_word_in_block(row0 % kWeightBlockRows + lane / 4, 0, lane % 4, Shape::kScaleWords);
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
    return row0 / kWeightBlockRows * Shape::kWeightBlockBytes +
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

// One K tile: four steps. word_a and word_b hold this lane's scale words (scale_a_row, scale_b_col).
template <class Shape>
__device__ __forceinline__ void mma_k_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], const uint8_t* act_stage,
                                           uint32_t act_at, const uint8_t* weight_stage, uint32_t weight_at,
                                           const uint32_t (&word_a)[Shape::kFragM],
                                           const uint32_t (&word_b)[Shape::kFragN]) {
  constexpr Fp4Operand kFp4 = Shape::kSwap ? Fp4Operand::kA : Fp4Operand::kB;
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
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) mx_mma<kFp4>(acc[i][j], lo, hi, b[j], word_a[i], word_b[j], s);
    }
  };
  step(cute::C<0>{});
  step(cute::C<1>{});
  step(cute::C<2>{});
  step(cute::C<3>{});
}

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
        act_lane(Operands<Shape>::act_lane(Shape::kSwap ? n0 : m0, lane)) {}

  // Adds the output tile at `coord` to acc.
  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const TileCoord& coord) const {
    const int tile_n0 = coord.n * Shape::N;
    const int scale_row_shift = load_m_tile(p.m_tiles + coord.m).row_begin % 4;
    const int act_scale_row = Shape::kSwap ? n0 + scale_b_col(lane_id()) : m0 + scale_a_row(lane_id());
    const uint32_t act_scale_lane = (act_scale_row + scale_row_shift) * 4;
    // A tile narrower than a block of weights starts anywhere in it.
    const int weight_row0 = tile_n0 % kWeightBlockRows + (Shape::kSwap ? m0 : n0);
    const uint32_t weight_lane = Operands<Shape>::weight_lane(weight_row0, lane_id());
    const auto weight_scale_lane = [&] { return WeightScales<Shape>::lane_offset(weight_row0, lane_id()); };
    const uint32_t kept_scale_lane = Shape::kKeepsNothing ? 0 : weight_scale_lane();

    const auto k_tile = [&](int s) {
      const uint8_t* act_scales = smem.act_scale(s) + act_scale_lane;
      uint32_t act_word[Shape::kSwap ? Shape::kFragN : Shape::kFragM], weight_word[WeightScales<Shape>::kFragments];
#pragma unroll
      for (int f = 0; f < (Shape::kSwap ? Shape::kFragN : Shape::kFragM); ++f)
        load_words<1>(act_word + f, act_scales + f * (Shape::kSwap ? 8 : 16) * 4);
      WeightScales<Shape>::load(weight_word,
                                smem.weight(s) + (Shape::kKeepsNothing ? weight_scale_lane() : kept_scale_lane));
      if constexpr (Shape::kSwap)
        mma_k_tile<Shape>(acc, smem.act(s), act_lane, smem.weight(s), weight_lane, weight_word, act_word);
      else
        mma_k_tile<Shape>(acc, smem.act(s), act_lane, smem.weight(s), weight_lane, act_word, weight_word);
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

// The function of a shape's kernel, for the launcher; the other kernels say it of theirs.
template <class Shape, std::enable_if_t<!Shape::kReadsBf16, int> = 0>
constexpr auto kernel_of(Shape*) {
  return grouped_gemm<Shape>;
}

}  // namespace mxfp4_moe
