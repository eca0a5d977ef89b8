// What a tile becomes on SM90 with Hopper's own MMA (wgmma_kernel.cuh): warpgroups, pipeline stages, shared memory.
//
// Always swapped: weight rows are the MMA's M, 64 to a warpgroup, and activation rows its N. The names are those of
// TileShape, so that the producer, the schedule and the epilogues are the same code.
#pragma once

#include "tile_shape.cuh"

namespace mxfp4_moe {

template <int M_, int N_>
struct WgmmaShape {
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = true;

  // Which tiles have it: below 16 rows expanding weights costs the same either way, above 128 rows or with more than
  // two warpgroups there are not enough registers.
  static constexpr bool kExists = M >= 16 && M <= 128 && (N == 64 || N == 128);

  static constexpr int kWarpgroups = ceil_div(N, 64);
  static constexpr int kMmaWarps = kWarpgroups * 4;
  static constexpr int kWarpM = 16, kWarpN = M;
  static constexpr int kFragM = 1, kFragN = M / 8;
  static constexpr int kWarpWeightRows = kWarpM;
  static constexpr int kAccumulators = M / 2;
  // A warpgroup that produces, so that registers can be moved: with 128 rows 12 x 168 = 8 x 232 + 4 x 40, with 64, two
  // blocks per SM, 12 x 80 >= 8 x 104 + 4 x 24.
  static constexpr bool kMovesRegisters = M >= 64 && kWarpgroups == 2;
  static constexpr int kMmaRegisters = M >= 128 ? 232 : 104;
  static constexpr int kProducerRegisters = M >= 128 ? 40 : 24;
  static constexpr int kThreads = kMmaWarps * 32 + (kMovesRegisters ? 128 : 32);

  // Activations are bf16, two halves of a K tile of 128 bytes a row each (TMA's swizzle and the MMA's), and loaded by
  // boxes, so that a tile with few rows loads few.
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kBoxRows = min_of(M, 32);
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;

  static constexpr bool kUnrollsStages = false;
  static constexpr bool kActivates = true, kFolded = true;
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kAmaxParts * M * 4;

  static constexpr int stages_for(int blocks) {
    const int budget = Sm90::kSmemPerSm / blocks - kSmemReservedPerBlock - kAmaxBytes;
    return min_of(kMaxStages, budget / (kStageBytes + kBarrierBytesPerStage));
  }
  static constexpr int kRegistersWanted = 2 * kAccumulators + 56;  // a K block's sums beside the accumulators
  static constexpr int registers_for(int blocks) {
    return kRegistersPerSubpartition / ceil_div(blocks * kThreads / 32, 4) / 8 * 8;
  }
  static constexpr int blocks_that_fit() {
    for (int blocks = kMaxBlocksPerSm; blocks > 1; --blocks)
      if (stages_for(blocks) >= 3 && registers_for(blocks) >= kRegistersWanted) return blocks;
    return 1;
  }
  static constexpr int kBlocksPerSm = kMovesRegisters ? (M >= 128 ? 1 : 2) : blocks_that_fit();
  static constexpr int kStages = stages_for(kBlocksPerSm);
  static constexpr int kSmemBytes = kStages * (kStageBytes + kBarrierBytesPerStage) + kAmaxBytes;

  static constexpr int kActOffset = 0;
  static constexpr int kWeightOffset = kActOffset + kStages * kActBytes;
  static constexpr int kActScaleOffset = 0, kActScaleBytes = 0;  // the scales are in the activations
  static constexpr int kBarrierOffset = kWeightOffset + kStages * kWeightBytes;
  static constexpr int kAmaxOffset = kBarrierOffset + kStages * kBarrierBytesPerStage;

  // More than a block is started with is never there, and setmaxnreg would wait for it for ever.
  static_assert(!kMovesRegisters ||
                    kMmaWarps * kMmaRegisters + 4 * kProducerRegisters <= kThreads / 32 * registers_for(kBlocksPerSm),
                "registers move only inside a block");
  static_assert(!kExists || kStages >= 2, "shared memory does not hold two pipeline stages");
  static_assert(kHalfBytes % 1024 == 0, "swizzle atoms must not straddle halves");
};

}  // namespace mxfp4_moe
