// How shared memory and registers are divided: a multiprocessor's among blocks, a block's among the stages of its
// pipeline. Once for all shapes (tile_shape.cuh, bf16/tile_shape.cuh). Host code: tests compile it alone, and
// tiles/stages.py mirrors it.
#pragma once

namespace mxfp4_moe {

constexpr int kSmemReservedPerBlock = 1024;     // taken by the system from every block
constexpr int kRegistersPerSubpartition = 512;  // of 32 lanes each; a multiprocessor's warps share four of these
constexpr int kMaxStages = 8;
constexpr int kMaxBlocksPerSm = 4;
constexpr int kBarrierBytesPerStage = 16;  // one full and one empty mbarrier
constexpr int kPassedTileBytes = 16;       // an output tile, as who loads passes it on (bf16/passed_tiles.cuh)

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
constexpr int min_of(int a, int b) { return a < b ? a : b; }

// What blocks per multiprocessor leave each block. kStageBytes includes the stage's barriers; kOnceBytes are what a
// block has beside its stages.
template <class Arch, int kThreads, int kStageBytes, int kOnceBytes>
struct Occupancy {
  static constexpr int stages_for(int blocks) {
    return min_of(kMaxStages, (Arch::kSmemPerSm / blocks - kSmemReservedPerBlock - kOnceBytes) / kStageBytes);
  }
  static constexpr int registers_for(int blocks) {
    return kRegistersPerSubpartition / ceil_div(blocks * kThreads / 32, 4) / 8 * 8;
  }
  // Several blocks hide each other's latencies and epilogues, as long as each still has a pipeline three deep and its
  // threads the registers that they want.
  static constexpr int blocks_that_fit(int most, int registers_wanted) {
    for (int blocks = most; blocks > 1; --blocks)
      if (stages_for(blocks) >= 3 && registers_for(blocks) >= registers_wanted) return blocks;
    return 1;
  }
};

// Where the parts of a block's dynamic shared memory begin: each an array over the stages, the strictest alignment
// first; behind them what the block has once, the table of amax first (swiglu_epilogue.cuh).
template <int kStages, int kActBytes, int kWeightBytes, int kActScaleBytes, int kBarrierBytes, int kOnceBytes>
struct SmemLayout {
  static constexpr int kAct = 0;
  static constexpr int kWeight = kAct + kStages * kActBytes;
  static constexpr int kActScale = kWeight + kStages * kWeightBytes;
  static constexpr int kBarrier = kActScale + kStages * kActScaleBytes;
  static constexpr int kAmax = kBarrier + kStages * kBarrierBytes;
  static constexpr int kBytes = kAmax + kOnceBytes;
};

}  // namespace mxfp4_moe
