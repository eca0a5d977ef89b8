// What a tile of up to 16 activation rows becomes on SM90 for folded activations (mma_sync_kernel.cuh).
#pragma once

#include "tile/sm90/bf16_shape.cuh"
#include "tile/sm90/parallel_k_shape.cuh"

namespace mxfp4_moe {

// Which tiles have it.
constexpr bool has_mma_sync(int m, int n) { return m <= 16 && n >= 64; }

// Four warps, whose weight rows share what a warp loads and converts of the activations, and one that produces.
template <int M, int N>
struct MmaSyncTile : Bf16Tile<M, N, N / 4, 5 * 32> {
  using Tile = Bf16Tile<M, N, N / 4, 5 * 32>;
  static constexpr bool kMovesRegisters = false;
  // The kernel of parallel K tiles, for the fewest tokens' GEMM2, reads MXFP8.
  static constexpr bool kFoldsOutput = !has_parallel_k(M, N);
  static constexpr int kBoxRows = 8;  // a tile with few rows loads few

  // Accumulators; operands of two K blocks; scales; an expanded row, sums, addresses.
  static constexpr int kRegistersWanted =
      Tile::kAccumulators + 8 * Tile::kFragN + 4 * Tile::kRowSets + 2 * Tile::kRowSets + 48;
  static constexpr int kBlocksPerSm = Tile::Fits::blocks_that_fit(6, kRegistersWanted);
};

template <int M, int N>
struct MmaSyncShape : Bf16Layout<MmaSyncTile<M, N>> {};

}  // namespace mxfp4_moe
