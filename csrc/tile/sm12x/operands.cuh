// What a warp of SM12x's kernel reads of a stage: where its lanes find operands and scales, and a K tile of MXFP8 rows.
// Of FP4 rows: fp4_operands.cuh. Which operand is which, of a swapped tile, is said here and there alone.
#pragma once

#include "tile/fragments.cuh"
#include "tile/sm12x/mma.cuh"

namespace mxfp4_moe {

// What a lane reads of a stage. The stage's addresses are the same for the whole warp, and kept apart from what is the
// lane's own, so that the one can stay in uniform registers and the other, with the MMA's bits, in four that never
// change.
struct StageOperands {
  const uint8_t *act, *weight;
  uint32_t act_at, weight_at;
  const uint8_t *act_scales, *weight_scales;  // this lane's first words (scale_a_row, scale_b_col)
};

// Where a warp's operands lie and how they are loaded: per group of 8 rows and 32 bytes of them two words of
// activations, as ldmatrix delivers them, and per step of K = 32 one of packed weights, four groups in a load.
// One ldmatrix fetches the activations of two groups in the order of the MMA's registers, because ptxas copies words
// that are not where the MMA wants them: for A group 0, 1, 0, 1 of the first and the second 16 bytes, for B group 0, 0,
// 1, 1.
template <class Shape>
struct OperandLoads {
  static constexpr int kActGroups = (Shape::kSwap ? Shape::kWarpN : Shape::kWarpM) / 8;
  static constexpr int kWeightGroups = Shape::kWarpWeightRows / 8;
  static constexpr int kActGroupsPerLoad = min_of(kActGroups, 2);
  static constexpr int kWeightGroupsPerLoad = min_of(kWeightGroups, 4);

  // Offsets of what this lane reads first, for a warp whose rows start at row0.
  static __device__ uint32_t act_lane(int row0, int lane) {
    const int group = Shape::kSwap ? lane / 16 % kActGroupsPerLoad : lane / 8 % 2;
    return act_chunk<Shape::kRowBytes>(row0 + group * 8 + lane % 8, Shape::kSwap ? lane / 8 % 2 : lane / 16);
  }
  static __device__ uint32_t weight_lane(int row0, int lane) {
    return row0 / kWeightBlockRows * Shape::kWeightBlockBytes +
           weight_word_in_block(row0 % kWeightBlockRows + lane / 4, 0, lane % 4, Shape::kScaleWords);
  }

  static __device__ __forceinline__ void load_act(uint32_t (&act)[kActGroups * 2], const StageOperands& stage,
                                                  int mma) {
    const uint32_t act_at = stage.act_at ^ mma << 5;  // 32 bytes of a row for an MMA, whatever their format
#pragma unroll
    for (int g = 0; g < kActGroups; g += kActGroupsPerLoad)
      ldmatrix<kActGroupsPerLoad * 2>(act + g * 2, stage.act + act_at + g * 8 * Shape::kRowBytes);
  }
  static __device__ __forceinline__ void load_weight(uint32_t (&weight)[kWeightGroups], const StageOperands& stage,
                                                     int step) {
#pragma unroll
    for (int g = 0; g < kWeightGroups; g += kWeightGroupsPerLoad)
      load_words<kWeightGroupsPerLoad>(weight + g,
                                       stage.weight + stage.weight_at + step * kWeightStepBytes + g / 4 * 512);
  }
};

// A warp's operands of one MMA of MXFP8 rows, a step of K = 32.
template <class Shape>
struct Operands : OperandLoads<Shape> {
  using Loads = OperandLoads<Shape>;
  uint32_t act[Loads::kActGroups * 2];
  uint32_t weight[Loads::kWeightGroups];

  __device__ __forceinline__ void load(const StageOperands& stage, int step) {
    Loads::load_act(act, stage, step);
    Loads::load_weight(weight, stage, step);
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

// The same of its activation rows, from the word of the first on.
template <class Shape>
struct ActScales {
  static constexpr int kFragments = Shape::kSwap ? Shape::kFragN : Shape::kFragM;

  static __device__ __forceinline__ void load(uint32_t (&word)[kFragments], const uint8_t* from) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) load_words<1>(word + f, from + f * (Shape::kSwap ? 8 : 16) * 4);
  }
};

// One K tile of MXFP8 rows: four steps.
template <class Shape>
__device__ __forceinline__ void mma_k_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], const StageOperands& stage) {
  constexpr Fp4Operand kFp4 = Shape::kSwap ? Fp4Operand::kA : Fp4Operand::kB;
  uint32_t act_word[ActScales<Shape>::kFragments], weight_word[WeightScales<Shape>::kFragments];
  ActScales<Shape>::load(act_word, stage.act_scales);
  WeightScales<Shape>::load(weight_word, stage.weight_scales);
  const auto step = [&](auto s) {
    Operands<Shape> operands;
    operands.load(stage, s);
    Fragment b[Shape::kFragN];
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) b[j] = operands.b(j);
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
      Fragment lo, hi;
      operands.a(lo, hi, i);
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) {
        if constexpr (Shape::kSwap)
          mx_mma<kFp4>(acc[i][j], lo, hi, b[j], weight_word[i], act_word[j], s);
        else
          mx_mma<kFp4>(acc[i][j], lo, hi, b[j], act_word[i], weight_word[j], s);
      }
    }
  };
  step(Constant<0>{});
  step(Constant<1>{});
  step(Constant<2>{});
  step(Constant<3>{});
}

}  // namespace mxfp4_moe
