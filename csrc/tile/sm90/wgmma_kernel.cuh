// Grouped GEMM of bf16 or fp16 activations and MXFP4 or NVFP4 weights for SM90, by Hopper's asynchronous MMA: shapes,
// layouts and bits are those of bf16/mma_sync_kernel.cuh.
//
// Fast because: wgmma takes the weights from registers, so that they are expanded once for all activation rows and
// never stored; the next operands are expanded while MMAs run, by as many warps as there are rows for; sums stay in the
// tensor core; and the activations' side is as narrow as the tile has rows.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "tile/bf16/passed_tiles.cuh"
#include "tile/sm90/tile_shape.cuh"

namespace mxfp4_moe {

// --- one MMA ----------------------------------------------------------------------------------------------------

template <int kActFormat, int kCols>
struct WgmmaOf;
#define MXFP4_MOE_WGMMA_OF(FORMAT, TYPES, COLS)                                                                       \
  template <>                                                                                                         \
  struct WgmmaOf<FORMAT, COLS> {                                                                                      \
    using Type =                                                                                                      \
        cute::SM90::GMMA::MMA_64x##COLS##x16_F32##TYPES##_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };
#define MXFP4_MOE_WGMMA(COLS)                            \
  MXFP4_MOE_WGMMA_OF(MXFP4_MOE_ACT_BF16, BF16BF16, COLS) \
  MXFP4_MOE_WGMMA_OF(MXFP4_MOE_ACT_FP16, F16F16, COLS)
MXFP4_MOE_WGMMA(16)
MXFP4_MOE_WGMMA(32)
MXFP4_MOE_WGMMA(48)
MXFP4_MOE_WGMMA(64)
MXFP4_MOE_WGMMA(80)
MXFP4_MOE_WGMMA(96)
MXFP4_MOE_WGMMA(112)
MXFP4_MOE_WGMMA(128)
MXFP4_MOE_WGMMA(160)
MXFP4_MOE_WGMMA(192)
MXFP4_MOE_WGMMA(224)
MXFP4_MOE_WGMMA(256)
#undef MXFP4_MOE_WGMMA
#undef MXFP4_MOE_WGMMA_OF

// The next narrower width that is worth its code, for a tile of m rows; 0: none. Below 32 columns expanding the weights
// takes longer than the MMAs.
constexpr int narrower(int m, int cols) {
  const int step = m <= 128 ? 16 : 32, least = m <= 64 ? 16 : m <= 128 ? 32 : 64;
  return cols > least ? cols - step : 0;
}

template <class Mma, size_t... kD>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, std::index_sequence<kD...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[kD]..., cute::SM90::GMMA::ScaleOut::One);
}

// f(0), f(1) .. f(kCount - 1), as constants.
template <class F, int... kI>
__device__ __forceinline__ void for_each_in(F f, std::integer_sequence<int, kI...>) {
  (f(Constant<kI>{}), ...);
}
template <int kCount, class F>
__device__ __forceinline__ void for_each_of(F f) {
  for_each_in(f, std::make_integer_sequence<int, kCount>());
}

// Shared-memory matrix descriptor (PTX ISA, "Matrix-descriptor format") of rows of 128 bytes with the 128-byte swizzle:
// groups of 8 rows are 1024 bytes apart. `from` may be any multiple of 32 bytes into an aligned group's row.
__device__ __forceinline__ uint64_t rows_descriptor(const uint8_t* from) {
  const uint32_t address = shared_address(from);
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Starts the two MMAs of a K block. act: the first row's half K tile, of which the block is the first or the second 64
// bytes.
template <int kActFormat, int kCols>
__device__ __forceinline__ void start_block(float* sums, const uint32_t (&a)[8], const uint8_t* act, int block) {
  using Mma = typename WgmmaOf<kActFormat, kCols>::Type;
  const uint64_t b = rows_descriptor(act) + block * 4;  // units of 16 bytes
  cute::warpgroup_arrive();
  wgmma<Mma>(sums, a, b, std::make_index_sequence<kCols / 2>());
  wgmma<Mma>(sums, a + 4, b + 2, std::make_index_sequence<kCols / 2>());
  cute::warpgroup_commit_batch();
}

// --- main loop --------------------------------------------------------------------------------------------------

// One output tile's sums, of its first kCols activation rows, for one warpgroup. Afterwards every stage is released.
//
// A unit of work is a K block of a set, 16 weight rows of each of the warpgroup's warps. Its weights are expanded while
// the MMAs of the unit before it run, once those of the one before that are done, whose registers they take; the first
// ones of a K tile while the last of the K tile before run. No MMA runs from one K tile into the next: where they did,
// ptxas gave every width operands of its own, and had none left.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_over_k(float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                           const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                           const Places& at, const typename ScalingOf<Shape>::Origin& origin) {
  constexpr int kSets = Shape::kFragM;
  // Where sums leave few registers, words are not loaded ahead.
  constexpr int kAhead = Shape::kMmaWarps > 8 && Shape::M > 64 ? 0 : 1;
  uint32_t a[2][8], words[1 + kAhead][2 * kSets], scales[2 * kSets];
  using Scales = ScalingOf<Shape>;
  const typename Scales::Kept kept = Scales::keep(origin);
  // Of any of the warpgroup's rows, whole blocks of weights, of which its warps see one or two: they must not part.
  const uint32_t block_scales = warp_id() / 4 * kSets * Shape::kWeightBlockBytes + lane_id() * 8;
  bool large = false;

  const auto load_block = [&](int stage, auto block) {
    constexpr int kBlock = decltype(block)::value;
    load_groups(words[kBlock % (1 + kAhead)], smem.weight(stage) + at.words + kBlock * kWeightStepBytes);
  };
  // Of a block all of whose predecessors are expanded.
  const auto load_scales_of = [&](int stage, auto block) {
    constexpr int kBlock = decltype(block)::value;
    if constexpr (kBlock % Scales::kSetSteps == 0)
      load_scales(scales, smem.weight(stage) + at.scales + kBlock / Scales::kSetSteps * kWeightScaleSetBytes);
  };
  const auto expand_unit = [&](auto unit) {
    constexpr int kBlock = decltype(unit)::value / kSets, kSet = decltype(unit)::value % kSets;
    expand_rows<Scales, false>(a[decltype(unit)::value % 2], words[kBlock % (1 + kAhead)] + kSet * 2, scales + kSet * 2,
                               kBlock, kept);
  };
  const auto start = [&](int stage, int block, auto set, const uint32_t (&operand)[8]) {
    // The set is a constant, or accumulators would not be registers until late, and integers in between.
    start_block<Shape::kActFormat, kCols>(&acc[decltype(set)::value][0][0], operand,
                                          smem.act(stage) + block / 2 * Shape::kHalfBytes, block % 2);
  };
  const auto open = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    load_block(ring.stage, Constant<0>{});
    load_scales_of(ring.stage, Constant<0>{});
    if constexpr (Scales::kHasLarge) {
      uint32_t all[2 * kSets];
#pragma unroll
      for (int set = 0; set < kSets; ++set)
        load_words<2>(all + set * 2, smem.weight(ring.stage) + block_scales + set * Shape::kWeightBlockBytes);
      large = has_large(all);
    }
    expand_unit(Constant<0>{});
  };
  const auto k_tile = [&](int stage, bool is_last, auto blocks) {
    constexpr int kUnits = decltype(blocks)::value * kSets;
    for_each_of<kUnits>([&](auto unit) {
      constexpr int kUnit = decltype(unit)::value, kBlock = kUnit / kSets, kSet = kUnit % kSets;
      constexpr bool kBlockFollows = kUnit + kSets < kUnits;
      if constexpr (kAhead == 1 && kSet == 0 && kBlockFollows) load_block(stage, Constant<kBlock + 1>{});
      start(stage, kBlock, Constant<kSet>{}, a[kUnit % 2]);
      if constexpr (kUnit > 0) cute::warpgroup_wait<1>();
      if constexpr (kUnit + 1 < kUnits) {
        if constexpr (kSet == kSets - 1) {
          if constexpr (kAhead == 0) load_block(stage, Constant<kBlock + 1>{});
          load_scales_of(stage, Constant<kBlock + 1>{});
        }
        expand_unit(Constant<kUnit + 1>{});
      } else if (!is_last) {
        open();
      }
    });
    cute::warpgroup_wait<0>();
    release(smem, stage);
  };
  // Scales that take two factors: seldom, so small and simple.
  const auto large_k_tile = [&](int stage, bool is_last, int blocks) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      uint32_t at_once[2 * kSets];
      load_groups(at_once, smem.weight(stage) + at.words + block * kWeightStepBytes);
      for_each_of<kSets>([&](auto set) {
        expand_rows<Scales, Scales::kHasLarge>(a[0], at_once + set * 2, scales + set * 2, block, kept);
        start(stage, block, set, a[0]);
        cute::warpgroup_wait<0>();
      });
    }
    if (!is_last) open();
    release(smem, stage);
  };
  const auto multiply = [&](bool is_last, auto blocks) {
    const int stage = ring.stage;
    ring.advance();
    if constexpr (!Scales::kHasLarge)
      k_tile(stage, is_last, blocks);
    else if (!large)
      k_tile(stage, is_last, blocks);
    else
      large_k_tile(stage, is_last, blocks);
  };

  const bool half_tail = (k - 1) % kTileK < 64;
  open();
#pragma unroll 1
  for (int more = ceil_div(k, kTileK) - half_tail; more > 0; --more) multiply(more == 1 && !half_tail, Constant<4>{});
  if (half_tail) multiply(true, Constant<2>{});
}

// As narrow as the rows allow.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_rows(int rows, float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring, const Places& at,
                                         const typename ScalingOf<Shape>::Origin& origin) {
  constexpr int kNarrower = narrower(Shape::M, kCols);
  if constexpr (kNarrower > 0) {
    if (rows <= kNarrower) return sum_rows<Shape, kNarrower>(rows, acc, k, smem, ring, at, origin);
  }
  sum_over_k<Shape, kCols>(acc, k, smem, ring, at, origin);
}

template <class Shape>
struct WgmmaSum {
  static constexpr float kUnit = ScalingOf<Shape>::kUnit;
  const GemmParams& p;
  const SharedStorage<Shape>& smem;

  __device__ __forceinline__ WgmmaSum(const GemmParams& params, const SharedStorage<Shape>& storage, int, int)
      : p(params), smem(storage) {}

  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const Mxfp4MoeMTile& rows) const {
    const Places at = places<Shape>(first_row<Shape>(warp_id() * Shape::kWarpM + lane_id() / 4));
    const auto origin = ScalingOf<Shape>::Origin::of(p.factors, rows.expert);
    sum_rows<Shape, Shape::M>(uniform(rows.row_end - rows.row_begin), acc, p.k, smem, ring, at, origin);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_wgmma(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, Bf16ActLoads<Shape>>(maps, p, smem, PassedTiles<Shape, WgmmaSum<Shape>>{p, smem});
}

template <class Shape, class Pair, int M, int N>
constexpr auto kernel_of(WgmmaShape<Pair, M, N>*) {
  return grouped_gemm_wgmma<Shape>;
}

}  // namespace mxfp4_moe
