// The kernels around the two grouped GEMMs, and the router's, as host functions: arguments in, launch error out.
//
// Everything here is asynchronous on the given stream, reads no device memory from the host and sizes its grids from
// shapes alone, so that a CUDA graph captures it. Callers (layer.cpp, operators.cpp) have checked shapes, dtypes and
// alignment. Letters: T tokens, k experts per token, R = T * k slots and rows, E experts, H hidden, I intermediate.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "emulation.h"
#include "shared/nonlinearities.cuh"
#include "shared/per_device.h"
#include "shared/scale_layout.cuh"
#include "tile_abi.h"

namespace mxfp4_moe {

constexpr int kMaxExperts = 1024;
constexpr int kScaleBlock = 32;  // OCP MX: values under one E8M0 scale

constexpr int kMaxTopK = 32;  // of the routers' kernels; a layer takes any

// Values as in Mxfp4MoeOutType.
enum class HalfType : int { kBFloat16 = MXFP4_MOE_OUT_BFLOAT16, kFloat16 = MXFP4_MOE_OUT_FLOAT16 };

// In what GEMM2 writes its rows. A row beyond fp16's range may have a weight with which the sum is in it, so rows of an
// fp16 output stay fp32 until they are added.
constexpr Mxfp4MoeOutType row_type(HalfType out) {
  return out == HalfType::kFloat16 ? MXFP4_MOE_OUT_FLOAT32 : MXFP4_MOE_OUT_BFLOAT16;
}
constexpr int row_value_bytes(HalfType out) { return row_type(out) == MXFP4_MOE_OUT_FLOAT32 ? 4 : 2; }

enum class LogitsType : int { kFloat32, kBFloat16, kFloat16 };

struct TopkSoftmaxArgs {
  const void* logits;  // [tokens, experts] of type
  LogitsType type;
  int32_t tokens;
  int32_t experts;      // 1 to kMaxExperts
  int32_t top_k;        // 1 to min(experts, kMaxTopK)
  bool renormalize;     // softmax over the chosen, else over all
  float* topk_weights;  // [tokens, top_k]
  int32_t* topk_ids;    // [tokens, top_k]
};
cudaError_t launch_topk_softmax(const TopkSoftmaxArgs& args, cudaStream_t stream);

// Values as in the package's routers.py.
enum class ScoringFunc : int { kSoftmax, kSigmoid, kSqrtSoftplus };
constexpr int kNumScoringFuncs = 3;
enum class GroupScore : int { kTop2Sum, kMax };
constexpr int kMaxExpertGroups = 32;
enum class GivenIds : int { kNone, kInt32, kInt64 };

// Any router (topk_experts.cu).
struct TopkExpertsArgs {
  TopkSoftmaxArgs choice;
  ScoringFunc scoring_func;
  const float* bias;         // e_score_correction_bias [experts], or null
  int32_t num_expert_group;  // 1, or up to kMaxExpertGroups of experts / num_expert_group each
  int32_t topk_group;        // 1 to num_expert_group, with top_k experts at least
  GroupScore group_score;
  float routed_scaling_factor;
  GivenIds given;         // kNone: to choose
  const void* given_ids;  // [tokens, top_k]: whose weights are asked for
};
// Whether topk_softmax.cu says the same, faster.
inline bool is_topk_softmax(const TopkExpertsArgs& args) {
  return args.scoring_func == ScoringFunc::kSoftmax && args.bias == nullptr && args.num_expert_group == 1 &&
         args.routed_scaling_factor == 1.0f && args.given == GivenIds::kNone;
}
cudaError_t launch_topk_experts(const TopkExpertsArgs& args, cudaStream_t stream);

struct RouteArgs {
  const void* topk_ids;  // [slots], int64 if ids_are_int64, else int32; slot = token * k + j
  bool ids_are_int64;
  int32_t slots;
  int32_t experts;       // 1 to kMaxExperts
  int32_t first_expert;  // the id of expert 0: ids from here to first_expert + experts - 1 count
  int32_t tile_m;
  int32_t* expert_offsets;  // [experts + 1], or null
  int32_t* row_slot;        // [slots], -1 past the valid rows; or null
  int32_t* slot_row;        // [slots], -1 for slots whose id is no expert
  int32_t* row_expert;      // [slots], -1 past the valid rows
  int32_t* valid_rows;      // [1]
  Mxfp4MoeMTile* m_tiles;   // [max_m_tiles(slots, experts, tile_m)]
  int32_t* num_m_tiles;     // [1]
  int32_t most_blocks;      // of a cluster; 1 where clusters are not to be used
};
// How many blocks every GPU that has clusters can run as one.
constexpr int kPortableClusterBlocks = 8;
// Clusters are for GPUs on which they have run; elsewhere one block routes, as it does everywhere for few slots.
inline int32_t most_cluster_blocks(int32_t device) {
  return compute_capability_major(device) == 9 && !kEmulatesSm12x ? kPortableClusterBlocks : 1;
}
cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream);
// The same for at most kFewSlots, faster; launch_route calls it.
constexpr int kFewSlots = 128;
cudaError_t launch_route_few(const RouteArgs& args, cudaStream_t stream);

// launch_topk_experts and launch_route, in one kernel up to kFewSlots; its ids need no memory then. args.topk_ids are
// choice's, int32. A router without given_ids.
// With experts on several GPUs, choice.experts is the number of all and args.experts that of these.
cudaError_t launch_topk_route(const TopkExpertsArgs& router, const RouteArgs& args, cudaStream_t stream);
// The same for at most kFewSlots and, of topk_softmax, 256 experts; launch_topk_route calls it.
cudaError_t launch_topk_route_few(const TopkExpertsArgs& router, const RouteArgs& args, cudaStream_t stream);

// To what a layer's activations are brought before each GEMM; formats/weight_layout.py has the names in this order.
enum class ActivationFormat : int { kMxfp8, kBf16, kMxfp4, kNvfp4, kFp16 };
constexpr int kNumActivationFormats = 5;

// What the rows that a GEMM reads are.
enum class RowFormat : int {
  kMxfp8,        // E4M3 codes, even k first, and their scales
  kMxfp8InBf16,  // the same values, codes times scales, as bf16 (shared/bf16_rows.cuh)
  kBf16,         // as they came, rounded to bf16
  kMxfp4,        // E2M1 codes, two to a byte, low nibble = even k, and their E8M0 scales
  kNvfp4,        // the same under E4M3 scales of 16 values, after a global scale (GlobalScales)
  kMxfp4InBf16,  // the values of these two, codes times scales, as bf16 (shared/folded_fp4.cuh); the global scale is
  kNvfp4InBf16,  // not among them
  kFp16,         // as they came, rounded to fp16
};
constexpr int kNumRowFormats = 8;
constexpr bool is_mxfp4(RowFormat rows) { return rows == RowFormat::kMxfp4 || rows == RowFormat::kMxfp4InBf16; }
constexpr bool is_nvfp4(RowFormat rows) { return rows == RowFormat::kNvfp4 || rows == RowFormat::kNvfp4InBf16; }
constexpr bool is_packed(RowFormat rows) { return rows == RowFormat::kMxfp4 || rows == RowFormat::kNvfp4; }
constexpr bool has_codes(RowFormat rows) { return rows == RowFormat::kMxfp8 || is_packed(rows); }

// NVFP4's global scales: what a row is multiplied by before it is quantized. Rows of an expert have that of the
// checkpoint; where it has none, each row its own, 2688 / amax, whose reciprocal its kernel leaves in row_factors.
struct GlobalScales {
  const float* of_experts;    // [E], or null
  const int32_t* row_expert;  // [rows], where of_experts is not null
  float* row_factors;         // [rows], where of_experts is null
};

struct QuantizePermuteArgs {
  const void* hidden;  // [T, hidden_size] of type, 16-byte aligned
  HalfType type;
  const int32_t* slot_row;  // [T * top_k], -1 for slots without a row
  int32_t tokens;
  int32_t top_k;
  int32_t hidden_size;  // multiple of 32
  RowFormat format;
  uint8_t* rows;    // [T * top_k, hidden_size]
  uint8_t* scales;  // [ceil(hidden_size / 128), T * top_k padded to 4, 4], of kMxfp8 and kMxfp4; of kNvfp4 twice
  GlobalScales global_scales;  // where is_nvfp4(format)
  bool hidden_is_ready;        // written by a kernel that was complete when the one just before this was running
};
cudaError_t launch_quantize_permute(const QuantizePermuteArgs& args, cudaStream_t stream);
cudaError_t launch_nvfp4_permute(const QuantizePermuteArgs& args, cudaStream_t stream);  // for is_nvfp4

// Rows that are MXFP8 already: gathered into expert order, k reordered, scales repacked.
struct PermuteArgs {
  const uint8_t* hidden;        // [T, hidden_size] E4M3, plain k order, 16-byte aligned
  const uint8_t* hidden_scale;  // E8M0: [T, hidden_size / 32], or 128x4-swizzled with T padded to 128
  bool scale_is_swizzled;
  const int32_t* slot_row;  // [T * top_k], -1 for slots without a row
  int32_t tokens;
  int32_t top_k;
  int32_t hidden_size;  // multiple of 32
  RowFormat format;     // kMxfp8 or kMxfp8InBf16
  uint8_t* rows;        // [T * top_k, hidden_size]
  uint8_t* scales;      // [ceil(hidden_size / 128), T * top_k padded to 4, 4], of kMxfp8
};
cudaError_t launch_permute(const PermuteArgs& args, cudaStream_t stream);

struct ActivationArgs {
  const float* gemm1;         // [rows, 2 * intermediate], groups of 8 gates and 8 ups; not gated: [rows, intermediate]
  const float* bias;          // [E, 2 * intermediate] or [E, intermediate] in the same order, or nullptr
  const int32_t* row_expert;  // [rows]
  const int32_t* valid_rows;  // device memory, one value
  int32_t rows;
  int32_t intermediate;  // multiple of 32
  Activation activation;
  Rounding rounding;      // of gemm1's values before the bias, and of the activation's
  PerExpert alpha, beta;  // of kSwigluOai; beta of kSitu too
  PerExpert limit;        // of all that have_numbers; +inf when there is none
  RowFormat format;
  uint8_t* out;                // [rows, intermediate]
  uint8_t* scales;             // [ceil(intermediate / 128), rows padded to 4, 4], of kMxfp8 and kMxfp4; of kNvfp4 twice
  GlobalScales global_scales;  // where is_nvfp4(format)
};
cudaError_t launch_activation(const ActivationArgs& args, cudaStream_t stream);
cudaError_t launch_fp4_activation(const ActivationArgs& args, cudaStream_t stream);  // it calls this one for FP4 rows

struct FinalizeArgs {
  const void* gemm2;          // [rows, hidden_size] of row_type(type)
  HalfType type;              // of out
  const float* bias;          // [E, hidden_size] or nullptr
  const float* topk_weights;  // [tokens, top_k]
  const int32_t* slot_row;    // [tokens * top_k]
  const int32_t* row_expert;  // [rows]
  int32_t experts;            // E, where there are biases
  int32_t tokens;
  int32_t top_k;
  int32_t hidden_size;  // multiple of 32
  void* out;            // [tokens, hidden_size] of type, 16-byte aligned
};
cudaError_t launch_finalize(const FinalizeArgs& args, cudaStream_t stream);
// The same with biases, faster where there are many rows: launch_finalize asks, and calls it.
bool finalizes_by_strips(const FinalizeArgs& args);
cudaError_t launch_finalize_strips(const FinalizeArgs& args, cudaStream_t stream);

// MXFP8 rows for callers outside of the layer (python/mxfp4_moe/flashinfer_api), in plain k order.
enum class QuantizeInput : int { kFloat32, kBFloat16, kFloat16 };
enum class ScaleLayout : int { k128x4, k8x4, kLinear };  // FlashInfer's numbers

struct Mxfp8QuantizeArgs {
  const void* x;  // [rows, k] of input, 16-byte aligned
  QuantizeInput input;
  ScaleLayout layout;
  int64_t rows;
  int32_t k;         // multiple of 32
  int32_t padded_k;  // multiple of 32, at least k
  uint8_t* codes;    // [rows, padded_k]
  uint8_t* scales;   // [rows, padded_k / 32]; or tiles of 128 or 8 rows by four blocks, padded to whole ones
};
cudaError_t launch_mxfp8_quantize(const Mxfp8QuantizeArgs& args, cudaStream_t stream);

// The same of FP4: NVFP4 where a global scale is given, else MXFP4.
struct Fp4QuantizeArgs {
  const void* x;  // [rows, k] of type, 16-byte aligned
  HalfType type;
  ScaleLayout layout;
  int64_t rows;
  int32_t k;                  // multiple of 32, of NVFP4 of 16
  const float* global_scale;  // device memory, one value; or null
  uint8_t* codes;             // [rows, k / 2]
  uint8_t* scales;            // as Mxfp8QuantizeArgs', for blocks of 32 or 16 values
};
cudaError_t launch_fp4_quantize(const Fp4QuantizeArgs& args, cudaStream_t stream);

}  // namespace mxfp4_moe
