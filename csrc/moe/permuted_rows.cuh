// A token's K tiles to the rows of all its experts, and the grid for it: quantize_permute.cu and permute.cu.
#pragma once

#include "moe/mx_rows.cuh"

namespace mxfp4_moe {

constexpr int kThreads = 128;
constexpr int kTilesPerBlock = kThreads / kLanesPerWord;
constexpr int kChoicesAtOnce = 4;

// Writes one K tile of kTokens tokens, from `token` on, `stride` apart, to each of their rows. kMxfp4 is the rows'
// format, which is known at compile time, so that the others' kernels are what they are without it.
template <bool kMxfp4 = false, int kTokens, typename Args>
__device__ __forceinline__ void store_to_rows(const KTile (&tiles)[kTokens], int64_t token, int64_t stride, int k_tile,
                                              const Args& args) {
  const RowsOut to = {args.format, args.rows, args.scales, int64_t{args.tokens} * args.top_k, args.hidden_size};
  for (int j0 = 0; j0 < args.top_k; j0 += kChoicesAtOnce) {
    int rows[kTokens][kChoicesAtOnce];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t of = token + t * stride;
#pragma unroll
      for (int j = 0; j < kChoicesAtOnce; ++j) {
        const bool is_one = of < args.tokens && j0 + j < args.top_k;
        rows[t][j] = is_one ? __ldcg(args.slot_row + of * args.top_k + j0 + j) : -1;
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int j = 0; j < kChoicesAtOnce; ++j) {
        if (rows[t][j] >= 0) {  // the same for the whole warp
          if constexpr (kMxfp4) {
            store_mxfp4_tile(tiles[t], rows[t][j], k_tile, to);
          } else {
            store_k_tile(tiles[t], rows[t][j], k_tile, to);
          }
        }
      }
    }
  }
}

template <typename Args>
inline dim3 grid_of(const Args& args, int tokens_at_once) {
  const int k_tiles = static_cast<int>(scale_k_tiles(args.hidden_size));
  const int of_tokens = (args.tokens + tokens_at_once - 1) / tokens_at_once;
  return dim3((k_tiles + kTilesPerBlock - 1) / kTilesPerBlock, of_tokens < kMaxGridY ? of_tokens : kMaxGridY);
}

}  // namespace mxfp4_moe
