// SM12x's block-scaled MMAs of FP4 by FP4 in integers, as emulated_mma.cuh has that of FP8 by FP4, for the same builds.
//
// mma.sync m16n8k64 of kind::mxf4 with scale_vec::2X and ue8m0, and of kind::mxf4nvf4 with scale_vec::4X and ue4m3,
// with thread selectors 0. The products of 16 neighbouring k, a group, are added exactly; the four groups and the
// accumulator are aligned to the largest exponent among them, each is cut toward zero at 35 fractional bits, and their
// sum is cut toward zero to fp32 (arXiv 2511.10909, "RTX Blackwell"). A group's exponent is the sum of its two scales',
// whatever its products are, and -139 where all products, or one of the scales, are zeros; an accumulator's that is
// zero is -139 too. arithmetic.py has the same rule, from the same source. Bit 7 of an E4M3 scale is not read.
#pragma once

#include "tile/sm12x/emulated_mma.cuh"

namespace mxfp4_moe::emulated {

constexpr int kFp4FractionalBits = 35, kFp4ZeroExponent = -139;

// An E2M1 code's value in halves.
MXFP4_MOE_HOST_DEVICE int32_t e2m1_halves(uint32_t code) {
  const int field = code >> 1 & 3;
  const int size = field ? (2 | (code & 1)) << (field - 1) : code & 1;
  return code & 8 ? -size : size;
}

// A scale: eighths * 2^exponent / 8.
struct GroupScale {
  int exponent;
  int eighths;
  bool nan;
};
template <bool kNvfp4>
MXFP4_MOE_HOST_DEVICE GroupScale group_scale(uint32_t byte) {
  if constexpr (!kNvfp4) return {static_cast<int>(byte) - 127, 8, byte == 0xFF};
  const int field = byte >> 3 & 15, mantissa = byte & 7;
  return {at_least_one(field) - 7, mantissa | (field ? 8 : 0), (byte & 0x7F) == 0x7F};
}

// x * 2^left, cut toward zero where left is below 0; |x| below 2^25, left at most 27.
MXFP4_MOE_HOST_DEVICE int64_t shifted(int64_t x, int left) {
  if (left >= 0) return x * (int64_t{1} << left);
  return left > -63 ? (x < 0 ? -(-x >> -left) : x >> -left) : 0;
}

// What one lane's four accumulators become. `warp` has the operands of all lanes: a(reg, lane) and b(reg, lane) are
// registers, scale_a(lane) and scale_b(lane) scale words; byte is the selector that picks an E8M0 word's first byte.
template <bool kNvfp4, class Warp>
MXFP4_MOE_HOST_DEVICE Sums fp4_mma_of_lane(const Warp& warp, int lane, int byte, Sums c) {
  // c.bits[x] is of row lane / 4 + 8 * (x / 2) and column lane % 4 * 2 + x % 2; four lanes hold a row, or a column.
  const int row_lane = lane / 4 * 4, col_lane = lane % 4 * 2 * 4;
  uint32_t scales_a[2], scales_b[2];
  for (int i = 0; i < 2; ++i) {
    scales_a[i] = warp.scale_a(row_lane + i) >> (8 * byte);  // row g of lane 4g, row g + 8 of lane 4g + 1
    scales_b[i] = warp.scale_b(col_lane + 4 * i) >> (8 * byte);
  }
  int32_t terms[4][4] = {};  // [accumulator][group], multiples of 2^(exponent - 8)
  int exponents[4][4];
  bool nan[4] = {};
  for (int group = 0; group < 4; ++group) {
    // k = 32 h + 8 t .. + 7 of a row or column are in its lane t: of A in register 2 h, of rows g + 8 in 2 h + 1; of B
    // in h. A group has two such words.
    const int h = group / 2, shift = 8 * (kNvfp4 ? group : h);
    int32_t products[4] = {};
    bool some[4] = {};
    for (int word = 0; word < 2; ++word) {
      const int t = group % 2 * 2 + word;
      const uint32_t of_a[2] = {warp.a(2 * h, row_lane + t), warp.a(2 * h + 1, row_lane + t)};
      const uint32_t of_b[2] = {warp.b(h, col_lane + t), warp.b(h, col_lane + 4 + t)};
      for (int k = 0; k < 8; ++k) {
        for (int x = 0; x < 4; ++x) {
          const int32_t product = e2m1_halves(of_a[x / 2] >> (4 * k) & 15) * e2m1_halves(of_b[x % 2] >> (4 * k) & 15);
          products[x] += product;
          some[x] |= product != 0;
        }
      }
    }
    for (int x = 0; x < 4; ++x) {
      const GroupScale a = group_scale<kNvfp4>(scales_a[x / 2] >> shift & 0xFF);
      const GroupScale b = group_scale<kNvfp4>(scales_b[x % 2] >> shift & 0xFF);
      nan[x] |= a.nan || b.nan;
      terms[x][group] = products[x] * a.eighths * b.eighths;
      exponents[x][group] = some[x] && a.eighths && b.eighths ? a.exponent + b.exponent : kFp4ZeroExponent;
    }
  }
  Sums d;
  for (int x = 0; x < 4; ++x) {
    const uint32_t size = c.bits[x] & ~0x80000000u;
    const int field = size >> 23, own = at_least_one(field) - 127;
    int largest = size ? own : kFp4ZeroExponent;
    for (int group = 0; group < 4; ++group)
      if (exponents[x][group] > largest) largest = exponents[x][group];
    const int last_bit = largest - kFp4FractionalBits;
    const int64_t significand = (size & 0x7FFFFF) | (field ? 0x800000 : 0);
    int64_t sum = shifted(c.bits[x] >> 31 ? -significand : significand, own - 23 - last_bit);
    for (int group = 0; group < 4; ++group) sum += shifted(terms[x][group], exponents[x][group] - 8 - last_bit);
    d.bits[x] = nan[x] || size > kInfinity ? kNan : size == kInfinity ? c.bits[x] : cut_to_fp32(sum, last_bit);
  }
  return d;
}

#ifdef __CUDACC__

struct ShuffledFp4Warp {
  uint32_t word_a[4], word_b[2], word_scale_a, word_scale_b;
  static __device__ __forceinline__ uint32_t of(int lane, uint32_t x) { return __shfl_sync(~0u, x, lane); }
  __device__ __forceinline__ uint32_t a(int reg, int lane) const { return of(lane, word_a[reg]); }
  __device__ __forceinline__ uint32_t b(int reg, int lane) const { return of(lane, word_b[reg]); }
  __device__ __forceinline__ uint32_t scale_a(int lane) const { return of(lane, word_scale_a); }
  __device__ __forceinline__ uint32_t scale_b(int lane) const { return of(lane, word_scale_b); }
};

// Not inlined, as emulated_mma.cuh's.
template <bool kNvfp4>
__device__ __noinline__ uint4 fp4_mma(uint4 c, uint4 a, uint2 b, uint32_t scale_a, uint32_t scale_b, int byte) {
  const ShuffledFp4Warp warp{{a.x, a.y, a.z, a.w}, {b.x, b.y}, scale_a, scale_b};
  const Sums d = fp4_mma_of_lane<kNvfp4>(warp, threadIdx.x % 32, byte, {{c.x, c.y, c.z, c.w}});
  return make_uint4(d.bits[0], d.bits[1], d.bits[2], d.bits[3]);
}

#endif  // __CUDACC__

}  // namespace mxfp4_moe::emulated
