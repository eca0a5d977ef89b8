// A lane's part of finalize: some columns of one token, the sum over its experts' rows.
//
//   acc = 0; for j in 0 .. k-1: acc = fma(weight_j, row_j + bias_j, acc)
// in fp32 and rounded once. Slots without a row (id < 0 or >= E) contribute nothing; a token with none is zero.
// Both kernels of finalize are made of this. They differ in where biases are: Biases::Part is what a lane holds of one
// row's while loads are in flight.
#pragma once

#include <type_traits>

#include "moe/halves.cuh"
#include "shared/launch.cuh"

namespace mxfp4_moe {

constexpr int kLoadsAhead = 4;  // rows of one token in flight

// Columns per lane where there are many tokens: 16-byte loads of rows.
template <HalfType kType>
constexpr int kManyColumns = kType == HalfType::kFloat16 ? 4 : 8;

// How many 16-bit values a lane stores at once.
template <int kColumns>
using Packed = std::conditional_t<kColumns == 2, uint32_t, std::conditional_t<kColumns == 4, uint2, uint4>>;

// A lane's columns of one row of GEMM2, as they are loaded.
template <HalfType kType, int kColumns>
struct RowPart {
  Packed<kColumns> packed;
  __device__ __forceinline__ void load(const void* gemm2, int64_t at) {
    packed = __ldcg(reinterpret_cast<const Packed<kColumns>*>(static_cast<const uint16_t*>(gemm2) + at));
  }
  __device__ __forceinline__ void widen(float (&x)[kColumns]) const { mxfp4_moe::widen<kType>(packed, x); }
};

template <int kColumns>
struct RowPart<HalfType::kFloat16, kColumns> {
  using Floats = std::conditional_t<kColumns == 2, float2, float4>;
  static_assert(sizeof(Floats) == kColumns * sizeof(float));
  Floats floats;
  __device__ __forceinline__ void load(const void* gemm2, int64_t at) {
    floats = __ldcg(reinterpret_cast<const Floats*>(static_cast<const float*>(gemm2) + at));
  }
  __device__ __forceinline__ void widen(float (&x)[kColumns]) const { memcpy(x, &floats, sizeof(x)); }
};

template <HalfType kType, int kColumns, class Biases>
__device__ __forceinline__ void finalize_token(const FinalizeArgs& args, int64_t token, int column,
                                               const Biases& biases) {
  float acc[kColumns] = {};
  for (int j0 = 0; j0 < args.top_k; j0 += kLoadsAhead) {
    int rows[kLoadsAhead];  // -1 for none
    float weights[kLoadsAhead];
    typename Biases::Part bias[kLoadsAhead];
    RowPart<kType, kColumns> values[kLoadsAhead];
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      const int64_t slot = token * args.top_k + j0 + i;
      rows[i] = j0 + i < args.top_k ? __ldcg(args.slot_row + slot) : -1;
      weights[i] = rows[i] >= 0 ? __ldcg(args.topk_weights + slot) : 0.0f;
      if (rows[i] >= 0) {
        bias[i].load(biases, args.row_expert + rows[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      if (rows[i] >= 0) {
        values[i].load(args.gemm2, int64_t{rows[i]} * args.hidden_size + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
      if (rows[i] < 0) {
        continue;
      }
      float x[kColumns];
      values[i].widen(x);
      bias[i].add(biases, x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        acc[c] = fmaf(weights[i], x[c], acc[c]);
      }
    }
  }
  auto* out = static_cast<typename Half<kType>::Element*>(args.out);
  *reinterpret_cast<Packed<kColumns>*>(out + token * args.hidden_size + column) = narrow<kType, Packed<kColumns>>(acc);
}

}  // namespace mxfp4_moe
