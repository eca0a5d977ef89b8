// The torch operators of the layer (namespace mxfp4_moe), on torch's stable ABI alone.
//
// fused_moe runs a layer (layer.h). route, quantize_permute, permute, activation and finalize expose its parts to tests
// and benchmarks. route_topk and route_experts are the routers' kernels, topk_softmax.cu and topk_experts.cu, and
// mxfp8_quantize and fp4_quantize the drop-in's. register_tile takes the address of a loaded tile (tile_abi.h);
// fused_moe finds its GEMM there.
// Every argument is checked before anything is launched (checks.h). Nothing here synchronizes or reads device memory.
// Shapes and layouts: kernels.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "moe/checks.h"
#include "moe/kernels.h"
#include "moe/layer.h"
#include "moe/registry.h"
#include "shared/schedule.cuh"
#include "torch_args.h"

namespace mxfp4_moe {
namespace {

// The rare arguments come last, with defaults: what a caller passes from Python costs 0.1 to 0.2 us each, a default a
// fifth of that.
void fused_moe(const Tensor& hidden_states, const std::optional<Tensor>& topk_weights,
               const std::optional<Tensor>& topk_ids, const std::optional<Tensor>& router_logits, int64_t top_k,
               const Tensor& w13, const std::optional<Tensor>& w13_bias, const Tensor& w2,
               const std::optional<Tensor>& w2_bias, int64_t intermediate_size, int64_t activation, double alpha,
               double beta, double limit, int64_t tile_m, int64_t tile_n, const Tensor& out, bool renormalize,
               int64_t first_expert, const std::optional<Tensor>& alphas, const std::optional<Tensor>& betas,
               const std::optional<Tensor>& limits, const std::optional<Tensor>& hidden_states_scale,
               bool scale_is_swizzled, bool intermediate_rounding, int64_t activation_format,
               const std::optional<Tensor>& e_score_correction_bias, int64_t scoring_func, int64_t num_expert_group,
               int64_t topk_group, int64_t group_score, double routed_scaling_factor, int64_t weight_format,
               const std::optional<Tensor>& w13_factors, const std::optional<Tensor>& w2_factors,
               const std::optional<Tensor>& w13_input_factors, const std::optional<Tensor>& w2_input_factors,
               const std::optional<Tensor>& w13_input_global_scales,
               const std::optional<Tensor>& w2_input_global_scales) {
  const RouterRule router = {e_score_correction_bias, scoring_func, num_expert_group, topk_group, group_score,
                             routed_scaling_factor};
  // clang-format off
  run_layer({hidden_states, hidden_states_scale, scale_is_swizzled,
             topk_weights, topk_ids, router_logits, top_k, renormalize, router, first_expert,
             weight_format, w13, w13_bias, w2, w2_bias, intermediate_size,
             w13_factors, w2_factors, w13_input_factors, w2_input_factors,
             w13_input_global_scales, w2_input_global_scales,
             activation, alpha, beta, limit, alphas, betas, limits, intermediate_rounding,
             tile_m, tile_n, activation_format, out});
  // clang-format on
}

// ---- its parts, for tests and benchmarks --------------------------------------------------------------------------

// Returns expert_offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& topk_ids, int64_t num_experts,
                                                                 int64_t tile_m) {
  const int32_t device = device_of("topk_ids", topk_ids);
  RouteArgs args = {};
  args.ids_are_int64 = check_ids(topk_ids, device);
  args.slots = check_range("topk_ids.numel()", topk_ids.numel(), 0, kMaxSlots);
  args.experts = check_range("num_experts", num_experts, 1, kMaxExperts);
  args.tile_m = check_range("tile_m", tile_m, 1, kMaxTileM);
  const DeviceGuard guard(device);
  const Tensor expert_offsets = empty({num_experts + 1}, ScalarType::Int, device);
  const Tensor row_slot = empty({args.slots}, ScalarType::Int, device);
  const Tensor slot_row = empty({args.slots}, ScalarType::Int, device);
  const Tensor row_expert = empty({args.slots}, ScalarType::Int, device);
  const Tensor m_tiles = empty({max_m_tiles(args.slots, num_experts, tile_m), 4}, ScalarType::Int, device);
  const Tensor num_m_tiles = empty({1}, ScalarType::Int, device);
  const Tensor valid_rows = empty({1}, ScalarType::Int, device);  // the last of expert_offsets again
  args.topk_ids = topk_ids.data_ptr();
  args.expert_offsets = data<int32_t>(expert_offsets);
  args.row_slot = data<int32_t>(row_slot);
  args.slot_row = data<int32_t>(slot_row);
  args.row_expert = data<int32_t>(row_expert);
  args.valid_rows = data<int32_t>(valid_rows);
  args.m_tiles = data<Mxfp4MoeMTile>(m_tiles);
  args.num_m_tiles = data<int32_t>(num_m_tiles);
  args.most_blocks = most_cluster_blocks(device);
  check_launch("route", launch_route(args, current_stream(device)));
  return {expert_offsets, row_slot, slot_row, row_expert, m_tiles, num_m_tiles};
}

// Rows of the kernels that make them, and their scales, of which bf16 and fp16 rows have none.
std::tuple<Tensor, Tensor> empty_rows(RowFormat format, int64_t rows, int64_t k, int32_t device) {
  const ScalarType halves = format == RowFormat::kFp16 ? ScalarType::Half : ScalarType::BFloat16;
  const ScalarType type = has_codes(format) ? ScalarType::Byte : halves;
  // Of scales, of a row in a K tile.
  const int64_t words = !has_codes(format) ? 0 : format == RowFormat::kNvfp4 ? 2 : 1;
  return {empty({rows, is_packed(format) ? k / 2 : k}, type, device),
          empty({words * scale_k_tiles(k), act_scale_rows(rows), 4}, ScalarType::Byte, device)};
}
RowFormat check_row_format(int64_t format) {
  return static_cast<RowFormat>(check_range("rows", format, 0, kNumRowFormats - 1));
}

// The global scales of NVFP4 rows: of experts [E], beside the rows' experts [R]; or the rows' own, of which the factors
// that undo them are written to row_factors [R].
GlobalScales check_global_scales(RowFormat format, const std::optional<Tensor>& global_scales,
                                 const std::optional<Tensor>& row_expert, const std::optional<Tensor>& row_factors,
                                 int64_t rows, int32_t device) {
  const bool nvfp4 = is_nvfp4(format);
  const bool of_experts = nvfp4 && global_scales.has_value();
  GlobalScales scales = {};
  scales.of_experts =
      check_scales("global_scales", global_scales, of_experts, {of_experts ? global_scales->numel() : 0}, device);
  scales.row_factors =
      const_cast<float*>(check_scales("row_factors", row_factors, nvfp4 && !of_experts, {rows}, device));
  if (of_experts) {
    STD_TORCH_CHECK(row_expert.has_value(), "row_expert: expected a tensor with global_scales, got none");
    check_tensor("row_expert", *row_expert, ScalarType::Int, {rows}, device, kElementAlignment);
    scales.row_expert = data<const int32_t>(row_expert);
  }
  return scales;
}

// The number of valid rows is the last value of expert_offsets.
const int32_t* check_offsets(const Tensor& expert_offsets, int32_t device) {
  STD_TORCH_CHECK(expert_offsets.dim() == 1 && expert_offsets.numel() >= 2,
                  "expert_offsets: expected int32 [experts + 1], got ", describe(expert_offsets));
  check_tensor("expert_offsets", expert_offsets, ScalarType::Int, {expert_offsets.numel()}, device, kElementAlignment);
  return data<const int32_t>(expert_offsets) + expert_offsets.numel() - 1;
}

// Returns rows [R, H] and scales. rows: RowFormat.
std::tuple<Tensor, Tensor> quantize_permute(const Tensor& hidden_states, const Tensor& slot_row, int64_t top_k,
                                            int64_t rows, const std::optional<Tensor>& global_scales,
                                            const std::optional<Tensor>& row_expert,
                                            const std::optional<Tensor>& row_factors) {
  const int32_t device = device_of("hidden_states", hidden_states);
  QuantizePermuteArgs args = {};
  args.format = check_row_format(rows);
  args.type = check_half("hidden_states", hidden_states);
  check_placed("hidden_states", hidden_states, device);
  args.hidden_size = check_multiple_of_32("hidden size", hidden_states.size(1));
  args.top_k = check_range("top_k", top_k, 1, kMaxExperts);
  const int32_t slots = check_range("tokens * top_k", hidden_states.size(0) * top_k, 0, kMaxSlots);
  args.tokens = static_cast<int32_t>(hidden_states.size(0));
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  args.global_scales = check_global_scales(args.format, global_scales, row_expert, row_factors, slots, device);
  const DeviceGuard guard(device);
  const auto [made, scales] = empty_rows(args.format, slots, args.hidden_size, device);
  args.hidden = hidden_states.data_ptr();
  args.slot_row = data<const int32_t>(slot_row);
  args.rows = static_cast<uint8_t*>(made.data_ptr());
  args.scales = data<uint8_t>(scales);
  check_launch("quantize-permute", launch_quantize_permute(args, current_stream(device)));
  return {made, scales};
}

// The same of hidden_states that are MXFP8: uint8 E4M3 [T, H] and their scales.
std::tuple<Tensor, Tensor> permute(const Tensor& hidden_states, const Tensor& hidden_states_scale,
                                   bool scale_is_swizzled, const Tensor& slot_row, int64_t top_k, int64_t rows) {
  const int32_t device = device_of("hidden_states", hidden_states);
  PermuteArgs args = {};
  args.format = check_row_format(rows);
  STD_TORCH_CHECK(args.format == RowFormat::kMxfp8 || args.format == RowFormat::kMxfp8InBf16,
                  "rows: expected 0 or 1, these are quantized, got ", rows);
  check_mxfp8(hidden_states, hidden_states_scale, scale_is_swizzled, device);
  args.hidden_size = check_multiple_of_32("hidden size", hidden_states.size(1));
  args.top_k = check_range("top_k", top_k, 1, kMaxExperts);
  const int32_t slots = check_range("tokens * top_k", hidden_states.size(0) * top_k, 0, kMaxSlots);
  args.tokens = static_cast<int32_t>(hidden_states.size(0));
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  const DeviceGuard guard(device);
  const auto [made, scales] = empty_rows(args.format, slots, args.hidden_size, device);
  args.hidden = data<const uint8_t>(hidden_states);
  args.hidden_scale = data<const uint8_t>(hidden_states_scale);
  args.scale_is_swizzled = scale_is_swizzled;
  args.slot_row = data<const int32_t>(slot_row);
  args.rows = static_cast<uint8_t*>(made.data_ptr());
  args.scales = data<uint8_t>(scales);
  check_launch("permute", launch_permute(args, current_stream(device)));
  return {made, scales};
}

// Returns rows [R, I] and scales. rows: RowFormat; rounding: 0 for none, else an Mxfp4MoeOutType.
std::tuple<Tensor, Tensor> activation(const Tensor& gemm1, const Tensor& row_expert, const Tensor& expert_offsets,
                                      const std::optional<Tensor>& w13_bias, int64_t activation, double alpha,
                                      double beta, double limit, const std::optional<Tensor>& alphas,
                                      const std::optional<Tensor>& betas, const std::optional<Tensor>& limits,
                                      int64_t rounding, int64_t rows, const std::optional<Tensor>& global_scales,
                                      const std::optional<Tensor>& row_factors) {
  const int32_t device = device_of("gemm1", gemm1);
  ActivationArgs args = {};
  args.format = check_row_format(rows);
  args.activation = check_activation(activation);
  args.rounding =
      static_cast<Rounding>(check_range("rounding", rounding, MXFP4_MOE_OUT_FLOAT32, MXFP4_MOE_OUT_FLOAT16));
  const int64_t widths = is_gated(args.activation) ? 2 : 1;
  STD_TORCH_CHECK(gemm1.dim() == 2, "gemm1: expected float32 [rows, ", widths, " * intermediate], got ",
                  describe(gemm1));
  args.rows = check_range("rows", gemm1.size(0), 0, kMaxSlots);
  args.intermediate = check_multiple_of_32("intermediate size", gemm1.size(1) / widths);
  check_tensor("gemm1", gemm1, ScalarType::Float, {args.rows, widths * args.intermediate}, device);
  check_tensor("row_expert", row_expert, ScalarType::Int, {args.rows}, device, kElementAlignment);
  args.valid_rows = check_offsets(expert_offsets, device);
  const int64_t experts = expert_offsets.numel() - 1;
  if (w13_bias.has_value()) {
    check_tensor("w13_bias", *w13_bias, ScalarType::Float, {experts, widths * args.intermediate}, device);
  }
  args.alpha = check_number("alpha", alpha, alphas, experts, device);
  args.beta = check_number("beta", beta, betas, experts, device);
  args.limit = check_number("limit", limit, limits, experts, device);
  args.global_scales = check_global_scales(args.format, global_scales, row_expert, row_factors, args.rows, device);
  const DeviceGuard guard(device);
  const auto [made, scales] = empty_rows(args.format, args.rows, args.intermediate, device);
  args.gemm1 = data<const float>(gemm1);
  args.bias = data<const float>(w13_bias);
  args.row_expert = data<const int32_t>(row_expert);
  args.out = static_cast<uint8_t*>(made.data_ptr());
  args.scales = data<uint8_t>(scales);
  check_launch("activation", launch_activation(args, current_stream(device)));
  return {made, scales};
}

// Returns out [T, H]: bfloat16 of bfloat16 rows, float16 of float32 rows.
Tensor finalize(const Tensor& gemm2, const Tensor& slot_row, const Tensor& row_expert, const Tensor& topk_weights,
                const std::optional<Tensor>& w2_bias) {
  const int32_t device = device_of("gemm2", gemm2);
  STD_TORCH_CHECK(topk_weights.dim() == 2, "topk_weights: expected float32 [tokens, top_k], got ",
                  describe(topk_weights));
  const int64_t tokens = topk_weights.size(0), top_k = topk_weights.size(1);
  FinalizeArgs args = {};
  const ScalarType row_type = gemm2.scalar_type();
  STD_TORCH_CHECK((row_type == ScalarType::BFloat16 || row_type == ScalarType::Float) && gemm2.dim() == 2,
                  "gemm2: expected bfloat16, or float32 for a float16 output, with 2 dimensions, got ",
                  describe(gemm2));
  args.type = row_type == ScalarType::BFloat16 ? HalfType::kBFloat16 : HalfType::kFloat16;
  args.hidden_size = check_multiple_of_32("hidden size", gemm2.size(1));
  const int32_t slots = check_range("tokens * top_k", tokens * top_k, 0, kMaxSlots);
  check_tensor("gemm2", gemm2, gemm2.scalar_type(), {slots, args.hidden_size}, device);
  check_tensor("slot_row", slot_row, ScalarType::Int, {slots}, device, kElementAlignment);
  check_tensor("row_expert", row_expert, ScalarType::Int, {slots}, device, kElementAlignment);
  check_tensor("topk_weights", topk_weights, ScalarType::Float, {tokens, top_k}, device, kElementAlignment);
  if (w2_bias.has_value()) {
    STD_TORCH_CHECK(w2_bias->dim() == 2, "w2_bias: expected float32 [experts, hidden], got ", describe(*w2_bias));
    check_tensor("w2_bias", *w2_bias, ScalarType::Float, {w2_bias->size(0), args.hidden_size}, device);
    args.experts = check_range("experts", w2_bias->size(0), 1, kMaxExperts);
  }
  const DeviceGuard guard(device);
  const ScalarType type = args.type == HalfType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
  const Tensor out = empty({tokens, args.hidden_size}, type, device);
  args.gemm2 = gemm2.data_ptr();
  args.bias = data<const float>(w2_bias);
  args.topk_weights = data<const float>(topk_weights);
  args.slot_row = data<const int32_t>(slot_row);
  args.row_expert = data<const int32_t>(row_expert);
  args.tokens = static_cast<int32_t>(tokens);
  args.top_k = static_cast<int32_t>(top_k);
  args.out = out.data_ptr();
  check_launch("finalize", launch_finalize(args, current_stream(device)));
  return out;
}

// ---- the router ---------------------------------------------------------------------------------------------------

// Returns topk_weights and topk_ids, both [T, k].
std::tuple<Tensor, Tensor> route_topk(const Tensor& router_logits, int64_t top_k, bool renormalize) {
  const int32_t device = device_of("router_logits", router_logits);
  TopkSoftmaxArgs args = check_logits(router_logits, top_k, renormalize, device);
  const DeviceGuard guard(device);
  const Tensor topk_weights = empty({args.tokens, top_k}, ScalarType::Float, device);
  const Tensor topk_ids = empty({args.tokens, top_k}, ScalarType::Int, device);
  args.topk_weights = data<float>(topk_weights);
  args.topk_ids = data<int32_t>(topk_ids);
  check_launch("topk-softmax", launch_topk_softmax(args, current_stream(device)));
  return {topk_weights, topk_ids};
}

// The same of any router; with topk_ids their weights.
std::tuple<Tensor, Tensor> route_experts(const Tensor& router_logits, int64_t top_k, bool renormalize,
                                         const std::optional<Tensor>& e_score_correction_bias, int64_t scoring_func,
                                         int64_t num_expert_group, int64_t topk_group, int64_t group_score,
                                         double routed_scaling_factor, const std::optional<Tensor>& topk_ids) {
  const int32_t device = device_of("router_logits", router_logits);
  const RouterRule rule = {e_score_correction_bias, scoring_func, num_expert_group, topk_group, group_score,
                           routed_scaling_factor};
  TopkExpertsArgs args = check_router(router_logits, top_k, renormalize, rule, device);
  if (topk_ids.has_value()) {
    args.given = check_ids(*topk_ids, device) ? GivenIds::kInt64 : GivenIds::kInt32;
    STD_TORCH_CHECK(topk_ids->size(0) == args.choice.tokens && topk_ids->size(1) == top_k, "topk_ids: expected [",
                    args.choice.tokens, ", ", top_k, "], got ", describe(*topk_ids));
    args.given_ids = topk_ids->data_ptr();
  }
  const DeviceGuard guard(device);
  const Tensor topk_weights = empty({args.choice.tokens, top_k}, ScalarType::Float, device);
  const Tensor chosen = empty({args.choice.tokens, top_k}, ScalarType::Int, device);
  args.choice.topk_weights = data<float>(topk_weights);
  args.choice.topk_ids = data<int32_t>(chosen);
  check_launch("top-k experts", launch_topk_experts(args, current_stream(device)));
  return {topk_weights, chosen};
}

// ---- for callers outside of the layer ------------------------------------------------------------------------------

// Returns codes [rows, padded_k] and scales, flat; layout: a ScaleLayout.
std::tuple<Tensor, Tensor> mxfp8_quantize(const Tensor& input, int64_t padded_k, int64_t layout) {
  const int32_t device = device_of("input", input);
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half) && input.dim() == 2,
      "input: expected float32, bfloat16 or float16 [rows, k], got ", describe(input));
  check_placed("input", input, device);
  Mxfp8QuantizeArgs args = {};
  args.input = type == ScalarType::Float      ? QuantizeInput::kFloat32
               : type == ScalarType::BFloat16 ? QuantizeInput::kBFloat16
                                              : QuantizeInput::kFloat16;
  args.layout = static_cast<ScaleLayout>(check_range("layout", layout, 0, 2));
  args.rows = input.size(0);
  args.k = check_multiple_of_32("k", input.size(1));
  args.padded_k = check_multiple_of_32("padded_k", padded_k);
  STD_TORCH_CHECK(args.padded_k >= args.k, "padded_k: expected at least k = ", args.k, ", got ", padded_k);
  const int64_t height = args.layout == ScaleLayout::k128x4 ? 128 : args.layout == ScaleLayout::k8x4 ? 8 : 1;
  const int64_t words = (args.rows + height - 1) / height * height * scale_k_tiles(padded_k);
  const DeviceGuard guard(device);
  const Tensor codes = empty({args.rows, padded_k}, ScalarType::Byte, device);
  const Tensor scales = empty({args.layout == ScaleLayout::kLinear ? args.rows * (padded_k / kScaleBlock) : words * 4},
                              ScalarType::Byte, device);
  args.x = input.data_ptr();
  args.codes = data<uint8_t>(codes);
  args.scales = data<uint8_t>(scales);
  check_launch("mxfp8-quantize", launch_mxfp8_quantize(args, current_stream(device)));
  return {codes, scales};
}

// Returns packed codes [rows, k / 2] and scales, flat: NVFP4 where a global scale is given, else MXFP4.
std::tuple<Tensor, Tensor> fp4_quantize(const Tensor& input, const std::optional<Tensor>& global_scale,
                                        int64_t layout) {
  const int32_t device = device_of("input", input);
  Fp4QuantizeArgs args = {};
  args.type = check_half("input", input);
  check_placed("input", input, device);
  const int64_t block = global_scale.has_value() ? 16 : kScaleBlock, k = input.size(1), blocks = k / block;
  STD_TORCH_CHECK(k > 0 && k % block == 0 && k <= INT_MAX / 2, "k: expected a positive multiple of ", block, ", got ",
                  k);
  args.layout = static_cast<ScaleLayout>(check_range("layout", layout, 0, 2));
  args.rows = input.size(0);
  args.k = static_cast<int32_t>(k);
  if (global_scale.has_value()) {
    check_tensor("global_scale", *global_scale, ScalarType::Float, {1}, device, kElementAlignment);
    args.global_scale = data<const float>(*global_scale);
  }
  const int64_t height = args.layout == ScaleLayout::k128x4 ? 128 : args.layout == ScaleLayout::k8x4 ? 8 : 1;
  const int64_t words = (args.rows + height - 1) / height * height * ((blocks + 3) / 4);
  const DeviceGuard guard(device);
  const Tensor codes = empty({args.rows, k / 2}, ScalarType::Byte, device);
  const Tensor scales =
      empty({args.layout == ScaleLayout::kLinear ? args.rows * blocks : words * 4}, ScalarType::Byte, device);
  args.x = input.data_ptr();
  args.codes = data<uint8_t>(codes);
  args.scales = data<uint8_t>(scales);
  check_launch("fp4-quantize", launch_fp4_quantize(args, current_stream(device)));
  return {codes, scales};
}

void register_tile(int64_t entry) {
  const std::string reason = tiles().add(reinterpret_cast<const Mxfp4MoeTile*>(static_cast<uintptr_t>(entry)));
  STD_TORCH_CHECK(reason.empty(), reason);
}

}  // namespace
}  // namespace mxfp4_moe

// Tiles register fragments of the same namespace, and may be loaded first.
STABLE_TORCH_LIBRARY_FRAGMENT(mxfp4_moe, m) {
  m.def("register_tile(int entry) -> ()");
  m.def(
      "fused_moe(Tensor hidden_states, Tensor? topk_weights, Tensor? topk_ids, Tensor? router_logits, int top_k, "
      "Tensor w13, Tensor? w13_bias, Tensor w2, Tensor? w2_bias, int intermediate_size, int activation, float alpha, "
      "float beta, float limit, int tile_m, int tile_n, Tensor(a!) out, bool renormalize=True, int first_expert=0, "
      "Tensor? alphas=None, Tensor? betas=None, Tensor? limits=None, Tensor? hidden_states_scale=None, "
      "bool scale_is_swizzled=False, bool intermediate_rounding=False, int activation_format=0, "
      "Tensor? e_score_correction_bias=None, int scoring_func=0, int num_expert_group=1, int topk_group=1, "
      "int group_score=0, float routed_scaling_factor=1.0, int weight_format=0, Tensor? w13_factors=None, "
      "Tensor? w2_factors=None, Tensor? w13_input_factors=None, Tensor? w2_input_factors=None, "
      "Tensor? w13_input_global_scales=None, Tensor? w2_input_global_scales=None) -> ()");
  m.def("route(Tensor topk_ids, int num_experts, int tile_m) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "quantize_permute(Tensor hidden_states, Tensor slot_row, int top_k, int rows=0, Tensor? global_scales=None, "
      "Tensor? row_expert=None, Tensor(a!)? row_factors=None) -> (Tensor, Tensor)");
  m.def(
      "permute(Tensor hidden_states, Tensor hidden_states_scale, bool scale_is_swizzled, Tensor slot_row, int top_k, "
      "int rows=0) -> (Tensor, Tensor)");
  m.def(
      "activation(Tensor gemm1, Tensor row_expert, Tensor expert_offsets, Tensor? w13_bias, int activation, "
      "float alpha, float beta, float limit, Tensor? alphas, Tensor? betas, Tensor? limits, int rounding=0, "
      "int rows=0, Tensor? global_scales=None, Tensor(a!)? row_factors=None) -> (Tensor, Tensor)");
  m.def("finalize(Tensor gemm2, Tensor slot_row, Tensor row_expert, Tensor topk_weights, Tensor? w2_bias) -> Tensor");
  m.def("route_topk(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)");
  m.def(
      "route_experts(Tensor router_logits, int top_k, bool renormalize=True, Tensor? e_score_correction_bias=None, "
      "int scoring_func=0, int num_expert_group=1, int topk_group=1, int group_score=0, "
      "float routed_scaling_factor=1.0, Tensor? topk_ids=None) -> (Tensor, Tensor)");
  m.def("mxfp8_quantize(Tensor input, int padded_k, int layout) -> (Tensor, Tensor)");
  m.def("fp4_quantize(Tensor input, Tensor? global_scale, int layout) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_moe, CompositeExplicitAutograd, m) {
  m.impl("register_tile", TORCH_BOX(&mxfp4_moe::register_tile));
}

STABLE_TORCH_LIBRARY_IMPL(mxfp4_moe, CUDA, m) {
  m.impl("fused_moe", TORCH_BOX(&mxfp4_moe::fused_moe));
  m.impl("route", TORCH_BOX(&mxfp4_moe::route));
  m.impl("quantize_permute", TORCH_BOX(&mxfp4_moe::quantize_permute));
  m.impl("permute", TORCH_BOX(&mxfp4_moe::permute));
  m.impl("activation", TORCH_BOX(&mxfp4_moe::activation));
  m.impl("finalize", TORCH_BOX(&mxfp4_moe::finalize));
  m.impl("route_topk", TORCH_BOX(&mxfp4_moe::route_topk));
  m.impl("route_experts", TORCH_BOX(&mxfp4_moe::route_experts));
  m.impl("mxfp8_quantize", TORCH_BOX(&mxfp4_moe::mxfp8_quantize));
  m.impl("fp4_quantize", TORCH_BOX(&mxfp4_moe::fp4_quantize));
}

// `import mxfp4_moe._ext.moe` runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit_moe(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "moe", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
