// Which kernels a tile has on its arch, and what that means to a layer. Host code: tests compile it alone, and
// tiles.py's kernels_of mirrors it.
#pragma once

#include <type_traits>

#include "tile/sm12x/shapes.cuh"
#include "tile/sm90/shapes.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

template <class Tile>
struct Kernels {
  using Folded = typename ShapesOf<Tile>::Folded;
  using ParallelK = typename ShapesOf<Tile>::ParallelK;
  static constexpr bool kHasFolded = !std::is_void_v<Folded>, kHasParallelK = !std::is_void_v<ParallelK>;

  static constexpr int kMask = 1 << MXFP4_MOE_KERNEL_PLAIN | (kHasParallelK ? 1 << MXFP4_MOE_KERNEL_PARALLEL_K : 0) |
                               (kHasFolded ? 1 << MXFP4_MOE_KERNEL_FOLDED : 0);
  // Whatever kernel runs GEMM1: the others can wherever the plain one can.
  static constexpr bool kActivates = Tile::kActivates;
  static constexpr int kGemm1Format = kHasFolded ? MXFP4_MOE_ACT_FOLDED : MXFP4_MOE_ACT_MXFP8;
  static constexpr int gemm2_format() {
    if constexpr (kHasFolded) return Folded::kFoldsOutput ? MXFP4_MOE_ACT_FOLDED : MXFP4_MOE_ACT_MXFP8;
    return MXFP4_MOE_ACT_MXFP8;
  }
};

}  // namespace mxfp4_moe
