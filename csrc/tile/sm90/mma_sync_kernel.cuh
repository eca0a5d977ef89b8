// The grouped GEMM of tile/plain_kernel.cuh for SM90 and tiles of 8 and 16 activation rows: same function, same bits.
//
// Shapes: act [rows, k] bf16, E4M3 values with their scales multiplied in (shared/folded.cuh); weight and out as in
// tile/plain_kernel.cuh.
//
// SM90 has no block-scaled MMA. With the activations' scales in their values, a K block's sum is two bf16 MMAs of K =
// 16 into zeros and one fp32 fma for each element, by the weights' scale. Fast because: the weights' codes are bf16
// operands as soon as their bits stand right; one 16-byte load has a lane's weights of 32 rows, one ldmatrix all
// activations of 8 rows and a K block, already bf16; the warps' rows are long, so that both are shared; and several
// blocks hide each other's waits.
#pragma once

#include "tile/sm90/bf16_operands.cuh"
#include "tile/sm90/mma_sync_shape.cuh"

namespace mxfp4_moe {

// d = c + a . b of m16n8k16, bf16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// What a warp multiplies in a K block: activations of each 8 rows, packed weights of each 16.
template <class Shape, int kFragments>
struct BlockOperands {
  uint32_t b[kFragments][4];
  uint32_t words[Shape::kRowSets * 2];

  __device__ __forceinline__ void load(const SharedStorage<Shape>& smem, int stage, int step, const Places& at,
                                       uint32_t act_at) {
    const uint8_t* act = smem.act(stage) + step / 2 * Shape::kHalfBytes + (act_at ^ step % 2 * 64);
    const uint8_t* weight = smem.weight(stage) + at.words + step * kWeightStepBytes;
#pragma unroll
    for (int j = 0; j < kFragments; ++j) ldmatrix<4>(b[j], act + j * 8 * kActRowBytes);
    if constexpr (Shape::kRowSets == 1) {
      load_words<2>(words, weight);
    } else {
#pragma unroll
      for (int s = 0; s < Shape::kRowSets; s += 2) load_words<4>(words + s * 2, weight + s / 2 * 512);
    }
  }

  // Calls add(set, fragment, sums) for each 16 x 8 of the K block's sums.
  template <class Add>
  __device__ __forceinline__ void multiply(const Add& add) const {
#pragma unroll
    for (int s = 0; s < Shape::kRowSets; ++s) {
      uint32_t a[8];
      expand_rows(a, words + s * 2);
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        float half[4], block[4];
        mma_bf16(half, a, b[j][0], b[j][1], {0.f, 0.f, 0.f, 0.f});
        mma_bf16(block, a + 4, b[j][2], b[j][3], half);
        add(s, j, block);
      }
    }
  }
};

// One output tile's sums of a warp, of its first 8 kFragments activation rows. Afterwards every stage is released. The
// operands of each K block are loaded before the one before it is multiplied, across stages too.
template <class Shape, int kFragments>
__device__ __forceinline__ void sum_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring, const Places& at,
                                         uint32_t act_at) {
  BlockOperands<Shape, kFragments> operands[2];
  uint32_t scales[Shape::kRowSets][2];
  const auto open = [&] {
    wait_for(smem.full(ring.stage), ring.phase);
    operands[0].load(smem, ring.stage, 0, at, act_at);
  };
  open();
  load_scales<Shape>(scales, smem.weight(ring.stage) + at.scales);
#pragma unroll 1
  for (int kt = ceil_div(k, kTileK); kt > 0; --kt) {
    const int stage = ring.stage;
    ring.advance();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step < 3) {
        operands[(step + 1) % 2].load(smem, stage, step + 1, at, act_at);
      } else if (kt > 1) {
        open();
      }
      operands[step % 2].multiply([&](int s, int j, const float (&block)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[s][j][i] = fmaf(block[i], scale_factor(scales[s][i / 2], step), acc[s][j][i]);
      });
    }
    if (kt > 1) load_scales<Shape>(scales, smem.weight(ring.stage) + at.scales);
    release(smem, stage);
  }
}

// The same where activations may be far; seldom, so small and simple.
template <class Shape>
__device__ __forceinline__ void sum_far_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], const GemmParams& p,
                                             const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring,
                                             const Places& at, uint32_t act_at, const Mxfp4MoeMTile& rows) {
  const int first = rows.row_begin + lane_id() % 4 * 2;  // this lane's columns are activation rows from here on
#pragma unroll 1
  for (int k_block = 0; k_block < round_up(p.k, kTileK) / kBlockK; ++k_block) {
    const int step = k_block % 4;
    if (step == 0) wait_for(smem.full(ring.stage), ring.phase);
    uint32_t scales[Shape::kRowSets][2];
    load_scales<Shape>(scales, smem.weight(ring.stage) + at.scales);
    BlockOperands<Shape, Shape::kFragN> operands;
    operands.load(smem, ring.stage, step, at, act_at);
    const uint8_t* act_scales = p.act_scale + act_scale_offset(first, k_block, p.rows);
    operands.multiply([&](int s, int j, const float (&block)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = j * 8 + i % 2;
        const int shift = first + row < rows.row_end ? folded_shift(load_byte(act_scales + row * 4)) : 0;
        acc[s][j][i] = add_scaled(acc[s][j][i], block[i], far_exponent(scales[s][i / 2], step, shift));
      }
    });
    if (step == 3) {
      release(smem, ring.stage);
      ring.advance();
    }
  }
}

// As few fragments as the rows allow.
template <class Shape, int kFragments>
__device__ __forceinline__ void sum_rows(int rows, float (&acc)[Shape::kFragM][Shape::kFragN][4], int k,
                                         const SharedStorage<Shape>& smem, Ring<Shape::kStages>& ring, const Places& at,
                                         uint32_t act_at) {
  if constexpr (kFragments > 1) {
    if (rows <= kFragments * 8 - 8) return sum_rows<Shape, kFragments - 1>(rows, acc, k, smem, ring, at, act_at);
  }
  sum_tile<Shape, kFragments>(acc, k, smem, ring, at, act_at);
}

template <class Shape>
struct MmaSyncSum {
  static constexpr float kUnit = kFoldedUnit;
  const GemmParams& p;
  const SharedStorage<Shape>& smem;
  bool has_far;

  __device__ __forceinline__ MmaSyncSum(const GemmParams& params, const SharedStorage<Shape>& storage, int, int)
      : p(params), smem(storage), has_far(uniform(__ldcg(p.has_far)) != 0) {}

  __device__ __forceinline__ void operator()(float (&acc)[Shape::kFragM][Shape::kFragN][4], Ring<Shape::kStages>& ring,
                                             const TileCoord& coord) const {
    const FirstRow row = first_row<Shape>();
    const Mxfp4MoeMTile rows = load_m_tile(p.m_tiles + coord.m);
    const Places at = places(row);
    const uint32_t act_at = act_chunk(lane_id() % 8, lane_id() / 8);  // what this lane names for ldmatrix in step 0
    if (has_far)
      sum_far_tile<Shape>(acc, p, smem, ring, at, act_at, rows);
    else
      sum_rows<Shape, Shape::kFragN>(uniform(rows.row_end - rows.row_begin), acc, p.k, smem, ring, at, act_at);
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_mma_sync(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const SharedStorage<Shape> smem{dynamic_smem};
  run_block<Shape, FoldedActLoads<Shape>>(maps, p, smem, OutputTiles<Shape, MmaSyncSum<Shape>>{p, smem});
}

template <int M, int N>
constexpr auto kernel_of(MmaSyncShape<M, N>*) {
  return grouped_gemm_mma_sync<MmaSyncShape<M, N>>;
}

}  // namespace mxfp4_moe
