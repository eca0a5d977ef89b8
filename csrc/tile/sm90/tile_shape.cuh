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

// wgmma: weight rows are the MMA's M, 64 to a warpgroup, and activation rows its N, whatever the tile's mode. Or kSets
// times 64 to a warpgroup, for which it reads, waits and counts once.
constexpr bool wgmma_moves_registers(int m, int n) { return m * n >= 128 * 256; }

template <class Pair, int M, int N, int kSets>
using WgmmaBase = Bf16Tile<Sm90, Pair, M, N, true, 16 * kSets, M, N / (16 * kSets), wgmma_moves_registers(M, N)>;

template <class Pair, int M, int N, int kSets>
struct WgmmaTile : WgmmaBase<Pair, M, N, kSets> {
  using Tile = WgmmaBase<Pair, M, N, kSets>;
  // Beside the accumulators: two units of operands, words and scales of each set, addresses.
  static constexpr int kRegistersWanted = Tile::kAccumulators + 40 + 8 * kSets;
  static constexpr int kBlocksPerSm =
      Tile::kMovesRegisters ? 1 : Tile::Fits::blocks_that_fit(kMaxBlocksPerSm, kRegistersWanted);
};

// With few activation rows instructions are what takes time, and sets save some, as long as three warps for each
// scheduler hide each other's latencies. With many, latency is what takes time.
template <class Pair, int M, int N>
constexpr int wgmma_sets() {
  if constexpr (N >= 128 && M * N <= 64 * 128) {
    using Two = WgmmaTile<Pair, M, N, 2>;
    return Two::kBlocksPerSm * Two::kMmaWarps >= 12 ? 2 : 1;
  }
  return 1;
}

template <class Pair, int M, int N>
struct WgmmaShape : Bf16Layout<WgmmaTile<Pair, M, N, wgmma_sets<Pair, M, N>()>> {};

template <class Pair, int M, int N, bool kSwap>
using Sm90Shape = std::conditional_t<has_wgmma(M, N), WgmmaShape<Pair, M, N>, Sm90MmaSyncShape<Pair, M, N, kSwap>>;

template <int M, int N, bool kSwap, int kWeights, int kActivations>
struct ShapeOf<M, N, kSwap, Sm90, HalfPair<kWeights, kActivations>> : PossibleTile<M, N, kSwap> {
  using Type = Sm90Shape<HalfPair<kWeights, kActivations>, M, N, kSwap>;
};

}  // namespace mxfp4_moe
