// A gated activation on all of a lane's accumulators with code for a few: they take turns at the same registers.
//
// Accumulators are registers, so a loop over them is unrolled, and an activation that is long and that few models have
// would cost every tile kilobytes of code. Here a loop that is not unrolled applies it to the first eight and moves
// all on by eight; after the last turn each is back in its place. A move per accumulator and turn is what it costs.
// Used by tile/swiglu_epilogue.cuh.
#pragma once

#include "shared/nonlinearities.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// gate = activation(gate, up), with their biases in them already. Swapped, a fragment holds two gates, then the two ups
// of the same outputs; native, one fragment has four gates and the next one their ups.
template <bool kSwap, int kFragM, int kFragN>
__device__ __forceinline__ void activate_in_turns(float (&acc)[kFragM][kFragN][4], bool is_situ,
                                                  const Numbers& numbers) {
  constexpr int kAll = kFragM * kFragN * 4, kTurn = kAll % 8 == 0 ? 8 : 4, kToUp = kSwap ? 2 : 4;
  static_assert(kSwap || kTurn == 8);
  const auto at = [&](int i) -> float& { return acc[i / 4 / kFragN][i / 4 % kFragN][i % 4]; };
#pragma unroll 1
  for (int turn = 0; turn < kAll / kTurn; ++turn) {
    const auto for_each_gate = [&](const auto& activation) {
#pragma unroll
      for (int i = 0; i < kTurn; ++i)
        if (i / kToUp % 2 == 0) at(i) = activation(at(i), at(min(i + kToUp, kTurn - 1)));
    };
    if (is_situ) {
      for_each_gate([&](float gate, float up) { return situ(gate, up, numbers); });
    } else {
      for_each_gate([&](float gate, float up) { return swiglu_step(gate, up, numbers); });
    }
    float done[kTurn];
#pragma unroll
    for (int i = 0; i < kTurn; ++i) done[i] = at(i);
#pragma unroll
    for (int i = 0; i < kAll - kTurn; ++i) at(i) = at(i + kTurn);
#pragma unroll
    for (int i = 0; i < kTurn; ++i) at(kAll - kTurn + i) = done[i];
  }
}

}  // namespace mxfp4_moe
