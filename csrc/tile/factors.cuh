// What sums that have factors (NVFP4's, and MXFP4's by fp16 rows) are multiplied by before anything else is done with
// them (tile_abi.h, Mxfp4MoeFactors): one factor for each output, the product of the weight's and the row's, rounded to
// fp32 once, and the product with the sum once more. reference/fp4.py has the same.
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
  constexpr bool kOfRows = Shape::kFolds || Shape::kActFormat == MXFP4_MOE_ACT_NVFP4;  // others have none
  // Of each 16 weight rows the second 8 have the other factor; `eighth` counts eights.
  const auto of_eighth = [&](int eighth) { return eighth % 2 == 0 ? of_weights.x : of_weights.y; };
  // Row by row, so that a row's factor is in a register no longer than it is used.
  constexpr int kActFrags = Shape::kSwap ? Shape::kFragN : Shape::kFragM;
  constexpr int kWeightFrags = Shape::kSwap ? Shape::kFragM : Shape::kFragN;
  const auto multiply = [&](const auto& of_row) {
#pragma unroll
    for (int f = 0; f < kActFrags; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float own = of_row(Shape::kSwap ? n0 + f * 8 + c_col(lane, r) : m0 + f * 16 + c_row(lane, 2 * r));
#pragma unroll
        for (int w = 0; w < kWeightFrags; ++w) {
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            float& sum = Shape::kSwap ? acc[w][f][2 * o + r] : acc[f][w][2 * r + o];
            const int eighth = Shape::kSwap ? o : (tile_n0 + n0) / 8 + w;
            sum = __fmul_rn(sum, __fmul_rn(own, of_eighth(eighth)));
          }
        }
      }
    }
  };
  if (kOfRows && factors.of_rows != nullptr) {
    // Of an activation row of the tile; those that the tile has not are stored nowhere. Written by the kernel before.
    const float* of_rows = factors.of_rows + m_tile.row_begin;
    multiply([&](int row) { return row < rows ? __ldcg(of_rows + row) : 1.f; });
  } else {
    const float of_input = !kOfRows || factors.of_inputs == nullptr ? 1.f : __ldg(factors.of_inputs + m_tile.expert);
    multiply([&](int) { return of_input; });
  }
}

}  // namespace mxfp4_moe
