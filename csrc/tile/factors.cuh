// What the sums of NVFP4 operands are multiplied by before anything else is done with them (tile_abi.h,
// Mxfp4MoeFactors): one factor for each output, the product of the weight's and the row's, rounded to fp32 once, and the
// product with the sum once more. reference/fp4.py has the same.
#pragma once

#include "tile/lane_maps.cuh"
#include "tile/pipeline.cuh"

namespace mxfp4_moe {

// acc *= factor, for one warp at (m0, n0) of the physical tile whose weight rows begin at tile_n0.
template <class Shape>
__device__ __forceinline__ void multiply_factors(float (&acc)[Shape::kFragM][Shape::kFragN][4],
                                                 const Mxfp4MoeFactors& factors, const Mxfp4MoeMTile& m_tile,
                                                 int tile_n0, int m0, int n0, int lane) {
  const int rows = m_tile.row_end - m_tile.row_begin;
  const float2 of_weights = __ldg(reinterpret_cast<const float2*>(factors.of_weights) + m_tile.expert);
  constexpr bool kOfRows = Shape::kActFormat == MXFP4_MOE_ACT_NVFP4;  // others have none
  const float of_input = !kOfRows || factors.of_inputs == nullptr ? 1.f : __ldg(factors.of_inputs + m_tile.expert);
  // Of an activation row of the tile; those that the tile has not are stored nowhere. Written by the kernel before.
  const auto of_row = [&](int row) {
    return !kOfRows || factors.of_rows == nullptr || row >= rows ? of_input
                                                                 : __ldcg(factors.of_rows + m_tile.row_begin + row);
  };
  // Of each 16 weight rows the second 8 have the other factor; `eighth` counts eights.
  const auto of_eighth = [&](int eighth) { return eighth % 2 == 0 ? of_weights.x : of_weights.y; };
#pragma unroll
  for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int phys_m = m0 + i * 16 + c_row(lane, x), phys_n = n0 + j * 8 + c_col(lane, x);
        const int eighth = Shape::kSwap ? x / 2 : (tile_n0 + n0) / 8 + j;
        const float factor = __fmul_rn(of_row(Shape::kSwap ? phys_n : phys_m), of_eighth(eighth));
        acc[i][j][x] = __fmul_rn(acc[i][j][x], factor);
      }
    }
  }
}

}  // namespace mxfp4_moe
