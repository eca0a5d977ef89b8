// Which output tile a block computes next.
//
// The work is a dense list of m-tiles (made on the device from the per-expert row counts, experts without rows take
// no part) times the tiles along n. Blocks are persistent and walk linear indices blockIdx.x, + gridDim.x, ...; n runs
// fastest, so that blocks that run together share an expert's activations, and the next m-tile of the same expert
// finds its weights in L2. The host knows only the shapes: max_m_tiles bounds the list, and with it the grid.
#pragma once

#include "shared/scale_layout.cuh"

namespace mxfp4_moe {

// m-tiles of one expert with `rows` rows.
MXFP4_MOE_HOST_DEVICE constexpr int32_t m_tiles_of(int32_t rows, int32_t tile_m) {
  return (rows + tile_m - 1) / tile_m;
}

// Rows of each but the last of those: as equal as multiples of 8 can be. On SM90 a tile takes time by its rows, but
// never less than its weights take to be expanded, so that a full tile and one of few rows take longer than two halves.
MXFP4_MOE_HOST_DEVICE constexpr int32_t rows_of_m_tile(int32_t rows, int32_t tile_m) {
  const int32_t tiles = m_tiles_of(rows, tile_m);
  return tiles == 0 ? tile_m : ((rows + tiles - 1) / tiles + 7) / 8 * 8;
}

// Upper bound on the m-tiles of `rows` rows spread in any way over `experts` experts. It is reached: as many experts
// as possible hold one row past a full tile.
MXFP4_MOE_HOST_DEVICE constexpr int64_t max_m_tiles(int64_t rows, int64_t experts, int64_t tile_m) {
  const int64_t active = rows < experts ? rows : experts;
  return (rows + active * (tile_m - 1)) / tile_m;
}

struct TileCoord {
  int32_t m;  // index into the m-tile list
  int32_t n;  // tile index along n
};

MXFP4_MOE_HOST_DEVICE constexpr TileCoord tile_coord(int32_t linear, int32_t num_n_tiles) {
  return TileCoord{linear / num_n_tiles, linear % num_n_tiles};
}

}  // namespace mxfp4_moe
