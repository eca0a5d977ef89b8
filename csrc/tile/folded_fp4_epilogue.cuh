// The end of GEMM1's epilogue (swiglu_epilogue.cuh) where activations are quantized to MXFP4 or NVFP4 and GEMM2 reads
// their values in bf16 (shared/folded_fp4.cuh): SM90's. NVFP4 rows are under their expert's global scale.
//
// Weights are the MMA's A, so lane 4g + t has output g of rows 2t and 2t + 1 of each group of 8 outputs, which are 16
// weight rows.
// A block is 32 outputs or, of NVFP4, 16: it lies in four or two warps of one group, in two of two, or in one. Warps
// that share a block leave the largest magnitude of their part of a row in shared memory; NVFP4's two do so in turns,
// in one place, because a table of all would cost the largest tile a pipeline stage.
#pragma once

#include "shared/folded_fp4.cuh"
#include "tile/lane_exchange.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

template <class Shape>
struct FoldedBlocks {
  static constexpr bool kNvfp4 = Shape::kWeightFormat == MXFP4_MOE_WEIGHT_NVFP4;
  static constexpr int kGroups = kNvfp4 ? 2 : 4;  // of a block
  static constexpr int kGroupsOfWarp = Shape::kWarpWeightRows / 16;
  static constexpr int kWarps = kGroups > kGroupsOfWarp ? kGroups / kGroupsOfWarp : 1;
};

// Whether GEMM1's epilogue, which is to quantize, quantizes to FP4.
template <class Shape>
__device__ __forceinline__ bool folds_fp4(const Mxfp4MoeActivate& a) {
  return FoldedBlocks<Shape>::kNvfp4 || a.format == MXFP4_MOE_ACT_MXFP4;
}

// Activations -> bf16 rows, for one warp at (m0, n0) of the physical tile; amax is the tile's shared table [parts][M].
// value(q, f, r): this lane's output of group q, of row r of fragment f; store(f, q, pair) writes both rows' bf16.
// All MMA warps call it.
template <class Shape, class Value, class Store>
__device__ __forceinline__ void store_folded_fp4(const Value& value, const Store& store, const Mxfp4MoeActivate& a,
                                                 const Mxfp4MoeMTile& m_tile, int m0, int n0, int lane,
                                                 uint32_t* amax) {
  using Blocks = FoldedBlocks<Shape>;
  static_assert(Shape::kSwap, "weights are the MMA's A");
  constexpr int kGroups = Blocks::kGroupsOfWarp, kOfBlock = min_of(Blocks::kGroups, kGroups);
  const int part = m0 / Shape::kWarpWeightRows, valid = m_tile.row_end - m_tile.row_begin;
  const bool leads = lane / 4 == 0;  // of the lanes that have the same rows
  const auto act_row = [&](int f, int r) { return n0 + f * 8 + 2 * (lane % 4) + r; };
  const auto for_each_fragment = [&](const auto& of_fragment) {
#pragma unroll
    for (int f = 0; f < Shape::kFragN; ++f) {
      if (f * 8 < valid) of_fragment(f);
    }
  };
  // Of this warp's part of a block.
  const auto largest_of = [&](int f, int r, int first) {
    uint32_t largest = 0;
#pragma unroll
    for (int q = 0; q < kOfBlock; ++q) largest = max(largest, magnitude(value(first + q, f, r)));
    return max_over_lanes<4, 3>(largest);
  };

  if constexpr (Blocks::kWarps > 1) {
    const auto sync = [&] { sync_warps_of_block<Shape>(part); };
    const auto leave = [&](int place, bool adds) {
      for_each_fragment([&](int f) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t largest = largest_of(f, r, 0);
          uint32_t& there = amax[place * Shape::M + act_row(f, r)];
          if (leads) there = adds ? max(there, largest) : largest;
        }
      });
    };
    sync();  // all have read the table of the output tile before
    if constexpr (!Blocks::kNvfp4) {
      leave(part, false);
    } else {
      static_assert(!Blocks::kNvfp4 || Blocks::kWarps == 2);
      if (part % 2 == 0) leave(part / 2, false);
      sync();
      if (part % 2 == 1) leave(part / 2, true);
    }
    sync();
  }
  const auto largest_of_block = [&](int f, int r, int first) {
    if constexpr (Blocks::kWarps == 1) {
      return largest_of(f, r, first);
    } else {
      constexpr int kPlaces = Blocks::kNvfp4 ? 1 : Blocks::kWarps;
      const uint32_t* there = amax + part / Blocks::kWarps * kPlaces * Shape::M + act_row(f, r);
      uint32_t largest = there[0];
#pragma unroll
      for (int i = 1; i < kPlaces; ++i) largest = max(largest, there[i * Shape::M]);
      return largest;
    }
  };

  const float global = Blocks::kNvfp4 ? __ldg(a.global_scales + m_tile.expert) : 1.f;
  const float inverse = __frcp_rn(global);
  for_each_fragment([&](int f) {
#pragma unroll
    for (int first = 0; first < kGroups; first += kOfBlock) {
      FoldedBlock block[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t largest = largest_of_block(f, r, first);
        block[r] = Blocks::kNvfp4 ? folded_nvfp4(largest, global, inverse) : folded_mxfp4(largest);
      }
#pragma unroll
      for (int q = first; q < first + kOfBlock; ++q)
        store(f, q, bf16_pair(folded(value(q, f, 0), block[0]), folded(value(q, f, 1), block[1])));
    }
  });
}

}  // namespace mxfp4_moe
