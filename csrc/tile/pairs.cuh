// The pairs of formats that kernels read, each as a type, weights first: tile.cu is compiled once for each pair of an
// arch (-DMXFP4_MOE_PAIR=mxfp4_bf16). tile_manifest.toml says which pairs a profile has, tiles/pairs.py what an arch's
// kernels read for them.
#pragma once

#include "tile_abi.h"

namespace mxfp4_moe {

// Both with their scales, for MMAs that take scales.
template <int kWeights, int kActivations>
struct ScaledPair {
  static constexpr int kWeightFormat = kWeights, kActFormat = kActivations;
};
struct Pair_mxfp4_mxfp8 : ScaledPair<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_MXFP8> {};
struct Pair_mxfp4_mxfp4 : ScaledPair<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_MXFP4> {};
struct Pair_nvfp4_nvfp4 : ScaledPair<MXFP4_MOE_WEIGHT_NVFP4, MXFP4_MOE_ACT_NVFP4> {};

// Weights expanded to the rows' 16-bit floats, their scale multiplied in.
template <int kWeights, int kActivations>
struct HalfPair {
  static constexpr int kWeightFormat = kWeights, kActFormat = kActivations;
};
using Pair_mxfp4_bf16 = HalfPair<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_BF16>;
using Pair_nvfp4_bf16 = HalfPair<MXFP4_MOE_WEIGHT_NVFP4, MXFP4_MOE_ACT_BF16>;
using Pair_mxfp4_fp16 = HalfPair<MXFP4_MOE_WEIGHT_MXFP4, MXFP4_MOE_ACT_FP16>;
using Pair_nvfp4_fp16 = HalfPair<MXFP4_MOE_WEIGHT_NVFP4, MXFP4_MOE_ACT_FP16>;

}  // namespace mxfp4_moe
