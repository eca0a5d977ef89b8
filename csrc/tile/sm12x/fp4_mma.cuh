// SM12x's block-scaled MMAs of FP4 by FP4, D[16,8] += A[16,64] . B[8,64]^T with a scale for each 32 or 16 k of a row:
// mma.sync.kind::mxf4.block_scale.scale_vec::2X.m16n8k64 with E8M0 scales and kind::mxf4nvf4.block_scale.scale_vec::4X
// with E4M3 ones (PTX ISA, "Warp level block scaling"). Twice the rate of sm12x/mma.cuh's.
//
// Registers are packed codes, eight k each, the lowest in the lowest bits (lane_maps.cuh); scale words come from the
// lanes from which sm12x/mma.cuh's does. Of an E8M0 word the selector picks a half, bytes 0 and 1 or 2 and 3, for k = 0
// .. 31 and 32 .. 63; an E4M3 word is taken whole.
#pragma once

#include "tile/lane_maps.cuh"
#ifdef MXFP4_MOE_EMULATES_SM12X
#include "tile/sm12x/emulated_fp4_mma.cuh"
#endif

namespace mxfp4_moe {

struct Fp4A {
  uint32_t lo, hi, lo_far, hi_far;  // rows g and g + 8 of k = 0 .. 31, and of 32 .. 63
};
struct Fp4B {
  uint32_t near, far;  // k = 0 .. 31, and 32 .. 63
};

// `half`, a constant, is which half of E8M0 words is meant.
template <bool kNvfp4, class Half>
__device__ __forceinline__ void fp4_mma(float (&d)[4], const Fp4A& a, const Fp4B& b, uint32_t scales_a,
                                        uint32_t scales_b, Half) {
#ifdef MXFP4_MOE_EMULATES_SM12X
  const uint4 sums = emulated::fp4_mma<kNvfp4>(
      make_uint4(__float_as_uint(d[0]), __float_as_uint(d[1]), __float_as_uint(d[2]), __float_as_uint(d[3])),
      make_uint4(a.lo, a.hi, a.lo_far, a.hi_far), make_uint2(b.near, b.far), scales_a, scales_b,
      kNvfp4 ? 0 : 2 * Half::value);
  d[0] = __uint_as_float(sums.x), d[1] = __uint_as_float(sums.y);
  d[2] = __uint_as_float(sums.z), d[3] = __uint_as_float(sums.w);
#else
#define MXFP4_MOE_FP4_MMA(KIND, SCALES, BYTE)                                                                \
  asm volatile("mma.sync.aligned.kind::" KIND ".m16n8k64.row.col.f32.e2m1.e2m1.f32." SCALES                  \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {%12,%13}, %11, {%12,%13};"      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
               : "r"(a.lo), "r"(a.hi), "r"(a.lo_far), "r"(a.hi_far), "r"(b.near), "r"(b.far), "r"(scales_a), \
                 "r"(scales_b), "n"(BYTE), "n"(0))
  if constexpr (kNvfp4) {
    MXFP4_MOE_FP4_MMA("mxf4nvf4.block_scale.scale_vec::4X", "ue4m3", 0);
  } else {
    MXFP4_MOE_FP4_MMA("mxf4.block_scale.scale_vec::2X", "ue8m0", 2 * Half::value);
  }
#undef MXFP4_MOE_FP4_MMA
#endif
}

}  // namespace mxfp4_moe
