// What lanes of a warp pass to each other behind the main loop, so that values leave in words: transposes and maxima.
// All 32 lanes call these.
#pragma once

#include <stdint.h>

namespace mxfp4_moe {

// Lanes l, l + kStride, l + 2 kStride, l + 3 kStride (their number: `part`) hold four bytes each; afterwards lane
// number p holds byte p of all four.
template <int kStride>
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t bytes, int part) {
  const uint32_t other = __shfl_xor_sync(~0u, bytes, kStride);
  const uint32_t pairs = __byte_perm(bytes, other, part & 1 ? 0x3715 : 0x6240);
  const uint32_t far = __shfl_xor_sync(~0u, pairs, 2 * kStride);
  return __byte_perm(pairs, far, part & 2 ? 0x3276 : 0x5410);
}

// Exchanges the rows and columns of an 8x8 matrix of 16-bit values held two to a lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
  return r;
}

// The maximum over the lanes that differ from this one in kBits bits from kStride on.
template <int kStride, int kBits>
__device__ __forceinline__ uint32_t max_over_lanes(uint32_t x) {
#pragma unroll
  for (int b = 0; b < kBits; ++b) x = max(x, __shfl_xor_sync(~0u, x, kStride << b));
  return x;
}

// Waits for the warps that share a block of 32 outputs with this one, which has its part number `part` of the weight
// rows. Where a tile's warps walk from tile to tile on their own (bf16/passed_tiles.cuh), for no others.
template <class Shape>
__device__ __forceinline__ void sync_warps_of_block(int part) {
  if constexpr (!Shape::kPassesTiles) {
    asm volatile("bar.sync 1, %0;" ::"n"(Shape::kMmaWarps * 32) : "memory");
  } else {
    constexpr int kWarps = 64 / Shape::kWarpWeightRows, kBlocks = Shape::N / 64;
    static_assert(kBlocks <= 4);
    const int block = part / kWarps;
    // Constants: with a number in a register, a block takes all 16 barriers, of which an SM has 64.
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else if (kBlocks == 1 || block == 0) {
      asm volatile("bar.sync 1, %0;" ::"n"(kWarps * 32) : "memory");
    } else if (kBlocks == 2 || block == 1) {
      asm volatile("bar.sync 2, %0;" ::"n"(kWarps * 32) : "memory");
    } else if (block == 2) {
      asm volatile("bar.sync 3, %0;" ::"n"(kWarps * 32) : "memory");
    } else {
      asm volatile("bar.sync 4, %0;" ::"n"(kWarps * 32) : "memory");
    }
  }
}

}  // namespace mxfp4_moe
