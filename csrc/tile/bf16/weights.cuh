// How packed weights become the operands of MMAs of 16-bit floats: what it takes in bf16 (bf16_weights.cuh) and in fp16
// (fp16_weights.cuh) alike.
#pragma once

#include <stdint.h>

#include "tile/pipeline.cuh"

namespace mxfp4_moe {

// What formats of weights (Mxfp4MoeWeightFormat) and of rows (Mxfp4MoeActFormat) differ in.
//   kUnit           what accumulators count in: a weight's operand is its value divided by it
//   kSetSteps       K blocks whose scales a scale word holds
//   kHasLarge       whether scales may take more than the usual expansion (has_large)
//   kScaleShift     from a scale's byte to where it stands in the 16-bit float
//   Origin          from where an expert's scales count, where they do not all from the same
//   Kept, keep      what a thread holds while it expands
//   expand_scaled   eight codes of a row's K block as operands, scales multiplied in
template <int kWeightFormat, int kActFormat>
struct Scaling;
template <class Shape>
using ScalingOf = Scaling<Shape::kWeightFormat, Shape::kActFormat>;

// The same for all weights.
struct CommonOrigin {
  static __device__ __forceinline__ CommonOrigin of(const Mxfp4MoeFactors&, int) { return {}; }
};

// 2^kShift, unknown to the compiler, because ptxas turns a multiplication by a number that it knows into a shift, which
// runs on the ALU that expanding keeps busy; multiply-adds have a pipe of their own.
template <int kShift>
__device__ __forceinline__ uint32_t scale_unit() {
  uint32_t one;
  asm volatile("mov.u32 %0, %%ntid.y;" : "=r"(one));  // blocks have one dimension
  return one << kShift;
}

// What Scalings have alike whose scales all count from the same.
struct KeptUnit {
  uint32_t unit;
};
template <int kShift>
struct CommonScaling {
  static constexpr int kScaleShift = kShift;
  using Origin = CommonOrigin;
  using Kept = KeptUnit;
  static __device__ __forceinline__ Kept keep(const Origin&) { return {scale_unit<kShift>()}; }
};

// One half in both: an operand's modifier in machine code, not an instruction.
template <int kHalf>
__device__ __forceinline__ uint32_t twice(uint32_t pair) {
  uint32_t both;
  if constexpr (kHalf == 0)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(both) : "r"(pair));
  else
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(both) : "r"(pair));
  return both;
}

}  // namespace mxfp4_moe
