// What one logical tile (M, N) becomes on SM12x with bf16 or fp16 activations. tiles/bf16.py mirrors this file,
// statement by statement.
//
// Weights are the MMA's A, whatever the tile's mode, as soon as four warps have 16 rows of them each: a weight is then
// expanded by one warp only. Eight warps share the largest tiles, because accumulators and operands of more rows do not
// fit a thread's registers.
#pragma once

#include <type_traits>

#include "tile/bf16/tile_shape.cuh"
#include "tile/pairs.cuh"

namespace mxfp4_moe {

template <class Pair, int M, int N>
struct Sm12xBf16 {
  static constexpr bool kSwap = N >= 64;
  static constexpr int kMmaWarps = kSwap && M * N >= 16384 ? 8 : 4;
  static constexpr bool kMovesRegisters = M * N >= 128 * 256;
  static constexpr bool kLoadsAhead = !kSwap || M <= 32;
  using Shape = MmaSyncShape<Sm12x, Pair, M, N, kSwap, kMmaWarps, kMovesRegisters, kMaxBlocksPerSm, kLoadsAhead>;
};

template <int M, int N, bool kSwap, int kWeights, int kActivations>
struct ShapeOf<M, N, kSwap, Sm12x, HalfPair<kWeights, kActivations>> : PossibleTile<M, N, kSwap> {
  using Type = typename Sm12xBf16<HalfPair<kWeights, kActivations>, M, N>::Shape;
};

}  // namespace mxfp4_moe
