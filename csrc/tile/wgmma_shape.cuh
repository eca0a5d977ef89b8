// What a tile becomes on SM90 with Hopper's own MMA (wgmma_kernel.cuh): warpgroups, pipeline stages, shared memory.
//
// Always swapped: weight rows are the MMA's M, 64 to a warpgroup, and activation rows its N. The names are those of
// TileShape, so that the producer, the schedule and the epilogues are the same code.
#pragma once

#include <type_traits>

#include "folded_shape.cuh"

namespace mxfp4_moe {

template <int M_, int N_>
struct WgmmaShape {
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = true, kIsWgmma = true;

  // Which tiles have it: below 32 rows mma.sync needs fewer instructions (folded_kernel.cuh); two warpgroups' registers
  // hold the sums of 256 x 128, and one that had a multiprocessor to itself would be alone.
  static constexpr bool kExists = M >= 32 && (N == 128 || (N == 64 && M <= 128) || (N == 256 && M <= 64));

  // With few activation rows a warpgroup has two sets of 64 weight rows, which share what it costs to pass barriers and
  // to describe operands; with more, two sets' sums would leave registers for too few warps.
  static constexpr int kRowSets = M <= 64 && N >= 128 ? 2 : 1;
  static constexpr int kWarpgroups = N / (64 * kRowSets);
  static constexpr int kMmaWarps = kWarpgroups * 4;
  static constexpr int kWarpM = 16 * kRowSets, kWarpN = M;
  static constexpr int kFragM = kRowSets, kFragN = M / 8;
  static constexpr int kWarpWeightRows = kWarpM;
  static constexpr int kAccumulators = kFragM * kFragN * 4;
  // Tiles of few rows are taken as narrow as their rows are, those of many no narrower than this.
  static constexpr int kMinCols = M <= 128 ? 8 : 128;
  // A warpgroup that produces, so that registers can be moved: 12 x 168 = 8 x 240 + 4 x 24.
  static constexpr bool kMovesRegisters = M >= 128 && kWarpgroups == 2;
  static constexpr int kMmaRegisters = 240;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kThreads = kMmaWarps * 32 + (kMovesRegisters ? 128 : 32);

  // Activations are bf16, two halves of a K tile of 128 bytes a row each (TMA's swizzle and the MMA's), and loaded by
  // boxes, so that a tile with few rows loads few.
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kBoxRows = 16;
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;

  static constexpr bool kUnrollsStages = false;
  static constexpr bool kActivates = true, kFolded = true, kFoldsOutput = true;
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kAmaxParts * M * 4;

  static constexpr int stages_for(int blocks) {
    const int budget = Sm90::kSmemPerSm / blocks - kSmemReservedPerBlock - kAmaxBytes;
    return min_of(kMaxStages, budget / (kStageBytes + kBarrierBytesPerStage));
  }
  // Beside the accumulators: operands, addresses, and a K block's sums of 16 columns, twice.
  static constexpr int kOtherRegisters = 52;
  static constexpr int kRegistersWanted = kAccumulators + kOtherRegisters + 16;
  static constexpr int registers_for(int blocks) {
    return kRegistersPerSubpartition / ceil_div(blocks * kThreads / 32, 4) / 8 * 8;
  }
  static constexpr int blocks_that_fit() {
    for (int blocks = kMaxBlocksPerSm; blocks > 1; --blocks)
      if (stages_for(blocks) >= 3 && registers_for(blocks) >= kRegistersWanted) return blocks;
    return 1;
  }
  static constexpr int kBlocksPerSm = kMovesRegisters ? 1 : blocks_that_fit();
  // How many columns an MMA has when a tile is taken as `cols` wide: as many as their sums, twice, leave registers for.
  static constexpr int chunk_of(int cols) {
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ > 1300
    if (kRowSets == 2 && cols == 64) return 8;  // with 32, ptxas 13.5 spills where 13.0 does not
#endif
    const int registers = kMovesRegisters ? kMmaRegisters : registers_for(kBlocksPerSm);
    for (int chunks = 1; chunks < cols / 8; ++chunks)
      if (cols % (8 * chunks) == 0 && cols / chunks <= min_of(80, registers - kOtherRegisters - kRowSets * cols / 2))
        return cols / chunks;
    return 8;
  }
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

// The shape of a tile's kernel for folded activations, if that exists.
template <int M, int N>
using FoldedOrWgmmaShape = std::conditional_t<M <= 16, FoldedShape<M, N>, WgmmaShape<M, N>>;

}  // namespace mxfp4_moe
