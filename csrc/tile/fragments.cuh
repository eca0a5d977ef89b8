// From shared memory to registers, as the warp-level MMAs want their operands.
#pragma once

#include "tile/mbarrier.cuh"
#include "tile/tile_shape.cuh"

namespace mxfp4_moe {

// kCount 8x16-byte matrices; lane l names row l % 8 of matrix l / 8. Thread t of a quad gets bytes 4t..4t+3 of its row.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t* r, const uint8_t* row) {
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.x2.m8n8.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at));
  } else {
    static_assert(kCount == 1);
    asm volatile("ldmatrix.sync.aligned.x1.m8n8.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at));
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
