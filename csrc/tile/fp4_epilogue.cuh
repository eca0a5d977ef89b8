// The end of GEMM1's epilogue (swiglu_epilogue.cuh) where GEMM2 reads MXFP4 or NVFP4 rows: activations in registers to
// packed codes [rows, intermediate / 2] E2M1, low nibble = even k, and their scales (tile_abi.h); the arithmetic is
// shared/fp4.cuh. NVFP4 rows are under their expert's global scale.
//
// A block is 32 or 16 outputs, 64 or 32 weight rows: of two or four warps, one, or half of one. Warps that share a
// block leave the largest magnitude of their part of a row in shared memory and meet once; others need neither.
// Weights are the MMA's A in every tile that activates FP4, so lane 4g + t has output g of rows 2t and 2t + 1. Codes
// leave as words of the eight outputs of a group: four groups' codes are 16 bits for each row, an 8x8 transpose brings
// a row's outputs 2t and 2t + 1 together, and a quad transposes the rest.
#pragma once

#include "shared/fp4.cuh"
#include "shared/scale_layout.cuh"
#include "tile/lane_exchange.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

template <class Shape>
struct Fp4Blocks {
  static constexpr bool kNvfp4 = Shape::kActFormat == MXFP4_MOE_ACT_NVFP4;
  static constexpr int kOuts = kNvfp4 ? 16 : 32, kWeightRows = 2 * kOuts;
  static constexpr int kOfWarp = Shape::kWarpWeightRows > kWeightRows ? Shape::kWarpWeightRows / kWeightRows : 1;
  static constexpr int kWarps = Shape::kWarpWeightRows < kWeightRows ? kWeightRows / Shape::kWarpWeightRows : 1;
  static constexpr int kOfTile = 128 / kOuts;  // of a K tile of GEMM2, whose scale words are whole
};

// Eight 4-bit codes of two outputs of four groups, the one output's in the low half as groups 0, 2, 1, 3, to a byte for
// each group with the first output's code in the low nibble.
__device__ __forceinline__ uint32_t pair_codes(uint32_t codes) {
  const auto spread = [](uint32_t half) { return (half | half << 12) & 0x0f0f0f0fu; };
  return spread(codes & 0xffffu) | spread(codes >> 16) << 4;
}

// Activations -> codes and scales, for one warp at (m0, n0) of the physical tile; amax is the tile's shared table
// [parts][M]. value(q, f, r): this lane's output of group q, of row r of fragment f (swiglu_epilogue.cuh).
// All MMA warps call it.
template <class Shape, class Value>
__device__ __forceinline__ void store_fp4(const Value& value, const Mxfp4MoeActivate& a, const Mxfp4MoeMTile& m_tile,
                                          int rows, int n, int tile_n0, int m0, int n0, int lane, uint32_t* amax) {
  using Blocks = Fp4Blocks<Shape>;
  static_assert(Shape::kSwap, "FP4 weights are the MMA's A");
  constexpr int kGroups = Shape::kFragM, kGroupsPerBlock = kGroups / Blocks::kOfWarp, kActFrags = Shape::kFragN;
  const int g = lane / 4, t = lane % 4;
  const int part = m0 / Shape::kWarpWeightRows, col0 = tile_n0 + m0;
  const int valid = m_tile.row_end - m_tile.row_begin, intermediate = n / 2;
  const auto act_row = [&](int f, int r) { return n0 + f * 8 + 2 * t + r; };
  const bool leads = g == 0;  // of the lanes that have the same rows

  uint32_t largest[kActFrags][2][Blocks::kOfWarp];
#pragma unroll
  for (int f = 0; f < kActFrags; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int b = 0; b < Blocks::kOfWarp; ++b) {
        uint32_t of_lane = 0;
#pragma unroll
        for (int q = b * kGroupsPerBlock; q < (b + 1) * kGroupsPerBlock; ++q)
          of_lane = max(of_lane, magnitude(value(q, f, r)));
        largest[f][r][b] = max_over_lanes<4, 3>(of_lane);
      }
    }
  }
  if constexpr (Blocks::kWarps > 1) {
    const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(Shape::kMmaWarps * 32) : "memory"); };
    const int first_part = part / Blocks::kWarps * Blocks::kWarps;
    sync();  // all have read the table of the output tile before
#pragma unroll
    for (int f = 0; f < kActFrags; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (leads) amax[part * Shape::M + act_row(f, r)] = largest[f][r][0];
      }
    }
    sync();
#pragma unroll
    for (int f = 0; f < kActFrags; ++f) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < Blocks::kWarps; ++i)
          largest[f][r][0] = max(largest[f][r][0], amax[(first_part + i) * Shape::M + act_row(f, r)]);
      }
    }
  }
  if (col0 >= n) return;  // the whole warp: n is whole blocks

  constexpr float kPoison = -1.f;  // a multiplier is not below 0
  float multiplier[kActFrags][2][Blocks::kOfWarp];
  const float global = Blocks::kNvfp4 ? __ldg(a.global_scales + m_tile.expert) : 1.f;
  const float inverse = __frcp_rn(global);
  const int block0 = col0 / Blocks::kWeightRows, last_block = intermediate / Blocks::kOuts - 1;
  const bool writes_scales = leads && part % Blocks::kWarps == 0;
#pragma unroll
  for (int f = 0; f < kActFrags; ++f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = act_row(f, r);
#pragma unroll
      for (int b = 0; b < Blocks::kOfWarp; ++b) {
        const uint32_t of_block = largest[f][r][b];
        const uint32_t scale = Blocks::kNvfp4 ? nvfp4_scale(of_block, global) : mxfp4_scale(of_block);
        multiplier[f][r][b] = of_block >= kFloatInfBits ? kPoison
                              : Blocks::kNvfp4          ? nvfp4_multiplier(of_block, scale, inverse)
                                                        : mxfp4_multiplier(scale);
        if (writes_scales && row < valid) {
          const auto at = [&](int block) { return a.scales + act_scale_offset(m_tile.row_begin + row, block, rows); };
          *at(block0 + b) = static_cast<uint8_t>(scale);
          if (block0 + b == last_block)  // the words' bytes past K are zero
            for (int pad = last_block + 1; pad % Blocks::kOfTile != 0; ++pad) *at(pad) = 0;
        }
      }
    }
  }

  const auto scaled = [&](int q, int f, int r) {
    const float by = multiplier[f][r][q / kGroupsPerBlock];
    return by < 0.f ? 0.f : __fmul_rn(value(q, f, r), by);
  };
  // Four of the fragments' groups at a time; what is beyond the last is zero and stored nowhere.
  constexpr int kCells = kActFrags * kGroups;
#pragma unroll
  for (int first = 0; first < kCells; first += 4) {
    float x[8];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int cell = first + c;
        x[r * 4 + c % 2 * 2 + c / 2] = cell < kCells ? scaled(cell % kGroups, cell / kGroups, r) : 0.f;
      }
    }
    const uint32_t word = transpose_bytes<1>(pair_codes(transpose_8x8(encode8_e2m1(x))), t);
    const int cell = first + t, row = n0 + cell / kGroups * 8 + g;
    if (cell < kCells && row < valid)
      *reinterpret_cast<uint32_t*>(a.rows + static_cast<int64_t>(m_tile.row_begin + row) * (intermediate / 2) +
                                   col0 / 4 + cell % kGroups * 4) = word;
  }
}

}  // namespace mxfp4_moe
