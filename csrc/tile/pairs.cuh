// The pairs of formats that kernels read, each as a type, weights first: tile.cu is compiled once for each pair of an
// arch (-DMXFP4_MOE_PAIR=mxfp4_bf16). tile_manifest.toml says which pairs a profile has, tiles/pairs.py what an arch's
// kernels read for them.
#pragma once

namespace mxfp4_moe {

struct Pair_mxfp4_mxfp8 {};  // both with their scales, for MMAs that take scales
struct Pair_mxfp4_bf16 {};   // weights expanded to bf16, their scale multiplied in
struct Pair_nvfp4_bf16 {};   // the same, and fp32 factors behind the sums

}  // namespace mxfp4_moe
