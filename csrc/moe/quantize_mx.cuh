// The MXFP8 quantizer (OCP MX v1.0, E4M3 elements under an E8M0 scale), and where its bytes go.
//
// A quad of lanes holds one block of 32 values, lane q the values k = 8q .. 8q+7. Lanes of a half-warp hold the four
// blocks of one K tile of 128 values, so that their scale bytes leave as one 32-bit word.
// Scale: amax * fp32(1/448), rounded up to a power of two on the bits. Codes: x * 2^-scale, RNE, clamped to +-448.
// An all-zero block is scale byte 0 and codes 0. A block with a NaN or an infinity becomes 32 NaN codes with scale
// byte 127 (2^0): poison stays in the block it came from. formats.quantize_mxfp8 is the same function in torch.
// Codes are stored even k first (16 even, then 16 odd of each block): the order the tile kernel's ldmatrix wants.
// Used by quantize.cu and activation.cu.
#pragma once

#include <cuda_fp8.h>

#include "../tile/scale_layout.cuh"
#include "launch.cuh"
#include "moe.h"

namespace mxfp4_moe {

constexpr int kLanesPerBlock = 4;  // a quad
constexpr int kValuesPerLane = kScaleBlock / kLanesPerBlock;
constexpr int kBlocksPerWord = 4;
constexpr int kLanesPerWord = kLanesPerBlock * kBlocksPerWord;  // a half-warp: one K tile of one row

constexpr uint32_t kFloatInfBits = 0x7f800000u;
constexpr uint32_t kPoisonScale = 127;
constexpr uint32_t kPoisonCodes = 0x7f7f7f7fu;

struct QuadCodes {
  uint32_t even, odd;  // this lane's 4 even-k and 4 odd-k codes
  uint32_t scale;      // the block's E8M0 byte, the same in all four lanes
};

// The E8M0 byte of the smallest power of two >= x, for finite x >= 0, as cvt.rp.satfinite.ue8m0x2.f32 gives it.
__device__ __forceinline__ uint32_t e8m0_round_up(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t exponent = bits >> 23;
  const uint32_t mantissa = bits & 0x007fffffu;
  // E8M0's smallest value 2^-127 is an fp32 denormal with mantissa 0x400000.
  const uint32_t exact = exponent == 0 ? 0x00400000u : 0u;
  return min(exponent + (mantissa > exact ? 1u : 0u), 254u);
}

// 2^(127 - byte) for byte 0 .. 254; the last one is a denormal.
__device__ __forceinline__ float e8m0_reciprocal(uint32_t byte) {
  return __uint_as_float(byte == 254u ? 0x00400000u : (254u - byte) << 23);
}

// Four values to four E4M3 codes, the first in the lowest byte.
__device__ __forceinline__ uint32_t encode4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Quantizes the block that this lane's quad holds. All 32 lanes of the warp must call it.
__device__ __forceinline__ QuadCodes quantize_quad(const float (&x)[kValuesPerLane]) {
  // As integers, |finite| < |inf| < |NaN|: one maximum finds amax and the poison.
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kValuesPerLane; ++i) {
    amax = max(amax, __float_as_uint(x[i]) & 0x7fffffffu);
  }
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 1));
  amax = max(amax, __shfl_xor_sync(kAllLanes, amax, 2));

  if (amax >= kFloatInfBits) {
    return QuadCodes{kPoisonCodes, kPoisonCodes, kPoisonScale};
  }
  if (amax == 0) {
    return QuadCodes{0, 0, 0};
  }
  const uint32_t scale = e8m0_round_up(__fmul_rn(__uint_as_float(amax), 1.0f / 448.0f));
  const float r = e8m0_reciprocal(scale);
  return QuadCodes{encode4(x[0] * r, x[2] * r, x[4] * r, x[6] * r), encode4(x[1] * r, x[3] * r, x[5] * r, x[7] * r),
                   scale};
}

// Writes a half-warp's K tile of one row: codes and the scale word. `k` is the row's length; lanes whose block lies
// past it hold zeros, store no codes and contribute the zero scale byte that pads the word. All 32 lanes call it; a
// half-warp whose K tile lies past the row stores nothing.
__device__ __forceinline__ void store_k_tile(const QuadCodes& quad, int64_t row, int k_tile, int k, int64_t rows,
                                             uint8_t* __restrict__ codes, uint8_t* __restrict__ scales) {
  const int lane = threadIdx.x % kLanesPerWord;
  const int block_in_word = lane / kLanesPerBlock;
  const int k_block = k_tile * kBlocksPerWord + block_in_word;
  if (k_block < k / kScaleBlock) {
    uint8_t* out = codes + row * k + k_block * kScaleBlock + lane % kLanesPerBlock * 4;
    *reinterpret_cast<uint32_t*>(out) = quad.even;
    *reinterpret_cast<uint32_t*>(out + kScaleBlock / 2) = quad.odd;
  }
  uint32_t word = quad.scale << (8 * block_in_word);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  word |= __shfl_xor_sync(kAllLanes, word, 8);
  if (lane == 0 && k_tile < scale_k_tiles(k)) {
    *reinterpret_cast<uint32_t*>(scales + act_scale_offset(row, k_tile * kBlocksPerWord, rows)) = word;
  }
}

}  // namespace mxfp4_moe
