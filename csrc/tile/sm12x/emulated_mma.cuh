// SM12x's block-scaled MMA in integers, from the very registers that the instruction reads: for a development build
// that runs SM12x's kernels on SM90 (docs/sm12x-without-sm12x.md), never for a wheel that anyone is given.
//
// mma.sync.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32 with thread selectors 0. The 32 scaled products and the
// accumulator are aligned to the largest exponent among them, each is cut toward zero at 25 fractional bits, and their
// sum is cut toward zero to fp32 (arXiv 2511.10909, "RTX Blackwell"; validated there on hardware). A product's exponent
// is the sum of its factors' and scales', whatever its significand; a zero's is -133; sums are never -0; NaN is
// 0x7FFFFFFF. One thing is stricter than the hardware: bits outside 5..2 of an E2M1 container make NaN.
#pragma once

#include <stdint.h>

#include "shared/scale_layout.cuh"

namespace mxfp4_moe::emulated {

constexpr int kFractionalBits = 25, kZeroExponent = -133;
constexpr uint32_t kNan = 0x7FFFFFFFu, kInfinity = 0x7F800000u;

enum class Code { kE4m3, kE2m1 };

MXFP4_MOE_HOST_DEVICE constexpr int at_least_one(int x) { return x > 1 ? x : 1; }
MXFP4_MOE_HOST_DEVICE int top_bit(uint64_t x) {  // of a number that is not 0
#ifdef __CUDA_ARCH__
  return 63 - __clzll(static_cast<long long>(x));
#else
  return 63 - __builtin_clzll(x);
#endif
}

// One register's byte as a fixed-point number: multiples of 2^-9 (E4M3), of 2^-1 (E2M1).
template <Code kCode>
MXFP4_MOE_HOST_DEVICE int32_t fixed_point(uint32_t word, int byte) {
  constexpr bool kE4m3 = kCode == Code::kE4m3;
  const int x = word >> (8 * byte) & 0xFF;
  const int field = x >> 3 & (kE4m3 ? 15 : 3), mantissa = kE4m3 ? x & 7 : x >> 2 & 1;
  const int value = (mantissa | (field ? kE4m3 ? 8 : 2 : 0)) << (at_least_one(field) - 1);
  return x & (kE4m3 ? 0x80 : 0x20) ? -value : value;
}
// 2^field, field the exponent's, at least 1; 0 for a zero. Of two, the product is 2 to the sum of the fields.
template <Code kCode>
MXFP4_MOE_HOST_DEVICE uint32_t exponent_bit(uint32_t word, int byte) {
  constexpr bool kE4m3 = kCode == Code::kE4m3;
  const int x = word >> (8 * byte);
  return x & (kE4m3 ? 0x7F : 0x1C) ? 1u << at_least_one(x >> 3 & (kE4m3 ? 15 : 3)) : 0u;
}
template <Code kCode>
MXFP4_MOE_HOST_DEVICE bool has_nan(uint32_t word) {
  return kCode == Code::kE4m3 ? ((word & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u : word & 0xC3C3C3C3u;
}

MXFP4_MOE_HOST_DEVICE int32_t cut_shift(int32_t x, int right) {  // x / 2^right toward zero, right at least 0
  const int by = right < 31 ? right : 31;
  const int32_t below = static_cast<int32_t>((1u << by) - 1);
  return (x + (x >> 31 & below)) >> by;
}

// How the terms of one sum are aligned.
struct Alignment {
  int exponent;       // the largest; sums count 2^(exponent - 25)
  int product_shift;  // from products of fixed-point numbers to that, left
};
// exponent_bits: the products' exponent bits, all in one word; scale: the two E8M0 bytes' sum; c: the accumulator.
MXFP4_MOE_HOST_DEVICE Alignment align(uint32_t exponent_bits, int scale, uint32_t c) {
  const int field = c >> 23 & 0xFF;
  int exponent = c & ~0x80000000u ? at_least_one(field) - 127 : kZeroExponent;
  if (exponent_bits) {  // E4M3's bias is 7, E2M1's 1
    const int of_products = top_bit(exponent_bits) - 8 + scale - 254;
    if (of_products > exponent) exponent = of_products;
  }
  return {exponent, scale - 254 - 10 - (exponent - kFractionalBits)};
}
// sum * 2^last_bit, cut toward zero, as fp32 bits; a zero is +0.
MXFP4_MOE_HOST_DEVICE uint32_t cut_to_fp32(int64_t sum, int last_bit) {
  if (sum == 0) return 0;
  const uint64_t size = sum < 0 ? -sum : sum;
  const int top = top_bit(size), exponent = top + last_bit;
  uint32_t result;
  if (exponent > 127) {
    result = kInfinity;
  } else if (exponent >= -126) {
    const uint32_t with_one = static_cast<uint32_t>(top > 23 ? size >> (top - 23) : size << (23 - top));
    result = with_one + (static_cast<uint32_t>(exponent + 126) << 23);
  } else {  // multiples of 2^-149
    const int left = last_bit + 149;
    result = static_cast<uint32_t>(left >= 0 ? size << left : size >> -left);
  }
  return result && sum < 0 ? result | 0x80000000u : result;
}
// The sum as fp32 bits. products: their sum, each cut where product_shift is below 0.
MXFP4_MOE_HOST_DEVICE uint32_t finish(int32_t products, uint32_t c, Alignment to) {
  const int field = c >> 23 & 0xFF;
  const int64_t significand = (c & 0x7FFFFF) | (field ? 0x800000 : 0);
  const int shift = at_least_one(field) - 127 - 23 - (to.exponent - kFractionalBits);  // at most 2
  const int64_t magnitude = shift >= 0 ? significand << shift : shift > -63 ? significand >> -shift : 0;
  const int64_t sum =
      int64_t{products} * (1 << (to.product_shift > 0 ? to.product_shift : 0)) + (c >> 31 ? -magnitude : magnitude);
  return cut_to_fp32(sum, to.exponent - kFractionalBits);
}

struct Sums {
  uint32_t bits[4];  // fp32
};

// What one lane's four accumulators become. `warp` has the operands of all lanes: a(reg, lane) and b(reg, lane) are
// registers, scale_a(lane) and scale_b(lane) scale words, bit_a(reg, k, lane) and bit_b exponent_bit of a register's
// byte k, value_a and value_b its fixed_point. byte is the selector that picks a scale word's byte.
template <Code kA, Code kB, class Warp>
MXFP4_MOE_HOST_DEVICE Sums mma_of_lane(const Warp& warp, int lane, int byte, Sums c) {
  // c.bits[x] is of row lane / 4 + 8 * (x / 2) and column lane % 4 * 2 + x % 2; four lanes hold a row, or a column.
  const int row_lane = lane / 4 * 4, col_lane = lane % 4 * 2 * 4;
  int scale_a[2], scale_b[2];
  bool nan_a[2], nan_b[2];
  for (int i = 0; i < 2; ++i) {
    scale_a[i] = warp.scale_a(row_lane + i) >> (8 * byte) & 0xFF;  // row g of lane 4g, row g + 8 of lane 4g + 1
    scale_b[i] = warp.scale_b(col_lane + 4 * i) >> (8 * byte) & 0xFF;
    nan_a[i] = scale_a[i] == 0xFF, nan_b[i] = scale_b[i] == 0xFF;
  }
  // k = 16 h + 4 t .. + 3 of a row or column are in its lane t: of A in register 2 h, of rows g + 8 in 2 h + 1; of B in
  // h.
  uint32_t exponent_bits[4] = {};
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const int h = w / 4, a = row_lane + w % 4, b = col_lane + w % 4;
    for (int i = 0; i < 2; ++i) {
      nan_a[i] |= has_nan<kA>(warp.a(2 * h + i, a));
      nan_b[i] |= has_nan<kB>(warp.b(h, b + 4 * i));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t of_a[2] = {warp.bit_a(2 * h, k, a), warp.bit_a(2 * h + 1, k, a)};
      const uint32_t of_b[2] = {warp.bit_b(h, k, b), warp.bit_b(h, k, b + 4)};
#pragma unroll
      for (int x = 0; x < 4; ++x) exponent_bits[x] |= of_a[x / 2] * of_b[x % 2];
    }
  }
  Alignment to[4];
  int right[4];
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    to[x] = align(exponent_bits[x], scale_a[x / 2] + scale_b[x % 2], c.bits[x]);
    right[x] = to[x].product_shift < 0 ? -to[x].product_shift : 0;
  }
  int32_t sum[4] = {};
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const int h = w / 4, a = row_lane + w % 4, b = col_lane + w % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int32_t of_a[2] = {warp.value_a(2 * h, k, a), warp.value_a(2 * h + 1, k, a)};
      const int32_t of_b[2] = {warp.value_b(h, k, b), warp.value_b(h, k, b + 4)};
#pragma unroll
      for (int x = 0; x < 4; ++x) sum[x] += cut_shift(of_a[x / 2] * of_b[x % 2], right[x]);
    }
  }
  Sums d;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const uint32_t size = c.bits[x] & ~0x80000000u;
    const bool nan = nan_a[x / 2] || nan_b[x % 2] || size > kInfinity;
    d.bits[x] = nan ? kNan : size == kInfinity ? c.bits[x] : finish(sum[x], c.bits[x], to[x]);
  }
  return d;
}

#ifdef __CUDACC__

// Every lane takes its own codes apart, and shuffles bring the others'. Unrolled, the arrays are registers.
template <Code kA, Code kB>
struct ShuffledWarp {
  uint32_t word_a[4], word_b[2], word_scale_a, word_scale_b;
  uint32_t bits_a[4][4], bits_b[2][4];
  int32_t values_a[4][4], values_b[2][4];

  __device__ __forceinline__ void take_apart() {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        bits_a[r][k] = exponent_bit<kA>(word_a[r], k), values_a[r][k] = fixed_point<kA>(word_a[r], k);
        if (r < 2) bits_b[r][k] = exponent_bit<kB>(word_b[r], k), values_b[r][k] = fixed_point<kB>(word_b[r], k);
      }
    }
  }
  template <class T>
  static __device__ __forceinline__ T of(int lane, T x) {
    return __shfl_sync(~0u, x, lane);
  }
  __device__ __forceinline__ uint32_t a(int reg, int lane) const { return of(lane, word_a[reg]); }
  __device__ __forceinline__ uint32_t b(int reg, int lane) const { return of(lane, word_b[reg]); }
  __device__ __forceinline__ uint32_t scale_a(int lane) const { return of(lane, word_scale_a); }
  __device__ __forceinline__ uint32_t scale_b(int lane) const { return of(lane, word_scale_b); }
  __device__ __forceinline__ uint32_t bit_a(int reg, int k, int lane) const { return of(lane, bits_a[reg][k]); }
  __device__ __forceinline__ uint32_t bit_b(int reg, int k, int lane) const { return of(lane, bits_b[reg][k]); }
  __device__ __forceinline__ int32_t value_a(int reg, int k, int lane) const { return of(lane, values_a[reg][k]); }
  __device__ __forceinline__ int32_t value_b(int reg, int k, int lane) const { return of(lane, values_b[reg][k]); }
};

// A function and not inlined: a kernel has up to a hundred of these instructions, and registers for its own variables.
template <Code kA, Code kB>
__device__ __noinline__ uint4 mma(uint4 c, uint4 a, uint32_t b0, uint32_t b1, uint32_t scale_a, uint32_t scale_b,
                                  int byte) {
  ShuffledWarp<kA, kB> warp{{a.x, a.y, a.z, a.w}, {b0, b1}, scale_a, scale_b};
  warp.take_apart();
  const Sums d = mma_of_lane<kA, kB>(warp, threadIdx.x % 32, byte, {{c.x, c.y, c.z, c.w}});
  return make_uint4(d.bits[0], d.bits[1], d.bits[2], d.bits[3]);
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe::emulated
