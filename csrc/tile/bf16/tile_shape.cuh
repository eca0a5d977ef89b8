// What a logical tile (M, N) becomes where its MMA takes bf16 or fp16, on any arch: warps, fragments, pipeline stages,
// shared memory. The names are those of tile/tile_shape.cuh, so that the pipeline, the schedule and the epilogues are
// the same code. tiles/bf16.py mirrors this file, statement by statement.
#pragma once

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// A tile of M activation rows by N weight rows of a pair of formats (HalfPair); of all, what is common. kWarpM and
// kWarpN are a warp's part.
template <class Arch_, class Pair, int M_, int N_, bool kSwap_, int kWarpM_, int kWarpN_, int kMmaWarps_,
          bool kMovesRegisters_>
struct Bf16Tile {
  using Arch = Arch_;
  static constexpr int M = M_, N = N_;
  static constexpr bool kSwap = kSwap_, kReadsHalves = true, kUnrollsStages = false;
  static constexpr int kActFormat = Pair::kActFormat, kWeightFormat = Pair::kWeightFormat;
  static constexpr bool kHasMxfp4 = kWeightFormat == MXFP4_MOE_WEIGHT_MXFP4;
  static constexpr bool kHasFp16 = kActFormat == MXFP4_MOE_ACT_FP16;
  static constexpr bool kFolds = Arch::kFolds && !kHasFp16, kPassesTiles = Arch::kPassesTiles;
  // Sums are multiplied by factors; of MXFP4 weights because fp16 has too few exponents for their scales.
  static constexpr bool kHasFactors = !kHasMxfp4 || kHasFp16;
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

  // Activations are 16-bit floats, two halves of a K tile of 128 bytes a row each (TMA's swizzle, and wgmma's); they
  // come in boxes of few rows, so that a tile with few loads few.
  static constexpr int kHalfBytes = M * 128;
  static constexpr int kActBytes = 2 * kHalfBytes;
  static constexpr int kBoxRows = M == 8 ? 8 : 16;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);
  static constexpr int kScaleWords = kHasMxfp4 ? kMxfp4ScaleWords : kNvfp4ScaleWords;
  static constexpr int kWeightBlockBytes = weight_block_bytes(kScaleWords);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  static constexpr int kActScaleBytes = 0;
  static constexpr int kStageBytes = kActBytes + kWeightBytes;
  static constexpr bool kActivates = N >= 64;
  // Quantizing needs each warp's largest magnitudes of a row; of NVFP4 the two warps' that share a block, in one place.
  static constexpr int kAmaxParts = kHasMxfp4 ? N / kWarpWeightRows : kWarpWeightRows < 32 ? N / 32 : 0;
  static constexpr int kAmaxBytes = kActivates && kFolds ? kAmaxParts * M * 4 : 0;
  // A stage's barriers and the output tile that begins there; the tile that each warp is at.
  static constexpr int kRingBytes = kBarrierBytesPerStage + (kPassesTiles ? kPassedTileBytes : 0);
  static constexpr int kKeptBytes = kPassesTiles ? kMmaWarps * kPassedTileBytes : 0;

  using Fits = Occupancy<Arch, kThreads, kStageBytes + kRingBytes, kAmaxBytes + kKeptBytes>;
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
  using Smem = SmemLayout<kStages, Tile::kActBytes, Tile::kWeightBytes, 0, Tile::kRingBytes,
                          Tile::kAmaxBytes + Tile::kKeptBytes>;
  static constexpr int kSmemBytes = Smem::kBytes;
  static_assert(kStages >= 2, "shared memory does not hold two pipeline stages");
  static_assert(Tile::kMmaWarps % 4 == 0, "a warpgroup has four warps");
  static_assert((Tile::kMovesRegisters ? Tile::kMmaRegisters : Tile::Fits::registers_for(Tile::kBlocksPerSm)) >=
                    Tile::kRegistersWanted,
                "a block's threads have too few registers");
};

// mma.sync: kMmaWarps and one that produces. Swapped, each has its part of the weight rows, which share what it loads
// of the activations; native, its part of the activation rows. kLoadsAhead: the activations of two K blocks are in
// registers, one's while the other's are multiplied; else those of a few rows at a time.
template <class Arch, class Pair, int M, int N, bool kSwap, int kMmaWarps, bool kMovesRegisters, int kMostBlocks,
          bool kLoadsAhead_>
struct MmaSyncTile
    : Bf16Tile<Arch, Pair, M, N, kSwap, (kSwap ? N : M) / kMmaWarps, kSwap ? M : N, kMmaWarps, kMovesRegisters> {
  using Tile =
      Bf16Tile<Arch, Pair, M, N, kSwap, (kSwap ? N : M) / kMmaWarps, kSwap ? M : N, kMmaWarps, kMovesRegisters>;
  static constexpr bool kLoadsAhead = kLoadsAhead_;
  // Accumulators; operands of two K blocks, or of one and of 32 activation rows; an expanded row, sums, addresses.
  static constexpr int kActRegisters = kSwap ? 4 * Tile::kFragN : 8 * Tile::kFragM;
  static constexpr int kOperandRegisters = kLoadsAhead ? 2 * kActRegisters : 16 + 8 * Tile::kFragM;
  static constexpr int kRowRegisters = Tile::kWarpWeightRows >= 64 ? 64 : Tile::kWarpWeightRows / 2;
  static constexpr int kRegistersWanted = Tile::kAccumulators + kOperandRegisters + kRowRegisters + 48;
  static constexpr int kBlocksPerSm = kMovesRegisters ? 1 : Tile::Fits::blocks_that_fit(kMostBlocks, kRegistersWanted);
};

template <class Arch, class Pair, int M, int N, bool kSwap, int kMmaWarps, bool kMovesRegisters, int kMostBlocks,
          bool kLoadsAhead>
struct MmaSyncShape
    : Bf16Layout<MmaSyncTile<Arch, Pair, M, N, kSwap, kMmaWarps, kMovesRegisters, kMostBlocks, kLoadsAhead>> {};

}  // namespace mxfp4_moe
