// The fused layer: checks, one allocation, and five kernels on the current stream: route, quantize-permute, GEMM1 with
// its activation, GEMM2, finalize; GEMM1 leaves the rarer activations to one more. With logits instead of topk_ids,
// experts are chosen before, of few tokens by route's kernel, of more by one of its own. Nothing here synchronizes or
// reads device memory. Shapes and layouts: kernels.h.
#include "moe/layer.h"

#include <string>

#include "moe/checks.h"
#include "moe/kernels.h"
#include "moe/registry.h"
#include "moe/workspace.h"
#include "shared/schedule.cuh"
#include "shared/weight_layout.cuh"
#include "torch_args.h"

namespace mxfp4_moe {
namespace {

// The arguments, checked, as the kernels want them.
struct Layer {
  int32_t device;
  const Mxfp4MoeTile* tile;
  Routing routing;
  int32_t tokens, slots, experts, first_expert;
  int32_t hidden, intermediate, gemm1_width;
  bool is_mxfp8;  // hidden_states
  int32_t weight_format;
  int32_t act_format;  // Mxfp4MoeActFormat that the tile reads on this device
  RowFormat rows;
  Mxfp4MoeFactors factors1, factors2;  // of the GEMMs, but for of_rows
  const float* global_scales1;         // [E] of NVFP4 rows whose scales the checkpoint has; else null
  const float* global_scales2;
  bool rows_have_scales;  // NVFP4 rows, each with a scale of its own
  HalfType out_type;
  Activation activation;
  PerExpert alpha, beta, limit;
  Rounding rounding;  // of GEMM1's values and the activation's
  bool gemm1_activates;
};

RowFormat rows_of(ActivationFormat format, int32_t act_format) {
  switch (format) {
    case ActivationFormat::kMxfp8:
      return act_format == MXFP4_MOE_ACT_BF16 ? RowFormat::kMxfp8InBf16 : RowFormat::kMxfp8;
    case ActivationFormat::kBf16:
      return RowFormat::kBf16;
    case ActivationFormat::kMxfp4:
      return act_format == MXFP4_MOE_ACT_BF16 ? RowFormat::kMxfp4InBf16 : RowFormat::kMxfp4;
    case ActivationFormat::kFp16:
      return RowFormat::kFp16;
    default:
      return act_format == MXFP4_MOE_ACT_BF16 ? RowFormat::kNvfp4InBf16 : RowFormat::kNvfp4;
  }
}

// To what GEMM1's epilogue quantizes what it writes.
int32_t quantized_to(RowFormat rows) {
  switch (rows) {
    case RowFormat::kBf16:
      return MXFP4_MOE_ACT_BF16;
    case RowFormat::kFp16:
      return MXFP4_MOE_ACT_FP16;
    case RowFormat::kMxfp4:
    case RowFormat::kMxfp4InBf16:
      return MXFP4_MOE_ACT_MXFP4;
    case RowFormat::kNvfp4:
    case RowFormat::kNvfp4InBf16:
      return MXFP4_MOE_ACT_NVFP4;
    default:
      return MXFP4_MOE_ACT_MXFP8;
  }
}

// The pairs of formats that a tile has kernels for on a device, in words; "" for none.
std::string pairs_of(const Mxfp4MoeTile& tile, int32_t device) {
  std::string pairs;
  for (int32_t weights = MXFP4_MOE_WEIGHT_MXFP4; weights <= MXFP4_MOE_WEIGHT_NVFP4; ++weights) {
    for (int32_t act = MXFP4_MOE_ACT_MXFP8; act <= MXFP4_MOE_ACT_FP16; ++act) {
      const Mxfp4MoeTileFacts* facts = tile.facts_of(device, weights, act);
      if (facts != nullptr) {
        pairs += (pairs.empty() ? "" : ", ") + std::string(facts->pair);
      }
    }
  }
  return pairs;
}

// Whether activations of a format, with scales of their own, go with weights of another.
bool pairs_with(ActivationFormat format, int32_t weights) {
  return weights == MXFP4_MOE_WEIGHT_NVFP4 ? format == ActivationFormat::kNvfp4
                                           : format == ActivationFormat::kMxfp8 || format == ActivationFormat::kMxfp4;
}

// The tile's kernel for the call's formats on the layer's device; null where it has none for any.
const Mxfp4MoeTileFacts* kernel_of(const Layer& layer, ActivationFormat format) {
  static constexpr int32_t kReads[kNumActivationFormats] = {
      MXFP4_MOE_ACT_MXFP8, MXFP4_MOE_ACT_BF16, MXFP4_MOE_ACT_MXFP4, MXFP4_MOE_ACT_NVFP4, MXFP4_MOE_ACT_FP16};
  const int32_t device = layer.device, weights = layer.weight_format;
  const Mxfp4MoeTileFacts* facts = layer.tile->facts_of(device, weights, kReads[static_cast<int>(format)]);
  if (facts == nullptr && pairs_with(format, weights)) {
    const Mxfp4MoeTileFacts* bf16 = layer.tile->facts_of(device, weights, MXFP4_MOE_ACT_BF16);
    facts = bf16 != nullptr && bf16->folds != 0 ? bf16 : nullptr;
  }
  if (facts == nullptr) {  // where the device has no machine code at all the launch says why
    const std::string having = pairs_of(*layer.tile, device);
    STD_TORCH_CHECK(having.empty(), "activation_format: expected one for which tile (", layer.tile->tile_m, ", ",
                    layer.tile->tile_n, ") has a kernel with these weights on this GPU (it has ", having, "), got ",
                    weights == MXFP4_MOE_WEIGHT_NVFP4 ? "nvfp4_" : "mxfp4_", name_of(format));
  }
  return facts;
}

// The float32 scales of NVFP4, and of MXFP4 weights in fp16: what the GEMMs' sums are multiplied by, and rows before
// they are quantized.
void check_tensor_scales(const LayerArgs& args, ActivationFormat format, Layer& layer) {
  const int64_t experts = layer.experts;
  const bool wanted = layer.weight_format == MXFP4_MOE_WEIGHT_NVFP4 || format == ActivationFormat::kFp16;
  const auto of_weights = [&](const char* name, const std::optional<Tensor>& factors) {
    return check_scales(name, factors, wanted, {experts, 2}, layer.device, 2 * sizeof(float));
  };
  layer.factors1.of_weights = of_weights("w13_factors", args.w13_factors);
  layer.factors2.of_weights = of_weights("w2_factors", args.w2_factors);
  if (format != ActivationFormat::kNvfp4) {
    return;  // those of inputs are NVFP4 rows' alone
  }
  const bool given = args.w13_input_factors.has_value();
  const auto of_inputs = [&](const char* name, const std::optional<Tensor>& scales) {
    return check_scales(name, scales, given, {experts}, layer.device);
  };
  layer.factors1.of_inputs = of_inputs("w13_input_factors", args.w13_input_factors);
  layer.factors2.of_inputs = of_inputs("w2_input_factors", args.w2_input_factors);
  layer.global_scales1 = of_inputs("w13_input_global_scales", args.w13_input_global_scales);
  layer.global_scales2 = of_inputs("w2_input_global_scales", args.w2_input_global_scales);
}

Layer check(const LayerArgs& args) {
  Layer layer = {};
  const int32_t device = layer.device = device_of("hidden_states", args.hidden_states);
  layer.out_type = check_half("out", args.out);
  layer.is_mxfp8 = args.hidden_states_scale.has_value();
  if (layer.is_mxfp8) {
    check_mxfp8(args.hidden_states, *args.hidden_states_scale, args.scale_is_swizzled, device);
  } else {
    check_half("hidden_states", args.hidden_states);
    check_placed("hidden_states", args.hidden_states, device);
  }
  const int64_t tokens = args.hidden_states.size(0);
  layer.hidden = check_multiple_of_32("hidden size", args.hidden_states.size(1));
  layer.routing = check_routing(args.topk_weights, args.topk_ids, args.router_logits, args.top_k, args.renormalize,
                                args.router, tokens, device);
  layer.slots = check_range("tokens * top_k", tokens * layer.routing.top_k, 0, kMaxSlots);
  layer.tokens = static_cast<int32_t>(tokens);

  layer.activation = check_activation(args.activation);
  STD_TORCH_CHECK(args.w13.dim() == 2, "w13: expected uint8 [experts, bytes], got ", describe(args.w13));
  layer.experts = check_range("experts", args.w13.size(0), 1, kMaxExperts);
  layer.first_expert = check_range("first_expert", args.first_expert, 0, INT_MAX - kMaxExperts);
  layer.intermediate = check_multiple_of_32("intermediate_size", args.intermediate_size);
  layer.gemm1_width = is_gated(layer.activation) ? 2 * layer.intermediate : layer.intermediate;
  layer.weight_format = check_weight_format(args.weight_format);
  const int scale_words = layer.weight_format == MXFP4_MOE_WEIGHT_NVFP4 ? kNvfp4ScaleWords : kMxfp4ScaleWords;
  check_tensor("w13", args.w13, ScalarType::Byte,
               {layer.experts, weight_bytes(layer.gemm1_width, layer.hidden, scale_words)}, device);
  check_tensor("w2", args.w2, ScalarType::Byte,
               {layer.experts, weight_bytes(layer.hidden, layer.intermediate, scale_words)}, device);
  if (args.w13_bias.has_value()) {
    check_tensor("w13_bias", *args.w13_bias, ScalarType::Float, {layer.experts, layer.gemm1_width}, device);
  }
  if (args.w2_bias.has_value()) {
    check_tensor("w2_bias", *args.w2_bias, ScalarType::Float, {layer.experts, layer.hidden}, device);
  }
  check_tensor("out", args.out, args.out.scalar_type(), {tokens, layer.hidden}, device);
  layer.alpha = check_number("alpha", args.alpha, args.alphas, layer.experts, device);
  layer.beta = check_number("beta", args.beta, args.betas, layer.experts, device);
  layer.limit = check_number("limit", args.limit, args.limits, layer.experts, device);
  layer.rounding = args.intermediate_rounding ? static_cast<Rounding>(layer.out_type) : Rounding::kNone;
  layer.tile = tiles().find(args.tile_m, args.tile_n);
  STD_TORCH_CHECK(layer.tile != nullptr, "tile: expected one that is loaded, got (", args.tile_m, ", ", args.tile_n,
                  ")");
  const ActivationFormat format = check_activation_format(args.activation_format);
  STD_TORCH_CHECK(format == ActivationFormat::kMxfp8 || !layer.is_mxfp8,
                  "activation_format: expected mxfp8 for hidden_states that are MXFP8 already, got ", name_of(format));
  check_tensor_scales(args, format, layer);
  const Mxfp4MoeTileFacts* facts = kernel_of(layer, format);
  layer.act_format = facts == nullptr ? MXFP4_MOE_ACT_MXFP8 : facts->act_format;
  layer.rows = rows_of(format, layer.act_format);
  layer.rows_have_scales = is_nvfp4(layer.rows) && layer.global_scales1 == nullptr;
  // A row's own scale needs all of the row, of which an output tile has a part.
  layer.gemm1_activates =
      facts != nullptr && facts->activates != 0 && is_fused(layer.activation) && !layer.rows_have_scales;
  return layer;
}

Workspace::Shape workspace_of(const Layer& layer, int64_t max_m_tiles) {
  return {layer.slots,
          layer.hidden,
          layer.intermediate,
          max_m_tiles,
          layer.gemm1_activates ? 0 : layer.gemm1_width,
          layer.routing.from_logits,
          layer.act_format,
          row_value_bytes(layer.out_type),
          layer.rows_have_scales};
}

// The kernels of one call, in the order in which they are launched.
class Launches {
 public:
  Launches(const LayerArgs& args, const Layer& layer)
      : args_(args),
        layer_(layer),
        max_m_tiles_(static_cast<int32_t>(max_m_tiles(layer.slots, layer.experts, layer.tile->tile_m))),
        at_(workspace_of(layer, max_m_tiles_)),
        workspace_(empty({at_.bytes}, ScalarType::Byte, layer.device)),
        base_(data<uint8_t>(workspace_)),
        stream_(current_stream(layer.device)) {}

  void route() {
    RouteArgs route = {};
    route.topk_ids = layer_.routing.ids;
    route.ids_are_int64 = layer_.routing.ids_are_int64;
    route.slots = layer_.slots;
    route.experts = layer_.experts;
    route.first_expert = layer_.first_expert;
    route.tile_m = layer_.tile->tile_m;
    route.slot_row = ints(at_.slot_row);
    route.row_expert = ints(at_.row_expert);
    route.valid_rows = ints(at_.valid_rows);
    route.m_tiles = m_tiles();
    route.num_m_tiles = ints(at_.num_m_tiles);
    route.most_blocks = most_cluster_blocks(layer_.device);
    topk_weights_ = layer_.routing.weights;
    if (!layer_.routing.from_logits) {
      check_launch("route", launch_route(route, stream_));
      return;
    }
    TopkExpertsArgs router = layer_.routing.router;
    router.choice.topk_ids = ints(at_.topk_ids);
    router.choice.topk_weights = reinterpret_cast<float*>(base_ + at_.topk_weights);
    route.topk_ids = router.choice.topk_ids;
    topk_weights_ = router.choice.topk_weights;
    check_launch("top-k and route", launch_topk_route(router, route, stream_));
  }

  void quantize_permute() {
    if (layer_.is_mxfp8) {
      PermuteArgs permute = to_rows(PermuteArgs{});
      permute.hidden = data<const uint8_t>(args_.hidden_states);
      permute.hidden_scale = data<const uint8_t>(*args_.hidden_states_scale);
      permute.scale_is_swizzled = args_.scale_is_swizzled;
      check_launch("permute", launch_permute(permute, stream_));
    } else {
      QuantizePermuteArgs quantize = to_rows(QuantizePermuteArgs{});
      quantize.hidden = args_.hidden_states.data_ptr();
      quantize.type = check_half("hidden_states", args_.hidden_states);
      quantize.global_scales = global_scales(layer_.global_scales1, at_.row_factors1);
      quantize.hidden_is_ready = true;  // route came between whoever wrote it and this kernel
      check_launch("quantize-permute", launch_quantize_permute(quantize, stream_));
    }
  }

  void gemm1() {
    Mxfp4MoeGemmArgs gemm = gemm_args(layer_.factors1, at_.row_factors1);
    gemm.act = base_ + at_.rows1;
    gemm.act_scale = base_ + at_.scales1;
    gemm.out = base_ + at_.gemm1_out;
    gemm.out_type = MXFP4_MOE_OUT_FLOAT32;
    if (layer_.gemm1_activates) {
      gemm.activate = {base_ + at_.rows2,
                       base_ + at_.scales2,
                       data<const float>(args_.w13_bias),
                       quantized_to(layer_.rows),
                       static_cast<int32_t>(layer_.activation),
                       static_cast<int32_t>(layer_.rounding),
                       layer_.alpha,
                       layer_.beta,
                       layer_.limit,
                       layer_.global_scales2};
    }
    run("GEMM1", gemm, args_.w13, layer_.gemm1_width, layer_.hidden);
    if (!layer_.gemm1_activates) activation();
  }

  void gemm2() {
    Mxfp4MoeGemmArgs gemm = gemm_args(layer_.factors2, at_.row_factors2);
    gemm.act = base_ + at_.rows2;
    gemm.act_scale = base_ + at_.scales2;
    gemm.out = base_ + at_.gemm2_out;
    gemm.out_type = row_type(layer_.out_type);
    run("GEMM2", gemm, args_.w2, layer_.hidden, layer_.intermediate);
  }

  void finalize() {
    FinalizeArgs finalize = {};
    finalize.gemm2 = base_ + at_.gemm2_out;
    finalize.type = layer_.out_type;
    finalize.bias = data<const float>(args_.w2_bias);
    finalize.topk_weights = topk_weights_;
    finalize.slot_row = ints(at_.slot_row);
    finalize.row_expert = ints(at_.row_expert);
    finalize.experts = layer_.experts;
    finalize.tokens = layer_.tokens;
    finalize.top_k = static_cast<int32_t>(layer_.routing.top_k);
    finalize.hidden_size = layer_.hidden;
    finalize.out = args_.out.data_ptr();
    check_launch("finalize", launch_finalize(finalize, stream_));
  }

 private:
  int32_t* ints(int64_t offset) const { return reinterpret_cast<int32_t*>(base_ + offset); }
  Mxfp4MoeMTile* m_tiles() const { return reinterpret_cast<Mxfp4MoeMTile*>(base_ + at_.m_tiles); }

  // What both kernels that make GEMM1's rows have in common.
  template <typename Args>
  Args to_rows(Args args) const {
    args.slot_row = ints(at_.slot_row);
    args.tokens = layer_.tokens;
    args.top_k = static_cast<int32_t>(layer_.routing.top_k);
    args.hidden_size = layer_.hidden;
    args.format = layer_.rows;
    args.rows = base_ + at_.rows1;
    args.scales = base_ + at_.scales1;
    return args;
  }

  // Of NVFP4 rows: the experts' where the checkpoint has them, else the rows' own.
  GlobalScales global_scales(const float* of_experts, int64_t row_factors) const {
    if (layer_.rows_have_scales) {
      return {nullptr, nullptr, reinterpret_cast<float*>(base_ + row_factors)};
    }
    return {of_experts, of_experts == nullptr ? nullptr : ints(at_.row_expert), nullptr};
  }

  // What both GEMMs have in common.
  Mxfp4MoeGemmArgs gemm_args(const Mxfp4MoeFactors& factors, int64_t row_factors) const {
    Mxfp4MoeGemmArgs gemm = {};
    gemm.m_tiles = m_tiles();
    gemm.num_m_tiles = ints(at_.num_m_tiles);
    gemm.max_m_tiles = max_m_tiles_;
    gemm.act_format = layer_.act_format;
    gemm.weight_format = layer_.weight_format;
    gemm.factors = factors;
    if (layer_.rows_have_scales) {
      gemm.factors.of_rows = reinterpret_cast<const float*>(base_ + row_factors);
    }
    gemm.rows = layer_.slots;
    gemm.experts = layer_.experts;
    gemm.m_tiles_are_ready = 1;
    gemm.stream = stream_;
    return gemm;
  }

  void run(const char* name, Mxfp4MoeGemmArgs& gemm, const Tensor& weight, int32_t n, int32_t k) const {
    gemm.weight = weight.data_ptr();
    gemm.n = n;
    gemm.k = k;
    const char* reason = layer_.tile->launch(&gemm);
    STD_TORCH_CHECK(reason == nullptr, name, " did not launch: ", reason);
  }

  // Where GEMM1 wrote its sums.
  void activation() {
    ActivationArgs activation = {};
    activation.gemm1 = reinterpret_cast<const float*>(base_ + at_.gemm1_out);
    activation.bias = data<const float>(args_.w13_bias);
    activation.row_expert = ints(at_.row_expert);
    activation.valid_rows = ints(at_.valid_rows);
    activation.rows = layer_.slots;
    activation.intermediate = layer_.intermediate;
    activation.activation = layer_.activation;
    activation.rounding = layer_.rounding;
    activation.alpha = layer_.alpha;
    activation.beta = layer_.beta;
    activation.limit = layer_.limit;
    activation.format = layer_.rows;
    activation.global_scales = global_scales(layer_.global_scales2, at_.row_factors2);
    activation.out = base_ + at_.rows2;
    activation.scales = base_ + at_.scales2;
    check_launch("activation", launch_activation(activation, stream_));
  }

  const LayerArgs& args_;
  const Layer& layer_;
  const int32_t max_m_tiles_;
  const Workspace at_;  // offsets
  const Tensor workspace_;
  uint8_t* const base_;
  const cudaStream_t stream_;
  const float* topk_weights_ = nullptr;
};

}  // namespace

void run_layer(const LayerArgs& args) {
  const Layer layer = check(args);
  if (layer.tokens == 0) {
    return;
  }
  const DeviceGuard guard(layer.device);
  Launches launches(args, layer);
  launches.route();
  launches.quantize_permute();
  launches.gemm1();
  launches.gemm2();
  launches.finalize();
}

}  // namespace mxfp4_moe
