// What the shapes of SM90's kernels for folded activations have in common (mma_sync_shape.cuh, wgmma_shape.cuh): a
// pipeline stage, how many fit, and where everything lies in shared memory. The names are those of TileShape, so that
// the producer, the schedule and the epilogues are the same code.
#pragma once

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// A tile of M activation rows by N weight rows, kWarpM of them to a warp; always swapped.
template <int M_, int N_, int kWarpM_, int kThreads_>
struct Bf16Tile {
  using Arch = Sm90;
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = true, kActivates = true, kFolded = true, kUnrollsStages = false;
  static constexpr bool kKeepsNothing = true;  // registers are what limits the blocks per SM
  static constexpr int kWarpM = kWarpM_, kWarpN = M, kThreads = kThreads_;
  static constexpr int kMmaWarps = N / kWarpM, kWarpsN = 1;
  static constexpr int kProducer = kMmaWarps;   // the warp that loads
  static constexpr int kRowSets = kWarpM / 16;  // of 16 weight rows, a warp's part of an MMA
  static constexpr int kFragM = kRowSets, kFragN = M / 8;
  static constexpr int kWarpWeightRows = kWarpM;
  static constexpr int kAccumulators = kFragM * kFragN * 4;

  // Activations are bf16, two halves of a K tile of 128 bytes a row each (TMA's swizzle, and wgmma's).
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kAmaxParts * M * 4;

  using Fits = Occupancy<Arch, kThreads, kStageBytes + kBarrierBytesPerStage, kAmaxBytes>;
  static_assert(kHalfBytes % 1024 == 0, "swizzle atoms must not straddle halves");
};

// The same with kBlocksPerSm decided.
template <class Tile>
struct Bf16Layout : Tile {
  static constexpr int kStages = Tile::Fits::stages_for(Tile::kBlocksPerSm);
  static constexpr int kActScaleBytes = 0;  // the scales are in the activations
  using Smem = SmemLayout<kStages, Tile::kActBytes, Tile::kWeightBytes, kActScaleBytes, 0, kBarrierBytesPerStage,
                          Tile::kAmaxBytes>;
  static constexpr int kSmemBytes = Smem::kBytes;
  static_assert(kStages >= 2, "shared memory does not hold two pipeline stages");
};

}  // namespace mxfp4_moe
