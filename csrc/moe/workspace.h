// Where one call's intermediates live: offsets into a single allocation, from shapes alone.
//
// bytes = 2 * 4 R + 16 max_m_tiles + 4 + 4                       routing
//       + max(rows of GEMM1, B R H)                              which GEMM2's output overwrites
//       + rows of GEMM2
//       + 4 R N1, only where GEMM1 does not activate             GEMM1's output, fp32
//       + 8 R, only where the layer starts from logits           topk_ids and topk_weights
//       + 8 R, only where each row has a scale of its own        row_factors1 and row_factors2
// Rows of K values are R K + 4 ceil(K/128) R4 bytes as MXFP8, 2 R K as bf16 or fp16, R K / 2 + 4 ceil(K/128) R4 as
// MXFP4 and R K / 2 + 8 ceil(K/128) R4 as NVFP4. B is 2, or 4 where the layer's output is fp16 (kernels.h, row_type).
// R4 is R padded to 4; N1 is GEMM1's width, 2I when the activation is gated and I when it is not; each term is rounded
// up to 256 (slot_row and so on are terms of their own). The rows that GEMM1 reads are dead when GEMM2 writes, so the
// two share their bytes.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "shared/scale_layout.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

constexpr int64_t kWorkspaceAlignment = 256;  // TMA needs 16; 256 is what torch's allocator gives

// Bytes of rows of k values, without their scales.
inline int64_t row_bytes(int32_t act_format, int64_t rows, int64_t k) {
  switch (act_format) {
    case MXFP4_MOE_ACT_MXFP8:
      return rows * k;
    case MXFP4_MOE_ACT_BF16:
    case MXFP4_MOE_ACT_FP16:
      return rows * k * 2;
    default:
      return rows * k / 2;
  }
}

// Scale words of a row in a K tile: of blocks of 32, of NVFP4 of 16; bf16 and fp16 have none.
inline int64_t row_scale_words(int32_t act_format) {
  switch (act_format) {
    case MXFP4_MOE_ACT_BF16:
    case MXFP4_MOE_ACT_FP16:
      return 0;
    case MXFP4_MOE_ACT_NVFP4:
      return 2;
    default:
      return 1;
  }
}

struct Workspace {
  int64_t slot_row, row_expert, m_tiles, num_m_tiles, valid_rows, topk_ids, topk_weights;
  int64_t rows1, scales1, rows2, scales2, gemm1_out, gemm2_out, row_factors1, row_factors2;
  int64_t bytes;

  struct Shape {
    int64_t slots, hidden, intermediate, max_m_tiles;
    int64_t gemm1_width;  // of GEMM1's output in memory, 0 when there is none
    bool from_logits;
    int32_t act_format;       // Mxfp4MoeActFormat: what the GEMMs read
    int64_t row_value_bytes;  // of GEMM2's output
    bool row_factors;         // of NVFP4 rows whose global scales are their own
  };

  explicit Workspace(const Shape& s) {
    bytes = 0;
    const auto take = [this](int64_t size) {
      const int64_t offset = bytes;
      bytes += (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
      return offset;
    };
    slot_row = take(s.slots * 4);
    row_expert = take(s.slots * 4);
    m_tiles = take(s.max_m_tiles * static_cast<int64_t>(sizeof(Mxfp4MoeMTile)));
    num_m_tiles = take(4);
    valid_rows = take(4);
    topk_ids = take(s.from_logits ? s.slots * 4 : 0);
    topk_weights = take(s.from_logits ? s.slots * 4 : 0);
    gemm2_out = bytes;
    const auto take_rows = [&](int64_t k, int64_t& rows, int64_t& scales) {
      rows = take(row_bytes(s.act_format, s.slots, k));
      scales = take(row_scale_words(s.act_format) * act_scale_bytes(s.slots, k));
    };
    take_rows(s.hidden, rows1, scales1);
    take(std::max<int64_t>(0, gemm2_out + s.slots * s.hidden * s.row_value_bytes - bytes));
    take_rows(s.intermediate, rows2, scales2);
    gemm1_out = take(s.slots * s.gemm1_width * 4);
    row_factors1 = take(s.row_factors ? s.slots * 4 : 0);
    row_factors2 = take(s.row_factors ? s.slots * 4 : 0);
  }
};

}  // namespace mxfp4_moe
