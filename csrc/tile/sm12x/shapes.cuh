// SM12x has the plain kernel alone (shapes.cuh).
#pragma once

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

template <class Tile>
struct ShapesOf<Tile, Sm12x> {
  using Folded = void;
  using ParallelK = void;
};

}  // namespace mxfp4_moe
