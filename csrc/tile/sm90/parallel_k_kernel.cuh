// The grouped GEMM of tile/plain_kernel.cuh, same operands and same bits, for calls with so few output tiles that the
// time of one tile is the time of the call: a block multiplies several K tiles at once. SM90, launched by launcher.cuh.
//
// Three kinds of warps work on a K tile one after the other, each waiting for its stage alone, never for the block:
//   producer      loads the K tile; then full[stage]
//   multipliers   part q of kParts takes K tiles q, q + kParts, ...: all MMAs of the K tile, each into zeros, whose
//                 results, the block sums, it stores unscaled beside the stage; then summed[stage]
//   adders        four warps take all K tiles in order: they multiply each block sum by its two scales and add it to
//                 the one fp32 accumulator of its output; then empty[stage]. After the last they run the epilogue
// The sum over K is not split: every output is the chain fma(block, scale, acc) over the K blocks in order that
// tile/plain_kernel.cuh has, operation by operation.
//
// Fast because: one fma per block is all that is left in sequence; expanding FP4, most of the instructions, is spread
// over the parts, and the four steps of a K tile do not depend on each other; scales are applied only where an output
// is real. With one activation row, the usual case at few tokens, that is an eighth of the MMA's results, and then two
// warps hold one output in every lane. A part's warps have 32 rows, so that activations are expanded half as often; and
// while the adders store an output tile, the others are at the next one.
//
// No wait can take a barrier's phase for the next one: kStages is a multiple of kParts, so a stage's K tiles all belong
// to the same warps, which pass its phases one by one. Adders that sit out an output tile meet the others after it, at
// the column of sums (kColumnOffset).
#pragma once

#include "tile/epilogue.cuh"
#include "tile/fragments.cuh"
#include "tile/mma_mx.cuh"
#include "tile/pipeline.cuh"
#include "tile/sm90/parallel_k_shape.cuh"

namespace mxfp4_moe {

template <class Shape>
struct ParallelKStorage : SharedStorage<Shape> {
  // Where a fragment's sums of step 0 begin.
  __device__ uint8_t* sums(int stage, int fragment) const {
    return this->base + Shape::Smem::kSum + stage * Shape::kSumBytes + fragment * Shape::kSumFragmentBytes;
  }
  __device__ EmptyBarrier* summed(int stage) const {
    return reinterpret_cast<EmptyBarrier*>(this->base + Shape::Smem::kBarrier + Shape::kStages * 16) + stage;
  }
  __device__ __forceinline__ void init_barriers(int stage) const {
    this->full(stage)->init(1);
    this->empty(stage)->init(Shape::kAddWarps);
    summed(stage)->init(Shape::kRowWarps);
  }
  __device__ float* column() const { return reinterpret_cast<float*>(this->base + Shape::kColumnOffset); }
};

// The output tiles of this block, with the next one's m-tile fetched while this one is computed.
struct BlockTiles {
  const GemmParams& p;
  const int num_n_tiles, num_tiles;
  int tile = blockIdx.x;
  Mxfp4MoeMTile m_tile, next;

  __device__ __forceinline__ explicit BlockTiles(const GemmParams& params, int tile_n)
      : p(params),
        num_n_tiles(ceil_div(p.n, tile_n)),
        num_tiles(uniform(load_num_m_tiles(p)) * num_n_tiles),
        next(fetch(tile)) {}
  __device__ __forceinline__ Mxfp4MoeMTile fetch(int of) const {
    Mxfp4MoeMTile m = {};
    if (of < num_tiles) m = load_m_tile(p.m_tiles + tile_coord(of, num_n_tiles).m);
    return m;
  }
  __device__ __forceinline__ bool begin() {
    if (tile >= num_tiles) return false;
    m_tile = next;
    next = fetch(tile + gridDim.x);
    return true;
  }
  __device__ __forceinline__ void advance() { tile += gridDim.x; }
  __device__ __forceinline__ int rows() const { return uniform(m_tile.row_end - m_tile.row_begin); }
};

#ifndef MXFP4_MOE_MMA_TAKES_SCALES  // where mma_mx.cuh applies scales in instructions of their own

// --- multipliers ------------------------------------------------------------------------------------------------

template <class Shape>
__device__ __forceinline__ void multiply(const GemmParams& p, const ParallelKStorage<Shape>& smem, int warp, int lane) {
  constexpr int kGroups = Shape::kWarpRows / 8, kGroupsPerLoad = min_of(kGroups, 4);
  const int num_k_tiles = ceil_div(p.k, kTileK);
  const int part = warp / Shape::kRowWarps, row0 = warp % Shape::kRowWarps * Shape::kWarpRows;
  const uint32_t act_lane = act_chunk(lane % 8, lane / 8);  // one ldmatrix brings two steps
  const uint32_t weight_lane = weight_word_in_block(row0 + lane / 4, 0, lane % 4);
  const uint32_t sum_lane = sum_slot(lane / 4, lane % 4) * 16;

  Ring<Shape::kStages> ring;
  ring.skip(part);
  int kt = part;  // this part's next K tile, counted from the first of the current output tile
  for (BlockTiles tiles(p, Shape::N); tiles.begin(); tiles.advance()) {
    const bool has_rows = c_col(lane, 0) < tiles.rows();
#pragma unroll 1
    for (; kt < num_k_tiles; kt += Shape::kParts) {
      const int s = ring.stage;
      wait_for(smem.full(s), ring.phase);
      // All of it first, because the compiler cannot know that the sums lie elsewhere. The steps that a last K tile
      // lacks hold any weights, but activations and scales of zero, as in tile/plain_kernel.cuh.
      uint32_t act[8], weight[4][kGroups];
      ldmatrix<4>(act, smem.act(s) + act_lane);
      ldmatrix<4>(act + 4, smem.act(s) + (act_lane ^ 64));
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int g = 0; g < kGroups; g += kGroupsPerLoad)
          load_words<kGroupsPerLoad>(weight[step] + g,
                                     smem.weight(s) + weight_lane + step * kWeightStepBytes + g / 4 * 512);
      }
      float block[4][Shape::kFragments][4];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const Fragment b = expand_act(act[2 * step], act[2 * step + 1]);
#pragma unroll
        for (int f = 0; f < Shape::kFragments; ++f) {
          mma_block(block[step][f], expand_weight(weight[step][2 * f]), expand_weight(weight[step][2 * f + 1]), b);
        }
      }
      if (has_rows) {
        uint8_t* sums = smem.sums(s, row0 / 16) + sum_lane;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
          for (int f = 0; f < Shape::kFragments; ++f) {
            const float* x = block[step][f];
            *reinterpret_cast<float4*>(sums + step * Shape::kSumStepBytes + f * Shape::kSumFragmentBytes) =
                make_float4(x[0], x[1], x[2], x[3]);
          }
        }
      }
      after_all_lanes([&] {
        if (lane == 0) smem.summed(s)->arrive();
      });
      ring.skip(Shape::kParts);
    }
    kt -= num_k_tiles;
  }
}

// --- adders -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add_block(float& acc, float block, uint32_t weight_word, uint32_t act_word, int step) {
  acc = fmaf(block, e8m0_to_float<kWeightScaleShift>(weight_word, step) * e8m0_to_float<kActScaleShift>(act_word, step),
             acc);
}

template <class Shape>
__device__ __forceinline__ void add(const GemmParams& p, const ParallelKStorage<Shape>& smem, int warp, int lane) {
  using Tile = typename Shape::Tile;
  const int num_k_tiles = ceil_div(p.k, kTileK);
  const int g = lane / 4, t = lane % 4,
            row0 = warp * 16;  // as an MMA's accumulators: rows g and g + 8, columns 2t, 2t+1
  const auto word = [](const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); };

  Ring<Shape::kStages> ring;
  for (BlockTiles tiles(p, Shape::N); tiles.begin(); tiles.advance()) {
    const int n_tile = tile_coord(tiles.tile, tiles.num_n_tiles).n;
    const int first_act_word = uniform(tiles.m_tile.row_begin) % 4;
    // take(stage): what one K tile adds.
    const auto each_k_tile = [&](int arrivals, auto&& take) {
#pragma unroll 1
      for (int kt = 0; kt < num_k_tiles; ++kt) {
        wait_for(smem.summed(ring.stage), ring.phase);
        wait_for(smem.full(ring.stage), ring.phase);  // long complete; this shows the copied scales to this warp too
        take(ring.stage);
        after_all_lanes([&] {
          if (lane < arrivals) smem.empty(ring.stage)->arrive();
        });
        ring.advance();
      }
    };
    float acc[1][1][4] = {};
    if (tiles.rows() == 1) {
      // One output per lane of two warps, which arrive for the other two.
      if (warp < 2) {
        const int row = warp * 32 + lane;
        const uint32_t sum_at = sum_slot(row % 8, 0) * 16 + row / 8 % 2 * 8;
        const uint32_t scale_at = weight_scale_word_in_block(row);
        float sum = 0.f;
        each_k_tile(2, [&](int s) {
          const uint8_t* sums = smem.sums(s, row / 16) + sum_at;
          float block[4];
#pragma unroll
          for (int step = 0; step < 4; ++step)
            block[step] = *reinterpret_cast<const float*>(sums + step * Shape::kSumStepBytes);
          const uint32_t weight_word = word(smem.weight(s) + scale_at);
          const uint32_t act_word = word(smem.act_scale(s) + first_act_word * 4);
#pragma unroll
          for (int step = 0; step < 4; ++step) add_block(sum, block[step], weight_word, act_word, step);
        });
        smem.column()[row] = sum;
      } else {
        ring.skip(num_k_tiles);
      }
      const auto sync = [] { asm volatile("bar.sync 2, %0;" ::"n"(Shape::kAddWarps * 32) : "memory"); };
      sync();
      if (t == 0) {
        acc[0][0][0] = smem.column()[row0 + g];
        acc[0][0][2] = smem.column()[row0 + g + 8];
      }
      sync();  // the next tile's column must not come before
    } else {
      const uint32_t sum_at = sum_slot(g, t) * 16;
      const uint32_t scale_at[2] = {static_cast<uint32_t>(weight_scale_word_in_block(row0 + g)),
                                    static_cast<uint32_t>(weight_scale_word_in_block(row0 + g + 8))};
      const uint32_t act_at = (first_act_word + 2 * t) * 4;
      each_k_tile(1, [&](int s) {
        const uint8_t* sums = smem.sums(s, warp) + sum_at;
        float4 block[4];
#pragma unroll
        for (int step = 0; step < 4; ++step)
          block[step] = *reinterpret_cast<const float4*>(sums + step * Shape::kSumStepBytes);
        uint32_t weight_word[2], act_word[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          weight_word[i] = word(smem.weight(s) + scale_at[i]);
          act_word[i] = word(smem.act_scale(s) + act_at + i * 4);
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          add_block(acc[0][0][0], block[step].x, weight_word[0], act_word[0], step);
          add_block(acc[0][0][1], block[step].y, weight_word[0], act_word[1], step);
          add_block(acc[0][0][2], block[step].z, weight_word[1], act_word[0], step);
          add_block(acc[0][0][3], block[step].w, weight_word[1], act_word[1], step);
        }
      });
    }
    multiply_accumulators<Tile>(acc, kAccumulatorUnit);
    store_tile<Tile>(acc, p, tiles.m_tile, n_tile, row0, 0, [&] { return lane; }, smem.amax());
  }
}

template <class Shape>
struct Compute {
  const GemmParams& p;
  const ParallelKStorage<Shape>& smem;
  __device__ __forceinline__ void operator()(int warp, int lane) const {
    if (warp < Shape::kAddWarps)
      add<Shape>(p, smem, warp, lane);
    else
      multiply<Shape>(p, smem, warp - Shape::kAddWarps, lane);
  }
};

#endif

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_parallel_k(const __grid_constant__ TensorMaps maps, const __grid_constant__ GemmParams p) {
#ifndef MXFP4_MOE_MMA_TAKES_SCALES
  extern __shared__ __align__(1024) uint8_t dynamic_smem[];
  const ParallelKStorage<Shape> smem{{dynamic_smem}};
  run_block<Shape, ScaledActLoads<Shape>>(maps, p, smem, Compute<Shape>{p, smem});
#endif
}

template <class Tile>
constexpr auto kernel_of(ParallelKShape<Tile>*) {
  return grouped_gemm_parallel_k<ParallelKShape<Tile>>;
}

}  // namespace mxfp4_moe
