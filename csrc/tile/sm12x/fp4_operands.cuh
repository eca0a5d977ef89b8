// A K tile of FP4 rows, MXFP4 or NVFP4, by weights of the same format: two MMAs of K = 64 for each fragment, whose
// operands are packed words as they were loaded. Nothing is expanded: an MMA's halves of K are two steps of 32, of both
// operands, in k order (word order `plain` of shared/weight_layout.cuh; rows of packed codes).
//
// Of MXFP4 a row's scale word is for the K tile, its halves for the two MMAs; of NVFP4 each MMA has a word of its own.
#pragma once

#include "tile/sm12x/fp4_mma.cuh"
#include "tile/sm12x/operands.cuh"

namespace mxfp4_moe {

// A warp's operands of one MMA, a step of K = 64.
template <class Shape>
struct Fp4Operands : OperandLoads<Shape> {
  using Loads = OperandLoads<Shape>;
  static constexpr int kWeightGroupsPerLoad = Shape::kSwap ? 2 : 1;
  uint32_t act[Loads::kActGroups * 2];
  static constexpr int kWeightGroups = Loads::kWeightGroups;
  uint32_t weight[2][kWeightGroups];

  __device__ __forceinline__ void load(const StageOperands& stage, int mma) {
    Loads::load_act(act, stage, mma);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kWeightGroups; g += kWeightGroupsPerLoad)
        load_words<kWeightGroupsPerLoad>(
            weight[half] + g,
            stage.weight + stage.weight_at + (2 * mma + half) * kWeightStepBytes + g / 4 * 512 + g % 4 * 4);
    }
  }

  // The MMA's A of fragment i, rows g and g + 8 of the first half of K and then of the second, and its B of fragment j.
  __device__ __forceinline__ Fp4A a(int i) const {
    if constexpr (Shape::kSwap) {
      return {weight[0][2 * i], weight[0][2 * i + 1], weight[1][2 * i], weight[1][2 * i + 1]};
    } else {
      return {act[4 * i], act[4 * i + 1], act[4 * i + 2], act[4 * i + 3]};
    }
  }
  __device__ __forceinline__ Fp4B b(int j) const {
    if constexpr (Shape::kSwap) {
      return {act[2 * j], act[2 * j + 1]};
    } else {
      return {weight[0][j], weight[1][j]};
    }
  }
};

template <class Shape>
__device__ __forceinline__ void mma_fp4_k_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4],
                                               const StageOperands& stage) {
  constexpr bool kNvfp4 = Shape::kActFormat == MXFP4_MOE_ACT_NVFP4;
  static_assert(kNvfp4 == (Shape::kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4), "an MMA has one kind of scales");
  uint32_t act_word[ActScales<Shape>::kFragments], weight_word[WeightScales<Shape>::kFragments];
  const auto step = [&](auto s) {
    if constexpr (s == 0 || kNvfp4) {
      ActScales<Shape>::load(act_word, stage.act_scales + s * Shape::kActScaleSetBytes);
      WeightScales<Shape>::load(weight_word, stage.weight_scales + s * kWeightScaleSetBytes);
    }
    Fp4Operands<Shape> operands;
    operands.load(stage, s);
    Fp4B b[Shape::kFragN];
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) b[j] = operands.b(j);
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
      const Fp4A a = operands.a(i);
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) {
        if constexpr (Shape::kSwap)
          fp4_mma<kNvfp4>(acc[i][j], a, b[j], weight_word[i], act_word[j], s);
        else
          fp4_mma<kNvfp4>(acc[i][j], a, b[j], act_word[i], weight_word[j], s);
      }
    }
  };
  step(Constant<0>{});
  step(Constant<1>{});
}

}  // namespace mxfp4_moe
