// Grouped GEMM of bf16 activations and MXFP4 weights for SM90, by Hopper's asynchronous MMA: shapes, layouts and bits
// are those of mma_sync_kernel.cuh.
//
// Fast because: wgmma takes the weights from registers, so that they are expanded once for all activation rows and
// never stored; the next operands are expanded while MMAs run, also across K tiles; a warpgroup has two sets of 64
// weight rows, where registers allow, which share barriers, loads and descriptors; sums stay in the tensor core; and
// the activations' side is as narrow as the tile has rows.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "tile/sm90/bf16_operands.cuh"

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
MXFP4_MOE_WGMMA(80)
MXFP4_MOE_WGMMA(96)
MXFP4_MOE_WGMMA(112)
MXFP4_MOE_WGMMA(128)
MXFP4_MOE_WGMMA(160)
MXFP4_MOE_WGMMA(192)
MXFP4_MOE_WGMMA(224)
MXFP4_MOE_WGMMA(256)
#undef MXFP4_MOE_WGMMA

// The next narrower width that is worth its code.
constexpr int narrower(int cols) {
  constexpr int kWidths[] = {224, 192, 160, 128, 112, 96, 80, 64, 48, 40, 32, 24, 16, 8};
  for (int width : kWidths)
    if (cols > width) return width;
  return 0;
}

template <class Mma, size_t... kD>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, std::index_sequence<kD...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[kD]..., cute::SM90::GMMA::ScaleOut::One);
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

// Starts the two MMAs of a K block. act: the first row's half K tile, of which the block is the first or the second 64
// bytes.
template <int kCols>
__device__ __forceinline__ void start_block(float* sums, const uint32_t (&a)[8], const uint8_t* act, int block) {
  using Mma = typename WgmmaOf<kCols>::Type;
  const uint64_t b = rows_descriptor(act) + block * 4;  // units of 16 bytes
  cute::warpgroup_arrive();
  wgmma<Mma>(sums, a, b, std::make_index_sequence<kCols / 2>());
  wgmma<Mma>(sums, a + 4, b + 2, std::make_index_sequence<kCols / 2>());
  cute::warpgroup_commit_batch();
}

// --- main loop --------------------------------------------------------------------------------------------------

// One output tile's sums, of its first kCols activation rows, for one warpgroup. Afterwards every stage is released.
//
// The MMAs of a K block and a set of weight rows are a unit. A unit's weights are expanded while the unit before it
// runs, once the one before that is done, whose registers they take; the first ones of a K tile while the last unit of
// the K tile before runs. No MMA runs from one K tile into the next: where they did, ptxas gave every width operands
// of its own, and had none left.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_over_k(float (&acc)[Shape::kFragM][kCols / 8][4], int k,
                                           const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                           const Places& at) {
  constexpr int kSets = Shape::kRowSets;
  uint32_t a[2][8], scales[kSets * 2];
  bool large;

  const auto expand_unit = [&](int stage, auto unit, auto is_large) {
    constexpr int kUnit = decltype(unit)::value, kStep = kUnit / kSets, kSet = kUnit % kSets;
    uint32_t words[2];
    load_words<2>(words, smem.weight(stage) + at.words + kStep * kWeightStepBytes + kSet * 8);
    expand_rows<decltype(is_large)::value>(a[kUnit % 2], words, scales + kSet * 2, kStep);
  };
  const auto open = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    load_scales(scales, smem.weight(ring.stage) + at.scales);
    large = has_large(scales);
    if (!large)
      expand_unit(ring.stage, cute::C<0>{}, std::false_type());
    else
      expand_unit(ring.stage, cute::C<0>{}, std::true_type());
  };
  const auto k_tile = [&](int stage, bool is_last, auto steps, auto is_large) {
    constexpr int kUnits = decltype(steps)::value * kSets;
    for_each_of<kUnits>([&](auto unit) {
      constexpr int kUnit = decltype(unit)::value, kStep = kUnit / kSets;
      start_block<kCols>(&acc[kUnit % kSets][0][0], a[kUnit % 2], smem.act(stage) + kStep / 2 * Shape::kHalfBytes,
                         kStep % 2);
      if constexpr (kUnit > 0) cute::warpgroup_wait<1>();
      if constexpr (kUnit + 1 < kUnits) {
        expand_unit(stage, cute::C<kUnit + 1>{}, is_large);
      } else if (!is_last) {
        open();
      }
    });
    cute::warpgroup_wait<0>();
    release(smem, stage);
  };
  const auto multiply = [&](bool is_last, auto steps) {
    const int stage = ring.stage;
    ring.advance();
    if (!large)
      k_tile(stage, is_last, steps, std::false_type());
    else
      k_tile(stage, is_last, steps, std::true_type());
  };

  const bool half_tail = (k - 1) % kTileK < 64;
  open();
#pragma unroll 1
  for (int more = ceil_div(k, kTileK) - half_tail; more > 0; --more) multiply(more == 1 && !half_tail, cute::C<4>{});
  if (half_tail) multiply(true, cute::C<2>{});
}

// A tile that is taken as kCols activation rows wide, for the epilogue.
template <class Shape, int kCols>
struct Narrow : Shape {
  static constexpr int kWarpN = kCols, kFragN = kCols / 8;
};

// What the computing warps of a block do (run_block): for each of its output tiles the sums, and those to memory. Every
// width has sums and an epilogue of its own: where widths shared registers, ptxas let MMAs wait for each other.
template <class Shape>
struct WgmmaTiles {
  const GemmParams& p;
  const SharedStorage<Shape>& smem;

  // As narrow as the rows allow.
  template <int kCols>
  __device__ __forceinline__ void run(int tile, int rows, Ring<Shape::kStages>& ring) const {
    if constexpr (narrower(kCols) > 0) {
      if (rows <= narrower(kCols)) return run<narrower(kCols)>(tile, rows, ring);
    }
    float acc[Shape::kFragM][kCols / 8][4] = {};
    sum_over_k<Shape, kCols>(acc, p.k, smem, ring, places(first_row(warp_id() * Shape::kWarpM + lane_id() / 4)));
    multiply_accumulators<Narrow<Shape, kCols>>(acc, kAccumulatorUnit);
    const TileCoord done = tile_coord(computed_anew(tile), ceil_div(p.n, Shape::N));
    store_tile<Narrow<Shape, kCols>>(acc, p, load_m_tile(p.m_tiles + done.m), done.n,
                                     warp_m0<Shape>(uniform(warp_id())), 0, lane_id, smem.amax());
  }

  __device__ __forceinline__ void operator()(int, int) const {
    Ring<Shape::kStages> ring;
    const auto num_n_tiles = [&] { return ceil_div(p.n, Shape::N); };
    for (int tile = blockIdx.x; tile < uniform(load_num_m_tiles(p)) * num_n_tiles(); tile += gridDim.x) {
      const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + tile_coord(tile, num_n_tiles()).m);
      run<Shape::M>(tile, uniform(m_tile.row_end - m_tile.row_begin), ring);
    }
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_wgmma(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, Bf16ActLoads<Shape>>(maps, p, smem, WgmmaTiles<Shape>{p, smem});
}

template <int M, int N>
constexpr auto kernel_of(WgmmaShape<M, N>*) {
  return grouped_gemm_wgmma<WgmmaShape<M, N>>;
}

}  // namespace mxfp4_moe
