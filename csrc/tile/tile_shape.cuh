// What one logical tile (M, N, SWAP_AB) becomes on SM12x: warps, fragments, pipeline stages, shared memory; and what
// all shapes have in common; with bf16 or fp16 activations: sm12x/bf16_tile_shape.cuh. SM90's are in
// sm90/tile_shape.cuh. A pair says what operands a tile of these rows reads: E4M3 or packed E2M1 activations, one or
// two scale words a row.
//
// M counts activation rows (tokens of one expert), N weight rows (output features). Native tiles feed activations to
// the MMA's A operand and weights to B; swapped tiles exchange them, so that the small side M becomes the MMA's
// N = 8 granule. Everything is constexpr: the kernel, the launcher and the facts that the build compares with the
// proof all read it from here. tiles/proof.py mirrors this file, statement by statement.
#pragma once

#include <type_traits>

#include "shared/weight_layout.cuh"
#include "tile/archs.cuh"
#include "tile/pairs.cuh"
#include "tile/stages.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

constexpr int kTileK = 128;            // four K = 32 blocks, whose E8M0 scales are one 32-bit word per row
constexpr int kBlockK = 32;            // OCP MX block, and the MMA's K
constexpr int kActRowBytes = kTileK;   // E4M3: TMA 128-byte swizzle
constexpr int kMaxAccumulators = 128;  // fp32 registers per thread; beyond it ptxas spills

// A number that is known when the code is compiled, as an argument.
template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// What every arch asks of a tile.
template <int M, int N, bool kSwap>
struct PossibleTile {
  static_assert(kSwap ? (M == 8 || M == 16 || M == 32) && N % 64 == 0 : M % 64 == 0,
                "native tiles need M % 64 == 0, swapped ones M in 8/16/32 and N % 64 == 0");
  static_assert(N >= 8 && N <= 256 && M <= 256, "a TMA box has at most 256 rows");
  static_assert(kWeightBlockRows % N == 0 || N % kWeightBlockRows == 0,
                "a tile has whole weight blocks, or shares one");
};

template <int M_, int N_, bool kSwap_, class Arch_, class Pair>
struct TileShape : PossibleTile<M_, N_, kSwap_> {
  using Arch = Arch_;
  static constexpr int M = M_, N = N_;
  static constexpr int kActFormat = Pair::kActFormat, kWeightFormat = Pair::kWeightFormat;
  static constexpr bool kIsFp4 = kActFormat != MXFP4_MOE_ACT_MXFP8;
  // FP4 weights are A, whatever the tile's mode, as soon as four warps have 16 rows of them each: two loads bring a
  // fragment's registers where its MMA wants them, while B's of two fragments would have to be copied apart.
  static constexpr bool kSwap = kSwap_ || (kIsFp4 && N >= 64);
  static constexpr int kSmemPerSm = Arch::kSmemPerSm;

  // Physical extents: rows of the MMA's A operand, columns of its B operand.
  static constexpr int kPhysM = kSwap ? N : M;
  static constexpr int kPhysN = kSwap ? M : N;

  // MMA warps in a grid of kWarpsM x kWarpsN. Long warp tiles reuse every expanded fragment.
  static constexpr int kSwappedWarpRows = N <= 64 ? 16 : (M <= 16 && N >= 256) || (M == 8 && N == 128) ? 64 : 32;
  static constexpr int kMmaWarps = kSwap_ ? N / kSwappedWarpRows : (M * N >= 16384 ? 8 : 4);
  static constexpr int kWarpN = kSwap_ ? kPhysN : kSwap ? (M * N >= 8192 ? 64 : 32) : min_of(N, 32);
  static constexpr int kWarpsN = kPhysN / kWarpN;
  static constexpr int kWarpsM = kMmaWarps / kWarpsN;
  static constexpr int kWarpM = kPhysM / kWarpsM;
  static constexpr int kFragM = kWarpM / 16;
  static constexpr int kFragN = kWarpN / 8;
  static constexpr int kAccumulators = kFragM * kFragN * 4;
  // One warp produces. Where eight warps hold large accumulators it is one of a whole warpgroup, which gives registers
  // away (setmaxnreg): 12 x 168 = 8 x 232 + 4 x 40.
  static constexpr bool kMovesRegisters = kMmaWarps == 8 && kAccumulators >= 64;
  static constexpr int kMmaRegisters = 232;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kProducer = kMmaWarps;  // the warp that loads
  // Beside accumulators, through the main loop; FP4 has no registers of expanded weights.
  static constexpr bool kKeepsNothing = kAccumulators > 64 && !kIsFp4;
  static constexpr int kThreads = (kMmaWarps + (kMovesRegisters ? 4 : 1)) * 32;

  // Bytes of one pipeline stage, and of each of its three parts.
  static constexpr int kRowBytes = kIsFp4 ? kTileK / 2 : kTileK;  // TMA's swizzle, too
  static constexpr int kActBytes = M * kRowBytes;
  static constexpr int kWeightBlocks = ceil_div(N, kWeightBlockRows);  // scales included; narrow tiles use part of one
  static constexpr int kScaleWords = kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4 ? kNvfp4ScaleWords : kMxfp4ScaleWords;
  static constexpr int kWeightBlockBytes = weight_block_bytes(kScaleWords);
  static constexpr int kWeightBytes = kWeightBlocks * kWeightBlockBytes;
  // TMA starts at multiples of 16 bytes, four rows' words, and a tile's first row may be any of the four. Activations
  // have as many words as weights: first all rows' first ones.
  static constexpr int kActScaleRows = M + 4;
  static constexpr int kActScaleSetBytes = kActScaleRows * 4;
  static constexpr int kActScaleBytes = round_up(kScaleWords * kActScaleSetBytes, 128);
  static constexpr int kStageBytes = kActBytes + kWeightBytes + kActScaleBytes;

  // GEMM1's activation needs the largest magnitude of a block of 32 gates and ups, which lie in several warps: each
  // leaves its own here, per row.
  static constexpr int kWarpWeightRows = kSwap ? kWarpM : kWarpN;
  static constexpr bool kReadsHalves = false, kHasFactors = kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4;
  static constexpr bool kFolds = false, kPassesTiles = false;
  static constexpr bool kActivates = N >= 64 && kAccumulators <= 64;  // with more, ptxas spills
  static constexpr int kAmaxParts = N / kWarpWeightRows;
  static constexpr int kAmaxBytes = kActivates ? kAmaxParts * M * 4 : 0;

  // More accumulators than a block can share its registers for are moved between warps instead.
  static constexpr int kRegistersWanted = kAccumulators <= 8              ? 96
                                          : kAccumulators <= 16           ? 112
                                          : kAccumulators <= 32 || kIsFp4 ? 168
                                                                          : 176;
  using Fits = Occupancy<Arch, kThreads, kStageBytes + kBarrierBytesPerStage, kAmaxBytes>;
  static constexpr int kBlocksPerSm = Fits::blocks_that_fit(kMaxBlocksPerSm, kRegistersWanted);
  static constexpr int kStages = Fits::stages_for(kBlocksPerSm);
  // The main loop, so that stages' addresses are constants: where that is not too much code.
  static constexpr bool kUnrollsStages = kIsFp4 || kFragM * kFragN <= 8;
  using Smem = SmemLayout<kStages, kActBytes, kWeightBytes, kActScaleBytes, kBarrierBytesPerStage, kAmaxBytes>;
  static constexpr int kSmemBytes = Smem::kBytes;

  static_assert(kWarpM % 16 == 0 && kWarpN % 8 == 0, "a warp tile is whole MMA fragments");
  static_assert(kWarpsM * kWarpsN == kMmaWarps && kWarpsM * kWarpM == kPhysM && kWarpsN * kWarpN == kPhysN,
                "the warp grid covers the tile");
  static_assert(kStages >= 2, "shared memory does not hold two pipeline stages");
  static_assert(kAccumulators <= kMaxAccumulators, "too many accumulator registers per thread");
  static_assert(kActBytes % (8 * kRowBytes) == 0, "swizzle atoms must not straddle stages");
};

// The shape of the kernel that reads a pair of formats on an arch.
template <int M, int N, bool kSwap, class Arch, class Pair>
struct ShapeOf;

template <int M, int N, bool kSwap>
struct ShapeOf<M, N, kSwap, Sm12x, Pair_mxfp4_mxfp8> {
  using Type = TileShape<M, N, kSwap, Sm12x, Pair_mxfp4_mxfp8>;
};
template <int M, int N, bool kSwap>
struct ShapeOf<M, N, kSwap, Sm12x, Pair_mxfp4_mxfp4> {
  using Type = TileShape<M, N, kSwap, Sm12x, Pair_mxfp4_mxfp4>;
};
template <int M, int N, bool kSwap>
struct ShapeOf<M, N, kSwap, Sm12x, Pair_nvfp4_nvfp4> {
  using Type = TileShape<M, N, kSwap, Sm12x, Pair_nvfp4_nvfp4>;
};

}  // namespace mxfp4_moe
