// Where one call's intermediates live: offsets into a single allocation, from shapes alone.
//
// bytes = 4 (E + 1) + 3 * 4 R + 16 max_m_tiles + 4                      routing
//       + R max(H, I) + 4 ceil(max(H, I) / 128) (R padded to 4)         MXFP8 rows and scales of GEMM1, then GEMM2
//       + max(4 R N1, 2 R H)                                            GEMM1 output fp32 [R, N1], then GEMM2's
// where N1 is GEMM1's width, 2I when the activation is gated and I when it is not,
// each term rounded up to 256 (expert_offsets and so on are terms of their own). The rows that GEMM1 reads are dead
// when the activation writes those that GEMM2 reads, and GEMM1's output is dead when GEMM2 writes, so each pair
// shares its bytes: nothing but the live intermediates is paid for.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../tile/scale_layout.cuh"
#include "../tile_abi.h"

namespace mxfp4_moe {

constexpr int64_t kWorkspaceAlignment = 256;  // TMA needs 16; 256 is what torch's allocator gives

struct Workspace {
  int64_t expert_offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles;
  int64_t codes, scales, gemm_out;
  int64_t bytes;

  Workspace(int64_t slots, int64_t experts, int64_t hidden, int64_t intermediate, int64_t gemm1_width,
            int64_t max_m_tiles) {
    bytes = 0;
    const auto take = [this](int64_t size) {
      const int64_t offset = bytes;
      bytes += (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
      return offset;
    };
    const int64_t widest = std::max(hidden, intermediate);
    expert_offsets = take((experts + 1) * 4);
    row_slot = take(slots * 4);
    slot_row = take(slots * 4);
    row_expert = take(slots * 4);
    m_tiles = take(max_m_tiles * static_cast<int64_t>(sizeof(Mxfp4MoeMTile)));
    num_m_tiles = take(4);
    codes = take(slots * widest);
    scales = take(act_scale_bytes(slots, widest));
    gemm_out = take(std::max(slots * gemm1_width * 4, slots * hidden * 2));
  }
};

}  // namespace mxfp4_moe
