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

}  // namespace mxfp4_moe
