// What the kernel of parallel K tiles (parallel_k_kernel.cuh) makes of a tile: warps, stages, shared memory. Written
// for the smallest swapped tile, 8 activation rows by the 64 weight rows of one weight block.
#pragma once

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// Which tiles have it.
constexpr bool has_parallel_k(int m, int n) { return m == 8 && n == 64; }

// kParts_ K tiles are multiplied at once, each by 64 / kWarpRows_ warps. More rows per warp expand the activations
// fewer times; more parts shorten a tile's own time but hold more stages. Two blocks of 8 multiplying warps take 13
// warps each, 72 registers a thread, and eight stages. Three blocks per SM would leave four stages and 48 registers.
template <class Tile_, int kParts_ = 4, int kWarpRows_ = 32, int kBlocks_ = 2>
struct ParallelKShape : Tile_ {
  using Tile = Tile_;
  static constexpr bool kUnrollsStages = false;  // for produce(): tiles begin at any stage
  static constexpr int kParts = kParts_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kBlocksPerSm = kBlocks_;

  static constexpr int kRowWarps = Tile::N / kWarpRows;  // that multiply one K tile
  static constexpr int kFragments = kWarpRows / 16;      // of one of them
  static constexpr int kAddWarps = Tile::kMmaWarps;      // as many as the tile's epilogue has warps
  static constexpr int kMultiplyWarps = kParts * kRowWarps;
  static constexpr int kProducer = kAddWarps + kMultiplyWarps;
  static constexpr int kThreads = (kProducer + 1) * 32;

  // A stage's block sums: [step][fragment of 16 weight rows][slot] of a lane's four (sum_slot).
  static constexpr int kSumFragmentBytes = 32 * 16;
  static constexpr int kSumStepBytes = Tile::N / 16 * kSumFragmentBytes;
  static constexpr int kSumBytes = 4 * kSumStepBytes;
  static constexpr int kBarrierBytesPerStage = 24;  // full, empty and summed
  static constexpr int kColumnBytes = Tile::N * 4;  // the sums of a lone activation row, on their way to the epilogue
  static constexpr int kFixedBytes = Tile::kAmaxBytes + kColumnBytes;

  using Fits =
      Occupancy<typename Tile::Arch, kThreads, Tile::kStageBytes + kSumBytes + kBarrierBytesPerStage, kFixedBytes, 16>;
  static constexpr int kStages = Fits::stages_for(kBlocksPerSm) / kParts * kParts;
  using Smem = SmemLayout<kStages, Tile::kActBytes, Tile::kWeightBytes, Tile::kActScaleBytes, kSumBytes,
                          kBarrierBytesPerStage, kFixedBytes>;
  static constexpr int kColumnOffset = Smem::kAmax + Tile::kAmaxBytes;
  static constexpr int kSmemBytes = Smem::kBytes;

  static_assert(Tile::kSwap && has_parallel_k(Tile::M, Tile::N) && Tile::N == kWeightBlockRows && Tile::kFragM == 1,
                "this kernel is written for 8 rows and one weight block");
  static_assert(kWarpRows == 16 || kWarpRows == 32 || kWarpRows == 64, "a warp has 1, 2 or 4 fragments");
  static_assert(kStages >= kParts && kStages % kParts == 0, "a stage always belongs to the same part");
  static_assert(kBlocksPerSm * (kSmemBytes + kSmemReservedPerBlock) <= Tile::Arch::kSmemPerSm, "the blocks fit one SM");
};

// Where a lane (g = lane / 4, t = lane % 4) leaves its four sums in a fragment's 32 slots. Lanes of one t stand side by
// side, because with one or two activation rows only those of t = 0 hold any; turned by 2t, so that any eight
// consecutive lanes, which a 16-byte access serves at once, find eight different groups of banks.
MXFP4_MOE_HOST_DEVICE constexpr int sum_slot(int g, int t) { return t * 8 + (g + 2 * t) % 8; }

}  // namespace mxfp4_moe
