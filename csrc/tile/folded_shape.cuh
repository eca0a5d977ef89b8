// What a tile of up to 16 activation rows becomes on SM90 for folded activations (folded_kernel.cuh): warps, pipeline
// stages, shared memory. The names are those of TileShape, so that the producer, the schedule and the epilogues are the
// same code.
#pragma once

#include "tile_shape.cuh"

namespace mxfp4_moe {

template <int M_, int N_>
struct FoldedShape {
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = true, kIsWgmma = false;
  static constexpr bool kExists = M <= 16 && N >= 64;

  // Four warps, whose weight rows share what a warp loads and converts of the activations.
  static constexpr int kMmaWarps = 4;
  static constexpr int kWarpM = N / kMmaWarps, kWarpN = M;
  static constexpr int kFragM = kWarpM / 16, kFragN = M / 8;
  static constexpr int kRowSets = kFragM;
  static constexpr int kWarpWeightRows = kWarpM;
  static constexpr int kAccumulators = kFragM * kFragN * 4;
  static constexpr bool kMovesRegisters = false;
  static constexpr int kThreads = (kMmaWarps + 1) * 32;

  // Activations are bf16, two halves of a K tile of 128 bytes a row each (TMA's swizzle).
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kBoxRows = M;
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;

  static constexpr bool kUnrollsStages = false;
  static constexpr bool kActivates = true, kFolded = true;
  // The tile for the fewest tokens has a kernel for GEMM2 that reads MXFP8 (split_k.cuh).
  static constexpr bool kFoldsOutput = !(M == 8 && N == 64);
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kAmaxParts * M * 4;

  static constexpr int stages_for(int blocks) {
    const int budget = Sm90::kSmemPerSm / blocks - kSmemReservedPerBlock - kAmaxBytes;
    return min_of(kMaxStages, budget / (kStageBytes + kBarrierBytesPerStage));
  }
  static constexpr int registers_for(int blocks) {
    return kRegistersPerSubpartition / ceil_div(blocks * kThreads / 32, 4) / 8 * 8;
  }
  // Accumulators; operands of two K blocks; scales; an expanded row, sums, addresses.
  static constexpr int kRegistersWanted = kAccumulators + 8 * kFragN + 4 * kRowSets + 2 * kRowSets + 48;
  static constexpr int blocks_that_fit() {
    for (int blocks = 6; blocks > 1; --blocks)
      if (stages_for(blocks) >= 3 && registers_for(blocks) >= kRegistersWanted) return blocks;
    return 1;
  }
  static constexpr int kBlocksPerSm = blocks_that_fit();
  static constexpr int kStages = stages_for(kBlocksPerSm);
  static constexpr int kSmemBytes = kStages * (kStageBytes + kBarrierBytesPerStage) + kAmaxBytes;

  static constexpr int kActOffset = 0;
  static constexpr int kWeightOffset = kActOffset + kStages * kActBytes;
  static constexpr int kActScaleOffset = 0, kActScaleBytes = 0;  // the scales are in the activations
  static constexpr int kBarrierOffset = kWeightOffset + kStages * kWeightBytes;
  static constexpr int kAmaxOffset = kBarrierOffset + kStages * kBarrierBytesPerStage;

  static_assert(!kExists || kStages >= 2, "shared memory does not hold two pipeline stages");
  static_assert(kHalfBytes % 1024 == 0, "swizzle atoms must not straddle halves");
};

}  // namespace mxfp4_moe
