// GEMM1's epilogue: bias, SwiGLU and MXFP8 from the accumulators, so that the [rows, 2 * intermediate] sums never reach
// memory. Writes what GEMM2 reads: codes [rows, intermediate] E4M3, even k first, and scales as in
// shared/scale_layout.cuh; or, where the tile's kernel reads them so, bf16 rows (shared/bf16_rows.cuh), quantized to
// MXFP8 before or not, if the kernel serves both, or fp16 rows. FP4 rows: fp4_epilogue.cuh; in bf16:
// folded_fp4_epilogue.cuh.
//
// Weight rows come in groups of 16, 8 gates and the 8 ups of the same outputs, so that one thread holds both of an
// output. A block of 32 outputs, 64 weight rows, lies in two or four warps: each reduces its own part of a row by
// shuffles, leaves it in shared memory, and after one barrier among the MMA warps every warp knows the block's amax.
// Codes leave as 32-bit words: four lanes that hold a byte of each of four words exchange them first.
// Same arithmetic, operation by operation, as csrc/moe/activation.cu on stored sums.
#pragma once

#include "shared/bf16_rows.cuh"
#include "shared/mxfp8.cuh"
#include "shared/nonlinearities.cuh"
#include "shared/scale_layout.cuh"
#include "tile/folded_fp4_epilogue.cuh"
#include "tile/folded_mxfp8_epilogue.cuh"
#include "tile/fp4_epilogue.cuh"
#include "tile/in_turns.cuh"
#include "tile/lane_exchange.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

// Biases that are loaded where they are added.
struct BiasOnDemand {
  static constexpr bool kIsEarly = false;
};

// A warp's biases of a tile, loaded before its main loop: lane l has those of weight rows l, l + 32 ..; 0 without any.
template <class Shape>
struct EarlyBias {
  static constexpr bool kIsEarly = Shape::kActivates;
  static constexpr int kLoads = ceil_div(Shape::kWarpWeightRows, 32);
  float of_lane[kLoads] = {};

  __device__ __forceinline__ EarlyBias(const Mxfp4MoeActivate& a, int n, const Mxfp4MoeMTile& m_tile, int row0,
                                       int lane) {
    if constexpr (kIsEarly) {
      static_assert(Shape::kSwap, "weights are the MMA's A");
      if (a.rows == nullptr || a.bias == nullptr || row0 >= n) return;  // n is whole blocks of 64
      const float* from = a.bias + static_cast<int64_t>(m_tile.expert) * n + row0 + lane;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (lane + i * 32 < Shape::kWarpWeightRows) of_lane[i] = load(from + i * 32);
    }
  }
  // Of row `eighth`, a multiple of 8, plus g. All lanes call it.
  __device__ __forceinline__ float of_row(int eighth, int g) const {
    return __shfl_sync(~0u, of_lane[eighth / 32], eighth % 32 + g);
  }

 private:
  // volatile, so that it stays before the main loop.
  static __device__ __forceinline__ float load(const float* from) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
  }
};

// acc -> codes and scales, for one warp; (m0, n0) is its place in the physical tile, amax the tile's shared table
// [parts][M]. All MMA warps call it.
template <class Shape, class Bias>
__device__ __forceinline__ void store_activated(float (&acc)[Shape::kFragM][Shape::kFragN][4],
                                                const Mxfp4MoeActivate& a, const Mxfp4MoeMTile& m_tile, int rows, int n,
                                                int tile_n0, int m0, int n0, int lane, uint32_t* amax,
                                                const Bias& early_bias) {
  constexpr bool kSwap = Shape::kSwap;
  // Fragments along the weight rows and along the activation rows; a group is 16 weight rows, 8 outputs.
  constexpr int kGroups = kSwap ? Shape::kFragM : Shape::kFragN / 2;
  constexpr int kActFrags = kSwap ? Shape::kFragN : Shape::kFragM;
  const int g = lane / 4, t = lane % 4;
  const int weight_row0 = kSwap ? m0 : n0, act_row0 = kSwap ? n0 : m0;
  const int part = weight_row0 / Shape::kWarpWeightRows;
  const bool in_range = tile_n0 + weight_row0 < n;  // of the whole warp: n is whole blocks
  const float* bias = a.bias == nullptr ? nullptr : a.bias + static_cast<int64_t>(m_tile.expert) * n;
  const auto rounding = static_cast<Rounding>(a.rounding);
  Numbers numbers = kSwigluNumbers;
  if (a.activation != MXFP4_MOE_SWIGLU)
    numbers = {of_expert(a.alpha, m_tile.expert), of_expert(a.beta, m_tile.expert), of_expert(a.limit, m_tile.expert)};
  const int col0 = tile_n0 + weight_row0;
  const int valid = m_tile.row_end - m_tile.row_begin;
  // Fragments without a row are skipped where tiles are wide; elsewhere asking costs more than it saves.
  const auto is_empty = [&](int f) { return Shape::kReadsHalves && f * 8 >= valid; };
  const auto round_all = [&] {
#pragma unroll
    for (int i = 0; i < Shape::kFragM; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kFragN; ++j) {
#pragma unroll
        for (int x = 0; x < 4; ++x) acc[i][j][x] = round_to(rounding, acc[i][j][x]);
      }
    }
  };
  if (rounding != Rounding::kNone) round_all();

  // The activation of group q, fragment f, activation row x: accumulators of the gate, where it stays, and of the up.
  // Swapped, a lane holds output g of activation rows 2t and 2t + 1; native, outputs 2t and 2t + 1 of rows g and g + 8.
  const auto value = [&](int q, int f, int row, int out) -> float& {
    if constexpr (kSwap) {
      return acc[q][f][row];
    } else {
      return acc[f][2 * q][2 * row + out];
    }
  };
  constexpr int kOuts = kSwap ? 1 : 2;
  // apply(gate, up, their biases) for every output; what it makes of the gate is the output.
  const auto for_each_output = [&](const auto& apply) {
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      float gate_bias[kOuts] = {}, up_bias[kOuts] = {};
      if constexpr (Bias::kIsEarly) {
        gate_bias[0] = early_bias.of_row(q * 16, g);
        up_bias[0] = early_bias.of_row(q * 16 + 8, g);
      } else if (bias != nullptr && in_range) {
#pragma unroll
        for (int o = 0; o < kOuts; ++o) {
          const float* at = bias + col0 + q * 16 + (kSwap ? g : 2 * t + o);
          gate_bias[o] = __ldg(at);
          up_bias[o] = __ldg(at + 8);
        }
      }
#pragma unroll
      for (int f = 0; f < kActFrags; ++f) {
        if (is_empty(f)) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int o = 0; o < kOuts; ++o) {
            float& up = kSwap ? acc[q][f][2 + r] : acc[f][kSwap ? 0 : 2 * q + 1][2 * r + o];
            apply(value(q, f, r, o), up, gate_bias[o], up_bias[o]);
          }
        }
      }
    }
  };
  if (a.activation <= MXFP4_MOE_SWIGLU_OAI) {
    for_each_output([&](float& gate, float& up, float gate_bias, float up_bias) {
      gate = swiglu_oai(gate + gate_bias, up + up_bias, numbers);
    });
  } else {
    for_each_output([](float& gate, float& up, float gate_bias, float up_bias) {
      gate += gate_bias;
      up += up_bias;
    });
    activate_in_turns<kSwap>(acc, a.activation == MXFP4_MOE_SITU, numbers);
  }

  if (rounding != Rounding::kNone) round_all();

  if constexpr (Shape::kActFormat == MXFP4_MOE_ACT_MXFP4 || Shape::kActFormat == MXFP4_MOE_ACT_NVFP4) {
    const auto output = [&](int q, int f, int row) { return value(q, f, row, 0); };
    store_fp4<Shape>(output, a, m_tile, rows, n, tile_n0, m0, n0, lane, amax);
    return;
  }

  const int intermediate = n / 2;
  // Rows 2t and 2t + 1 of output g to outputs 2t and 2t + 1 of row g, which stand side by side. All lanes call it.
  const auto store_halves = [&](int f, int q, uint32_t pair) {
    const uint32_t outs = transpose_8x8(pair);
    const int row = act_row0 + f * 8 + g;
    if (row < valid && in_range)
      *reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(a.rows) +
                                   static_cast<int64_t>(m_tile.row_begin + row) * intermediate + col0 / 2 + q * 8 +
                                   2 * t) = outs;
  };
  if constexpr (Shape::kReadsHalves) {
    static_assert(kSwap);
    if (!Shape::kFolds || a.format == Shape::kActFormat) {
#pragma unroll
      for (int f = 0; f < kActFrags; ++f) {
        if (is_empty(f)) continue;
#pragma unroll
        for (int q = 0; q < kGroups; ++q) {
          const float low = value(q, f, 0, 0), high = value(q, f, 1, 0);
          store_halves(f, q, Shape::kHasFp16 ? fp16_pair(low, high) : bf16_pair(low, high));
        }
      }
      return;
    }
    if constexpr (Shape::kFolds) {
      const auto output = [&](int q, int f, int row) { return value(q, f, row, 0); };
      if (folds_fp4<Shape>(a))
        store_folded_fp4<Shape>(output, store_halves, a, m_tile, m0, n0, lane, amax);
      else
        store_folded_mxfp8<Shape>(output, store_halves, m_tile, m0, n0, lane, amax);
    }
    return;
  }

  const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(Shape::kMmaWarps * 32) : "memory"); };
  const auto act_row = [&](int f, int r) { return act_row0 + (kSwap ? f * 8 + 2 * t + r : f * 16 + 8 * r + g); };
  sync();  // all have read the table of the output tile before
#pragma unroll
  for (int f = 0; f < kActFrags; ++f) {
    if (is_empty(f)) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t largest = 0;
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
#pragma unroll
        for (int o = 0; o < kOuts; ++o) largest = max(largest, magnitude(value(q, f, r, o)));
      }
      largest = kSwap ? max_over_lanes<4, 3>(largest) : max_over_lanes<1, 2>(largest);
      if (kSwap ? g == 0 : t == 0) amax[part * Shape::M + act_row(f, r)] = largest;
    }
  }
  sync();
  if (!in_range) return;

  constexpr int kPartsPerBlock = 64 / Shape::kWarpWeightRows;
  const int block = col0 / 64, out_in_block = col0 % 64 / 2;
#pragma unroll
  for (int f = 0; f < kActFrags; ++f) {
    if (is_empty(f)) continue;
    uint32_t largest[2], scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = act_row(f, r);
      largest[r] = 0;
#pragma unroll
      for (int i = 0; i < kPartsPerBlock; ++i)
        largest[r] = max(largest[r], amax[(part / kPartsPerBlock * kPartsPerBlock + i) * Shape::M + row]);
      scale[r] = mx_scale(largest[r]);
      if (part % kPartsPerBlock == 0 && (kSwap ? g == 0 : t == 0) && row < valid) {
        const int64_t at = act_scale_offset(m_tile.row_begin + row, block, rows);
        a.scales[at] = static_cast<uint8_t>(scale[r]);
        if (block == intermediate / 32 - 1)  // the word's bytes past K are zero
          for (int pad = block % 4 + 1; pad < 4; ++pad) a.scales[at + pad - block % 4] = 0;
      }
    }
    const auto store_word = [&](int row, int parity, int out, uint32_t word) {
      if (row < valid)
        *reinterpret_cast<uint32_t*>(a.rows + static_cast<int64_t>(m_tile.row_begin + row) * intermediate + block * 32 +
                                     parity * 16 + (out_in_block + out) / 2) = word;
    };
    if constexpr (kSwap) {
      // Two groups at a time; a lane's bytes: row 0 of both, row 1 of both. Four lanes g = 2 * number + parity
      // exchange.
      const int number = g / 2, parity = g % 2;
#pragma unroll
      for (int q = 0; q < kGroups; q += 2) {
        uint32_t bytes[2];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          bytes[r] = mx_codes(largest[r], scale[r], value(q, f, r, 0),
                              q + 1 < kGroups ? value(min(q + 1, kGroups - 1), f, r, 0) : 0.f, 0.f, 0.f);
        const uint32_t word = transpose_bytes<8>(__byte_perm(bytes[0], bytes[1], 0x5410), number);
        if (q + number % 2 < kGroups) store_word(act_row(f, number / 2), parity, (q + number % 2) * 8, word);
      }
    } else {
      // A lane's bytes: even and odd output of group 0, then of group 1. The four lanes of a quad exchange.
      static_assert(kSwap || kGroups == 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t bytes = mx_codes(largest[r], scale[r], value(0, f, r, 0), value(0, f, r, kOuts - 1),
                                        value(kGroups - 1, f, r, 0), value(kGroups - 1, f, r, kOuts - 1));
        store_word(act_row(f, r), t % 2, t / 2 * 8, transpose_bytes<1>(bytes, t));
      }
    }
  }
}

}  // namespace mxfp4_moe
