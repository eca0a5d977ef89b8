// The kernels that a tile has on SM90 beside the plain one (shapes.cuh). tiles/sm90.py mirrors this room's shapes.
#pragma once

#include <type_traits>

#include "tile/sm90/mma_sync_shape.cuh"
#include "tile/sm90/parallel_k_shape.cuh"
#include "tile/sm90/wgmma_shape.cuh"

namespace mxfp4_moe {

template <class Tile>
struct ShapesOf<Tile, Sm90> {
  static constexpr int M = Tile::M, N = Tile::N;
  using Folded = std::conditional_t<has_mma_sync(M, N), MmaSyncShape<M, N>,
                                    std::conditional_t<has_wgmma(M, N), WgmmaShape<M, N>, void>>;
  using ParallelK = std::conditional_t<has_parallel_k(M, N), ParallelKShape<Tile>, void>;
};

}  // namespace mxfp4_moe
