// The grouped GEMM of kernel.cuh for SM90, with Hopper's asynchronous MMA: same function, same bits.
//
// Shapes: act [rows, k] bf16, E4M3 values with their scales multiplied in (folded.cuh); weight and out as in
// kernel.cuh.
//
// SM90 has no block-scaled MMA. bfloat16 holds an E4M3 or E2M1 value times a power of two exactly, so the scales go
// into the operands, and a K block's sum is two MMAs of K = 16 into zeros and one addition for each element, instead of
// 17 instructions for every 128 elements. Fast because: weights are expanded into registers, from which wgmma takes its
// A, once for all activation rows; wgmma runs beside the expansion of the next step and the additions of other
// warpgroups; the activations' side is as narrow as the tile has rows.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "folded.cuh"
#include "kernel.cuh"
#include "wgmma_shape.cuh"

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
MXFP4_MOE_WGMMA(96)
MXFP4_MOE_WGMMA(128)
#undef MXFP4_MOE_WGMMA

template <class Mma, size_t... kD>
__device__ __forceinline__ void wgmma(float* d, const uint32_t* a, uint64_t b, cute::SM90::GMMA::ScaleOut scale,
                                      std::index_sequence<kD...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[kD]..., scale);
}

// Shared-memory matrix descriptor (PTX ISA, "Matrix-descriptor format") of rows of 128 bytes with the 128-byte swizzle:
// groups of 8 rows are 1024 bytes apart. `from` may be any multiple of 32 bytes into an aligned group's row.
__device__ __forceinline__ uint64_t rows_descriptor(const uint8_t* from) {
  const uint32_t address = cute::cast_smem_ptr_to_uint(from);
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// --- weights ----------------------------------------------------------------------------------------------------

// The A registers of one row and K block: w has word order `halves` (mma_mx.cuh); here each code goes to where bf16 has
// sign, low exponent and high mantissa, which is the value times 2^-126.
__device__ __forceinline__ void expand_to_bf16(uint32_t (&pair)[4], uint32_t w) {
  constexpr uint32_t kSign = 0x80008000u, kValue = 0x01C001C0u;
  pair[0] = ((w >> 3) & kValue) | (w & kSign);
  pair[1] = (w & kValue) | ((w << 3) & kSign);
  pair[2] = ((w << 3) & kValue) | ((w << 1) & kSign);
  pair[3] = ((w << 6) & kValue) | ((w << 2) & kSign);
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
  return r;
}

// A row's scale of one K block as the pair of factors that make of a weight's bits the folded weight: 2^(byte - 127),
// times 2^126 for the bits, over 2 for the fold. One bf16 holds that up to byte 127; of larger bytes the rest comes
// extra.
__device__ __forceinline__ uint32_t pair_of_exponents(uint32_t word, int byte, uint32_t bias) {
  return __byte_perm(word, 0, 0x4040 | byte << 8 | byte) * 128 + bias * 0x00800080u;
}

// What a lane expands of a stage: rows g and g + 8 of its warp's 16.
struct WeightRows {
  const uint8_t* words;  // of step 0
  uint32_t scales[2];
  bool has_rest;  // any lane

  __device__ __forceinline__ void open(const uint8_t* words_at, const uint8_t* scales_at) {
    words = words_at;
    load_words<1>(scales, scales_at);
    load_words<1>(scales + 1, scales_at + 8);
    has_rest = __any_sync(~0u, (scales[0] | scales[1]) & 0x80808080u);
  }

  // The A registers of a step's two MMAs.
  __device__ __forceinline__ void expand(uint32_t (&a)[8], int step) const {
    uint32_t w[2];
    load_words<2>(w, words + step * kWeightStepBytes);
    const auto multiply = [&](int r, uint32_t factor) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i * 2 + r] = multiply_bf16x2(a[i * 2 + r], factor);
    };
    constexpr uint32_t kBias = 126 - kFoldedWeightShift;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t pair[4];
      expand_to_bf16(pair, w[r]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i * 2 + r] = pair[i];
    }
    if (!has_rest) {
#pragma unroll
      for (int r = 0; r < 2; ++r) multiply(r, pair_of_exponents(scales[r], step, kBias));
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t small = __vminu4(scales[r], 0x7f7f7f7fu);
        multiply(r, pair_of_exponents(small, step, kBias));
        multiply(r, pair_of_exponents(scales[r] - small, step, 127));
      }
    }
  }
};

// --- main loop --------------------------------------------------------------------------------------------------

// One output tile's sums, of its first kCols activation rows, for one warpgroup. words_at and scales_at are this
// lane's places in a stage's weights. Afterwards every stage is released.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_over_k(float (&acc)[1][Shape::kFragN][4], const SharedStorage<Shape>& smem,
                                           Ring<Shape::kStages>& ring, int k, uint32_t words_at, uint32_t scales_at) {
  constexpr int kSums = kCols / 2;
  float block[kSums];
  uint32_t a[2][8];
  WeightRows weights;
  const uint8_t* act;

  const auto open_stage = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    weights.open(smem.weight(ring.stage) + words_at, smem.weight(ring.stage) + scales_at);
    act = smem.act(ring.stage);
  };
  const auto release = [&](int stage) {
    __syncwarp();
    if (cute::elect_one_sync()) smem.empty(stage)->arrive();
  };
  const auto start = [&](const uint32_t (&a)[8], int step) {
    const uint64_t b = rows_descriptor(act + step / 2 * Shape::kHalfBytes) + step % 2 * 4;  // units of 16 bytes
    cute::warpgroup_arrive();
    wgmma<typename WgmmaOf<kCols>::Type>(block, a, b, cute::SM90::GMMA::ScaleOut::Zero,
                                         std::make_index_sequence<kSums>());
    wgmma<typename WgmmaOf<kCols>::Type>(block, a + 4, b + 2, cute::SM90::GMMA::ScaleOut::One,
                                         std::make_index_sequence<kSums>());
    cute::warpgroup_commit_batch();
  };
  const auto finish = [&] {
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int i = 0; i < kSums; ++i) cute::warpgroup_fence_operand(block[i]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[0][i / 4][i % 4] += block[i];
  };

  open_stage();
  weights.expand(a[0], 0);
  const int k_tiles = ceil_div(k, kTileK);
  const bool half_tail = (k - 1) % kTileK < 64;
#pragma unroll 1
  for (int kt = 0; kt < k_tiles; ++kt) {
    const int stage = ring.stage;
    const bool last = kt + 1 == k_tiles;
    // Two steps; while the MMAs of one run, the weights of the next are expanded.
    const auto half = [&](auto first_step) {
      constexpr int kFirst = decltype(first_step)::value;
      start(a[0], kFirst);
      weights.expand(a[1], kFirst + 1);
      finish();
      start(a[1], kFirst + 1);
      const bool leaves = kFirst == 2 || (last && half_tail);
      if (!leaves) {
        weights.expand(a[0], 2);
      } else {
        ring.advance();
        if (!last) {
          open_stage();
          weights.expand(a[0], 0);
        }
      }
      finish();
      if (leaves) release(stage);
    };
    half(cute::C<0>{});
    if (!(last && half_tail)) half(cute::C<2>{});
  }
}

// The next narrower width that is worth its code.
constexpr int narrower(int cols) {
  return cols > 96 ? 96 : cols > 64 ? 64 : cols > 48 ? 48 : cols > 40 ? 40 : cols - 8;
}

// As narrow as the rows allow.
template <class Shape, int kCols>
__device__ __forceinline__ void sum_rows(int rows, float (&acc)[1][Shape::kFragN][4], const SharedStorage<Shape>& smem,
                                         Ring<Shape::kStages>& ring, int k, uint32_t words_at, uint32_t scales_at) {
  if constexpr (kCols > 8) {
    if (rows <= narrower(kCols)) return sum_rows<Shape, narrower(kCols)>(rows, acc, smem, ring, k, words_at, scales_at);
  }
  sum_over_k<Shape, kCols>(acc, smem, ring, k, words_at, scales_at);
}

// --- roles ------------------------------------------------------------------------------------------------------

// Activations as the producer loads them: boxes of rows, only those that have any of the tile's.
template <class Shape>
struct FoldedActLoads {
  static __device__ __forceinline__ int boxes(const Mxfp4MoeMTile& m) {
    return ceil_div(m.row_end - m.row_begin, Shape::kBoxRows);
  }
  static __device__ __forceinline__ uint32_t bytes(const Mxfp4MoeMTile& m) { return boxes(m) * Shape::kBoxRows * 256; }
  static __device__ __forceinline__ void load(const TensorMaps& maps, const SharedStorage<Shape>& smem, int s, int kt,
                                              const Mxfp4MoeMTile& m) {
    uint64_t* full = reinterpret_cast<uint64_t*>(smem.full(s));
    const int count = boxes(m);
    for (int b = 0; b < count; ++b) {
      for (int half = 0; half < 2; ++half)
        tma_load_2d(smem.act(s) + half * Shape::kHalfBytes + b * Shape::kBoxRows * 128, maps.act, full,
                    kt * kTileK + half * 64, m.row_begin + b * Shape::kBoxRows, kEvictLast);
    }
  }
};

template <class Shape>
__device__ void consume_wgmma(const GemmParams& p, const SharedStorage<Shape>& smem) {
  Ring<Shape::kStages> ring;
  // What the main loop does not need is had again behind it (kernel.cuh): registers are what limits the blocks per SM.
  const auto is_tile = [&](int tile) { return tile < uniform(load_num_m_tiles(p)) * ceil_div(p.n, Shape::N); };
  for (int tile = blockIdx.x; is_tile(tile); tile += gridDim.x) {
    const int row = warp_id() * 16 + lane_id() / 4;  // of the tile's weight rows; and the one 8 further
    const int block = row / kWeightBlockRows * kWeightBlockBytes, row_in_block = row % kWeightBlockRows;
    const Mxfp4MoeMTile rows = load_m_tile(p.m_tiles + tile_coord(tile, ceil_div(p.n, Shape::N)).m);
    float acc[1][Shape::kFragN][4] = {};
    sum_rows<Shape, Shape::M>(uniform(rows.row_end - rows.row_begin), acc, smem, ring, p.k,
                              block + weight_word_in_block(row_in_block, 0, lane_id() % 4),
                              block + weight_scale_word_in_block(row_in_block));
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) acc[0][j][x] *= kFoldedUnit;
    }
    int same_tile = tile;
    asm volatile("" : "+r"(same_tile));
    const TileCoord done = tile_coord(same_tile, ceil_div(p.n, Shape::N));
    const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + done.m);
    const int tile_n0 = done.n * Shape::N, m0 = uniform(warp_id()) * 16;
    if (p.activate.codes != nullptr)
      store_activated<Shape>(acc, p.activate, m_tile, p.rows, p.n, tile_n0, m0, 0, lane_id(), smem.amax());
    else
      store<Shape>(acc, p, m_tile, tile_n0, m0, 0, lane_id());
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_wgmma(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  const int warp = uniform(threadIdx.x / 32);
  start_block(p, smem);
  if (warp >= Shape::kMmaWarps) {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::kProducerRegisters));
    if (warp == Shape::kMmaWarps) produce<Shape, FoldedActLoads<Shape>>(maps, p, smem);
  } else {
    if constexpr (Shape::kMovesRegisters)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::kMmaRegisters));
    wait_for_previous_kernel();
    consume_wgmma<Shape>(p, smem);
  }
}

}  // namespace mxfp4_moe
