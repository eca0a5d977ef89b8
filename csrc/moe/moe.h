// The four kernels around the two grouped GEMMs, as host functions: arguments in, launch error out.
//
// Everything here is asynchronous on the given stream, reads no device memory from the host and sizes its grids from
// shapes alone, so that a CUDA graph captures it. Callers (ops.cpp) have checked shapes, dtypes and alignment.
// Letters: T tokens, k experts per token, R = T * k slots and rows, E experts, H hidden, I intermediate.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../tile_abi.h"

namespace mxfp4_moe {

constexpr int kMaxExperts = 1024;
constexpr int kScaleBlock = 32;  // OCP MX: values under one E8M0 scale

// Values as in Mxfp4MoeOutType, because the layer's input and output dtype are the same.
enum class HalfType : int { kBFloat16 = MXFP4_MOE_OUT_BFLOAT16, kFloat16 = MXFP4_MOE_OUT_FLOAT16 };

enum class Activation : int { kSwiglu = 0, kSwigluOai = 1 };

struct RouteArgs {
  const void* topk_ids;  // [slots], int64 if ids_are_int64, else int32; slot = token * k + j
  bool ids_are_int64;
  int32_t slots;
  int32_t experts;  // 1 to kMaxExperts
  int32_t tile_m;
  int32_t* expert_offsets;  // [experts + 1]
  int32_t* row_slot;        // [slots], -1 past the valid rows
  int32_t* slot_row;        // [slots], -1 for slots whose id is no expert
  int32_t* row_expert;      // [slots], -1 past the valid rows
  Mxfp4MoeMTile* m_tiles;   // [max_m_tiles(slots, experts, tile_m)]
  int32_t* num_m_tiles;     // [1]
};
cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream);

struct QuantizePermuteArgs {
  const void* hidden;  // [T, hidden_size] of type, 16-byte aligned
  HalfType type;
  const int32_t* row_slot;    // [rows]
  const int32_t* valid_rows;  // device memory, one value: expert_offsets[E]
  int32_t rows;
  int32_t top_k;
  int32_t hidden_size;  // multiple of 32
  uint8_t* codes;       // [rows, hidden_size], even k first
  uint8_t* scales;      // [ceil(hidden_size / 128), rows padded to 4, 4]
};
cudaError_t launch_quantize_permute(const QuantizePermuteArgs& args, cudaStream_t stream);

struct ActivationArgs {
  const float* gemm1;         // [rows, 2 * intermediate], groups of 8 gates and 8 ups
  const float* bias;          // [E, 2 * intermediate] in the same order, or nullptr
  const int32_t* row_expert;  // [rows]
  const int32_t* valid_rows;  // device memory, one value
  int32_t rows;
  int32_t intermediate;  // multiple of 32
  Activation activation;
  float alpha, beta, limit;  // of kSwigluOai; limit = +inf when there is none
  uint8_t* codes;            // [rows, intermediate], even k first
  uint8_t* scales;           // [ceil(intermediate / 128), rows padded to 4, 4]
};
cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream);

struct FinalizeArgs {
  const void* gemm2;  // [rows, hidden_size] of type
  HalfType type;
  const float* bias;          // [E, hidden_size] or nullptr
  const float* topk_weights;  // [tokens, top_k]
  const int32_t* slot_row;    // [tokens * top_k]
  const int32_t* row_expert;  // [rows]
  int32_t tokens;
  int32_t top_k;
  int32_t hidden_size;  // multiple of 32
  void* out;            // [tokens, hidden_size] of type, 16-byte aligned
};
cudaError_t launch_finalize(const FinalizeArgs& args, cudaStream_t stream);

}  // namespace mxfp4_moe
