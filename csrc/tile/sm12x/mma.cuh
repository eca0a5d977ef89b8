// SM12x's block-scaled MMA, D[16,8] += (A[16,32] . B[8,32]^T) * 2^(scale_a[row] - 127) * 2^(scale_b[col] - 127):
// mma.sync.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32 (PTX ISA, "Warp level block scaling"), on 8-bit containers
// (E2M1 in bits 5..2), or, in a development build for tests, the same computed on SM90 (emulated_mma.cuh).
//
// Registers (lane_maps.cuh): activations as ldmatrix brings them, one 32-bit word of eight FP4 codes per lane, row and
// step, and per K tile one 32-bit word of four E8M0 scales in the lanes from which the instruction reads them with
// thread selector 0: A's row g from lane 4g, row g+8 from lane 4g+1, B's column g from lane 4g. The selector picks the
// word's scale, 0 to 3; it must be a constant (Constant): one known only at run time costs a loop around every MMA.
#pragma once

#include "tile/lane_maps.cuh"
#ifdef MXFP4_MOE_EMULATES_SM12X
#include "tile/sm12x/emulated_mma.cuh"
#endif

namespace mxfp4_moe {

// Containers of the even k and of the odd k.
struct Fragment {
  uint32_t even, odd;
};
__device__ __forceinline__ Fragment expand_act(uint32_t even, uint32_t odd) { return {even, odd}; }
// Word order `containers`: nibbles k = 8t .. 8t + 7, low one first, rotated left by 2.
__device__ __forceinline__ Fragment expand_weight(uint32_t w) {
  return {w & 0x3C3C3C3Cu, __funnelshift_r(w, w, 4) & 0x3C3C3C3Cu};
}

template <Fp4Operand kFp4, class Selector>
__device__ __forceinline__ void mx_mma(float (&d)[4], const Fragment& a_lo, const Fragment& a_hi, const Fragment& b,
                                       uint32_t scales_a, uint32_t scales_b, Selector) {
#ifdef MXFP4_MOE_EMULATES_SM12X
  constexpr bool kFp4A = kFp4 == Fp4Operand::kA;
  constexpr auto kFp4Code = emulated::Code::kE2m1, kFp8Code = emulated::Code::kE4m3;
  const uint4 sums = emulated::mma<kFp4A ? kFp4Code : kFp8Code, kFp4A ? kFp8Code : kFp4Code>(
      make_uint4(__float_as_uint(d[0]), __float_as_uint(d[1]), __float_as_uint(d[2]), __float_as_uint(d[3])),
      make_uint4(a_lo.even, a_hi.even, a_lo.odd, a_hi.odd), b.even, b.odd, scales_a, scales_b, Selector::value);
  d[0] = __uint_as_float(sums.x), d[1] = __uint_as_float(sums.y);
  d[2] = __uint_as_float(sums.z), d[3] = __uint_as_float(sums.w);
#else
#define MXFP4_MOE_MX_MMA(TYPES)                                                                                        \
  asm volatile("mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32." TYPES                 \
               ".f32.ue8m0 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {%12,%13}, %11, {%12,%13};"      \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
               : "r"(a_lo.even), "r"(a_hi.even), "r"(a_lo.odd), "r"(a_hi.odd), "r"(b.even), "r"(b.odd), "r"(scales_a), \
                 "r"(scales_b), "n"(Selector::value), "n"(0))
  if constexpr (kFp4 == Fp4Operand::kA) {
    MXFP4_MOE_MX_MMA("e2m1.e4m3");
  } else {
    MXFP4_MOE_MX_MMA("e4m3.e2m1");
  }
#undef MXFP4_MOE_MX_MMA
#endif
}

}  // namespace mxfp4_moe
