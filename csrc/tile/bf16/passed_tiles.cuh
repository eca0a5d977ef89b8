// The walk over a block's output tiles where the warp that loads also passes on which tile it loads (SM90).
//
// A tile's place in the list of m-tiles, its rows and its expert are in global memory, past L1, and every trip there
// costs a thousand clocks in which nothing of the block multiplies: at a tile's begin, behind its main loop, and once
// more to see whether there is another. The producer has made that trip long before. It leaves 16 bytes in the stage
// of the tile's first K tile, which the stage's barrier publishes with the data. GEMM1's biases are asked for before
// the main loop, too.
#pragma once

#include "tile/bf16/operands.cuh"

namespace mxfp4_moe {

__device__ __forceinline__ Mxfp4MoeMTile read_tile(const uint8_t* at) {
  Mxfp4MoeMTile tile;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile.expert), "=r"(tile.row_begin), "=r"(tile.row_end), "=r"(tile.reserved)
               : "r"(shared_address(at))
               : "memory");
  return tile;
}

// What the computing warps of a block do (run_block); as OutputTiles does it (tile/epilogue.cuh).
template <class Shape, class Sum>
struct PassedTiles {
  const GemmParams& p;
  const SharedStorage<Shape>& smem;

  __device__ __forceinline__ void operator()(int, int) const {
    const Sum sum(p, smem, 0, 0);
    Ring<Shape::kStages> ring;
    const int num_tiles = uniform(load_num_m_tiles(p)) * ceil_div(p.n, Shape::N);
    for (int tile_number = blockIdx.x; tile_number < num_tiles; tile_number += gridDim.x) {
      wait_for(smem.full(ring.stage), ring.phase);
      const Mxfp4MoeMTile tile = read_tile(smem.passed_tile(ring.stage));
      __syncwarp();  // all lanes have read what is kept of the tile before
      if (lane_id() == 0)
        *reinterpret_cast<int4*>(smem.kept_tile(warp_id())) =
            make_int4(tile.expert, tile.row_begin, tile.row_end, tile.reserved);
      const EarlyBias<Shape> bias(p.activate, p.n, tile, tile.reserved * Shape::N + warp_m0<Shape>(warp_id()),
                                  lane_id());

      float acc[Shape::kFragM][Shape::kFragN][4] = {};
      sum(acc, ring, tile);
      if constexpr (Sum::kUnit != 1.f) multiply_accumulators<Shape>(acc, Sum::kUnit);
      const int warp = uniform(warp_id());
      const Mxfp4MoeMTile done = read_tile(smem.kept_tile(warp));
      if constexpr (Shape::kHasFactors)
        multiply_factors<Shape>(acc, p.factors, done, done.reserved * Shape::N, warp_m0<Shape>(warp),
                                warp_n0<Shape>(warp), lane_id());
      store_tile<Shape>(acc, p, done, done.reserved, warp_m0<Shape>(warp), warp_n0<Shape>(warp), lane_id, smem.amax(),
                        bias);
    }
  }
};

template <class Shape, class Sum>
using TilesOf = std::conditional_t<Shape::kPassesTiles, PassedTiles<Shape, Sum>, OutputTiles<Shape, Sum>>;

}  // namespace mxfp4_moe
