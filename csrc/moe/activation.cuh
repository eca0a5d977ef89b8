// What a lane computes of a row between the two GEMMs: bias and activation of eight neighbouring outputs. For the
// kernels that differ in what they make of them: activation.cu and fp4_activation.cu.
#pragma once

#include <type_traits>

#include "moe/mx_rows.cuh"
#include "shared/nonlinearities.cuh"

namespace mxfp4_moe {

constexpr int kHalfGroup = kValuesPerLane / 2;  // a lane's outputs of a group of 8: its neighbour has the other four

// What a lane reads of two groups: four gates and four ups each, or four values.
template <bool kGated>
struct TwoGroups {
  static constexpr int kVectors = kGated ? 2 : 1;
  float x[2][kVectors][kHalfGroup];

  // `row` begins at the first group's column of what GEMM1 wrote, or of the biases.
  __device__ __forceinline__ void load(const float* row) {
    const int half = threadIdx.x % 2 * kHalfGroup;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float* at = row + (group * kVectors + v) * kValuesPerLane + half;
        const float4 four = __ldcg(reinterpret_cast<const float4*>(at));
        x[group][v][0] = four.x;
        x[group][v][1] = four.y;
        x[group][v][2] = four.z;
        x[group][v][3] = four.w;
      }
    }
  }

  template <typename Change>
  __device__ __forceinline__ void for_each(const Change& change) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kHalfGroup; ++i) {
          change(x[group][v][i], group, v, i);
        }
      }
    }
  }
};

// From four outputs of each of two groups to eight of one: the even lane's is the first. All 32 lanes call it.
__device__ __forceinline__ void exchange(const float (&y)[2][kHalfGroup], float (&x)[kValuesPerLane]) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < kHalfGroup; ++i) {
    const float mine = odd ? y[1][i] : y[0][i];
    const float other = __shfl_xor_sync(kAllLanes, odd ? y[0][i] : y[1][i], 1);
    x[i] = odd ? other : mine;
    x[i + kHalfGroup] = odd ? mine : other;
  }
}

// Rounds, if `rounding` says so, all values that for_each(change) changes. One branch for all of them, which all lanes
// take alike, is what those who do not round pay.
template <typename ForEach>
__device__ __forceinline__ void round_each(Rounding rounding, const ForEach& for_each) {
  if (rounding == Rounding::kBFloat16) {
    for_each([](float& x) { x = round_to(Rounding::kBFloat16, x); });
  } else if (rounding == Rounding::kFloat16) {
    for_each([](float& x) { x = round_to(Rounding::kFloat16, x); });
  }
}

// A lane's place in a row of what GEMM1 wrote.
template <Activation kActivation>
struct LaneOutputs {
  static constexpr bool kGated = is_gated(kActivation);
  using Groups = TwoGroups<kGated>;
  Groups bias = {};  // of the column and expert that were asked for last
  int expert_of_bias = -1;

  // The eight outputs from `column` on; zeros past the row. All 32 lanes call it.
  __device__ __forceinline__ void operator()(const ActivationArgs& args, int64_t row, int column,
                                             float (&x)[kValuesPerLane]) {
    const int64_t width = int64_t{args.intermediate} * (kGated ? 2 : 1);
    // Of the two lanes' groups.
    const int first_column = (column - threadIdx.x % 2 * kValuesPerLane) * (kGated ? 2 : 1);
    float y[2][kHalfGroup] = {};
    if (column < args.intermediate) {
      Groups sums;
      sums.load(args.gemm1 + row * width + first_column);
      const int expert = __ldcg(args.row_expert + row);
      if (args.bias != nullptr && expert != expert_of_bias) {
        bias.load(args.bias + expert * width + first_column);
        expert_of_bias = expert;
      }
      round_each(args.rounding,
                 [&](const auto& change) { sums.for_each([&](float& x, int, int, int) { change(x); }); });
      if (args.bias != nullptr) {
        sums.for_each([&](float& x, int group, int v, int i) { x += bias.x[group][v][i]; });
      }
      Numbers numbers = {};
      if constexpr (has_numbers(kActivation)) {
        numbers = {of_expert(args.alpha, expert), of_expert(args.beta, expert), of_expert(args.limit, expert)};
      }
#pragma unroll
      for (int group = 0; group < 2; ++group) {
#pragma unroll
        for (int i = 0; i < kHalfGroup; ++i) {
          if constexpr (kGated) {
            y[group][i] = apply<kActivation>(sums.x[group][0][i], sums.x[group][1][i], numbers);
          } else {
            y[group][i] = apply<kActivation>(sums.x[group][0][i], numbers);
          }
        }
      }
      round_each(args.rounding, [&](const auto& change) {
#pragma unroll
        for (int i = 0; i < kValuesPerLane; ++i) {
          change(y[i / kHalfGroup][i % kHalfGroup]);
        }
      });
    }
    exchange(y, x);
  }
};

// of(std::integral_constant<Activation, activation>), whose results are of one type; `none` where there is no such.
template <typename Kernel, typename Of>
Kernel kernel_of(Activation activation, Kernel none, const Of& of) {
  switch (activation) {
    case Activation::kSwiglu:
      return of(std::integral_constant<Activation, Activation::kSwiglu>{});
    case Activation::kSwigluOai:
      return of(std::integral_constant<Activation, Activation::kSwigluOai>{});
    case Activation::kSwigluStep:
      return of(std::integral_constant<Activation, Activation::kSwigluStep>{});
    case Activation::kGeglu:
      return of(std::integral_constant<Activation, Activation::kGeglu>{});
    case Activation::kGegluTanh:
      return of(std::integral_constant<Activation, Activation::kGegluTanh>{});
    case Activation::kSitu:
      return of(std::integral_constant<Activation, Activation::kSitu>{});
    case Activation::kSilu:
      return of(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return of(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return of(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return of(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu2:
      return of(std::integral_constant<Activation, Activation::kRelu2>{});
    case Activation::kClampedRelu2:
      return of(std::integral_constant<Activation, Activation::kClampedRelu2>{});
    case Activation::kIdentity:
      return of(std::integral_constant<Activation, Activation::kIdentity>{});
  }
  return none;
}

}  // namespace mxfp4_moe
