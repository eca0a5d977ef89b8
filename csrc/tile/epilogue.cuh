// What follows the main loop: accumulators to memory, as sums (here) or as GEMM1's activation (swiglu_epilogue.cuh),
// and the walk over a block's output tiles around both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tile/factors.cuh"
#include "tile/lane_maps.cuh"
#include "tile/pipeline.cuh"
#include "tile/swiglu_epilogue.cuh"

namespace mxfp4_moe {

__device__ __forceinline__ uint32_t pack_pair(float lo, float hi, int32_t out_type) {
  if (out_type == MXFP4_MOE_OUT_BFLOAT16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// acc -> out for one warp; (m0, n0) is the warp's place in the physical tile.
template <class Shape>
__device__ __forceinline__ void store_sums(const float (&acc)[Shape::kFragM][Shape::kFragN][4], const GemmParams& p,
                                           const Mxfp4MoeMTile& m_tile, int tile_n0, int m0, int n0, int lane) {
  const int rows = m_tile.row_end - m_tile.row_begin;
  const auto element = [&](int row, int col) { return static_cast<int64_t>(m_tile.row_begin + row) * p.n + col; };
#pragma unroll
  for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // rows g and g + 8 of the fragment
        const float lo = acc[i][j][h * 2], hi = acc[i][j][h * 2 + 1];
        const int phys_m = m0 + i * 16 + c_row(lane, h * 2), phys_n = n0 + j * 8 + c_col(lane, 0);
        if constexpr (!Shape::kSwap) {
          const int row = phys_m, col = tile_n0 + phys_n;
          if (row >= rows || col >= p.n) continue;
          if (p.out_type == MXFP4_MOE_OUT_FLOAT32) {
            *reinterpret_cast<float2*>(static_cast<float*>(p.out) + element(row, col)) = make_float2(lo, hi);
          } else {
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + element(row, col)) =
                pack_pair(lo, hi, p.out_type);
          }
        } else if (p.out_type == MXFP4_MOE_OUT_FLOAT32) {
          const int row = phys_n, col = tile_n0 + phys_m;
          if (col >= p.n) continue;
          if (row < rows) static_cast<float*>(p.out)[element(row, col)] = lo;
          if (row + 1 < rows) static_cast<float*>(p.out)[element(row + 1, col)] = hi;
        } else {
          const uint32_t pair = transpose_8x8(pack_pair(lo, hi, p.out_type));
          const int row = n0 + j * 8 + lane / 4, col = tile_n0 + m0 + i * 16 + h * 8 + c_col(lane, 0);
          if (row >= rows || col >= p.n) continue;
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + element(row, col)) = pair;
        }
      }
    }
  }
}

// acc to where the call wants it, for one warp at (m0, n0) of the physical tile n_tile of an m-tile. lane() is this
// thread's in the warp.
template <class Shape, class Lane, class Bias>
__device__ __forceinline__ void store_tile(float (&acc)[Shape::kFragM][Shape::kFragN][4], const GemmParams& p,
                                           const Mxfp4MoeMTile& m_tile, int n_tile, int m0, int n0, const Lane& lane,
                                           uint32_t* amax, const Bias& bias) {
  if constexpr (Shape::kActivates) {
    if (p.activate.rows != nullptr) {
      store_activated<Shape>(acc, p.activate, m_tile, p.rows, p.n, n_tile * Shape::N, m0, n0, lane(), amax, bias);
      return;
    }
  }
  store_sums<Shape>(acc, p, m_tile, n_tile * Shape::N, m0, n0, lane());
}

template <class Shape>
__device__ __forceinline__ void multiply_accumulators(float (&acc)[Shape::kFragM][Shape::kFragN][4], float unit) {
#pragma unroll
  for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) acc[i][j][x] *= unit;
    }
  }
}

// A warp's place in the physical tile.
template <class Shape>
__device__ int warp_m0(int warp) {
  return warp / Shape::kWarpsN * Shape::kWarpM;
}
template <class Shape>
__device__ int warp_n0(int warp) {
  return warp % Shape::kWarpsN * Shape::kWarpN;
}

// What the computing warps of a block do (run_block): for each of its output tiles zeros, to which a Sum adds the tile,
// and those, times Sum::kUnit, to memory. Where accumulators leave no registers for it (kKeepsNothing), what the main
// loop does not need is read and computed anew for each tile.
template <class Shape, class Sum>
struct OutputTiles {
  const GemmParams& p;
  const SharedStorage<Shape>& smem;

  __device__ __forceinline__ void operator()(int warp, int lane) const {
    const int kept_n_tiles = ceil_div(p.n, Shape::N);
    const auto num_n_tiles = [&] { return Shape::kReadsHalves ? ceil_div(p.n, Shape::N) : kept_n_tiles; };
    const int num_tiles = Shape::kKeepsNothing ? 0 : uniform(load_num_m_tiles(p)) * num_n_tiles();
    const auto is_tile = [&](int tile) {
      return tile < (Shape::kKeepsNothing ? uniform(load_num_m_tiles(p)) * ceil_div(p.n, Shape::N) : num_tiles);
    };
    const Sum sum(p, smem, warp, lane);
    Ring<Shape::kStages> ring;
    for (int tile = blockIdx.x; is_tile(tile); tile += gridDim.x) {
      float acc[Shape::kFragM][Shape::kFragN][4] = {};
      sum(acc, ring, tile_coord(tile, num_n_tiles()));
      if constexpr (Sum::kUnit != 1.f) multiply_accumulators<Shape>(acc, Sum::kUnit);
      const TileCoord done = tile_coord(computed_anew(tile), num_n_tiles());
      const Mxfp4MoeMTile m_tile = load_m_tile(p.m_tiles + done.m);
      const int same_warp = uniform(warp_id());
      if constexpr (Shape::kHasFactors)
        multiply_factors<Shape>(acc, p.factors, m_tile, done.n * Shape::N, warp_m0<Shape>(same_warp),
                                warp_n0<Shape>(same_warp), lane_id());
      store_tile<Shape>(acc, p, m_tile, done.n, warp_m0<Shape>(same_warp), warp_n0<Shape>(same_warp), lane_id,
                        smem.amax(), BiasOnDemand());
    }
  }
};

}  // namespace mxfp4_moe
