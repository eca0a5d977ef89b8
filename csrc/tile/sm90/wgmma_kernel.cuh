// The grouped GEMM of tile/plain_kernel.cuh for SM90, with Hopper's asynchronous MMA: same function, same bits.
//
// Shapes: act [rows, k] bf16, E4M3 values with their scales multiplied in (shared/folded.cuh); weight and out as in
// tile/plain_kernel.cuh.
//
// SM90 has no block-scaled MMA. With the activations' scales in their values, a K block's sum is two MMAs of K = 16
// into zeros and one fp32 fma for each element, by the weights' scale. Fast because: wgmma takes the weights from
// registers, and their codes are bf16 operands as soon as their bits stand right, expanded once for all activation
// rows; a warpgroup has two sets of 64 weight rows, where registers allow, which share barriers, loads and descriptors;
// MMAs run beside additions and the expansion of the next weights; and the activations' side is as narrow as the tile
// has rows.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "tile/sm90/bf16_operands.cuh"
#include "tile/sm90/wgmma_shape.cuh"

namespace mxfp4_moe {

// --- one MMA ----------------------------------------------------------------------------------------------------

template <int kCols>
struct WgmmaOf;
#define MXFP4_MOE_WGMMA(COLS)                                                                                        \
  template <>                                                                                                        \
  struct WgmmaOf<COLS> {                                                                                             \
    using Type =                                                                                                     \
        cute::SM90::GMMA::MMA_64x##COLS##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };
MXFP4_MOE_WGMMA(8)
MXFP4_MOE_WGMMA(16)
MXFP4_MOE_WGMMA(24)
MXFP4_MOE_WGMMA(32)
MXFP4_MOE_WGMMA(40)
MXFP4_MOE_WGMMA(48)
MXFP4_MOE_WGMMA(64)
MXFP4_MOE_WGMMA(72)
MXFP4_MOE_WGMMA(80)
#undef MXFP4_MOE_WGMMA

template <class Mma, size_t... kD>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, cute::SM90::GMMA::ScaleOut scale,
                                      std::index_sequence<kD...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[kD]..., scale);
}

// f(0), f(1) .. f(kCount - 1), as constants.
template <class F, int... kI>
__device__ __forceinline__ void for_each_in(F f, std::integer_sequence<int, kI...>) {
  (f(cute::C<kI>{}), ...);
}
template <int kCount, class F>
__device__ __forceinline__ void for_each_of(F f) {
  for_each_in(f, std::make_integer_sequence<int, kCount>());
}

// Shared-memory matrix descriptor (PTX ISA, "Matrix-descriptor format") of rows of 128 bytes with the 128-byte swizzle:
// groups of 8 rows are 1024 bytes apart. `from` may be any multiple of 32 bytes into an aligned group's row.
__device__ __forceinline__ uint64_t rows_descriptor(const uint8_t* from) {
  const uint32_t address = cute::cast_smem_ptr_to_uint(from);
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Starts a K block's sums: two MMAs into zeros. act: the first row's half K tile, of which the block is the first or
// the second 64 bytes.
template <int kCols>
__device__ __forceinline__ void start_block_sum(float (&sums)[kCols / 2], const uint32_t (&a)[8], const uint8_t* act,
                                                int block) {
  using Mma = typename WgmmaOf<kCols>::Type;
  const uint64_t b = rows_descriptor(act) + block * 4;  // units of 16 bytes
  cute::warpgroup_arrive();
  wgmma<Mma>(sums, a, b, cute::SM90::GMMA::ScaleOut::Zero, std::make_index_sequence<kCols / 2>());
  wgmma<Mma>(sums, a + 4, b + 2, cute::SM90::GMMA::ScaleOut::One, std::make_index_sequence<kCols / 2>());
  cute::warpgroup_commit_batch();
}

// --- main loop --------------------------------------------------------------------------------------------------

// One output tile's sums where activations may be far; seldom, so small and simple. Afterwards every stage is released.
template <class Shape>
__device__ __forceinline__ void sum_far_over_k(float (&acc)[Shape::kFragM][Shape::kFragN][4], const GemmParams& p,
                                               const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                               const Places& at, const Mxfp4MoeMTile& rows) {
  const int first = rows.row_begin + lane_id() % 4 * 2;  // this lane's columns are activation rows from here on
#pragma unroll 1
  for (int k_block = 0; k_block < round_up(p.k, kTileK) / kBlockK; ++k_block) {
    const int step = k_block % 4;
    if (step == 0) wait_for(smem.full(ring.stage), ring.phase);
    const uint8_t* weight = smem.weight(ring.stage);
    uint32_t scales[Shape::kRowSets][2], words[Shape::kRowSets * 2];
    load_scales<Shape>(scales, weight + at.scales);
    load_words<Shape::kRowSets * 2>(words, weight + at.words + step * kWeightStepBytes);
    const uint8_t* act_scales = p.act_scale + act_scale_offset(first, k_block, p.rows);
#pragma unroll
    for (int set = 0; set < Shape::kRowSets; ++set) {
      uint32_t a[8];
      expand_rows(a, words + set * 2);
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) {
        float block[4];
        start_block_sum<8>(block, a, smem.act(ring.stage) + step / 2 * Shape::kHalfBytes + j * 8 * 128, step % 2);
        int shift[2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (first + j * 8 + c < rows.row_end) shift[c] = folded_shift(load_byte(act_scales + (j * 8 + c) * 4));
        cute::warpgroup_wait<0>();
#pragma unroll
        for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(block[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          acc[set][j][i] = add_scaled(acc[set][j][i], block[i], far_exponent(scales[set][i / 2], step, shift[i % 2]));
      }
    }
    if (step == 3) {
      release(smem, ring.stage);
      ring.advance();
    }
  }
}

// One output tile's sums, of its first kCols activation rows, for one warpgroup. Afterwards every stage is released.
//
// The MMAs of a K block, a set of weight rows and some of the columns are a unit. A unit is started before the one
// before it is added, so that MMAs run all the time: beside them, one unit is added and the next weights are expanded.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_over_k(float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                           const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                           const Places& at) {
  constexpr int kSets = Shape::kRowSets;
  constexpr int kChunk = Shape::chunk_of(kCols), kChunks = kCols / kChunk, kSums = kChunk / 2;
  static_assert(kChunk % 8 == 0 && kChunk * kChunks == kCols, "chunks are whole fragments");
  float block[2][kSums];
  uint32_t a[2][8], words[kSets * 2];
  uint32_t scales[kSets][2];

  const auto open = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    load_scales<Shape>(scales, smem.weight(ring.stage) + at.scales);
  };
  // `turn`: a K block and a set of weight rows, in this order; kSets of them have one K block.
  const auto expand = [&](int stage, auto turn) {
    constexpr int kTurn = decltype(turn)::value;
    if constexpr (kTurn % kSets == 0)
      load_words<kSets * 2>(words, smem.weight(stage) + at.words + kTurn / kSets * kWeightStepBytes);
    expand_rows(a[kTurn % 2], words + kTurn % kSets * 2);
  };
  const auto start = [&](int stage, auto turn, auto part) {
    constexpr int kTurn = decltype(turn)::value, kPart = decltype(part)::value, kStep = kTurn / kSets;
    start_block_sum<kChunk>(block[(kTurn * kChunks + kPart) % 2], a[kTurn % 2],
                            smem.act(stage) + kStep / 2 * Shape::kHalfBytes + kPart * kChunk * 128, kStep % 2);
  };
  // Adds a unit, after which `running` that were started later may still run.
  const auto finish = [&](auto running, auto turn, auto part, const uint32_t (&scales)[2]) {
    constexpr int kTurn = decltype(turn)::value, kPart = decltype(part)::value;
    float (&sums)[kSums] = block[(kTurn * kChunks + kPart) % 2];
    cute::warpgroup_wait<decltype(running)::value>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(sums[i]);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = scale_factor(scales[r], kTurn / kSets);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = acc[kTurn % kSets][kPart * kChunk / 8 + i / 4][i % 4];
      sum = fmaf(sums[i], factor[i / 2 % 2], sum);
    }
  };
  constexpr cute::C<0> kNone;
  constexpr cute::C<1> kOne;
  constexpr cute::C<kChunks - 1> kLastPart;
  // The units of a K tile up to its last, which is left running.
  const auto run = [&](auto steps, int stage) {
    constexpr int kTurns = decltype(steps)::value * kSets;
    start(stage, kNone, kNone);
    for_each_of<kTurns>([&](auto turn) {
      constexpr cute::C<decltype(turn)::value> kTurn;
      constexpr bool kExpands = kTurn + 1 < kTurns;
      for_each_of<kChunks>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        if constexpr (kTurn > 0 || kPart > 0) {
          start(stage, kTurn, cute::C<kPart>{});
          if constexpr (kPart == 1 && kExpands) expand(stage, cute::C<kTurn + 1>{});
          if constexpr (kPart > 0) {
            finish(kOne, kTurn, cute::C<kPart - 1>{}, scales[kTurn % kSets]);
          } else {
            finish(kOne, cute::C<kTurn - 1>{}, kLastPart, scales[(kTurn - 1) % kSets]);
          }
        }
        if constexpr (kChunks == 1 && kExpands) expand(stage, cute::C<kTurn + 1>{});
      });
    });
  };
  const auto finish_last = [&](auto steps, const uint32_t (&scales)[2]) {
    finish(kNone, cute::C<decltype(steps)::value * kSets - 1>{}, kLastPart, scales);
  };

  const int k_tiles = ceil_div(k, kTileK);
  const bool half_tail = (k - 1) % kTileK < 64;
  open();
  expand(ring.stage, kNone);
#pragma unroll 1
  for (int kt = 0; kt < k_tiles; ++kt) {
    const int stage = ring.stage;
    const bool last = kt + 1 == k_tiles;
    ring.advance();
    if (!last) {
      run(cute::C<4>{}, stage);
      const uint32_t done[2] = {scales[kSets - 1][0], scales[kSets - 1][1]};
      open();
      expand(ring.stage, kNone);
      finish_last(cute::C<4>{}, done);
    } else if (half_tail) {
      run(cute::C<2>{}, stage);
      finish_last(cute::C<2>{}, scales[kSets - 1]);
    } else {
      run(cute::C<4>{}, stage);
      finish_last(cute::C<4>{}, scales[kSets - 1]);
    }
    release(smem, stage);
  }
}

// The next narrower width that is worth its code.
constexpr int narrower(int cols) {
  constexpr int kWidths[] = {160, 144, 128, 96, 64, 48};
  for (int width : kWidths)
    if (cols > width) return width;
  return cols - 8;
}

// As narrow as the rows allow.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_rows(int rows, float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                         const Places& at) {
  if constexpr (kCols > Shape::kMinCols) {
    if (rows <= narrower(kCols)) return sum_rows<Shape, narrower(kCols)>(rows, acc, k, smem, ring, at);
  }
  sum_over_k<Shape, kCols>(acc, k, smem, ring, at);
}

template <class Shape>
struct WgmmaSum {
  static constexpr float kUnit = kFoldedUnit;
  const GemmParams& p;
  const SharedStorage<Shape>& smem;
  bool has_far;

  __device__ __forceinline__ WgmmaSum(const GemmParams& params, const SharedStorage<Shape>& storage, int, int)
      : p(params), smem(storage), has_far(uniform(__ldcg(p.has_far)) != 0) {}

  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const TileCoord& coord) const {
    const FirstRow row = first_row<Shape>();
    const Mxfp4MoeMTile rows = load_m_tile(p.m_tiles + coord.m);
    const Places at = places(row);
    if (!has_far)
      sum_rows<Shape, Shape::M>(uniform(rows.row_end - rows.row_begin), acc, p.k, smem, ring, at);
    else
      sum_far_over_k<Shape>(acc, p, smem, ring, at, rows);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_wgmma(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, FoldedActLoads<Shape>>(maps, p, smem, OutputTiles<Shape, WgmmaSum<Shape>>{p, smem});
}

template <int M, int N>
constexpr auto kernel_of(WgmmaShape<M, N>*) {
  return grouped_gemm_wgmma<WgmmaShape<M, N>>;
}

}  // namespace mxfp4_moe
