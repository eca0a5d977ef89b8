// Which kernels a tile has on its arch, what each is, and what that means to a layer. Host code: tests compile it
// alone, and tiles.kernels_of and tiles.prove mirror it.
#pragma once

#include <type_traits>

#include "tile/sm12x/shapes.cuh"
#include "tile/sm90/shapes.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// What the compiler knows of one kernel, by its shape.
template <class Shape>
constexpr Mxfp4MoeKernelFacts kernel_facts(Mxfp4MoeKernel kernel) {
  if constexpr (std::is_void_v<Shape>)
    return {};
  else
    return {kernel,
            Shape::kThreads,
            Shape::kStages,
            Shape::kStageBytes,
            Shape::kSmemBytes,
            Shape::kBlocksPerSm,
            Shape::kAccumulators};
}

template <class Tile>
struct Kernels {
  using Folded = typename ShapesOf<Tile>::Folded;
  using ParallelK = typename ShapesOf<Tile>::ParallelK;
  static constexpr bool kHasFolded = !std::is_void_v<Folded>, kHasParallelK = !std::is_void_v<ParallelK>;

  static constexpr Mxfp4MoeKernelFacts plain() { return kernel_facts<Tile>(MXFP4_MOE_KERNEL_PLAIN); }
  static constexpr Mxfp4MoeKernelFacts parallel_k() { return kernel_facts<ParallelK>(MXFP4_MOE_KERNEL_PARALLEL_K); }
  static constexpr Mxfp4MoeKernelFacts folded() { return kernel_facts<Folded>(MXFP4_MOE_KERNEL_FOLDED); }
  // Whatever kernel runs GEMM1: the others can wherever the plain one can.
  static constexpr bool kActivates = Tile::kActivates;
  static constexpr int kGemm1Format = kHasFolded ? MXFP4_MOE_ACT_FOLDED : MXFP4_MOE_ACT_MXFP8;
  static constexpr int gemm2_format() {
    if constexpr (kHasFolded) return Folded::kFoldsOutput ? MXFP4_MOE_ACT_FOLDED : MXFP4_MOE_ACT_MXFP8;
    return MXFP4_MOE_ACT_MXFP8;
  }
};

}  // namespace mxfp4_moe
