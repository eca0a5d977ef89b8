// From shared memory to registers, as the warp-level MMAs want their operands.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// kCount 8x16-byte matrices; lane l names row l % 8 of matrix l / 8. Thread t of a quad gets bytes 4t..4t+3 of its row.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t* r, const uint8_t* row) {
  const auto& source = *reinterpret_cast<const cute::uint128_t*>(row);
  if constexpr (kCount == 4) {
    cute::SM75_U32x4_LDSM_N::copy(source, r[0], r[1], r[2], r[3]);
  } else if constexpr (kCount == 2) {
    cute::SM75_U32x2_LDSM_N::copy(source, r[0], r[1]);
  } else {
    static_assert(kCount == 1);
    cute::SM75_U32x1_LDSM_N::copy(source, r[0]);
  }
}

// TMA's swizzles of rows of 128 and of 64 bytes: 16-byte chunk c of row r sits where 8 consecutive rows hit all banks
// once. Rows of fragments start at multiples of 8, so moving to another chunk flips bits of the offset:
// offset ^ (delta << 4).
template <int kRowBytes = kActRowBytes>
__device__ __forceinline__ uint32_t act_chunk(int row, int chunk) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return row * kRowBytes + ((chunk ^ (kRowBytes == 128 ? row & 7 : row >> 1 & 3)) << 4);
}

// kCount consecutive 32-bit words of shared memory in one load.
template <int kCount>
__device__ __forceinline__ void load_words(uint32_t* r, const uint8_t* from) {
  if constexpr (kCount == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  } else if constexpr (kCount == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    r[0] = v.x, r[1] = v.y;
  } else {
    static_assert(kCount == 1);
    r[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

}  // namespace mxfp4_moe
