// What one logical tile (M, N) becomes on SM90, with either kernel (bf16/mma_sync_kernel.cuh, wgmma_kernel.cuh); with
// MXFP4 weights and bf16 each serves MXFP8 activations too. tiles/bf16.py mirrors this file, statement by statement.
#pragma once

#include <type_traits>

#include "tile/bf16/tile_shape.cuh"
#include "tile/pairs.cuh"

namespace mxfp4_moe {

// Which of the two a tile has. Below 32 activation rows mma.sync needs fewer instructions; wgmma takes 64 weight rows
// at least.
constexpr bool has_wgmma(int m, int n) { return m >= 32 && n >= 64; }

// mma.sync: four warps.
template <class Pair, int M, int N, bool kSwap>
using Sm90MmaSyncShape = MmaSyncShape<Sm90, Pair, M, N, kSwap, 4, false, 6, true>;

// wgmma: weight rows are the MMA's M, 64 to a warpgroup, and activation rows its N, whatever the tile's mode. One
// warpgroup for each 64 rows, and not two sets of them to one, because expanding takes latency that other warps hide.
constexpr bool wgmma_moves_registers(int m, int n) { return m * n >= 128 * 256; }

template <class Pair, int M, int N>
struct WgmmaTile : Bf16Tile<Sm90, Pair, M, N, true, 16, M, N / 16, wgmma_moves_registers(M, N)> {
  using Tile = Bf16Tile<Sm90, Pair, M, N, true, 16, M, N / 16, wgmma_moves_registers(M, N)>;
  // Beside the accumulators: two units of operands, scales, addresses.
  static constexpr int kRegistersWanted = Tile::kAccumulators + 48;
  static constexpr int kBlocksPerSm =
      Tile::kMovesRegisters ? 1 : Tile::Fits::blocks_that_fit(kMaxBlocksPerSm, kRegistersWanted);
};

template <class Pair, int M, int N>
struct WgmmaShape : Bf16Layout<WgmmaTile<Pair, M, N>> {};

template <class Pair, int M, int N, bool kSwap>
using Sm90Shape = std::conditional_t<has_wgmma(M, N), WgmmaShape<Pair, M, N>, Sm90MmaSyncShape<Pair, M, N, kSwap>>;

template <int M, int N, bool kSwap, int kWeights, int kActivations>
struct ShapeOf<M, N, kSwap, Sm90, HalfPair<kWeights, kActivations>> : PossibleTile<M, N, kSwap> {
  using Type = Sm90Shape<HalfPair<kWeights, kActivations>, M, N, kSwap>;
};

}  // namespace mxfp4_moe
