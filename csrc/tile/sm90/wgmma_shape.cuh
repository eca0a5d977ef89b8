// What a tile becomes on SM90 with Hopper's own MMA (wgmma_kernel.cuh): weight rows are the MMA's M, 64 to a warpgroup
// and set, and activation rows its N.
#pragma once

#include "tile/sm90/bf16_shape.cuh"

namespace mxfp4_moe {

// Which tiles have it: below 32 rows mma.sync needs fewer instructions (mma_sync_kernel.cuh); two warpgroups' registers
// hold the sums of 256 x 128, and one that had a multiprocessor to itself would be alone.
constexpr bool has_wgmma(int m, int n) {
  return m >= 32 && (n == 128 || (n == 64 && m <= 128) || (n == 256 && m <= 64));
}

// With few activation rows a warpgroup has two sets of 64 weight rows, which share what it costs to pass barriers and
// to describe operands; with more, two sets' sums would leave registers for too few warps.
constexpr int wgmma_row_sets(int m, int n) { return m <= 64 && n >= 128 ? 2 : 1; }
constexpr int wgmma_warps(int m, int n) { return n / (16 * wgmma_row_sets(m, n)); }
// A whole warpgroup produces where eight warps hold the sums of 128 rows and more, so that registers can be moved:
// 12 x 168 = 8 x 240 + 4 x 24.
constexpr bool wgmma_moves_registers(int m, int n) { return m >= 128 && wgmma_warps(m, n) == 8; }
constexpr int wgmma_threads(int m, int n) { return wgmma_warps(m, n) * 32 + (wgmma_moves_registers(m, n) ? 128 : 32); }

template <int M, int N>
struct WgmmaTile : Bf16Tile<M, N, 16 * wgmma_row_sets(M, N), wgmma_threads(M, N)> {
  using Tile = Bf16Tile<M, N, 16 * wgmma_row_sets(M, N), wgmma_threads(M, N)>;

  static constexpr bool kFoldsOutput = true;
  static constexpr int kBoxRows = 16;  // a tile with few rows loads few
  // Tiles of few rows are taken as narrow as their rows are, those of many no narrower than this.
  static constexpr int kMinCols = M <= 128 ? 8 : 128;
  static constexpr bool kMovesRegisters = wgmma_moves_registers(M, N);
  static constexpr int kMmaRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  // Beside the accumulators: operands, addresses, and a K block's sums of 16 columns, twice.
  static constexpr int kOtherRegisters = 52;
  static constexpr int kRegistersWanted = Tile::kAccumulators + kOtherRegisters + 16;
  static constexpr int kBlocksPerSm =
      kMovesRegisters ? 1 : Tile::Fits::blocks_that_fit(kMaxBlocksPerSm, kRegistersWanted);
  // How many columns an MMA has when a tile is taken as `cols` wide: as many as their sums, twice, leave registers for.
  static constexpr int chunk_of(int cols) {
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ > 1300
    if (Tile::kRowSets == 2 && cols == 64) return 8;  // with 32, ptxas 13.5 spills where 13.0 does not
#endif
    const int registers = kMovesRegisters ? kMmaRegisters : Tile::Fits::registers_for(kBlocksPerSm);
    for (int chunks = 1; chunks < cols / 8; ++chunks)
      if (cols % (8 * chunks) == 0 &&
          cols / chunks <= min_of(80, registers - kOtherRegisters - Tile::kRowSets * cols / 2))
        return cols / chunks;
    return 8;
  }

  // More than a block is started with is never there, and setmaxnreg would wait for it for ever.
  static_assert(!kMovesRegisters || Tile::kMmaWarps * kMmaRegisters + 4 * kProducerRegisters <=
                                        Tile::kThreads / 32 * Tile::Fits::registers_for(kBlocksPerSm),
                "registers move only inside a block");
};

template <int M, int N>
struct WgmmaShape : Bf16Layout<WgmmaTile<M, N>> {};

}  // namespace mxfp4_moe
