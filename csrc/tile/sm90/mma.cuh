// SM90's side of mma_mx.cuh: two f16 MMAs into zeros, then one fp32 fma per element, by the two scales.
#pragma once

#include "tile/lane_maps.cuh"

namespace mxfp4_moe {

constexpr bool kSelectorIsImmediate = false;
// An FP4 code in f16's lowest exponents is the value times 2^-14. The scales make up for 2^7 of it: the weights' bytes
// end at 253 and are taken twice as large, so that byte 0 is a normal number too; the activations' end at 248. The rest
// stays in the accumulators until the end.
constexpr int kWeightScaleShift = 1, kActScaleShift = 6;
constexpr float kAccumulatorUnit = 1 << (14 - kWeightScaleShift - kActScaleShift);

// Pairs of f16: k = 8t + {0, 2}, {4, 6}, {1, 3}, {5, 7}.
struct Fragment {
  uint32_t pair[4];
};

// E4M3 to f16 is exact. ptxas takes FP8 MMAs apart in the same way: SM90 has no FP8 tensor instruction at warp level.
__device__ __forceinline__ Fragment expand_act(uint32_t even, uint32_t odd) {
  Fragment f;
  asm("{ .reg .b16 a, b, c, d; mov.b32 {a, b}, %4; mov.b32 {c, d}, %5; cvt.rn.f16x2.e4m3x2 %0, a; "
      "cvt.rn.f16x2.e4m3x2 %1, b; cvt.rn.f16x2.e4m3x2 %2, c; cvt.rn.f16x2.e4m3x2 %3, d; }"
      : "=r"(f.pair[0]), "=r"(f.pair[1]), "=r"(f.pair[2]), "=r"(f.pair[3])
      : "r"(even), "r"(odd));
  return f;
}

// Word order `halves`: in each half of the word magnitudes in bits 11..9, 8..6, 5..3 and 2..0 and their signs in 14,
// 15, 12 and 13. It is made for bf16 (tile/sm90/bf16_operands.cuh), which the kernels of SM90's layers take; f16 has
// sign, low exponent and mantissa in bits 15 and 11..9.
__device__ __forceinline__ Fragment expand_weight(uint32_t w) {
  constexpr uint32_t kSign = 0x80008000u, kValue = 0x0E000E00u;
  return {{(w & kValue) | ((w << 1) & kSign), ((w << 3) & kValue) | (w & kSign),
           ((w << 6) & kValue) | ((w << 3) & kSign), ((w << 9) & kValue) | ((w << 2) & kSign)}};
}

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

// d = c + a . b of m16n8k16.
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1, float c0, float c1, float c2, float c3) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// block = A . B^T, without scales. f16 products and their fp32 sum are exact in the same cases as FP8's, so the bits
// are those of the FP8 instruction.
__device__ __forceinline__ void mma_block(float (&block)[4], const Fragment& a_lo, const Fragment& a_hi,
                                          const Fragment& b) {
  float half[4];
  mma_f16(half, a_lo.pair[0], a_hi.pair[0], a_lo.pair[1], a_hi.pair[1], b.pair[0], b.pair[1], 0.f, 0.f, 0.f, 0.f);
  mma_f16(block, a_lo.pair[2], a_hi.pair[2], a_lo.pair[3], a_hi.pair[3], b.pair[2], b.pair[3], half[0], half[1],
          half[2], half[3]);
}

template <Fp4Operand kFp4, class Selector>
__device__ __forceinline__ void mx_mma(float (&d)[4], const Fragment& a_lo, const Fragment& a_hi, const Fragment& b,
                                       ScaleA sa, ScaleB sb, Selector byte) {
  constexpr bool kFp4A = kFp4 == Fp4Operand::kA;
  float block[4];
  mma_block(block, a_lo, a_hi, b);
  float ea[2], eb[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    ea[i] = e8m0_to_float<kFp4A ? kWeightScaleShift : kActScaleShift>(sa.word[i], byte);
    eb[i] = e8m0_to_float<kFp4A ? kActScaleShift : kWeightScaleShift>(sb.word[i], byte);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = fmaf(block[i], ea[i / 2] * eb[i % 2], d[i]);
}

}  // namespace mxfp4_moe
