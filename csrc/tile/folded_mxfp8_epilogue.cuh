// The end of GEMM1's epilogue (swiglu_epilogue.cuh) where activations are quantized to MXFP8 and GEMM2 reads their
// values in bf16 (shared/bf16_rows.cuh): SM90's. Bit for bit what mx_codes and bf16_pair_of_codes make of them.
//
// Weights are the MMA's A, so lane 4g + t has output g of rows 2t and 2t + 1 of each group of 8 outputs, which are 16
// weight rows. A block is 32 outputs, four groups, in one, two or four warps, which leave theirs in shared memory.
//
// Fast because what is reduced is not a block's largest magnitude but the scale that it asks for, an exponent: two
// rows' take one register, through shuffles, shared memory and all. Blocks whose scale is not 2^-126 to 2^120, which
// are zero or tiny, huge, or have an infinity or a NaN in them, go the long way: their tile asks for the magnitudes
// themselves.
#pragma once

#include "shared/bf16_rows.cuh"
#include "tile/lane_exchange.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// The scale byte of a block from the largest magnitude() in it, plus kScaleOffset, where that is in kFirstPlainScale
// and kLastPlainScale: RN(amax * fp32(1/448)), rounded up to a power of two, is amax' exponent less 8, or less 7 where
// its mantissa is above that of 448.
constexpr uint32_t kScaleOffset = 8, kFirstPlainScale = kScaleOffset + 1, kLastPlainScale = 254;
__device__ __forceinline__ uint32_t offset_scale(uint32_t amax) { return (amax + 0x1fffffu) >> 23; }

// The larger, the smaller of each of two 16-bit numbers.
__device__ __forceinline__ uint32_t max_of_two(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.s16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t min_of_two(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.s16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Two E4M3 codes of values under scales, the first in the low byte, times the scales: in bf16.
__device__ __forceinline__ uint32_t through_codes(float low, float high, uint32_t low_scale, uint32_t high_scale) {
  const auto reciprocal = [](uint32_t scale) { return __uint_as_float(((254 + kScaleOffset) << 23) - (scale << 23)); };
  const auto unit = [](uint32_t scale) { return __uint_as_float((scale << 23) - (kScaleOffset << 23)); };
  const uint32_t codes = __nv_cvt_float2_to_fp8x2(
      make_float2(low * reciprocal(low_scale), high * reciprocal(high_scale)), __NV_SATFINITE, __NV_E4M3);
  return bf16_pair_of_codes(codes, unit(low_scale), unit(high_scale));
}

// Activations -> bf16 rows, for one warp at (m0, n0) of the physical tile; table is the tile's, [parts][M] words.
// value(q, f, r): this lane's output of group q, of row r of fragment f; store(f, q, pair) writes both rows' bf16.
// All MMA warps call it.
template <class Shape, class Value, class Store>
__device__ __forceinline__ void store_folded_mxfp8(const Value& value, const Store& store, const Mxfp4MoeMTile& m_tile,
                                                   int m0, int n0, int lane, uint32_t* table) {
  static_assert(Shape::kSwap, "weights are the MMA's A");
  constexpr int kGroups = Shape::kWarpWeightRows / 16, kWarps = 64 / Shape::kWarpWeightRows;
  constexpr int kFrags = Shape::kFragN;
  const int part = m0 / Shape::kWarpWeightRows, valid = m_tile.row_end - m_tile.row_begin;
  const int first_part = part / kWarps * kWarps, t = lane % 4;
  const bool leads = lane / 4 == 0;  // of the lanes that have the same rows
  const auto for_each_fragment = [&](const auto& of_fragment) {
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
      if (f * 8 < valid) of_fragment(f);
    }
  };
  const auto largest_of = [&](int f, int r) {
    uint32_t largest = 0;
#pragma unroll
    for (int q = 0; q < kGroups; ++q) largest = max(largest, magnitude(value(q, f, r)));
    return largest;
  };
  const auto sync = [&] { sync_warps_of_block<Shape>(part); };

  // Both rows' scales of a fragment: of this warp's part of the block, and of the block. The parts of a block are side
  // by side, where its magnitudes would be: other blocks' warps may be on the long way.
  uint32_t* const parts = table + first_part * Shape::M + t * kWarps;
  const auto scales_of_part = [&](int f) {
    uint32_t both = offset_scale(largest_of(f, 0)) | offset_scale(largest_of(f, 1)) << 16;
#pragma unroll
    for (int b = 4; b < 32; b *= 2) both = max_of_two(both, __shfl_xor_sync(~0u, both, b));
    return both;
  };
  const auto scales_of_block = [&](int f) {
    if constexpr (kWarps == 4) {
      const uint4 all = *reinterpret_cast<const uint4*>(parts + f * 4 * kWarps);
      return max_of_two(max_of_two(all.x, all.y), max_of_two(all.z, all.w));
    } else if constexpr (kWarps == 2) {
      const uint2 all = *reinterpret_cast<const uint2*>(parts + f * 4 * kWarps);
      return max_of_two(all.x, all.y);
    } else {
      return parts[f * 4];
    }
  };
  sync();  // all have read the table of the output tile before
  for_each_fragment([&](int f) {
    const uint32_t both = scales_of_part(f);
    if (leads) parts[f * 4 * kWarps + part % kWarps] = both;
  });
  sync();
  uint32_t least = 0x7fff7fffu, most = 0;
  for_each_fragment([&](int f) {
    const uint32_t both = scales_of_block(f);
    least = min_of_two(least, both);
    most = max_of_two(most, both);
  });
  const bool is_plain =
      min(least & 0xffff, least >> 16) >= kFirstPlainScale && max(most & 0xffff, most >> 16) <= kLastPlainScale;
  if (__all_sync(~0u, is_plain)) {  // the same for all warps of a block
    for_each_fragment([&](int f) {
      const uint32_t both = scales_of_block(f);
#pragma unroll
      for (int q = 0; q < kGroups; ++q)
        store(f, q, through_codes(value(q, f, 0), value(q, f, 1), both & 0xffff, both >> 16));
    });
    return;
  }

  // The long way.
  const auto act_row = [&](int f, int r) { return n0 + f * 8 + 2 * t + r; };
  sync();  // all have read the scales
  for_each_fragment([&](int f) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t largest = max_over_lanes<4, 3>(largest_of(f, r));
      if (leads) table[part * Shape::M + act_row(f, r)] = largest;
    }
  });
  sync();
  for_each_fragment([&](int f) {
    uint32_t largest[2], scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) largest[r] = max(largest[r], table[(first_part + i) * Shape::M + act_row(f, r)]);
      scale[r] = mx_scale(largest[r]);
    }
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      uint32_t codes = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        codes |= (mx_codes(largest[r], scale[r], value(q, f, r), 0.f, 0.f, 0.f) & 0xff) << (8 * r);
      store(f, q, bf16_pair_of_codes(codes, e8m0_value(scale[0]), e8m0_value(scale[1])));
    }
  });
}

}  // namespace mxfp4_moe
