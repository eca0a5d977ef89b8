// What one logical tile (M, N) becomes on SM90: warps, fragments, pipeline stages, shared memory; of both kernels
// (mma_sync_kernel.cuh, wgmma_kernel.cuh). The names are those of tile/tile_shape.cuh, so that the pipeline, the
// schedule and the epilogues are the same code. tiles/sm90.py mirrors this file, statement by statement.
#pragma once

#include <type_traits>

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// Which of the two a tile has. Below 32 activation rows mma.sync needs fewer instructions; wgmma takes 64 weight rows
// at least.
constexpr bool has_wgmma(int m, int n) { return m >= 32 && n >= 64; }

// A tile of M activation rows by N weight rows; of both, what is common. kWarpM and kWarpN are a warp's part.
template <int M_, int N_, bool kSwap_, int kWarpM_, int kWarpN_, int kMmaWarps_, bool kMovesRegisters_>
struct Bf16Tile {
  using Arch = Sm90;
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = kSwap_, kReadsBf16 = true, kUnrollsStages = false;
  static constexpr bool kKeepsNothing = true;  // registers are what limits the blocks per SM
  static constexpr int kMmaWarps = kMmaWarps_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kWarpsN = (kSwap ? M : N) / kWarpN;
  static constexpr int kFragM = kWarpM / 16, kFragN = kWarpN / 8;
  static constexpr int kWarpWeightRows = kSwap ? kWarpM : kWarpN;
  static constexpr int kAccumulators = kFragM * kFragN * 4;
  static constexpr int kProducer = kMmaWarps;  // the warp that loads
  // A whole warpgroup produces where warps hold more sums than each thread starts with registers for, so that
  // registers can be moved: 12 x 168 >= 8 x 240 + 4 x 24, 20 x 96 >= 16 x 112 + 4 x 24.
  static constexpr bool kMovesRegisters = kMovesRegisters_;
  static constexpr int kMmaRegisters = kMmaWarps > 8 ? 112 : 240, kProducerRegisters = 24;
  static constexpr int kThreads = (kMmaWarps + (kMovesRegisters ? 4 : 1)) * 32;

  // Activations are bf16, two halves of a K tile of 128 bytes a row each (TMA's swizzle, and wgmma's); they come in
  // boxes of few rows, so that a tile with few loads few.
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kBoxRows = M == 8 ? 8 : 16;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kActScaleBytes = 0;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr bool kActivates = N >= 64;
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kActivates ? kAmaxParts * M * 4 : 0;

  using Fits = Occupancy<Arch, kThreads, kStageBytes + kBarrierBytesPerStage, kAmaxBytes>;
  static_assert(kHalfBytes % 1024 == 0, "swizzle atoms must not straddle halves");
  // More than a block is started with is never there, and setmaxnreg would wait for it for ever.
  static_assert(!kMovesRegisters ||
                    kMmaWarps * kMmaRegisters + 4 * kProducerRegisters <= kThreads / 32 * Fits::registers_for(1),
                "registers move only inside a block");
};

// The same with kBlocksPerSm decided.
template <class Tile>
struct Bf16Layout : Tile {
  static constexpr int kStages = Tile::Fits::stages_for(Tile::kBlocksPerSm);
  using Smem = SmemLayout<kStages, Tile::kActBytes, Tile::kWeightBytes, 0, kBarrierBytesPerStage, Tile::kAmaxBytes>;
  static constexpr int kSmemBytes = Smem::kBytes;
  static_assert(kStages >= 2, "shared memory does not hold two pipeline stages");
  static_assert(Tile::kMmaWarps % 4 == 0, "a warpgroup has four warps");
  static_assert((Tile::kMovesRegisters ? Tile::kMmaRegisters : Tile::Fits::registers_for(Tile::kBlocksPerSm)) >=
                    Tile::kRegistersWanted,
                "a block's threads have too few registers");
};

// mma.sync: four warps and one that produces. Swapped, each has a quarter of the weight rows, which share what it loads
// of the activations; native, a quarter of the activation rows.
template <int M, int N, bool kSwap>
struct MmaSyncTile : Bf16Tile<M, N, kSwap, (kSwap ? N : M) / 4, kSwap ? M : N, 4, false> {
  using Tile = Bf16Tile<M, N, kSwap, (kSwap ? N : M) / 4, kSwap ? M : N, 4, false>;
  // Accumulators; operands of two K blocks; an expanded row, sums, addresses.
  static constexpr int kActRegisters = kSwap ? 4 * Tile::kFragN : 8 * Tile::kFragM;
  static constexpr int kRowRegisters = Tile::kWarpWeightRows >= 64 ? 64 : Tile::kWarpWeightRows / 2;
  static constexpr int kRegistersWanted = Tile::kAccumulators + 2 * kActRegisters + kRowRegisters + 48;
  static constexpr int kBlocksPerSm = Tile::Fits::blocks_that_fit(6, kRegistersWanted);
};

// wgmma: weight rows are the MMA's M, 64 to a warpgroup, and activation rows its N, whatever the tile's mode. One
// warpgroup for each 64 rows, and not two sets of them to one, because expanding takes latency that other warps hide.
constexpr bool wgmma_moves_registers(int m, int n) { return m * n >= 128 * 256; }

template <int M, int N>
struct WgmmaTile : Bf16Tile<M, N, true, 16, M, N / 16, wgmma_moves_registers(M, N)> {
  using Tile = Bf16Tile<M, N, true, 16, M, N / 16, wgmma_moves_registers(M, N)>;
  // Beside the accumulators: two units of operands, scales, addresses.
  static constexpr int kRegistersWanted = Tile::kAccumulators + 48;
  static constexpr int kBlocksPerSm =
      Tile::kMovesRegisters ? 1 : Tile::Fits::blocks_that_fit(kMaxBlocksPerSm, kRegistersWanted);
};

template <int M, int N, bool kSwap>
struct MmaSyncShape : Bf16Layout<MmaSyncTile<M, N, kSwap>> {};
template <int M, int N>
struct WgmmaShape : Bf16Layout<WgmmaTile<M, N>> {};

template <int M, int N, bool kSwap>
struct ShapeOf<M, N, kSwap, Sm90> : PossibleTile<M, N, kSwap> {
  using Type = std::conditional_t<has_wgmma(M, N), WgmmaShape<M, N>, MmaSyncShape<M, N, kSwap>>;
};

}  // namespace mxfp4_moe
