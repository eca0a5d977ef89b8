// The seam: one block-scaled MMA, D[16,8] += (A[16,32] . B[8,32]^T) * 2^(scale_a[row] - 127) * 2^(scale_b[col] - 127).
//
// SM12x executes it as one instruction, mma.sync.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32 (PTX ISA, "Warp
// level block scaling"); SM90 as an FP8 MMA into zeros, then one fp32 fma per element. Both take the same registers:
// A and B in the 8-bit containers of kind::mxf8f6f4 (E2M1 in bits 5..2), and per K tile one 32-bit word of four E8M0
// scales in the lanes from which SM12x reads them with thread selector 0: A's row g from lane 4g, row g+8 from lane
// 4g+1, B's column g from lane 4g. The selector picks the word's scale, 0 to 3. On SM12x it is a constant (cute::C):
// one known only at run time costs a loop around every MMA there.
//
// The lane maps below are what the kernel assumes; tests compare them, element by element, with CuTe's MMA_Traits of
// SM120_16x8x32_TN_VS.
#pragma once

#include <stdint.h>

#include "scale_layout.cuh"

namespace mxfp4_moe {

// Fragment maps of m16n8k32 with 8-bit operands. `byte` is the element's place in its 32-bit register.
MXFP4_MOE_HOST_DEVICE constexpr int a_row(int lane, int reg) { return lane / 4 + 8 * (reg % 2); }
MXFP4_MOE_HOST_DEVICE constexpr int a_k(int lane, int reg, int byte) { return lane % 4 * 4 + byte + 16 * (reg / 2); }
MXFP4_MOE_HOST_DEVICE constexpr int b_col(int lane) { return lane / 4; }
MXFP4_MOE_HOST_DEVICE constexpr int b_k(int lane, int reg, int byte) { return lane % 4 * 4 + byte + 16 * reg; }
MXFP4_MOE_HOST_DEVICE constexpr int c_row(int lane, int reg) { return lane / 4 + 8 * (reg / 2); }
MXFP4_MOE_HOST_DEVICE constexpr int c_col(int lane, int reg) { return lane % 4 * 2 + reg % 2; }
// The row (column) whose scale word this lane must hold; lanes that the instruction does not read hold a valid one.
MXFP4_MOE_HOST_DEVICE constexpr int scale_a_row(int lane) { return lane / 4 + 8 * (lane % 2); }
MXFP4_MOE_HOST_DEVICE constexpr int scale_b_col(int lane) { return lane / 4; }

#ifdef __CUDACC__

enum class Fp4Operand { kA, kB };

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200

constexpr bool kSelectorIsImmediate = true;

// The instruction fetches the scales from their lanes itself.
struct ScaleA {
  uint32_t word;
};
struct ScaleB {
  uint32_t word;
};
__device__ __forceinline__ ScaleA share_scale_a(uint32_t word) { return {word}; }
__device__ __forceinline__ ScaleB share_scale_b(uint32_t word) { return {word}; }

template <Fp4Operand kFp4, class Selector>
__device__ __forceinline__ void mx_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ScaleA sa,
                                       ScaleB sb, Selector) {
#define MXFP4_MOE_MX_MMA(TYPES)                                                                                   \
  asm volatile("mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32." TYPES            \
               ".f32.ue8m0 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {%12,%13}, %11, {%12,%13};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(sa.word), "r"(sb.word),    \
                 "n"(Selector::value), "n"(0))
  if constexpr (kFp4 == Fp4Operand::kA) {
    MXFP4_MOE_MX_MMA("e2m1.e4m3");
  } else {
    MXFP4_MOE_MX_MMA("e4m3.e2m1");
  }
#undef MXFP4_MOE_MX_MMA
}

#else

constexpr bool kSelectorIsImmediate = false;

// The words of the rows (columns) whose accumulators this lane holds, fetched from the lanes that SM12x reads.
struct ScaleA {
  uint32_t word[2];  // rows c_row(lane, 0) and c_row(lane, 2)
};
struct ScaleB {
  uint32_t word[2];  // columns c_col(lane, 0) and c_col(lane, 1)
};
__device__ __forceinline__ ScaleA share_scale_a(uint32_t word) {
  const int lane = threadIdx.x % 32;
  return {{__shfl_sync(~0u, word, lane / 4 * 4), __shfl_sync(~0u, word, lane / 4 * 4 + 1)}};
}
__device__ __forceinline__ ScaleB share_scale_b(uint32_t word) {
  const int lane = threadIdx.x % 32;
  return {{__shfl_sync(~0u, word, lane % 4 * 8), __shfl_sync(~0u, word, lane % 4 * 8 + 4)}};
}

// 1 in a float's exponent field. In constant memory, because ptxas turns a multiplication by a number that it knows
// into a shift, which runs on the ALU that unpacking FP4 keeps busy; multiply-adds have a pipe of their own.
static __constant__ uint32_t exponent_one = 1u << 23;

// 2^(e - 127 + kShift) of one of the word's E8M0 bytes e; e + kShift must be 1 to 254.
template <int kShift>
__device__ __forceinline__ float e8m0_to_float(uint32_t word, int byte) {
  return __uint_as_float(__byte_perm(word, 0, 0x4440 | byte) * exponent_one + kShift * (1u << 23));
}

// An E2M1 container read as E4M3 is the value times 2^-6: same sign, two exponent bits and mantissa, other bias.
__device__ __forceinline__ uint32_t e2m1_as_e4m3(uint32_t c) { return (c & 0x1C1C1C1Cu) | ((c << 2) & 0x80808080u); }

// Four E4M3 bytes as f16: r[0] the lower two, r[1] the upper two. Exact: f16 holds every E4M3 value.
__device__ __forceinline__ void e4m3_as_f16(uint32_t (&r)[2], uint32_t bytes) {
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.rn.f16x2.e4m3x2 %0, lo; cvt.rn.f16x2.e4m3x2 %1, hi; }"
      : "=r"(r[0]), "=r"(r[1])
      : "r"(bytes));
}

// d = c + a . b of m16n8k16.
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1, float c0, float c1, float c2, float c3) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// SM90 has no FP8 tensor instruction at warp level: ptxas turns mma.m16n8k32.e4m3.e4m3 into these conversions, two
// f16 MMAs and four additions of the accumulator. Written out, the additions are gone: the scaled sum does their work.
// f16 products and their fp32 sum are exact in the same cases, so the bits are those of the FP8 instruction.
template <Fp4Operand kFp4, class Selector>
__device__ __forceinline__ void mx_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ScaleA sa,
                                       ScaleB sb, Selector byte) {
  constexpr bool kFp4A = kFp4 == Fp4Operand::kA;
  uint32_t fa[4][2], fb[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) e4m3_as_f16(fa[i], kFp4A ? e2m1_as_e4m3(a[i]) : a[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) e4m3_as_f16(fb[i], kFp4A ? b[i] : e2m1_as_e4m3(b[i]));
  // A thread's four bytes of a 16-wide half block are two of its k pairs; which pairs does not matter, since A and B
  // are split alike.
  float half[4], block[4];
  mma_f16(half, fa[0][0], fa[1][0], fa[0][1], fa[1][1], fb[0][0], fb[0][1], 0.f, 0.f, 0.f, 0.f);
  mma_f16(block, fa[2][0], fa[3][0], fa[2][1], fa[3][1], fb[1][0], fb[1][1], half[0], half[1], half[2], half[3]);
  // The weights' scales are taken twice as large, so that byte 0 is a normal number too; the activations' scales, whose
  // bytes end at 248, make up for it and for the 2^6 that e2m1_as_e4m3 took.
  constexpr int kWeightShift = 1, kActShift = 6 - kWeightShift;
  float ea[2], eb[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    ea[i] = e8m0_to_float<kFp4A ? kWeightShift : kActShift>(sa.word[i], byte);
    eb[i] = e8m0_to_float<kFp4A ? kActShift : kWeightShift>(sb.word[i], byte);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = fmaf(block[i], ea[i / 2] * eb[i % 2], d[i]);
}

#endif
#endif  // __CUDACC__

}  // namespace mxfp4_moe
